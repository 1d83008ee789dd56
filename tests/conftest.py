"""Fixtures that every test file shares."""

from __future__ import annotations

import pytest
import torch

from svdkern.backends import extension

pytest.register_assert_rewrite("operands")  # shared checks say as much as a test's own


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of every backend that runs on this machine's CPU."""
    if request.param == "cpu" and extension.why_missing is not None:
        pytest.skip(f"needs the compiled extension: {extension.why_missing}")
    return str(request.param)
