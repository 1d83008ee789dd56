"""``load_adapter`` refuses: other structures, other bases, and every way in which the files can be broken."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_checkpoint import forward, same_bits, train, trained
from test_model import Net, snapshot, unchanged
from torch import Tensor, nn

from svdkern.checkpoint import load_adapter, save_adapter
from svdkern.model import adapt, merge, unmerge

# ---------------------------------------------------------------------------------------------- onto adapted models


def test_refresh_an_adapted_model(tmp_path: Path) -> None:
    model = trained("sorsa")
    before = copy.deepcopy(model)
    save_adapter(model, tmp_path / "a")
    pointer = model.layers[0].down.u
    train(model, forward)
    assert not same_bits(model, before)
    report = load_adapter(model, tmp_path / "a")
    assert same_bits(model, before) and model.layers[0].down.u is pointer and len(report.layers) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "pissa"}, "the layer's method is PiSSA"),
        ({"rank": 5}, r"layers\.0\.q_proj: u is float32 \(32, 5\) in the model and float32 \(32, 4\) in the file"),
        ({"adapter_dtype": torch.bfloat16}, "u is bfloat16"),
        ({"alpha": 2.0}, None),
    ],
)
def test_refresh_needs_the_same_structure(tmp_path: Path, arguments: dict[str, Any], message: str | None) -> None:
    save_adapter(trained("sorsa"), tmp_path / "a")
    model = trained(**({"method": "sorsa"} | arguments))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message or "the layer's residual is another one"):
        load_adapter(model, tmp_path / "a")
    assert unchanged(model, before)


def test_refresh_refuses_merged_and_further_layers(tmp_path: Path) -> None:
    model = trained("pissa", target_modules=["q_proj"])
    save_adapter(model, tmp_path / "a")
    merge(model)
    with pytest.raises(RuntimeError, match="is merged"):
        load_adapter(model, tmp_path / "a")
    unmerge(model)
    adapt(model, "pissa", rank=2, target_modules=["down"])
    with pytest.raises(ValueError, match=r"adapted layers that the file has not: layers\.0\.down"):
        load_adapter(model, tmp_path / "a")


# ------------------------------------------------------------------------------------------------------- wrong base


def _other_weight(model: Net) -> None:
    model.layers[1].q_proj.weight.data[0, 0] += 1e-3


def _other_shape(model: Net) -> None:
    model.layers[0].down = nn.Linear(16, 31)


def _missing_layer(model: Net) -> None:
    del model.layers[1].down


def _other_type(model: Net) -> None:
    model.layers[0].down = nn.ReLU()  # type: ignore[assignment]


def _to_meta(model: Net) -> None:
    model.layers[0].q_proj.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_weight, r"layers\.1\.q_proj: the weight is not the one the adapter was made on \(SHA-256"),
        (
            _other_shape,
            r"layers\.0\.down: \(in_features, out_features\) is \(16, 31\), the adapter was made for \(16, 32\)",
        ),
        (_missing_layer, r"the model has no module 'layers\.1\.down'"),
        (_other_type, r"layers\.0\.down: is of type ReLU"),
        (_to_meta, r"layers\.0\.q_proj: the weight is on the meta device"),
        (lambda m: m.half(), r"layers\.0\.q_proj: the weight is float16, the adapter was made on float32"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_another_base_is_refused(tmp_path: Path, change: Callable[[Net], object], message: str, method: str) -> None:
    save_adapter(trained(method), tmp_path / "a")
    model = Net()
    change(model)
    before = (
        [(n, id(m)) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
    )
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, tmp_path / "a")
    assert str(error.value).startswith(str(tmp_path / "a"))
    assert before == (
        [(n, id(m)) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
    )


# ------------------------------------------------------------------------------------------------------ broken files


def _cut(file: str, size: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / file).write_bytes((path / file).read_bytes()[:size])

    return damage


def _text(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).write_text("this is no adapter")  # type: ignore[return-value]


def _remove(file: str) -> Callable[[Path], None]:
    return lambda path: (path / file).unlink()


def _folder(file: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / file).unlink()
        (path / file).mkdir()

    return damage


def _flip(path: Path) -> None:
    data = bytearray((path / "adapter.safetensors").read_bytes())
    data[-100] ^= 1
    (path / "adapter.safetensors").write_bytes(data)


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        change(config)
        (path / "adapter_config.json").write_text(json.dumps(config))

    return damage


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors and make the hash fit again: what is left to catch are keys, shapes, dtypes."""

    def damage(path: Path) -> None:
        tensors = safetensors.torch.load_file(path / "adapter.safetensors")
        change(tensors)
        data = safetensors.torch.save(tensors)
        (path / "adapter.safetensors").write_bytes(data)
        _config(lambda c: c.update(tensors_sha256=hashlib.sha256(data).hexdigest()))(path)

    return damage


def _replace(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: value})


