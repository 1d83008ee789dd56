"""The tests' own module of torch-free kernels, built once a session, and the instruction sets that this machine runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import building  # noqa: E402


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    if (missing := building.why_not()) is not None:
        pytest.skip(f"needs {missing} to build the tests' module")
    return building.load(building.build(sanitize=False))


@pytest.fixture(params=["baseline", "neon", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def isa(request: pytest.FixtureRequest, kernels: ModuleType) -> str:
    """The name of every instruction set in turn."""
    if not dict(kernels.isas()).get(request.param, False):
        pytest.skip(f"needs a CPU with {request.param}")
    return str(request.param)
