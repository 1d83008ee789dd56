"""Which tiles a layer's Triton kernels are launched with: what was measured on this GPU, what was shipped, the rule.

A row of a table is one measured layer: (arch, dtype, family, R) and M, K, N. A layer takes the nearest row of both tables, up
to an octave away in M, K and N (``table.distance``; the tuned one of two as near), and where there is none the rule of
``triton_kernels/configs.py``. So do layers with a core, which need all ranks in one tile.

    triton_tiles.json                                     shipped; empty: nothing measured yet was faster than the rule
    $SVDKERN_CACHE_DIR | ... /tiles/<version>.json        of this user, by ``python -m svdkern tune --device cuda``

``<version>`` is a hash of the kernels' sources, Triton, torch and the GPU's name. A file that is missing, broken or another
user's is as good as none. In a distributed job only the shipped rows and the rule count, so that all ranks choose alike.

Layer: below ``triton``; above ``choices`` and ``tuned``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from svdkern.backends.choices import distributed
from svdkern.backends.table import DTYPES, Shape, check_fields, distance, rows_in, text_in, text_of, write_whole
from svdkern.backends.tuned import base_folder
from svdkern.triton_kernels import configs
from svdkern.triton_kernels.configs import FAMILIES, Config

log = logging.getLogger("svdkern")

VERSION = 1
SHIPPED = Path(__file__).with_name("triton_tiles.json")
_LONGEST = 1 << 20  # characters of a table's file


@dataclass(frozen=True)
class Row:
    """One measured layer; ``shape.r`` is R, the padded rank. ``rule_s`` is None where the rule's tiles could not be run."""

    arch: int
    dtype: str
    family: str
    shape: Shape
    config: Config
    seconds: float
    rule_s: float | None
    gpu: str
    triton: str

    def to_json(self) -> dict[str, Any]:
        sizes = self.shape._asdict()
        sizes["R"] = sizes.pop("r")
        fields = {name: getattr(self, name) for name in ("seconds", "rule_s", "gpu", "triton")}
        return {
            "arch": self.arch, "dtype": self.dtype, "family": self.family, **sizes, "config": self.config._asdict(), **fields,
        }  # fmt: skip

    @staticmethod
    def from_json(found: Any) -> Row:
        """The row in what a file holds.

        Raises:
            ValueError: it is none; the message says why.
        """
        check_fields(found, _FIELDS)
        sizes = [found[name] for name in ("M", "K", "N", "R")]
        if not all(type(size) is int and 0 < size < 1 << 48 for size in (*sizes, found["arch"])):
            raise ValueError(f"arch, M, K, N and R are {found['arch']!r} and {sizes}, expected positive integers")
        if found["dtype"] not in DTYPES or found["family"] not in FAMILIES:
            raise ValueError(f"dtype or family is none: {found['dtype']!r}, {found['family']!r}")
        if not isinstance(found["gpu"], str) or not isinstance(found["triton"], str):
            raise ValueError(f"gpu or triton is no text: {found['gpu']!r}, {found['triton']!r}")
        if not _time(found["seconds"]) or not (found["rule_s"] is None or _time(found["rule_s"])):
            raise ValueError(f"seconds and rule_s are {found['seconds']!r} and {found['rule_s']!r}, expected times")
        config = _config(found["config"], found["family"], sizes[3])
        return Row(
            found["arch"], found["dtype"], found["family"], Shape(*sizes), config,
            found["seconds"], found["rule_s"], found["gpu"], found["triton"],
        )  # fmt: skip


_FIELDS = ("arch", "dtype", "family", "M", "K", "N", "R", "config", "seconds", "rule_s", "gpu", "triton")


def _time(found: Any) -> bool:
    return type(found) in (int, float) and 0 < found < math.inf


def _config(found: Any, family: str, R: int) -> Config:
    """A configuration that the kernels can be compiled with."""
    if not isinstance(found, dict) or set(found) != set(Config._fields):
        raise ValueError(f"config is {found!r}, expected {', '.join(Config._fields)}")
    if not all(type(size) is int and 0 < size <= 4096 for size in found.values()):
        raise ValueError(f"config is {found}, expected positive integers")
    config = Config(**found)
    tiles = (config.BM, config.BN, config.BK, config.BF, config.BD, config.RT)
    powers = all(n & (n - 1) == 0 for n in (*tiles, config.num_warps))
    few_rows = family == "decode" and (config.BM < configs.DECODE_M or config.RT != R)
    if not powers or min(tiles) < 16 or R % config.RT or config.num_warps > 16 or config.num_stages > 8 or few_rows:
        raise ValueError(f"config is {found}, which is none for the {family} kernels and R={R}")
    return config