_ROW = "layers.0.down"
_BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors cut at 0": (_cut("adapter.safetensors", 0), "0 bytes.*truncated"),
    "tensors cut at 7": (_cut("adapter.safetensors", 7), "truncated"),
    "tensors cut at 100": (_cut("adapter.safetensors", 100), "truncated"),
    "tensors cut mid-tensor": (_cut("adapter.safetensors", 6000), "6000 bytes.*truncated"),
    "tensors are text": (_text("adapter.safetensors"), "damaged"),
    "tensors are a folder": (_folder("adapter.safetensors"), "adapter.safetensors is a directory"),
    "tensors missing": (_remove("adapter.safetensors"), "adapter.safetensors is missing"),
    "one bit flipped": (_flip, "its SHA-256 differs"),
    "config cut at 0": (_cut("adapter_config.json", 0), "adapter_config.json is damaged"),
    "config cut at 100": (_cut("adapter_config.json", 100), "adapter_config.json is damaged"),
    "config is text": (_text("adapter_config.json"), "adapter_config.json is damaged"),
    "config is a list": (lambda p: (p / "adapter_config.json").write_text("[]"), "holds a list"),
    "config is binary": (lambda p: (p / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "config missing": (_remove("adapter_config.json"), "adapter_config.json is missing"),
    "other version": (_config(lambda c: c.update(format_version=2)), "format_version is 2, this svdkern reads 1"),
    "no version": (_config(lambda c: c.pop("format_version")), "format_version is None"),
    "no layers": (_config(lambda c: c.pop("layers")), "layers is missing"),
    "layer is text": (_config(lambda c: c["layers"].update({_ROW: "x"})), r"layer 'layers\.0\.down' is 'x'"),
    "no rank": (_config(lambda c: c["layers"][_ROW].pop("rank")), r"layer 'layers\.0\.down': rank is missing"),
    "rank is text": (_config(lambda c: c["layers"][_ROW].update(rank="4")), "rank is '4', expected int"),
    "rank is true": (_config(lambda c: c["layers"][_ROW].update(rank=True)), "rank is True, expected int"),
    "other rank": (_config(lambda c: c["layers"][_ROW].update(rank=5)), r"down\.u is float32 \(16, 4\), expected float32"),
    "negative rank": (_config(lambda c: c["layers"][_ROW].update(rank=-1)), "out of range"),
    "dropout above 1": (_config(lambda c: c["layers"][_ROW].update(dropout_p=1.5)), "out of range"),
    "unknown method": (_config(lambda c: c["layers"][_ROW].update(method="dora")), "method is 'dora', this svdkern has lora"),
    "unknown setting": (_config(lambda c: c["layers"][_ROW]["method_config"].update(x=1)), "method_config has"),
    "setting of a wrong type": (_config(lambda c: c["layers"][_ROW]["method_config"].update(gamma="x")), "method_config is"),
    "unknown dtype": (_config(lambda c: c["layers"][_ROW].update(base_dtype="int8")), "base_dtype is 'int8'"),
    "hash is short": (_config(lambda c: c["layers"][_ROW].update(base_sha256="ab")), "expected 64 hexadecimal digits"),
    "no initial scale": (_config(lambda c: c["layers"][_ROW].update(initial_scale=None)), "initial_scale is None"),
    "layer left out": (_config(lambda c: c["layers"].pop(_ROW)), r"unexpected layers\.0\.down\.sigma"),
    "tie to nothing": (_config(lambda c: c["tied_modules"].update(x="nothing")), "tied_modules has 'x'"),
    "tie is a number": (_config(lambda c: c["tied_tensors"].update(x=3)), "tied_tensors has 'x'"),
    "key missing": (_tensors(lambda t: t.pop(f"{_ROW}.v")), r"layers\.0\.down\.v is missing"),
    "initial factor missing": (_tensors(lambda t: t.pop(f"{_ROW}.u0")), r"layers\.0\.down\.u0 is missing"),
    "key unexpected": (_tensors(_replace("x.u", torch.zeros(2))), r"unexpected x\.u"),
    "wrong shape": (_tensors(_replace(f"{_ROW}.v", torch.zeros(32, 3))), r"down\.v is float32 \(32, 3\)"),
    "wrong dimensions": (_tensors(_replace(f"{_ROW}.u0", torch.zeros(()))), r"down\.u0 is float32 \(\)"),
    "wrong dtype": (_tensors(_replace(f"{_ROW}.u", torch.zeros(16, 4).half())), r"down\.u is float16"),
    "initial ranks differ": (_tensors(_replace(f"{_ROW}.u0", torch.zeros(16, 3))), r"have ranks \[3, 4\]"),
    "initial factor changed": (_tensors(_replace(f"{_ROW}.u0", torch.zeros(16, 4))), "rebuilt residual differs"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("saved") / "a"
    save_adapter(trained("sorsa"), path)
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("case", _BROKEN)
def test_broken_files(tmp_path: Path, saved: dict[str, bytes], case: str) -> None:
    """Lightning-AI/pytorch-lightning#688 and its kind: one clear error naming the path; the model is unchanged."""
    damage, message = _BROKEN[case]
    path = tmp_path / "adapter here"
    path.mkdir()
    for name, data in saved.items():
        (path / name).write_bytes(data)
    model = Net()
    load_adapter(copy.deepcopy(model), path)  # what is damaged below was right
    damage(path)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, path)
    assert str(error.value).startswith(str(path))
    assert unchanged(model, before)


def test_paths_that_are_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (("none", "no such directory"), ("file", "is a file"), ("empty", "config.json is missing")):
        with pytest.raises(ValueError, match=message) as error:
            load_adapter(Net(), tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name))
