"""Tables of measured layers: a row is one layer, with the seconds of each path and the path to take.

    {"version": 1, "rows": [
    {"isa": "avx2/AVX2", "dtype": "float32", "M": 64, "K": 576, "N": 1536, "r": 16,
     "seconds": {"fused": 1.2e-3, "steps": 1.3e-3, "eager": null}, "choice": "fused", "torch": "2.13.0", "threads": 2}]}

Seconds are those of one forward and backward; null: not measured, because far too slow or the same as another path.

Layer: below ``tuned`` and ``choices``.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

VERSION = 1
PATHS = ("fused", "steps", "eager")
DTYPES = ("float32", "bfloat16", "float16")

MARGIN = 0.03
"""A path replaces the one that was taken before only where it takes this much less time: noise must not change a choice."""

NEAR = (1.0, 1.0, 1.0, 2.0)
"""How many octaves a row may be off in M, K, N and r to stand for a layer that has none of its own."""


class Shape(NamedTuple):
    """x (M, K), weight (N, K), rank r."""

    M: int
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}x{self.r}"


def distance(a: Shape, b: Shape) -> float:
    """Octaves between two layers, summed over M, K, N and half of r; infinite where one says nothing about the other.

    That is beyond ``NEAR``, and between one row and several: a matrix-vector product is another routine in every library.
    """
    if (a.M == 1) != (b.M == 1) or not all(a) or not all(b):
        return 0.0 if a == b else math.inf
    off = [abs(math.log2(p) - math.log2(q)) for p, q in zip(a, b, strict=True)]
    return sum(off) - 0.5 * off[3] if all(o <= most for o, most in zip(off, NEAR, strict=True)) else math.inf


@dataclass(frozen=True)
class Row:
    """One measured layer."""

    isa: str
    dtype: str
    shape: Shape
    seconds: Mapping[str, float | None]
    choice: str
    torch: str
    threads: int

    def best(self, paths: Iterable[str]) -> str | None:
        """The choice if it is one of ``paths``, else the fastest of them that was measured."""
        paths = tuple(paths)
        return self.choice if self.choice in paths else fastest({path: self.seconds.get(path) for path in paths})

    def to_json(self) -> dict[str, Any]:
        return {
            "isa": self.isa,
            "dtype": self.dtype,
            **self.shape._asdict(),
            "seconds": dict(self.seconds),
            "choice": self.choice,
            "torch": self.torch,
            "threads": self.threads,
        }

    @staticmethod
    def from_json(found: Any) -> Row:
        """The row in what a file holds.

        Raises:
            ValueError: it is none; the message says why.
        """
        check_fields(found, _FIELDS)
        sizes = [found[name] for name in Shape._fields]
        if not all(type(size) is int and 0 < size < 1 << 48 for size in (*sizes, found["threads"])):
            raise ValueError(f"M, K, N, r and threads are {sizes} and {found['threads']!r}, expected positive integers")
        if not isinstance(found["isa"], str) or not isinstance(found["torch"], str) or found["dtype"] not in DTYPES:
            raise ValueError(f"isa, torch or dtype is none: {found['isa']!r}, {found['torch']!r}, {found['dtype']!r}")
        seconds = found["seconds"]
        if not isinstance(seconds, dict) or not set(seconds) <= set(PATHS) or not all(map(_time, seconds.values())):
            raise ValueError(f"seconds are {seconds!r}, expected times of {', '.join(PATHS)}")
        if found["choice"] not in PATHS:
            raise ValueError(f"choice is {found['choice']!r}, expected one of {', '.join(PATHS)}")
        return Row(
            found["isa"], found["dtype"], Shape(*sizes), seconds, found["choice"], found["torch"], found["threads"]
        )


def fastest(seconds: Mapping[str, float | None], before: str | None = None) -> str | None:
    """The path of the least time; ``before`` unless another beats it by more than ``MARGIN``. None if none was measured."""
    times = {path: time for path, time in seconds.items() if time is not None}
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    if before in times and times[best] >= (1 - MARGIN) * times[before]:
        return before
    return best


class Table:
    """Rows by what they were measured for; of two for the same layer the last counts."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows: dict[tuple[str, str], dict[Shape, Row]] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        self._rows.setdefault((row.isa, row.dtype), {})[row.shape] = row

    def find(self, isa: str, dtype: str, shape: Shape) -> Row | None:
        """The row of this layer, else the nearest (of several as near, the smallest shape), else None."""
        rows = self._rows.get((isa, dtype), {})
        if shape in rows:
            return rows[shape]
        near, _, row = min(
            ((distance(row.shape, shape), row.shape, row) for row in list(rows.values())),
            key=lambda candidate: candidate[:2],
            default=(math.inf, None, None),
        )
        return row if near < math.inf else None

    def __iter__(self) -> Iterator[Row]:
        """All rows, sorted."""
        everything = [row for rows in self._rows.values() for row in rows.values()]
        return iter(sorted(everything, key=lambda row: (row.isa, DTYPES.index(row.dtype), row.shape)))

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))


def read_table(path: Path) -> Table:
    """The table in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table, or of another version.
    """
    return Table(map(Row.from_json, rows_in(path.read_text(encoding="utf-8"), VERSION)))


def write_table(path: Path, table: Table) -> None:
    """Write a table, a row a line; the file appears whole or not at all."""
    write_whole(path, text_of((row.to_json() for row in table), VERSION))
    path.chmod(0o644)  # an aside file is its owner's alone; a table is shipped


def check_fields(found: Any, fields: Iterable[str]) -> None:
    """Raise a ValueError that says why, if ``found`` is no row with these fields."""
    if not isinstance(found, dict):
        raise ValueError(f"a row is an object, not {type(found).__name__}")
    if missing := [name for name in fields if name not in found]:
        raise ValueError(f"a row lacks {', '.join(missing)}")


def rows_in(text: str, version: int) -> list[Any]:
    """The rows in the text of a table.

    Raises:
        ValueError: it is no table, or of another version.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("version") != version or not isinstance(found.get("rows"), list):
        raise ValueError(f"expected a table of version {version}")
    return list(found["rows"])


def text_of(rows: Iterable[Any], version: int) -> str:
    """The text of a table, a row a line."""
    lines = ",\n".join(map(json.dumps, rows))
    return f'{{"version": {version}, "rows": [{f"{chr(10)}{lines}{chr(10)}" if lines else ""}]}}\n'


def text_in(path: Path, longest: int, *, ours: bool) -> str:
    """What a file holds, at most so many characters; ``ours``: a plain file of this user, or none. A pipe is not waited for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not ours, or longer.
    """
    with open(path, encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if ours and (not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid()):
            raise ValueError("not a file of this user")
        text = file.read(longest + 1)
    if len(text) > longest:
        raise ValueError(f"longer than {longest} characters")
    return text


def write_whole(path: Path, text: str) -> None:
    """Write a file aside and rename it: a reader sees the old one or the new one, and writers need no lock.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _time(found: Any) -> bool:
    return found is None or (type(found) in (int, float) and 0 < found < math.inf)


_FIELDS = ("isa", "dtype", *Shape._fields, "seconds", "choice", "torch", "threads")
