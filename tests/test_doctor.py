"""The command line: what doctor says, and what it says when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from svdkern import cli, doctor
from svdkern.backends import extension


def test_doctor_tests_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--shape", "1x4096x4096"]) == 0
    said = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in said
    assert "M=1 K=4096 N=4096" in said
    assert "FAILED" not in said
    assert said.count("ok") >= 8
    if extension.why_missing is None:
        assert f"in use: {torch.ops.svdkern._cpu_isa()}" in said
        assert "cpu     float16   M=3   ok" in said
        built = torch.ops.svdkern._cuda_build()
        assert (f"compiled by {built}" if built else "built without CUDA kernels") in said


def test_doctor_names_the_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel's metadata may leave it out: those of PyPI say 2.13.0 of a 2.13.0+cu130."""
    monkeypatch.setattr(torch, "__version__", "2.99.0+some")
    assert f"  {'torch':<14}2.99.0+some" in doctor._versions()


def test_a_shape_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("4096", "-1x2x3", "axbxc"):
        with pytest.raises(SystemExit):
            cli.main(["doctor", f"--shape={text}"])
    assert "is not MxKxN" in capsys.readouterr().err


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_doctor_fails_where_a_backend_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fill: float
) -> None:
    from svdkern.backends import dispatch

    eager = dispatch.BACKENDS["eager"]
    monkeypatch.setattr(eager, "outer", lambda a, q, like, rng, t: torch.full_like(like, fill), raising=False)
    assert cli.main(["doctor"]) == 1
    assert "eager   float32   M=3   FAILED" in capsys.readouterr().out


def test_an_unknown_instruction_set_is_named() -> None:
    """A forced instruction set that is not there is an error that lists those that are."""
    if extension.why_missing is not None:
        pytest.skip("needs the compiled extension")
    done = subprocess.run(
        [sys.executable, "-c", "import torch, svdkern; print(torch.ops.svdkern._cpu_isa())"],
        env=os.environ | {"SVDKERN_CPU_ISA": "avx1024"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "avx1024" in done.stderr and "baseline" in done.stderr


def test_doctor_reports_an_unknown_instruction_set() -> None:
    if extension.why_missing is not None:
        pytest.skip("needs the compiled extension")
    for command in (["doctor", "--shape", "1x64x64"], ["tune", "--shapes", "1x64x64x4"]):
        done = subprocess.run(
            [sys.executable, "-m", "svdkern", *command],
            env=os.environ | {"SVDKERN_CPU_ISA": "avx1024"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert "SVDKERN_CPU_ISA=avx1024 cannot run here" in done.stdout + done.stderr


def test_strict_makes_a_missing_extension_an_error() -> None:
    code = (
        "import sys; sys.modules['svdkern._C'] = None\n"
        "import torch, svdkern\n"
        "x = torch.ones(2, 3)\n"
        "svdkern.svd_linear(x, torch.ones(4, 3), torch.ones(3, 1), None, torch.ones(4, 1))"
    )
    strict = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"SVDKERN_STRICT": "1"}, capture_output=True, text=True
    )
    assert strict.returncode != 0
    assert "SVDKERN_STRICT=1 and backend 'cpu' cannot be used: the compiled extension is not there" in strict.stderr
    lenient = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert lenient.returncode == 0, lenient.stderr
    assert lenient.stderr.count("falling back to the eager backend") == 1
