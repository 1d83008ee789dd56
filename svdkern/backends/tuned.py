"""What was measured on this machine, kept on disk for this user: one small JSON file a row.

    $SVDKERN_CACHE_DIR | $XDG_CACHE_HOME/svdkern | ~/.cache/svdkern
        choices/<version>/float32-1024x576x1536x16.json

``<version>`` is a hash of all that a time depends on: the compiled extension's bytes, torch, the processor, the instruction
sets, the number of threads. Files are written aside and renamed, so processes need no lock. A folder or file that is missing,
unreadable, broken, or another user's is as good as none: that costs speed, never a result.

Layer: below ``choices``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
from pathlib import Path

import torch

from svdkern.backends import cpu
from svdkern.backends.table import VERSION, Row, text_in, write_whole

log = logging.getLogger("svdkern")

_LONGEST = 2000  # of a row's file: no row has more characters


def base_folder() -> Path | None:
    """Where this user's caches are; None where the environment names no place."""
    if given := os.environ.get("SVDKERN_CACHE_DIR"):
        return Path(given).absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(caches) / "svdkern" if os.path.isabs(caches) else None  # as the XDG specification has it


def folder() -> Path | None:
    """Where the rows of this machine, build and number of threads are."""
    base = base_folder()
    return None if base is None else base / "choices" / _version(cpu.isa(), torch.get_num_threads())


def load() -> list[Row]:
    """All rows; one log line says which files are none."""
    base = base_folder()
    if base is None or not os.path.isdir(base / "choices"):
        return []
    place = folder()
    assert place is not None
    try:
        files = sorted(place / name for name in os.listdir(place) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("ignoring the tuned choices: %s", error)
        return []
    rows, problems = [], []
    for path in files:
        try:
            rows.append(read(path))
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path.name}: {error}")
    if problems:
        log.warning("ignoring %d of %d tuned choices in %s (%s)", len(problems), len(files), place, problems[0])
    return rows


def read(path: Path) -> Row:
    """The row in one file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not one that ``save`` wrote for this user and place.
    """
    found = json.loads(text_in(path, _LONGEST, ours=True))
    if not isinstance(found, dict) or found.pop("version", None) != VERSION:
        raise ValueError(f"not of version {VERSION}")
    row = Row.from_json(found)
    here = (cpu.isa(), torch.__version__, torch.get_num_threads())
    if (row.isa, row.torch, row.threads) != here or path.name != _file_name(row):
        raise ValueError("measured for something else than its place says")
    return row


def save(row: Row) -> Path | None:
    """Write a row; None, and one log line for all rows of a process, where that is not possible."""
    place = folder()
    try:
        if place is None:
            raise OSError("no SVDKERN_CACHE_DIR, XDG_CACHE_HOME or home directory")
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = place / _file_name(row)
        write_whole(path, json.dumps({"version": VERSION, **row.to_json()}) + "\n")
    except OSError as error:
        _say_once(f"{error.strerror or error} ({place})")
        return None
    return path


def taken_over(row: Row) -> Row:
    """The row on disk for the same layer, if another process has written one meanwhile; else this one, saved."""
    place = folder()
    if place is not None:
        try:
            return read(place / _file_name(row))
        except (OSError, ValueError, RecursionError):
            pass
    save(row)
    return row


def clear() -> int:
    """Remove the rows of every version and return how many there were. Nothing else in the folder is touched.

    Raises:
        OSError: one could not be removed.
    """
    base, count = base_folder(), 0
    for place in [] if base is None else sorted((base / "choices").glob("*")):
        if not place.is_dir() or place.is_symlink():
            continue
        for path in sorted(place.glob("*.json")):
            path.unlink(missing_ok=True)
            count += 1
        for path in sorted(place.glob(".*.tmp")):  # of a process that was killed
            path.unlink(missing_ok=True)
        if not any(place.iterdir()):
            place.rmdir()
    return count


def _file_name(row: Row) -> str:
    return f"{row.dtype}-{row.shape}.json"


@functools.cache
def _version(isa: str, threads: int) -> str:
    spec = importlib.util.find_spec("svdkern._C")
    code = Path(spec.origin).read_bytes() if spec is not None and spec.origin else b""
    rest = "\0".join((torch.__version__, _processor(), isa, str(threads)))
    return hashlib.sha256(code + b"\0" + rest.encode()).hexdigest()[:16]


def _processor() -> str:
    """Its model and number of cores: a home directory may be several machines'."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()} {os.cpu_count()}"


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("tuned choices are not kept: %s", reason)
