"""Fixtures that every test file shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svdkern.backends import choices, dispatch, extension, tuned
from svdkern.backends.table import Table, write_table

pytest.register_assert_rewrite("operands")  # shared checks say as much as a test's own


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _nothing_tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What somebody has measured on this machine is no part of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDKERN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("WORLD_SIZE", raising=False)
        patch.delenv("SVDKERN_AUTOTUNE", raising=False)
        dispatch.read_environment()
        yield
    dispatch.read_environment()


@pytest.fixture(autouse=True)
def _nothing_chosen() -> None:
    """Tests change what choices are made from."""
    dispatch._paths.clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the test's own tuned choices are kept; the shipped table is an empty one."""
    monkeypatch.setenv("SVDKERN_CACHE_DIR", str(tmp_path / "cache"))
    write_table(tmp_path / "choices.json", Table())
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "choices.json")
    dispatch.read_environment()
    tuned._say_once.cache_clear()
    yield tmp_path / "cache"
    monkeypatch.undo()
    dispatch.read_environment()


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of every backend that runs on this machine's CPU."""
    if request.param == "cpu" and extension.why_missing is not None:
        pytest.skip(f"needs the compiled extension: {extension.why_missing}")
    return str(request.param)
