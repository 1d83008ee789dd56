"""The files of measured choices: every way in which they can be broken, not there, or another's."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import row

from svdkern.backends import choices, dispatch, extension, tuned
from svdkern.backends.table import Shape

pytestmark = [
    pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension"),
    pytest.mark.usefixtures("cache"),
]

SHAPE = Shape(64, 512, 512, 16)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "svdkern"]


def path_of(shape: Shape, dtype: torch.dtype = torch.float32) -> str:
    return choices.choose(shape, dtype).path


def test_a_row_is_a_file_of_its_own_that_only_this_user_reads(cache: Path) -> None:
    path = tuned.save(row(SHAPE, "eager"))
    assert path is not None and path.name == "float32-64x512x512x16.json" and path.parent.parent == cache / "choices"
    assert path.stat().st_mode & 0o777 == 0o600
    assert tuned.load() == [row(SHAPE, "eager")]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    tuned.save(row(SHAPE, "fused"))
    assert tuned.load() == [row(SHAPE, "fused")]


def _changed(**change: Any) -> str:
    return json.dumps({"version": 1, **row(SHAPE, "eager").to_json(), **change})


BROKEN = {
    "empty": "",
    "truncated": _changed()[:40] if extension.why_missing is None else "",
    "no object": "[1, 2]",
    "nested without end": "[" * 1_990,
    "long": " " * 3000,
    "no text": b"\xff\xfe\x00\x80",
    "another version": '{"version": 2}',
    "no fields": '{"version": 1}',
}


@pytest.mark.parametrize(
    "content", [*BROKEN, "wrong field", "another isa", "another torch", "other threads", "another layer", "folder", "pipe",
                "link to nothing", "another user's"],
)  # fmt: skip
def test_a_file_that_is_no_row_is_ignored_with_one_line(
    content: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tuned.save(row(SHAPE, "eager"))
    assert path is not None
    changes: dict[str, Any] = {
        "wrong field": {"choice": "fastest"},
        "another isa": {"isa": "avx9/AVX9"},
        "another torch": {"torch": "1.0"},
        "other threads": {"threads": 99},
        "another layer": {"M": 65},
    }
    if content in BROKEN:
        text = BROKEN[content]
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    elif content in changes:
        path.write_text(_changed(**changes[content]))
    elif content == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        path.unlink()
        if content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(path.parent / "nothing")
    dispatch.read_environment()
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert [path_of(SHAPE), path_of(Shape(65, 512, 512, 16))] == ["steps", "steps"]
    (line,) = warnings_of(caplog)
    assert "ignoring 1 of 1 tuned choices" in line and path.name in line
    if content not in ("folder", "another user's"):  # the next measurement takes its place
        assert tuned.save(row(SHAPE, "eager")) == path
        dispatch.read_environment()
        assert path_of(SHAPE) == "eager"


def test_good_files_among_bad_ones_count(caplog: pytest.LogCaptureFixture) -> None:
    path = tuned.save(row(SHAPE, "eager"))
    assert path is not None
    for name in ("a.json", "b.json"):
        (path.parent / name).write_text("{")
    (path.parent / "README").write_text("no row")
    dispatch.read_environment()
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert path_of(SHAPE) == "eager"
    (line,) = warnings_of(caplog)
    assert "ignoring 2 of 3" in line


def test_rows_of_another_build_or_number_of_threads_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save(row(SHAPE, "eager"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        dispatch.read_environment()
        assert path_of(SHAPE) == "steps"
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "99.0")
    tuned._version.cache_clear()
    dispatch.read_environment()
    assert path_of(SHAPE) == "steps"
    monkeypatch.undo()
    tuned._version.cache_clear()


@pytest.mark.parametrize("problem", ["read-only", "disk full", "a file in the way", "no home"])
def test_where_nothing_can_be_written_everything_goes_on(
    problem: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30 if problem == "read-only" else 28, "Read-only" if problem == "read-only" else "No space left")

    if problem == "read-only":
        monkeypatch.setattr("tempfile.mkstemp", refuse)
    elif problem == "disk full":
        monkeypatch.setattr(os, "replace", refuse)
    elif problem == "a file in the way":
        cache.write_text("")
    else:
        monkeypatch.delenv("SVDKERN_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    dispatch.read_environment()
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert tuned.save(row(SHAPE, "eager")) is None
        assert tuned.save(row(Shape(1, 2, 3, 4), "eager")) is None
        assert tuned.load() == []
        assert path_of(SHAPE) == "steps"
    (line,) = warnings_of(caplog)
    assert "tuned choices are not kept" in line
    assert not list(tmp_path.rglob("*.tmp"))


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = Path(choices.__file__).parent.parent
    cases: list[tuple[dict[str, str], Path | None]] = [
        ({"SVDKERN_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, Path("/a/b")),
        ({"SVDKERN_CACHE_DIR": "rel"}, tmp_path / "rel"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, Path("/x/svdkern")),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, None),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, Path("/h/.cache/svdkern")),
    ]
    monkeypatch.chdir(tmp_path)
    for environment, expected in cases:
        for name in ("SVDKERN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert tuned.base_folder() == expected
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    found = tuned.base_folder()  # from the list of users
    assert found is None or not found.is_relative_to(package)


def _write_many(barrier: Any, who: int) -> None:
    barrier.wait()
    for m in range(40):
        tuned.save(row((m % 10 + 1, 32, 32, 4), ("fused", "steps", "eager")[who % 3]))
        for found in tuned.load():  # never half a file
            assert found.shape.K == 32


def test_eight_processes_write_at_once(caplog: pytest.LogCaptureFixture) -> None:
    tuned.folder()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    workers = [context.Process(target=_write_many, args=(barrier, who)) for who in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert {found.shape.M for found in tuned.load()} == set(range(1, 11))
    place = tuned.folder()
    assert place is not None and not warnings_of(caplog)
    assert sorted(path.suffix for path in place.iterdir()) == [".json"] * 10


def test_clear_removes_rows_of_every_version_and_nothing_else(cache: Path) -> None:
    path = tuned.save(row(SHAPE, "eager"))
    assert path is not None
    old = cache / "choices" / "0123456789abcdef"
    old.mkdir()
    for name in ("float32-1x2x3x4.json", ".float32-1x2x3x4.json.abc.tmp", "kept.txt"):
        (old / name).write_text("")
    (cache / "other.json").write_text("{}")
    assert tuned.clear() == 2
    assert sorted(p.name for p in cache.rglob("*") if p.is_file()) == ["kept.txt", "other.json"]
    assert not path.parent.exists()
    assert tuned.clear() == 0
