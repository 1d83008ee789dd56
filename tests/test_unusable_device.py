"""A test that leaves the GPU unusable fails alone. The runs have a stand-in for torch, in whose processes CUDA can break."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TORCH = """
class cuda:
    initialized = broken = False

    @classmethod
    def is_initialized(cls):
        return cls.initialized

    @classmethod
    def synchronize(cls):
        if cls.broken:
            raise RuntimeError("CUDA error: an illegal instruction was encountered\\nmore lines of advice")
"""

TESTS = """
import pytest
import torch


@pytest.fixture(params=range(5))
def gpu():
    torch.cuda.initialized = True
    torch.cuda.synchronize()


def test_before(gpu):
    pass


def test_wrong(gpu):
    assert False, "a wrong result"


@pytest.mark.parametrize("when", ["call", "teardown"])
def test_breaks(when, request):
    torch.cuda.initialized = True

    def break_it():
        torch.cuda.broken = True
        torch.cuda.synchronize()

    if when == "call":
        break_it()
    request.addfinalizer(break_it)


def test_after(gpu):
    pass
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "torch.py").write_text(TORCH)
    (folder / "test_gpu.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    command = [sys.executable, "-m", "pytest", "-p", "unusable_device", "-p", "no:cacheprovider", "-rA", *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def outcomes(output: str) -> dict[str, set[str]]:
    """{test: its outcomes}, from pytest's summary."""
    found: dict[str, set[str]] = {}
    for outcome, test in re.findall(r"^(PASSED|FAILED|ERROR) (?:\S*::)?(\w+(?:\[\w+\])?)", output, re.MULTILINE):
        found.setdefault(test, set()).add(outcome)
    return found


@pytest.mark.parametrize("workers", ["1", "2"])
def test_under_xdist_the_other_tests_run_in_a_new_worker(tmp_path: Path, workers: str) -> None:
    pytest.importorskip("xdist", reason="needs pytest-xdist")
    done = run(tmp_path, "-n", workers)
    found = outcomes(done.stdout)
    assert done.returncode == 1, done.stdout
    assert found.pop("test_breaks[call]") == {"FAILED"}
    assert "ERROR" in found.pop("test_breaks[teardown]")  # and failed, as the one that the worker died of
    for number in range(5):
        assert found.pop(f"test_wrong[{number}]") == {"FAILED"}  # the device works on: nothing ends
        assert found.pop(f"test_before[{number}]") == found.pop(f"test_after[{number}]") == {"PASSED"}
    assert not found
    assert "an illegal instruction was encountered" in done.stdout
    assert done.stdout.count("replacing crashed worker") == 2


def test_without_xdist_the_run_stops_and_says_why(tmp_path: Path) -> None:
    done = run(tmp_path, "-p", "no:xdist")
    found = outcomes(done.stdout)
    assert done.returncode == 1
    expected = {"test_breaks[call]": {"FAILED"}}
    for number in range(5):
        expected |= {f"test_before[{number}]": {"PASSED"}, f"test_wrong[{number}]": {"FAILED"}}
    assert found == expected
    (line,) = [line for line in done.stdout.splitlines() if "the GPU is unusable" in line]
    assert "after test_gpu.py::test_breaks[call]: CUDA error: an illegal instruction was encountered" in line
