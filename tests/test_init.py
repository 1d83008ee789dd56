"""``python -m svdkern init``: an adapter, and the residual model, from files that are never loaded whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdkern import SVDLinear, adapt, cli, load_adapter, save_adapter, streaming
from svdkern.methods import SORSA
from svdkern.model_files import ModelFiles
from svdkern.streaming import init_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(48, 48), nn.Linear(48, 16, bias=False)
        self.up, self.down = nn.Linear(48, 200, bias=False), nn.Linear(200, 48, bias=False)
        self.norm = nn.LayerNorm(48)


class Net(nn.Module):
    def __init__(self, seed: int = 0, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(60, 48)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(48, 60, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def saved(folder: Path, model: nn.Module, shards: int = 1) -> Path:
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (folder / "config.json").write_text(json.dumps({"vocab_size": 60, "model_type": "tiny"}))
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(state)}
    for file in names:
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


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


# ----------------------------------------------------------------------------------------------------- interrupts


def failing_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> Callable[[], int]:
    real, calls = streaming.row_of, iter(range(1000))
    seen = []

    def row(name: str, layer: SVDLinear) -> object:
        seen.append(name)
        if next(calls) == count:
            raise error
        return real(name, layer)

    monkeypatch.setattr(streaming, "row_of", row)
    return lambda: len(seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_interrupted_and_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    folder = saved(tmp_path / "model", Net())
    init_adapter(folder, tmp_path / "out", rank=3)
    old = files_below(tmp_path / "out")
    with monkeypatch.context() as patch:
        failing_after(patch, 4, error)
        with pytest.raises(type(error)):
            init_adapter(folder, tmp_path / "out", rank=4)
    assert files_below(tmp_path / "out") == old
    kept = [path for path in (tmp_path / "out.partial").iterdir() if path.suffix == ".safetensors"]
    assert len(kept) >= 3 and not list((tmp_path / "out.partial").glob("*.tmp"))
    with pytest.raises(ValueError, match=r"was started otherwise \(rank was 4, is 5\)"):
        init_adapter(folder, tmp_path / "out", rank=5)
    kept[0].write_bytes(kept[0].read_bytes()[:-1])  # as a crash of the machine may leave it
    (tmp_path / "out.partial" / "x.safetensors.tmp").write_text("half")
    with monkeypatch.context() as patch:
        made_now = failing_after(patch, -1, error)
        made = init_adapter(folder, tmp_path / "out", rank=4)
    assert made.resumed == len(kept) - 1 and made_now() == 8 - made.resumed
    init_adapter(folder, tmp_path / "whole", rank=4)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("limit", [100, 6_000, 30_000])
def test_a_file_system_that_takes_no_more(tmp_path: Path, limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning-AI/pytorch-lightning#688: while settings, a layer, and the whole are written."""
    resource = pytest.importorskip("resource")
    folder, res = saved(tmp_path / "model", Net()), str(tmp_path / "res")
    command = ["init", str(folder), "-o", str(tmp_path / "out"), "--rank", "4", "--residual", res]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert cli.main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the same command goes on from there" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "out.partial"}
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    assert cli.main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "res"]


def test_progress_counts_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model", Net())
    init_adapter(folder, tmp_path / "out", rank=4, progress=True)
    assert "pissa factors: 100%" in (text := capsys.readouterr().err) and "44.5k/44.5k" in text
    init_adapter(folder, tmp_path / "out", rank=4, progress=False)
    assert not capsys.readouterr().err


