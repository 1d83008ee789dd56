"""The folder of a long computation's finished parts: what an interrupted run leaves for the next one.

It lies beside the result, as ``<name>.partial``, with the settings that its parts were made with. A part gets its name when it is
whole. One process at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svdkern.directory import flush

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SETTINGS = "settings.json"
_UNFINISHED = ".tmp"


class Workspace:
    """A folder of finished parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def add(self, name: str, write: Callable[[Path], None]) -> None:
        """Let ``write(path)`` make a file, and give it its name once it is whole and on the disk."""
        unfinished = self.folder / f"{name}{_UNFINISHED}"
        try:
            write(unfinished)
            flush(unfinished)
            unfinished.rename(self.path(name))
        finally:
            unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, path: Path) -> None:
        """Become ``path``, a new or empty directory."""
        self.path(_SETTINGS).unlink()
        flush(self.folder)
        self.folder.rename(path)


@contextmanager
def workspace_of(path: Path, settings: dict[str, Any]) -> Iterator[Workspace]:
    """The workspace of the result ``path``, taken up again if it is there.

    Raises:
        ValueError: it was made with other settings, or another process works in it.
        OSError: it cannot be made.
    """
    folder = path.with_name(f"{path.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = _locked(folder)
    try:
        file = folder / _SETTINGS
        text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        if not file.exists():
            if any(entry.suffix != _UNFINISHED for entry in folder.iterdir()):
                raise ValueError(f"{folder} is not the folder of an unfinished run: move it away")
            Workspace(folder).add(_SETTINGS, lambda unfinished: _write(unfinished, text))
        elif (before := file.read_text(encoding="utf-8")) != text:
            raise ValueError(
                f"{folder} holds an unfinished run that was started otherwise ({_difference(before, settings)}): "
                "go on with its settings, or delete that folder to start anew"
            )
        for remnant in folder.glob(f"*{_UNFINISHED}"):
            remnant.unlink()
        yield Workspace(folder)
    finally:
        if lock is not None:
            os.close(lock)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _locked(folder: Path) -> int | None:
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another process works in {folder}") from None
    except OSError:
        pass  # a file system without locks
    return lock


def _difference(before: str, settings: dict[str, Any]) -> str:
    try:
        old = json.loads(before)
    except ValueError:
        return "its settings are damaged"
    if not isinstance(old, dict):
        return "its settings are damaged"
    changed = [key for key in settings if key not in old or json.loads(json.dumps(settings[key])) != old[key]]
    return (
        ", ".join(f"{key} was {old.get(key)!r}, is {settings[key]!r}" for key in changed[:3]) or "settings are missing"
    )
