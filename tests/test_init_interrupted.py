"""``python -m svdkern init``, interrupted, killed, run twice at once; and the memory that it takes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import Net, failing_after, files_below, parts, saved
from safetensors.torch import save_file
from torch import Tensor

from svdkern import cli
from svdkern.streaming import init_adapter


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
    kept = parts(tmp_path / "out")
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
    done = {f.name: f.stat().st_mtime_ns for f in parts(tmp_path / "res")}
    assert 1 <= len(done) < 3
    init_adapter(folder, tmp_path / "out", rank=4, residual=tmp_path / "res")
    assert all((tmp_path / "res" / name).stat().st_mtime_ns == time for name, time in done.items())
    init_adapter(folder, tmp_path / "out2", rank=4, residual=tmp_path / "res2")
    assert files_below(tmp_path / "res") == files_below(tmp_path / "res2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "out2", "res", "res2"]


@pytest.mark.parametrize("killed", [False, True], ids=["ctrl-c", "killed"])
def test_ended_at_any_step_and_the_same_command_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], killed: bool
) -> None:
    """Before and after everything that changes a name, until a run is no longer hit. What is said of OUT is what is there.

    As killed, a run cleans up nothing: whatever else would change a name fails, too.
    """
    folder = saved(tmp_path / "model", Net(blocks=1))
    layer, said = ["k_proj"], set()
    init_adapter(folder, tmp_path / "old", "pissa", 2, layer)
    init_adapter(folder, tmp_path / "new", "pissa", 3, layer, residual=tmp_path / "new res")
    old, new, new_res = (files_below(tmp_path / name) for name in ("old", "new", "new res"))
    for step in range(1000):
        place = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", place / "out")
        command = ["init", str(folder), "-o", str(place / "out"), "--rank", "3", "--target-modules", *layer]
        command += ["--residual", str(place / "res")]
        with monkeypatch.context() as patch:
            calls = iter(range(10_000))
            for name in ("rename", "unlink", "rmdir"):
                patch.setattr(os, name, _ending(getattr(os, name), calls, range(step, 10_000 if killed else step + 1)))
            status = cli.main(command)
        message = capsys.readouterr().err
        if status == 0:
            break
        assert status == 130
        said.add(message.partition(";")[0].strip())
        if "everything is finished" not in message:
            assert files_below(place / "out") == (old if "OUT is as it was" in message else new)
            assert cli.main(command) == 0, capsys.readouterr().err
        assert files_below(place / "out") == new and files_below(place / "res") == new_res
        init_adapter(folder, place / "out", "pissa", 2, layer)  # another one may follow
        names = {path.name for path in place.iterdir()}
        assert {"out", "res"} <= names <= {"out", "res", "res.partial"}
        assert "res.partial" not in names or "everything is finished" in message
    assert step >= 30 and said == {
        "interrupted: OUT is as it was",
        "interrupted: OUT is the new adapter",
        "interrupted: but everything is finished",
    }


def _ending(real: Callable[..., None], calls: Iterator[int], at: range) -> Callable[..., None]:
    def call(*arguments: Any, **named: Any) -> None:
        if next(calls) in at:
            raise KeyboardInterrupt
        real(*arguments, **named)
        if next(calls) in at:
            raise KeyboardInterrupt

    return call


def test_a_full_disk_while_the_residual_model_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from svdkern import residual_files

    folder = saved(tmp_path / "model", Net())
    init_adapter(folder, tmp_path / "out", rank=3)
    command = ["init", str(folder), "-o", str(tmp_path / "out"), "--rank", "4", "--residual", str(tmp_path / "res")]

    def full(*arguments: object) -> Tensor:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(residual_files, "exact_residual", full)
        assert cli.main(command) == 1
    assert "No space left on device\nOUT is the new adapter; " in capsys.readouterr().err
    init_adapter(folder, tmp_path / "whole", rank=4)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")
    assert cli.main(command) == 0 and "(8 of them by an earlier run)" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["out", "res"])
def test_a_link_to_an_empty_directory(tmp_path: Path, target: str) -> None:
    folder = saved(tmp_path / "model", Net())
    (tmp_path / "real").mkdir()
    (tmp_path / target).symlink_to("real")
    init_adapter(folder, tmp_path / "out", rank=4, residual=tmp_path / "res")
    assert (tmp_path / target).is_symlink() and len(files_below(tmp_path / "real")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"model", "real", "out", "res"})


def test_into_an_empty_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "model", Net())
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert cli.main(["init", "../model", "-o", ".", "--rank", "4", "--residual", "../res"]) == 0
    size = sum(map(len, files_below(tmp_path / "out").values()))
    assert f"{size / 1e6:.1f} MB" in capsys.readouterr().out
    init_adapter(folder, tmp_path / "whole", rank=4)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole") and (tmp_path / "res").is_dir()


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
    while process.poll() is None and len(parts(tmp_path / "out")) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    was_killed_early = (tmp_path / "out.partial" / "settings.json").exists()  # else it was faster than this test
    made = init_adapter(folder, tmp_path / "out", rank=8)
    init_adapter(folder, tmp_path / "whole", rank=8)
    assert made.layers == 80 and (made.resumed >= 5 or not was_killed_early)
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
