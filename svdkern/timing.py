"""Timing candidates side by side: what ``python -m svdkern tune`` and the benchmarks share.

- Candidates are timed round robin in one process, in an order rotated every round, so that a slow minute of the machine
  falls on all of them.
- A figure is a median with its 20th and 80th percentile, never a mean and never a best case.

Layer: depends on nothing here.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of `n` samples."""

    median_s: float
    p20_s: float
    p80_s: float
    n: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        if not samples:
            raise ValueError("no samples: a timing needs at least one")
        ordered = sorted(samples)
        last = len(ordered) - 1
        return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def cpu_clock(call: Callable[[int], object], first: int, calls: int) -> float:
    """Seconds per call of `call(first) … call(first + calls - 1)` by the wall clock."""
    start = time.perf_counter()
    for i in range(first, first + calls):
        call(i)
    return (time.perf_counter() - start) / calls


def cuda_clock(call: Callable[[int], object], first: int, calls: int) -> float:
    """The same by CUDA events: the time between two marks on the stream, host overhead included only where it shows."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for i in range(first, first + calls):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what is freed, for this process; elsewhere nothing happens.

    Otherwise it gives large blocks back to the system or not, by the order in which they happen to be freed, and the next
    call of a layer pays hundreds of page faults (up to 5 % of its time) that fall on candidates by chance.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)  # the most that it takes


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    sample_seconds: float = 2e-3,
    warmup: int = 2,
    settle: int = 0,
    in_a_row: int = 1,
    clock: Callable[[Callable[[int], object], int, int], float] = cpu_clock,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times the calls in turn, round after round, for about `seconds` altogether.

    A call gets a running number as its only argument, with which it picks its inputs from a rotation. All candidates share
    the count: otherwise one would find in the caches what the one before it has just used. Calls shorter
    than `sample_seconds` are repeated within a sample, since switching candidates at every call would measure cold
    instruction caches, not the call. At its turn a candidate gives `in_a_row` samples after `settle` calls that are not
    timed: the first call after another candidate's pays for code and workspace that have left the caches, and the first
    training step after another model's for memory that the allocator gave back. `on_round(done, total)` reports progress.
    """
    if not calls:
        return {}
    names = list(calls)
    number = 0

    def sample(name: str, repeat: int) -> float:
        nonlocal number
        first, number = number, number + repeat
        return clock(calls[name], first, repeat)

    once: dict[str, float] = {}
    for name in names:
        for _ in range(max(1, warmup)):
            once[name] = sample(name, 1)
    # The last warm-up call may still carry a first-time cost, so short calls are measured again over a few repeats.
    for name in names:
        if once[name] < sample_seconds:
            once[name] = sample(name, 10)
    repeat = {name: max(1, min(10_000, round(sample_seconds / max(once[name], 1e-9)))) for name in names}
    round_seconds = sum(once[name] * (settle + in_a_row * repeat[name]) for name in names)
    rounds = max(min_rounds, min(max_rounds, int(seconds / max(round_seconds, 1e-9))))

    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= min_rounds and time.perf_counter() - start > 1.3 * seconds:
            break  # the machine has become busier than it was when the rounds were counted
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            for _ in range(settle):
                sample(name, 1)
            samples[name].extend(sample(name, repeat[name]) for _ in range(in_a_row))
        if on_round is not None:
            on_round(done + 1, rounds)
    return {name: Timing.of(values) for name, values in samples.items()}


def least_seconds(
    call: Callable[[int], object],
    enough: float,
    *,
    tries: int = 4,
    clock: Callable[[Callable[[int], object], int, int], float] = cpu_clock,
) -> float:
    """The least time of one call in up to `tries`, none of them after one that took no more than `enough`.

    For deciding that something is too slow to be run: a first call's costs and other programs only ever make a call
    slower, and one try on a busy machine once left out the frozen layer itself. It is no result.
    """
    least = math.inf
    for i in range(tries):
        least = min(least, clock(call, i, 1))
        if least <= enough:
            break
    return least


def rotation_length(bytes_per_set: int, *, cap_bytes: int = 512 << 20, hot_below: int = 1 << 20, most: int = 96) -> int:
    """How many copies of a call's tensors to rotate through so that none is still in the last-level cache.

    A set below `hot_below` bytes is used hot (1), as such a layer is in practice. Otherwise the copies together fill
    `cap_bytes`, which is larger than the share of a cache that one process holds on most machines.
    """
    if bytes_per_set < hot_below:
        return 1
    return max(2, min(most, -(-cap_bytes // bytes_per_set)))