# ------------------------------------------------------------------------------------------------------------- files


def read_rows(path: Path, *, ours: bool = False) -> list[Row]:
    """The rows of a table.

    Args:
        path: the file.
        ours: whether it must be a plain file of this user.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no table, or of another version.
    """
    text = text_in(path, _LONGEST, ours=ours)
    return [Row.from_json(row) for row in rows_in(text, VERSION)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a table, a row a line, sorted; of two rows for the same layer the last. The file appears whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    last = {(row.arch, DTYPES.index(row.dtype), FAMILIES.index(row.family), row.shape): row for row in rows}
    write_whole(path, text_of((last[key].to_json() for key in sorted(last)), VERSION))


def user_file(gpu: str) -> Path | None:
    """Where this user's rows for a GPU are; None where the environment names no place."""
    base = base_folder()
    return None if base is None else base / "tiles" / f"{_version(gpu)}.json"


def save(rows: Iterable[Row], gpu: str) -> Path:
    """Add rows to this user's table.

    Raises:
        OSError: it could not be written.
    """
    path = user_file(gpu)
    if path is None:
        raise OSError("no SVDKERN_CACHE_DIR, XDG_CACHE_HOME or home directory")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_rows(path, [*_read_or_say(path, ours=True), *rows])
    forget()
    return path


def clear() -> int:
    """Remove this user's tables, of every version and GPU, and return how many there were."""
    base, count = base_folder(), 0
    for path in [] if base is None else sorted((base / "tiles").glob("*.json")):
        path.unlink(missing_ok=True)
        count += 1
    forget()
    return count


def _read_or_say(path: Path, *, ours: bool) -> list[Row]:
    try:
        return read_rows(path, ours=ours)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        log.warning("ignoring a table of tiles: %s: %s", path, error)
        return []


@functools.cache
def _version(gpu: str) -> str:
    digest = hashlib.sha256("\0".join((gpu, torch.__version__, triton_version())).encode())
    for file in sorted(Path(configs.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def triton_version() -> str:
    """As "3.6.0"; "none" where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


# ----------------------------------------------------------------------------------------------------------- look-up


class Tables(NamedTuple):
    """Both tables, read."""

    tuned: list[Row]
    shipped: list[Row]


@functools.cache
def tables(gpu: str) -> Tables:
    """The tables in force on a GPU (by name; "" for none)."""
    path = user_file(gpu) if gpu else None
    tuned = [] if path is None else _read_or_say(path, ours=True)
    return Tables(tuned, _read_or_say(SHIPPED, ours=False))


def forget() -> None:
    """Read the tables again at the next call."""
    tables.cache_clear()
    _find.cache_clear()


def choose(family: str, device: torch.device, dtype: torch.dtype, core: bool, shape: Shape) -> Config:
    """The tiles of a layer.

    Args:
        family: "forward", "backward" or "decode".
        device: where it runs.
        dtype: of its activations.
        core: whether it has one.
        shape: its sizes; ``r`` is R, the padded rank.
    """
    from svdkern.triton_kernels import launching

    arch = launching.architecture(device)
    if not core:
        name = gpu_name(device) if device.type == "cuda" else ""
        if (row := _find(name, arch, dtype, family, shape)) is not None:
            return row.config
    return rule(family, arch, dtype, core, shape, launching.processors(device))


def rule(family: str, arch: int, dtype: torch.dtype, core: bool, shape: Shape, processors: int) -> Config:
    """The tiles of a layer that no row is near."""
    if family == "decode":
        return configs.decoding(dtype, shape.r)
    out = shape.N if family == "forward" else shape.K
    return configs.training(arch, dtype, shape.r, core, shape.M, out, processors)


@functools.lru_cache(maxsize=4096)
def _find(gpu: str, arch: int, dtype: torch.dtype, family: str, shape: Shape) -> Row | None:
    both = tables(gpu)
    of_kind = (arch, str(dtype).removeprefix("torch."), family, shape.r)
    near: list[tuple[float, bool, Shape, Row]] = []
    for rows, shipped in ((both.shipped, True), (both.tuned, False)):
        if not shipped and rows and distributed():
            continue
        for row in rows:
            if (row.arch, row.dtype, row.family, row.shape.r) == of_kind:
                near.append((distance(row.shape, shape), shipped, row.shape, row))
    best = min(near, key=lambda candidate: candidate[:3], default=None)
    return best[3] if best is not None and best[0] < math.inf else None


@functools.cache
def gpu_name(device: torch.device) -> str:
    """As the driver has it."""
    return torch.cuda.get_device_name(device)
