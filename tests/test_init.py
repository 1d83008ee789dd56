"""``python -m svdkern init``: an adapter, and the residual model, from files that are never loaded whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from model_folders import Net, files_below, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdkern import adapt, load_adapter, save_adapter
from svdkern.methods import SORSA
from svdkern.model_files import ModelFiles
from svdkern.streaming import init_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", ["pissa", "sorsa", SORSA(gamma=1e-3)], ids=["pissa", "sorsa", "configured"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_adapter_is_adapts_bit_for_bit(tmp_path: Path, dtype: torch.dtype, method: object, shards: int) -> None:
    folder = saved(tmp_path / "model", Net().to(dtype), shards)
    made = init_adapter(folder, tmp_path / "out", method, 5, alpha=10.0, dropout_p=0.25)  # type: ignore[arg-type]
    assert made.layers == 8 and made.resumed == 0
    model = Net().to(dtype)
    report = adapt(model, method, 5, alpha=10.0, dropout_p=0.25)  # type: ignore[arg-type]
    assert made.parameters == report.trainable
    save_adapter(model, tmp_path / "expected")
    assert (tmp_path / "out/adapter.safetensors").read_bytes() == (
        tmp_path / "expected/adapter.safetensors"
    ).read_bytes()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "expected")]
    assert configs[0] == configs[1]
    fresh = Net().to(dtype)
    load_adapter(fresh, tmp_path / "out")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in fresh.state_dict().items())
    assert made.adapter_bytes == sum(map(len, files_below(tmp_path / "out").values()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "model", "out"]
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~_umask() for path in (tmp_path / "out").iterdir())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", ["pissa", "sorsa", "svfit", "osf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_model(tmp_path: Path, dtype: torch.dtype, method: str, shards: int) -> None:
    """G1, elementwise: |W_res + L - W| is half an ulp of W_res and the rounding of L's sum in float64."""
    folder = saved(tmp_path / "model", Net().to(dtype), shards)
    (folder / "tokenizer.model").write_bytes(b"tokens")
    init_adapter(folder, tmp_path / "out", method, 5, residual=tmp_path / "res")
    assert {f.name for f in folder.iterdir()} == {f.name for f in (tmp_path / "res").iterdir()}
    before, after = tensors_of(folder), tensors_of(tmp_path / "res")
    rows = json.loads((tmp_path / "out/adapter_config.json").read_text())["layers"]
    factors = load_file(tmp_path / "out/adapter.safetensors")
    assert before.keys() == after.keys() and len(rows) == 8
    for key, w in before.items():
        name = key.removesuffix(".weight")
        if name not in rows:
            assert torch.equal(after[key], w)
            continue
        # a factor that stays frozen is in the file once
        u, v = (factors.get(f"{name}.{a}0", factors[f"{name}.{a}"]).double() for a in "uv")
        sigma = factors.get(f"{name}.sigma0", torch.ones(5)).double()
        terms = [torch.outer(v[:, i], sigma[i] * u[:, i]) for i in range(5)]
        residual = after[key].double()
        assert after[key].dtype == dtype and not torch.equal(after[key], w)
        ulp = (
            torch.nextafter(after[key].abs(), torch.tensor(float("inf"), dtype=dtype)).double() - residual.abs()
        ).abs()
        rounding = 4 * 6 * 2.0**-53 * (w.double().abs() + sum(t.abs() for t in terms))
        assert bool(((residual + sum(terms) - w.double()).abs() <= 0.5 * ulp + rounding).all())


@pytest.mark.parametrize("method", ["pissa", "sorsa", "svfit", "osf"])
def test_another_dtype_than_the_files(tmp_path: Path, method: str) -> None:
    folder = saved(tmp_path / "model", Net())
    init_adapter(folder, tmp_path / "out", method, 4, dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    model = Net().to(torch.bfloat16)
    load_adapter(model, tmp_path / "out")
    expected = Net().to(torch.bfloat16)
    adapt(expected, method, 4, adapter_dtype=torch.bfloat16)
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="the weight is float32, the adapter was made on bfloat16"):
        load_adapter(Net(), tmp_path / "out")
    with pytest.raises(ValueError, match="does not fit into the file"):
        init_adapter(folder, tmp_path / "o", method, 4, dtype=torch.bfloat16, residual=tmp_path / "res")


def test_targets_are_adapts(tmp_path: Path) -> None:
    """huggingface/peft#3603: an entry that matches nothing is an error, with near matches."""
    folder = saved(tmp_path / "model", Net(blocks=11))
    wanted, unwanted = ["q_proj", "layers.10.up"], ["layers.1.q_proj"]
    init_adapter(folder, tmp_path / "out", rank=4, target_modules=wanted, exclude_modules=unwanted)
    names = list(json.loads((tmp_path / "out/adapter_config.json").read_text())["layers"])
    assert names == [f"layers.{i}.q_proj" for i in (0, *range(2, 11))] + ["layers.10.up"]
    for targets, error, message in (
        (["q_proj", "k_porj"], ValueError, "'k_porj', which matches no module; near matches: 'k_proj'"),
        ([], ValueError, "target_modules is empty"),
        (["embed_tokens"], TypeError, "embed_tokens: is of type Embedding"),
        (["norm"], TypeError, "is of type Module, expected nn.Linear"),
    ):
        with pytest.raises(error, match=message):
            init_adapter(folder, tmp_path / "nothing", rank=4, target_modules=targets)
    assert not (tmp_path / "nothing").exists() and not (tmp_path / "nothing.partial").exists()


