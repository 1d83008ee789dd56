"""Counts of a run: bytes and sectors of global accesses, passes of shared ones."""

from __future__ import annotations

import numpy as np
import pytest
from programs import run, zeros
from ptx_emulator import Statistics

pytestmark = pytest.mark.emulator
TILE = ".shared .align 128 .b8 tile[8192];"


def only(body: str, **launch) -> tuple:  # type: ignore[no-untyped-def]
    """(times, bytes, sectors, least sectors, passes, least passes) of the instruction that is counted last."""
    statistics = Statistics()
    run(body, zeros(4096, np.uint32), statistics=statistics, declared=TILE, **launch)
    entry = list(statistics.accesses.values())[-1]
    return entry.times, entry.bytes, entry.sectors, entry.least_sectors, entry.passes, entry.least_passes


@pytest.mark.parametrize(
    ("stride", "instruction", "expected"),
    [
        (4, "ld.global.b32 %r1, [%d1];", (1, 128, 4, 4, 0, 0)),
        (16, "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];", (1, 512, 16, 16, 0, 0)),
        (128, "ld.global.b32 %r1, [%d1];", (1, 128, 32, 4, 0, 0)),
        (0, "ld.global.b32 %r1, [%d1];", (1, 128, 1, 1, 0, 0)),
        (8, "st.global.b32 [%d1], %tx;", (1, 128, 8, 4, 0, 0)),
        (4, "st.global.b8 [%d1], %tx;", (1, 32, 4, 1, 0, 0)),
    ],
)
def test_sectors_of_global_memory(stride: int, instruction: str, expected: tuple) -> None:
    assert (
        only(f"mul.lo.u32 %r9, %tx, {stride}; cvt.u64.u32 %d1, %r9; add.s64 %d1, %d0, %d1; {instruction}") == expected
    )


@pytest.mark.parametrize(
    ("stride", "value", "passes", "least"),
    [(4, "b32", 1, 1), (8, "b32", 2, 1), (128, "b32", 32, 1), (132, "b32", 1, 1), (0, "b32", 1, 1), (16, "v4", 4, 4),
     (32, "v4", 8, 4), (2, "b16", 1, 1)],
)  # fmt: skip
def test_passes_of_shared_memory(stride: int, value: str, passes: int, least: int) -> None:
    store = "st.shared.v4.b32 [%r1], {%tx, %tx, %tx, %tx};" if value == "v4" else f"st.shared.{value} [%r1], %tx;"
    found = only(f"mov.b32 %r1, tile; mad.lo.u32 %r1, %tx, {stride}, %r1;" + store)
    assert found[4:] == (passes, least)


@pytest.mark.parametrize(("stride", "passes"), [(16, 4), (32, 8), (128, 32), (144, 4)])
def test_passes_of_ldmatrix(stride: int, passes: int) -> None:
    """Eight rows of 16 bytes: at a stride of 144 each in banks of its own, at 128 all in the same four."""
    body = f"""
    mov.b32 %r1, tile; mad.lo.u32 %r1, %tx, {stride}, %r1; st.shared.v4.b32 [%r1], {{%tx, %tx, %tx, %tx}};
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];
    """
    assert only(body) == (1, 512, 0, 0, passes, 4)


def test_warps_and_guards_are_counted() -> None:
    body = "setp.lt.u32 %p1, %tx, 40; mad.wide.u32 %d1, %tx, 4, %d0; @%p1 ld.global.b32 %r1, [%d1];"
    assert only(body, threads=96) == (2, 160, 5, 5, 0, 0)


def test_sums_over_a_run() -> None:
    """28 sectors too many of the second load, one pass too many of the store; each instruction once for each of two warps."""
    statistics = Statistics()
    body = """
    mov.b32 %r1, tile; mad.wide.u32 %d1, %lane, 4, %d0;
    ld.global.b32 %r2, [%d1];
    mad.wide.u32 %d2, %lane, 64, %d0;
    ld.global.b32 %r3, [%d2];
    mad.lo.u32 %r4, %lane, 8, %r1;
    st.shared.b32 [%r4], %r3;
    """
    run(body, zeros(4096, np.uint32), threads=64, statistics=statistics, declared=TILE)
    assert (statistics.wasted_sectors(), statistics.conflicts()) == (2 * 28, 2 * 1)
    assert {name: statistics.instructions[name] for name in ("ld", "st", "mad", "ret")} == {
        "ld": 6,
        "st": 2,
        "mad": 6,
        "ret": 2,
    }
