"""Replacing a directory as one: at every moment its path holds the old contents or the new ones, whole.

The new directory is built beside the old one under a temporary name, flushed to disk, and then both change names in one
system call (Linux ``renameat2`` with ``RENAME_EXCHANGE``). Where that does not exist (other systems, some network file
systems) two renames do it; a crash between those two leaves the old directory under its temporary name, and the next
replacement puts it back. A builder holds a lock on its temporary directory, so whatever is found unlocked was left
behind by a process that died, and is removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def replace_directory(path: Path, build: Callable[[Path], None], own_files: Iterable[str]) -> None:
    """Let ``build(folder)`` fill a new folder and put it at ``path``.

    Args:
        path: a new directory, an empty one, or one that holds nothing but ``own_files``. Missing parents are made.
        build: writes the files; if it raises, path keeps what it had.
        own_files: names that a directory at path may hold; anything else is somebody else's and is never deleted, nor if it
            arrives during the build.

    Raises:
        ValueError: path is no directory, or holds other files.
        OSError: no space, no permission.
    """
    path = Path(os.path.realpath(path))  # a symbolic link to a directory stays one
    own_files = frozenset(own_files)
    check_replaceable(path, own_files)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path)
    folder, lock = _make_locked(path)
    try:
        build(folder)
        for file in folder.iterdir():
            flush(file)
        flush(folder)
        _swap(folder, path, own_files)
        flush(path.parent)
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)  # what was at path before, or an unfinished build
        finally:
            if lock is not None:
                os.close(lock)


def check_replaceable(path: Path, own_files: Iterable[str]) -> None:
    """ValueError if ``replace_directory`` would refuse to replace path."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file, expected a directory or a new path")
    _refuse_others(path, path, own_files)


def _refuse_others(folder: Path, path: Path, own_files: Iterable[str]) -> None:
    """ValueError if folder, which is at path or was there a moment ago, holds other files."""
    others = sorted({entry.name for entry in folder.iterdir()} - set(own_files))
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise ValueError(
            f"{path} holds other files ({shown}), which replacing it would delete: give it a directory of its own"
        )


def _prefix(path: Path) -> str:
    return f".{path.name}.svdkern-"


def _make_locked(path: Path) -> tuple[Path, int | None]:
    while True:
        folder = path.parent / f"{_prefix(path)}{uuid4().hex}"
        folder.mkdir()
        if fcntl is None:
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process took it for a remnant
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            return folder, lock  # a file system without locks: nothing there is ever taken for a remnant
        if folder.exists():
            return folder, lock
        os.close(lock)  # it was taken for a remnant before it was locked


def _clean(path: Path) -> None:
    """Remove what killed processes left beside path; put path back if one died between its two renames."""
    if fcntl is None:
        return
    for remnant in path.parent.glob(f"{_escape(_prefix(path))}*"):
        try:
            lock = os.open(remnant, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if remnant.name.endswith(".old") and not path.exists():
                remnant.rename(path)
            else:
                shutil.rmtree(remnant, ignore_errors=True)
        except OSError:
            pass  # locked: its process is alive
        finally:
            os.close(lock)


def _escape(name: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _swap(folder: Path, path: Path, own_files: frozenset[str]) -> None:
    for _ in range(100):
        try:
            folder.rename(path)  # a new path, or an empty directory
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM):
                raise
        try:
            if not _exchange(folder, path):
                _rename_twice(folder, path, own_files)
                return
            try:
                _refuse_others(folder, path, own_files)
            except BaseException:
                _exchange(folder, path)
                raise
            return
        except OSError as error:  # another process was between its two renames
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise OSError(errno.EBUSY, "other processes keep replacing it", str(path))


def _rename_twice(folder: Path, path: Path, own_files: frozenset[str]) -> None:
    old = folder.with_name(f"{_prefix(path)}{uuid4().hex}.old")
    path.rename(old)
    try:
        _refuse_others(old, path, own_files)
        folder.rename(path)
    except BaseException:
        with suppress(OSError):  # another process put it back, or put its own there
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(folder: Path, path: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(path))


def flush(path: Path) -> None:
    """Bring a file or a directory to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
