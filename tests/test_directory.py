"""Replacing a directory as one, through kills, full disks and fallbacks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import svdkern.directory as directory
from svdkern.directory import replace_directory

FILES = ("one", "two")


def write(value: str):  # type: ignore[no-untyped-def]
    def build(folder: Path) -> None:
        for name in FILES:
            (folder / name).write_text(value)

    return build


def read(path: Path) -> set[str]:
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    return {(path / name).read_text() for name in FILES}


@pytest.fixture(params=["exchange", "two renames"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(directory, "_exchange", lambda folder, path: False)
    return request.param


def test_new_replaced_and_nested(tmp_path: Path, either: str) -> None:
    path = tmp_path / "deep" / "er" / "a"
    for value in ("first", "second", "third"):
        replace_directory(path, write(value), FILES)
        assert read(path) == {value} and list(path.parent.iterdir()) == [path]
    empty = tmp_path / "empty"
    empty.mkdir()
    replace_directory(empty, write("x"), FILES)
    assert read(empty) == {"x"}


def test_relative_path_and_symbolic_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, either: str) -> None:
    monkeypatch.chdir(tmp_path)
    replace_directory(Path("a"), write("x"), FILES)
    (tmp_path / "link").symlink_to("a")
    replace_directory(Path("link"), write("y"), FILES)
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "a") == {"y"}


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    replace_directory(tmp_path / "a", write("x"), FILES)
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "f").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "a" / "one").stat().st_mode == (tmp_path / "usual" / "f").stat().st_mode


def test_somebody_elses_files_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="holds other files .*thesis.tex"):
        replace_directory(tmp_path, write("x"), FILES)
    assert (tmp_path / "thesis.tex").read_text() == "years" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="is a file"):
        replace_directory(tmp_path / "thesis.tex", write("x"), FILES)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_a_failed_build_leaves_the_old_and_no_litter(tmp_path: Path, error: BaseException) -> None:
    """Lightning-AI/pytorch-lightning#688: a full disk, or an interrupt, in the middle of saving."""
    path = tmp_path / "a"
    replace_directory(path, write("old"), FILES)

    def failing(folder: Path) -> None:
        (folder / "one").write_text("ne")
        raise error

    with pytest.raises(type(error)):
        replace_directory(path, failing, FILES)
    assert read(path) == {"old"} and list(tmp_path.iterdir()) == [path]


_LOOP = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("directory", {file!r})  # without the package, which would load torch
directory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(directory)
value = 0
print("ready", flush=True)
while True:
    value += 1
    def build(folder):
        for name in ("one", "two"):
            (folder / name).write_text(str(value) * 50000)
    directory.replace_directory(Path(sys.argv[1]), build, ("one", "two"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs renameat2")
def test_killed_while_saving(tmp_path: Path) -> None:
    """Lightning-AI/pytorch-lightning#688: a kill during saving leaves a truncated checkpoint."""
    path = tmp_path / "a"
    code = _LOOP.format(file=directory.__file__)
    replace_directory(path, write("start"), FILES)
    for round_ in range(8):
        process = subprocess.Popen([sys.executable, "-S", "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        deadline = time.monotonic() + 0.01 + 0.013 * round_
        while time.monotonic() < deadline:  # a reader beside it sees whole directories all the time
            assert path.is_dir()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(read(path)) == 1
    replace_directory(path, write("end"), FILES)
    assert read(path) == {"end"} and list(tmp_path.iterdir()) == [path]


def test_a_live_builder_is_not_taken_for_a_remnant(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def build(folder: Path) -> None:
        write("outer")(folder)
        replace_directory(path, write("inner"), FILES)  # cleans up while the outer one is being built
        assert folder.exists() and read(path) == {"inner"}

    replace_directory(path, build, FILES)
    assert read(path) == {"outer"} and list(tmp_path.iterdir()) == [path]


def test_remnants_are_cleaned_and_an_interrupted_fallback_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "a"
    remnant = tmp_path / ".a.svdkern-0123"
    remnant.mkdir()
    (remnant / "one").write_text("half")
    other = tmp_path / ".ab.svdkern-0123"
    other.mkdir()
    replace_directory(path, write("x"), FILES)
    assert sorted(tmp_path.iterdir()) == [other, path]
    path.rename(tmp_path / ".a.svdkern-77.old")  # died between the two renames

    def failing(folder: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_directory(path, failing, FILES)
    assert read(path) == {"x"}


def test_a_file_that_arrives_during_the_build_is_not_deleted(tmp_path: Path, either: str) -> None:
    path = tmp_path / "a"
    replace_directory(path, write("old"), FILES)

    def build(folder: Path) -> None:
        write("new")(folder)
        (path / "thesis.tex").write_text("years")

    with pytest.raises(ValueError, match="a holds other files .*thesis.tex"):
        replace_directory(path, build, FILES)
    assert (path / "thesis.tex").read_text() == "years" and (path / "one").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_taken_for_a_remnant_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    real, path = os.open, tmp_path / "a"

    def open_late(file: Path, *arguments: int) -> int:
        if Path(file).name.startswith(".a.svdkern-"):
            monkeypatch.setattr(os, "open", real)
            directory._clean(path)  # as another process that begins to save
        return real(file, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    replace_directory(path, write("x"), FILES)
    assert read(path) == {"x"} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_process_cleans_up_at_the_second_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before it, the old directory is put back; after it, removed. Either way the save goes on."""
    pytest.importorskip("fcntl")
    path = tmp_path / "a"
    replace_directory(path, write("old"), FILES)
    monkeypatch.setattr(directory, "_exchange", lambda folder, path: False)
    real = Path.rename

    def rename(source: Path, target: Path) -> Path:
        is_second = target == path and not source.name.endswith(".old") and not path.exists()
        if is_second and when == "before":
            monkeypatch.setattr(Path, "rename", real)
            directory._clean(path)
        moved = real(source, target)
        if is_second and when == "after":
            directory._clean(path)
        return moved

    monkeypatch.setattr(Path, "rename", rename)
    replace_directory(path, write("new"), FILES)
    assert read(path) == {"new"} and list(tmp_path.iterdir()) == [path]


def test_the_old_directory_is_put_back_if_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    replace_directory(path, write("old"), FILES)
    monkeypatch.setattr(directory, "_exchange", lambda folder, path: False)
    real = Path.rename

    def rename(source: Path, target: Path) -> Path:
        if target == path and not source.name.endswith(".old") and not path.exists():
            raise OSError(errno.EIO, "the disk is gone")
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"):
        replace_directory(path, write("new"), FILES)
    assert read(path) == {"old"} and list(tmp_path.iterdir()) == [path]


def test_exchange_reports_what_the_system_cannot(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs renameat2")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "f").write_text("x")
    assert directory._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "f").exists() and os.listdir(tmp_path / "b") == []
    with pytest.raises(OSError, match="No such file"):
        directory._exchange(tmp_path / "a", tmp_path / "none")
