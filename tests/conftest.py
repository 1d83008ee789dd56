"""Fixtures that every test file shares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from unusable_device import pytest_runtest_protocol  # noqa: F401

from svdkern.backends import choices, dispatch, extension, triton_tiles, tuned
from svdkern.backends.table import Table, write_table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulator-json",
        metavar="FILE",
        type=Path,
        help="write what the emulated tests did: outcome, seconds, and every launch with its kernel, arch, triton, mode and seed",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run only where -m names them."""
    if "slow" in config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


_emulated: list[dict[str, object]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "emulator" in report.keywords and (report.when == "call" or report.outcome != "passed"):
        launches = [value for name, value in report.user_properties if name == "launch"]
        _emulated.append(
            {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                "launches": launches,
            }
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.option.emulator_json
    if path is not None and not hasattr(session.config, "workerinput"):
        path.parent.mkdir(parents=True, exist_ok=True)
        outcomes = {o: sum(t["outcome"] == o for t in _emulated) for o in ("passed", "failed", "skipped")}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"outcomes": outcomes, "tests": _emulated}, indent=1) + "\n")
        partial.rename(path)


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


@pytest.fixture
def tile_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's own tables of tiles, both empty."""
    monkeypatch.setenv("SVDKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_tiles, "SHIPPED", tmp_path / "shipped.json")
    triton_tiles.forget()
    yield tmp_path
    triton_tiles.forget()
