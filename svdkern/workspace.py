"""The folder of a long computation's finished parts: what an interrupted run leaves for the next one.

It lies beside the result, as ``<name>.partial``: the settings that the parts were made with, and in a folder of their own the
parts, each there when it is whole. Settings without that folder mean that it has become the result. One process at a time.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from svdkern.directory import flush

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("svdkern")

_SETTINGS = "settings.json"
_UNFINISHED = ".tmp"


class Workspace:
    """The finished parts of ``result``, a directory."""

    def __init__(self, result: Path) -> None:
        self.result = Path(os.path.realpath(result))  # a symbolic link to a directory stays one
        self.folder = self.result.with_name(f"{self.result.name}.partial")
        self.parts = self.folder / "parts"
        self.settings = self.folder / _SETTINGS

    def path(self, name: str) -> Path:
        return self.parts / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def add(self, name: str, write: Callable[[Path], None]) -> None:
        """Let ``write(path)`` make a file, and give it its name, which may be in a subfolder, once it is whole and on the disk."""
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self._put(self.path(name), write)

    def _put(self, path: Path, write: Callable[[Path], None]) -> None:
        unfinished = self.folder / f"{uuid4().hex}{_UNFINISHED}"
        try:
            write(unfinished)
            flush(unfinished)
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @property
    def published(self) -> bool:
        """Whether the parts have become the result."""
        return not self.parts.exists() and self.result.is_dir() and any(self.result.iterdir())

    def publish(self) -> None:
        """Let the parts become the result, a new or empty directory."""
        for folder in (self.parts, *filter(Path.is_dir, self.parts.rglob("*"))):
            flush(folder)
        self.parts.rename(self.result)
        flush(self.result.parent)

    def remove(self) -> None:
        """Remove what is left. The settings go last, so that an interrupted removal leaves what a run can go on from."""
        try:
            if self.parts.exists():
                shutil.rmtree(self.parts)
            self.settings.unlink()
            self.folder.rmdir()
        except OSError as error:  # the result is there all the same
            log.warning("%s is needed no longer, and cannot be removed: %s", self.folder, error)


@contextmanager
def workspace_of(result: Path, settings: dict[str, Any]) -> Iterator[Workspace]:
    """The workspace of a result, taken up again if it is there.

    Raises:
        ValueError: it was made with other settings, or another process works in it.
        OSError: it cannot be made.
    """
    workspace = Workspace(result)
    lock = _make_locked(workspace.folder)
    try:
        if not workspace.settings.exists():
            if not _is_new(workspace):
                raise ValueError(f"{workspace.folder} is not the folder of an unfinished run: move it away")
            workspace.parts.mkdir(exist_ok=True)  # before the settings: see the top
            text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            workspace._put(workspace.settings, lambda path: _write(path, text))
            flush(workspace.folder)
        elif difference := _difference(workspace.settings, settings):
            raise ValueError(
                f"{workspace.folder} holds an unfinished run that was started otherwise ({difference}): "
                "go on with its settings, or delete that folder to start anew"
            )
        for remnant in workspace.folder.glob(f"*{_UNFINISHED}"):
            remnant.unlink()
        yield workspace
    finally:
        if lock is not None:
            os.close(lock)


def is_published(result: Path, settings: dict[str, Any]) -> bool:
    """Whether a run with these settings, and maybe more of them, has published the result and not yet removed its workspace."""
    workspace = Workspace(result)
    return workspace.published and workspace.settings.exists() and not _difference(workspace.settings, settings)


def _is_new(workspace: Workspace) -> bool:
    """Whether nothing is there but what is made before the settings."""
    return all(
        entry.suffix == _UNFINISHED or (entry == workspace.parts and entry.is_dir() and not any(entry.iterdir()))
        for entry in workspace.folder.iterdir()
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _make_locked(folder: Path) -> int | None:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # a process that has finished removed it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ValueError(f"another process works in {folder}") from None
        except OSError:
            return lock  # a file system without locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
        os.close(lock)  # of a folder that was removed before it was locked


def _difference(file: Path, settings: dict[str, Any]) -> str:
    """What was otherwise in the settings that are in the file; "" if nothing was."""
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return "its settings are damaged"
    if not isinstance(old, dict):
        return "its settings are damaged"
    changed = [key for key in settings if key not in old or json.loads(json.dumps(settings[key])) != old[key]]
    return ", ".join(f"{key} was {old.get(key)!r}, is {settings[key]!r}" for key in changed[:3])