def test_the_residual_model_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdkern import residual_files

    folder = saved(tmp_path / "model", Net(), 3)
    real, calls = residual_files.exact_residual, iter(range(100))

    def failing(*arguments: object) -> Tensor:
        if next(calls) == 6:
            raise OSError(28, "No space left on device")
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(residual_files, "exact_residual", failing)
        with pytest.raises(OSError, match="No space"):
            init_adapter(folder, tmp_path / "out", rank=4, residual=tmp_path / "res")
    assert not (tmp_path / "res").exists() and not list((tmp_path / "res.partial").glob("*.tmp"))
    done = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "res.partial").glob("*.safetensors")}
    assert 1 <= len(done) < 3
    init_adapter(folder, tmp_path / "out", rank=4, residual=tmp_path / "res")
    assert all((tmp_path / "res" / name).stat().st_mtime_ns == time for name, time in done.items())
    init_adapter(folder, tmp_path / "out2", rank=4, residual=tmp_path / "res2")
    assert files_below(tmp_path / "res") == files_below(tmp_path / "res2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "out2", "res", "res2"]


def test_a_model_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path / "model", Net())
    with monkeypatch.context() as patch:
        failing_after(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            init_adapter(folder, tmp_path / "out", rank=4)
    shutil.rmtree(folder)
    saved(folder, Net(seed=1))
    with pytest.raises(ValueError, match="was started otherwise \\(model was"):
        init_adapter(folder, tmp_path / "out", rank=4)


def test_two_at_once(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = saved(tmp_path / "model", Net())
    (tmp_path / "out.partial").mkdir()
    holder = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="another process works in"):
            init_adapter(folder, tmp_path / "out", rank=4)
    finally:
        os.close(holder)
    assert init_adapter(folder, tmp_path / "out", rank=4).layers == 8


def test_killed_and_run_again(tmp_path: Path) -> None:
    """A real process, killed with no chance to clean up."""
    folder = saved(tmp_path / "model", Net(blocks=20))
    command = [sys.executable, "-m", "svdkern", "init", str(folder), "--rank", "8", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent.parent)
    partial = tmp_path / "out.partial"
    while process.poll() is None and len(list(partial.glob("*.safetensors"))) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = init_adapter(folder, tmp_path / "out", rank=8)
    init_adapter(folder, tmp_path / "whole", rank=8)
    assert made.layers == 80 and (made.resumed >= 5 or not partial.exists())
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "whole"]


# ---------------------------------------------------------------------------------------------------------- memory


def test_memory_is_that_of_a_weight_not_of_the_model(tmp_path: Path) -> None:
    """huggingface/peft#896: a model that does not fit into memory."""
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(10):
        head = torch.randn(1030, 12, generator=generator) @ torch.randn(12, 8192, generator=generator)
        weight = (head + torch.randn(1030, 8192, generator=generator)).to(torch.bfloat16)
        save_file({f"layers.{i}.up.weight": weight}, folder / f"model-{i:02}.safetensors")
    code = (
        "import resource, sys, torch; from pathlib import Path; from svdkern.streaming import init_adapter\n"
        "from svdkern.linalg import factors; factors(torch.randn(1100, 64), 4)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); init_adapter(Path(sys.argv[1]), Path(sys.argv[2]), rank=8); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent, env=environment
    )
    assert int(done.stdout) * 1024 < 5 * weight.numel() * 2, done.stdout  # of ten in the model


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "model", Net())
    arguments = ["--rank", "4", "--target-modules", "q_proj", "up", "--residual", str(tmp_path / "res")]
    assert cli.main(["init", str(folder), "-o", str(tmp_path / "out"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "4 layers decomposed; 2,752 parameters will train" in out and f"{tmp_path / 'res'}: the model with" in out
    model = Net()
    assert len(load_adapter(model, tmp_path / "out").layers) == 4
    residual = load_file(tmp_path / "res/model.safetensors")
    assert torch.equal(model.layers[0].up.residual, residual["layers.0.up.weight"])  # type: ignore[index,union-attr]


def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", Net())
    out = ["-o", str(tmp_path / "out")]
    for arguments, message in (
        ([str(tmp_path / "nowhere"), *out], "nowhere: there is no *.safetensors"),
        ([str(folder), *out, "--method", "pisa"], "expected one of pissa"),
        ([str(folder), *out, "--target-modules", "q_porj"], "near matches: 'q_proj'"),
        ([str(folder), *out, "--rank", "99"], "rank is 99"),
        ([str(folder)], "-o/--out"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["init", *arguments])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    for error, status, message in (
        (KeyboardInterrupt(), 130, "interrupted: OUT is as it was"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ):
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)  # how much the other threads finished is chance
        with monkeypatch.context() as patch:
            failing_after(patch, 2, error)
            assert cli.main(["init", str(folder), *out, "--rank", "4"]) == status
        assert message in capsys.readouterr().err
    assert cli.main(["init", str(folder), *out, "--rank", "4"]) == 0
    assert "by an earlier run)" in capsys.readouterr().out


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["init", "--help"])
    text = capsys.readouterr().out
    for word in ("MODEL_DIR", "examples:", "load_adapter", "OUT.partial", "pissa", "sorsa", "--residual"):
        assert word in text


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