def test_a_layer_of_less_rank_is_named_before_anything_is_done(tmp_path: Path) -> None:
    """NovaSky-AI/SkyRL#2069."""
    folder = saved(tmp_path / "model", Net())
    with pytest.raises(ValueError, match=r"layers\.0\.k_proj: rank is 17, expected 1 <= rank <= 16"):
        init_adapter(folder, tmp_path / "out", rank=17)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def break_files(folder: Path, how: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "header cut":
        shard.write_bytes(shard.read_bytes()[:20])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "text":
        shard.write_text("this is no tensor file, whatever its name says")
    elif how == "missing":
        shard.unlink()
    elif how == "wrong index":
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("layers.0.q_proj.weight", "layers.7.q_proj.weight"))
    elif how == "index":
        (folder / "model.safetensors.index.json").write_text("{")
    elif how == "escaping":
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model-00003-of-00003.safetensors: .*truncated"),
        ("header cut", "model-00003-of-00003.safetensors"),
        ("empty", "model-00003-of-00003.safetensors"),
        ("text", "model-00003-of-00003.safetensors"),
        ("missing", "model-00003-of-00003.safetensors, which model.safetensors.index.json lists, is missing"),
        ("wrong index", "says that layers.7.q_proj.weight is in"),
        ("index", "index.json is damaged"),
        ("escaping", "is missing"),
    ],
)
def test_broken_files(tmp_path: Path, how: str, message: str) -> None:
    folder = saved(tmp_path / "model", Net(), 3)
    break_files(folder, how)
    with pytest.raises(ValueError, match=message):
        init_adapter(folder, tmp_path / "out", rank=4)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: there is no"):
        init_adapter(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin would have to be converted"):
        init_adapter(tmp_path, tmp_path / "out")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a", "b"):
        save_file({"x.weight": torch.zeros(4, 4)}, twice / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"x\.weight is in a\.safetensors and in b\.safetensors"):
        init_adapter(twice, tmp_path / "out")
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    save_file({"x.weight": torch.zeros(4, 4, dtype=torch.int8)}, quantised / "model.safetensors")
    with pytest.raises(ValueError, match="no linear layer, .*quantised models are not supported"):
        init_adapter(quantised, tmp_path / "out")
    transposed = saved(tmp_path / "gpt2", Net())
    (transposed / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="Conv1D"):
        init_adapter(transposed, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "pisa"}, ValueError, "method is 'pisa', expected one of pissa"),
        ({"method": "lora"}, ValueError, "lora draws random factors: load the model and call adapt"),
        ({"method": "corda"}, ValueError, "corda starts from data.*: load the model and call adapt"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"alpha": -1.0}, ValueError, "scale is"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p is 2"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype is torch.int8"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, object], error: type[Exception], message: str) -> None:
    folder = saved(tmp_path / "model", Net())
    with pytest.raises(error, match=message):
        init_adapter(folder, tmp_path / "out", **({"rank": 4} | arguments))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("target", ["out", "res"])
def test_somebody_elses_files_are_not_replaced(tmp_path: Path, target: str) -> None:
    folder = saved(tmp_path / "model", Net())
    (tmp_path / target).mkdir()
    (tmp_path / target / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="thesis|new or empty"):
        init_adapter(folder, tmp_path / "out", rank=4, residual=tmp_path / "res")
    assert (tmp_path / target / "thesis.tex").read_text() == "mine"
    assert not (tmp_path / "out.partial").exists()


def test_adapter_and_residual_need_two_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected two directories"):
        init_adapter(saved(tmp_path / "model", Net()), tmp_path / "out", rank=4, residual=tmp_path / "out")


def test_a_weight_with_a_nan_is_named(tmp_path: Path) -> None:
    model = Net()
    with torch.no_grad():
        model.layers[1].up.weight[3, 4] = float("nan")  # type: ignore[index,union-attr]
    folder = saved(tmp_path / "model", model)
    with pytest.raises(ValueError, match=r"layers\.1\.up: weight has a NaN"):
        init_adapter(folder, tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_layers_are_told_from_embeddings(tmp_path: Path) -> None:
    files = ModelFiles.open(saved(tmp_path / "model", Net()))
    linear = sorted(name for name in files.tensors if files.is_linear(name))
    assert linear == sorted(f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("q_proj", "k_proj", "up", "down"))
    skeleton = files.skeleton()
    assert (
        isinstance(skeleton.embed_tokens, nn.Embedding) and skeleton.layers.get_submodule("0.q_proj").bias is not None
    )


def test_bits_do_not_depend_on_where_memory_begins() -> None:
    """A weight in a file's mapping begins anywhere."""
    from svdkern.linalg import factors

    weight = torch.randn(256, 200, generator=torch.Generator().manual_seed(0))
    storage = torch.zeros(weight.numel() + 16)
    for shift in range(1, 16, 3):
        moved = storage[shift : shift + weight.numel()].view_as(weight).copy_(weight)
        assert all(torch.equal(a, b) for a, b in zip(factors(moved, 8), factors(weight, 8), strict=True))
