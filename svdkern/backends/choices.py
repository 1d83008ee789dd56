"""Which path of the cpu backend a layer takes: what was measured here, what was measured before it was shipped, the rule.

In this order: the rows that ``python -m svdkern tune`` or ``SVDKERN_AUTOTUNE=1`` left on this machine (``tuned``), the rows of
``choices.json``, whichever has the nearer row (``table.distance``; the tuned one of two as near), and ``cpu.fuses``. The tables
are read at the first call; so is the number of threads that the tuned rows are for. The shipped rows are for any number: they,
and with them a run's bits, do not depend on it.

In a distributed job every rank must make the same choice, whatever its own disk or clock says: only the shipped table and the
rule count there.

Layer: above ``cpu``, ``tuned`` and ``measure``; below ``dispatch``.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from svdkern.backends import cpu, tuned
from svdkern.backends.measure import seconds_of_paths
from svdkern.backends.table import PATHS, Row, Shape, Table, distance, fastest, read_table

log = logging.getLogger("svdkern")

SHIPPED = Path(__file__).with_name("choices.json")

AUTOTUNE_SECONDS = 0.3
"""What the first call of a layer may take longer under ``SVDKERN_AUTOTUNE=1``; layers too large for that are not measured."""

AUTOTUNE_OCTAVE = 0.25
"""So near in M (same K, N and r) a tuned row serves: batches of every length would otherwise each be measured."""


class Choice(NamedTuple):
    """A path and where it comes from: "tuned here", "shipped table" (with the row, if it is another layer's), or "rule"."""

    path: str
    source: str


class Tables(NamedTuple):
    """Both tables, read."""

    tuned: Table
    shipped: Table


def tables() -> Tables:
    """The tables in force; read now if they have not been."""
    global _tables
    if _tables is None:
        try:
            shipped = read_table(SHIPPED)
        except (OSError, ValueError) as error:
            log.warning("ignoring the shipped table of choices: %s: %s", SHIPPED, error)
            shipped = Table()
        _tables = Tables(Table(tuned.load()), shipped)
    return _tables


def forget() -> None:
    """Read the tables again at the next call."""
    global _tables
    _tables = None
    _said.clear()


def distributed() -> bool:
    """Whether this process is one of several ranks (``torch.distributed``, or WORLD_SIZE in the environment)."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if there and torch.distributed.get_world_size() > 1:
        return True
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdigit() and int(size) > 1


def choose(shape: Shape, dtype: torch.dtype, *, eager: bool = True, use_tuned: bool = True) -> Choice:
    """The path of a layer.

    Args:
        shape: the layer.
        dtype: of its activations.
        eager: whether all of it may be ATen's: not with dropout, whose mask is slow there, nor where "cpu" was asked for.
        use_tuned: whether rows of this machine count (never in a distributed job).
    """
    allowed = PATHS if eager else ("fused", "steps")
    sources = {"shipped table": tables().shipped}
    if use_tuned and not distributed():
        sources = {"tuned here": tables().tuned} | sources
    elif use_tuned and len(tables().tuned):
        _say_once("a distributed job: choices tuned on this machine are ignored, so that all ranks make the same")
    name = str(dtype).removeprefix("torch.")
    found = [
        (distance(row.shape, shape), source, row, path)
        for source, table in sources.items()
        if (row := table.find(cpu.isa(), name, shape)) is not None and (path := row.best(allowed)) is not None
    ]
    if found:  # the nearest; of two as near the one that was tuned here
        _, source, row, path = min(found, key=lambda candidate: candidate[0])
        return Choice(path, source if row.shape == shape else f"{source}, nearest row {_in_words(row.shape)}")
    return rule(shape, dtype)


def rule(shape: Shape, dtype: torch.dtype) -> Choice:
    """The path of a layer that no row is near."""
    return Choice("fused" if cpu.fuses(shape.M, shape.K, shape.N, dtype) else "steps", "rule")


def paths_to_measure(shape: Shape, dtype: torch.dtype) -> tuple[str, ...]:
    """Those that differ for this layer."""
    return PATHS if cpu.steps_are_ours(shape.M, dtype) else ("fused", "steps")


def measured(shape: Shape, dtype: torch.dtype, seconds: dict[str, float | None], before: str) -> Row | None:
    """The row of a layer that was measured now; ``before`` is its choice without it. None where every path was too slow."""
    path = fastest(seconds, before if before in seconds else "steps")  # which is "eager", where that was not measured
    if path is None:
        return None
    name = str(dtype).removeprefix("torch.")
    return Row(cpu.isa(), name, shape, seconds, path, torch.__version__, torch.get_num_threads())


# ---- SVDKERN_AUTOTUNE=1 ------------------------------------------------------------------------------------------------


def autotune(shape: Shape, dtype: torch.dtype) -> bool:
    """Measure a layer that has no tuned row, and keep it. False if a later call shall do that, because now is not the time."""
    if distributed():
        _say_once("a distributed job: SVDKERN_AUTOTUNE is ignored, so that all ranks make the same choices")
        return True
    if torch.are_deterministic_algorithms_enabled() or not all(shape) or _is_known(shape, dtype):
        return True
    if not _quiet() or not _measuring.acquire(blocking=False):
        return False
    try:
        paths = {path: cpu.PATHS[path] for path in paths_to_measure(shape, dtype)}
        before = choose(shape, dtype, use_tuned=False).path
        before = before if before in paths else "steps"  # the same calls as "eager" there
        seconds = seconds_of_paths(
            shape,
            dtype,
            paths,
            seconds=AUTOTUNE_SECONDS / 2,
            slowest=AUTOTUNE_SECONDS / 20,
            cold_bytes=64 << 20,
        )
        row = measured(shape, dtype, seconds, before)
        if row is not None and seconds.get(before) is not None:
            tables().tuned.add(tuned.taken_over(row))
    finally:
        _measuring.release()
    return True


def _is_known(shape: Shape, dtype: torch.dtype) -> bool:
    row = tables().tuned.find(cpu.isa(), str(dtype).removeprefix("torch."), shape)
    if row is None or row.shape[1:] != shape[1:]:
        return False
    return abs(math.log2(row.shape.M / shape.M)) <= AUTOTUNE_OCTAVE


def _quiet() -> bool:
    """Whether calls of our own can be made and timed here: no tracer, transform, mode, capture or backward is looking on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._current_graph_task_id() != -1
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _in_words(shape: Shape) -> str:
    return " ".join(f"{name}={size}" for name, size in shape._asdict().items())


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning("%s", message)


_tables: Tables | None = None
_said: set[str] = set()
_measuring = threading.Lock()
