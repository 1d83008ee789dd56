"""``python -m svdkern init`` on the command line: what it says and how it ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from model_folders import Net, failing_after, saved
from safetensors.torch import load_file

from svdkern import cli, load_adapter


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
