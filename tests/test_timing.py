"""The timing discipline, on a clock of its own: nothing here depends on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from svdkern import timing


class FakeClock:
    """Calls last what the test says, so that nothing depends on the machine."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.order: list[tuple[str, int, int]] = []

    def __call__(self, call: Any, first: int, calls: int) -> float:
        name = call(first)
        self.order.append((name, first, calls))
        return self.seconds[name]


def test_a_timing_is_median_and_percentiles() -> None:
    found = timing.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median_s, found.p20_s, found.p80_s, found.n) == (3.5, 2.0, 5.0, 6)
    with pytest.raises(ValueError, match="no samples"):
        timing.Timing.of([])


def test_interleave_runs_everyone_in_every_round_and_rotates_the_order() -> None:
    clock = FakeClock({"a": 0.1, "b": 0.2, "c": 0.3})
    calls = {name: (lambda i, name=name: name) for name in "abc"}
    timings = timing.interleave(calls, seconds=1.9, min_rounds=2, warmup=1, clock=clock)
    assert {name: timing.n for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = [name for name, _, _ in clock.order][3:]
    assert rounds == list("abc" + "bca" + "cab")
    assert timings["b"].median_s == pytest.approx(0.2)
    # The running number never repeats, whoever is called: every call gets the next inputs of the rotation.
    assert [first for _, first, _ in clock.order] == list(range(12))


def test_interleave_lets_a_call_settle_before_its_samples() -> None:
    clock = FakeClock({"a": 0.1, "b": 0.1})
    calls = {name: (lambda i, name=name: name) for name in "ab"}
    timings = timing.interleave(calls, seconds=1.6, min_rounds=1, warmup=1, settle=1, in_a_row=3, clock=clock)
    assert [name for name, _, _ in clock.order][2:] == list("aaaabbbb" + "bbbbaaaa")
    assert [first for _, first, _ in clock.order] == list(range(18))
    assert {name: timing.n for name, timing in timings.items()} == {"a": 6, "b": 6}


def test_interleave_repeats_short_calls_within_a_sample() -> None:
    clock = FakeClock({"a": 1e-5})
    timing.interleave({"a": lambda i: "a"}, seconds=0.01, sample_seconds=1e-3, min_rounds=1, clock=clock)
    assert clock.order[-1][2] == 100


def test_interleave_keeps_within_its_rounds() -> None:
    clock = FakeClock({"a": 10.0})
    assert timing.interleave({"a": lambda i: "a"}, seconds=1, min_rounds=3, clock=clock)["a"].n == 3
    clock = FakeClock({"a": 0.01})
    assert timing.interleave({"a": lambda i: "a"}, seconds=100, max_rounds=8, clock=clock)["a"].n == 8


@pytest.mark.parametrize(
    ("seconds", "expected", "tries"),
    [([0.1], 0.1, 1), ([9.0, 0.1], 0.1, 2), ([9.0, 3.0, 5.0, 4.0], 3.0, 4)],
    ids=["fast", "first call slow", "slow"],
)
def test_the_least_of_a_few_calls_decides_what_is_too_slow(seconds: list[float], expected: float, tries: int) -> None:
    asked: list[int] = []

    def clock(call: Any, first: int, calls: int) -> float:
        asked.append(first)
        return seconds[first]

    assert timing.least_seconds(lambda i: None, 1.0, clock=clock) == expected
    assert len(asked) == tries


@pytest.mark.parametrize(("size", "expected"), [(1000, 1), (1 << 20, 96), (64 << 20, 8), (1 << 30, 2)])
def test_rotation_exceeds_the_cache_where_the_layer_does(size: int, expected: int) -> None:
    assert timing.rotation_length(size) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """In a process of its own: once the heap has grown, a large block that is freed and taken again costs no page faults."""
    program = """
import resource, sys
from svdkern import timing
import torch
if sys.argv[1] == "keep":
    timing.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(60):
    faults()
print(sum(faults() for _ in range(20)))
"""

    def count(how: str) -> int:
        command = [sys.executable, "-c", program, how]
        environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536"} if how == "give back" else None
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    pages_of_a_call = 4882
    assert count("keep") < 5 * pages_of_a_call < 10 * pages_of_a_call < count("give back")
