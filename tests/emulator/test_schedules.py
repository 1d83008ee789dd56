"""Who runs when: lanes that part and meet again, deadlocks, endless loops, adversaries, CTAs that wait for a place."""

from __future__ import annotations

import numpy as np
import pytest
from programs import run
from ptx_emulator.errors import Deadlock, EndlessLoop, PartialWarp, PtxError
from ptx_emulator.launch import ADVERSARIES, MODES

pytestmark = pytest.mark.emulator
STORE = "mad.wide.u32 %d9, %tx, 4, %d0; st.global.u32 [%d9], %r9;"
EVERY = [(mode, seed) for mode in MODES for seed in range(len(ADVERSARIES) if mode == "adversarial" else 1)]

# ------------------------------------------------------------------------------------------- lanes part and meet again


@pytest.mark.parametrize(("mode", "seed"), EVERY)
def test_loops_of_different_lengths_end_in_one_warp(mode: str, seed: int) -> None:
    """Lane l takes l % 5 turns of a loop; behind it stands a collective that needs all of them, at once."""
    body = """
    rem.u32 %r1, %lane, 5; mov.u32 %r2, 0;
    LOOP: setp.ge.u32 %p1, %r2, %r1; @%p1 bra DONE;
    add.u32 %r2, %r2, 1; bra.uni LOOP;
    DONE: redux.sync.add.u32 %r9, %r2, -1;
    """
    out = np.zeros(64, np.uint32)
    run(body + STORE, out, threads=64, mode=mode, seed=seed)
    assert set(out) == {sum(i % 5 for i in range(32))}


def test_both_sides_of_a_branch_and_branches_within() -> None:
    body = """
    mov.u32 %r9, 0; and.b32 %r1, %lane, 1; setp.eq.u32 %p1, %r1, 0; setp.lt.u32 %p2, %lane, 20;
    @%p1 bra EVEN;
        add.u32 %r9, %r9, 1; @!%p2 bra JOIN; add.u32 %r9, %r9, 10; bra.uni JOIN;
    EVEN:
        add.u32 %r9, %r9, 100; @%p2 bra SMALL; add.u32 %r9, %r9, 1000; bra.uni JOIN;
        SMALL: add.u32 %r9, %r9, 2000;
    JOIN: vote.sync.ballot.b32 %r2, %p1, -1; popc.b32 %r2, %r2; mad.lo.u32 %r9, %r2, 10000, %r9;
    """
    out = np.zeros(32, np.uint32)
    run(body + STORE, out)
    want = [(100 + (2000 if i < 20 else 1000)) if i % 2 == 0 else 1 + (10 if i < 20 else 0) for i in range(32)]
    assert out.tolist() == [160000 + w for w in want]


def test_a_loop_in_a_loop_with_breaks() -> None:
    """sum of min(j, l) over i < l % 4, j < i + l, with a way out in the middle, as Python has it."""

    def expected(lane: int) -> int:
        total = 0
        for i in range(lane % 4):
            for j in range(i + lane):
                if total > 50:
                    return total
                total += min(j, lane)
        return total

    body = """
    mov.u32 %r9, 0; and.b32 %r1, %lane, 3; mov.u32 %r2, 0;
    OUTER: setp.ge.u32 %p1, %r2, %r1; @%p1 bra DONE; mov.u32 %r3, 0; add.u32 %r4, %r2, %lane;
    INNER: setp.ge.u32 %p2, %r3, %r4; @%p2 bra NEXT;
        setp.gt.u32 %p3, %r9, 50; @%p3 bra DONE;
        min.u32 %r5, %r3, %lane; add.u32 %r9, %r9, %r5; add.u32 %r3, %r3, 1; bra.uni INNER;
    NEXT: add.u32 %r2, %r2, 1; bra.uni OUTER;
    DONE: bar.sync 0;
    """
    out = np.zeros(32, np.uint32)
    run(body + STORE, out)
    assert out.tolist() == [expected(i) for i in range(32)]


def test_lanes_that_meet_at_the_target_of_a_forward_jump_run_on_together() -> None:
    """The second group jumps to where the first one waits: what stands there runs once, for both."""
    body = """
    mov.u32 %r9, 0; setp.lt.u32 %p1, %lane, 8; setp.lt.u32 %p2, %lane, 16;
    @%p1 bra MEET; mov.u32 %r9, 5; @%p2 bra MEET; mov.u32 %r9, 7;
    MEET: add.u32 %r9, %r9, 100; atom.global.add.u32 %r2, [%d1], 1; activemask.b32 %r3; popc.b32 %r3, %r3;
    mad.lo.u32 %r9, %r3, 1000, %r9;
    """
    out, count = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
    run(body + STORE, out, count)
    assert out.tolist() == [32100] * 8 + [32105] * 8 + [32107] * 16 and count[0] == 32


@pytest.mark.parametrize(("mode", "seed"), EVERY)
def test_one_lane_waits_for_another_cta_while_its_warp_stands(mode: str, seed: int) -> None:
    """As CUDA code does it: thread 0 spins in a loop of its own. It must not spin alone."""
    body = """
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; setp.ne.u32 %p2, %tx, 0; @%p2 bra READY; @%p1 bra FIRST;
    SPIN: ld.acquire.gpu.global.u32 %r2, [%d1]; setp.eq.u32 %p3, %r2, 0; @%p3 bra SPIN; bra.uni READY;
    FIRST: mov.u32 %r3, 9; st.release.gpu.global.u32 [%d1], %r3;
    READY: bar.sync 0; ld.relaxed.gpu.global.u32 %r9, [%d1]; mad.lo.u32 %tx, %r1, 64, %tx;
    """
    out, flag = np.zeros(128, np.uint32), np.zeros(1, np.uint32)
    run(body + STORE, out, flag, threads=64, grid=(2,), resident=2, mode=mode, seed=seed, budget=20_000)
    assert set(out[64:]) == {9}


# ------------------------------------------------------------------------------------------------------ ends of lanes


def test_lanes_may_end_before_the_others() -> None:
    body = "setp.lt.u32 %p1, %lane, 10; @%p1 ret; activemask.b32 %r9; @%p1 mov.u32 %r9, 0;" + STORE
    out = np.zeros(64, np.uint32)
    run(body, out, threads=64)
    assert out.reshape(2, 32).tolist() == [[0] * 10 + [2**32 - 2**10] * 22] * 2


def test_who_has_ended_is_missing_in_a_collective() -> None:
    with pytest.raises(PartialWarp, match="0xffffff00 are here"):
        run("setp.lt.u32 %p1, %lane, 8; @%p1 exit; shfl.sync.bfly.b32 %r1, %tx, 1, 31, -1;")


@pytest.mark.parametrize("order", ["low first", "high first"])
def test_parts_of_a_warp_end_in_different_places(order: str) -> None:
    test = "setp.lt.u32 %p1, %lane, 16;" if order == "low first" else "setp.ge.u32 %p1, %lane, 16;"
    body = test + "@%p1 bra OTHER; mov.u32 %r9, 1;" + STORE + "ret; OTHER: mov.u32 %r9, 2;" + STORE
    out = np.zeros(32, np.uint32)
    run(body, out)
    assert sorted(out.tolist()) == [1] * 16 + [2] * 16 and out[0] == (2 if order == "low first" else 1)


# -------------------------------------------------------------------------------------------- deadlocks, endless loops


def test_a_deadlock_says_who_waits_where() -> None:
    body = (
        "mov.u32 %r1, %ctaid.x; setp.lt.u32 %p1, %tx, 32; @%p1 bra FIRST; bar.sync 1, 64; ret; FIRST: bar.sync 2, 64;"
    )
    with pytest.raises(Deadlock) as caught:
        run(body, threads=64, grid=(2,))
    said = str(caught.value)
    assert all(f"CTA {cta} warp {warp} at bar.sync {2 - warp}, 64" in said for cta in (0, 1) for warp in (0, 1))


def test_a_barrier_that_a_warp_has_left_behind() -> None:
    with pytest.raises(Deadlock, match="warp 1 at bar.sync 0"):
        run("setp.lt.u32 %p1, %tx, 32; @%p1 ret; bar.sync 0;", threads=64)


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_without_end(mode: str) -> None:
    with pytest.raises(EndlessLoop, match=r"(?s)1000 instructions and no end.*PTX line"):
        run("AGAIN: add.u32 %r1, %r1, 1; bra.uni AGAIN;", threads=64, mode=mode, budget=1000)


# --------------------------------------------------------------------------------------------------------- adversaries

REDUCTION = """
    .reg .f32 %x, %y;
    mad.wide.u32 %d9, %tx, 4, %d0; mov.u32 %r1, %ctaid.x; mul.wide.u32 %d8, %r1, 512; add.s64 %d9, %d9, %d8;
    ld.global.f32 %x, [%d9]; mov.b32 %r2, tile; mad.lo.u32 %r3, %tx, 4, %r2; st.shared.f32 [%r3], %x; mov.u32 %r4, 64;
    HALVE: bar.sync 0; setp.ge.u32 %p1, %tx, %r4; @%p1 bra SKIP;
        mad.lo.u32 %r5, %r4, 4, %r3; ld.shared.f32 %y, [%r5]; ld.shared.f32 %x, [%r3]; add.f32 %x, %x, %y; st.shared.f32 [%r3], %x;
    SKIP: shr.u32 %r4, %r4, 1; setp.ne.u32 %p2, %r4, 0; @%p2 bra HALVE;
    setp.ne.u32 %p3, %tx, 0; @%p3 bra DONE; mad.wide.u32 %d9, %r1, 4, %d1; st.global.f32 [%d9], %x;
    DONE:
"""


@pytest.mark.parametrize("resident", [None, 1, 2])
def test_a_reduction_gives_the_same_bits_in_every_mode(resident: int | None) -> None:
    values = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    want = values.copy()
    for half in (64, 32, 16, 8, 4, 2, 1):
        want[:, :half] += want[:, half : 2 * half]
    for mode, seed in EVERY:
        out = np.zeros(6, np.float32)
        run(REDUCTION, values, out, threads=128, grid=(6,), resident=resident, mode=mode, seed=seed,
            declared=".shared .align 16 .b8 tile[512];")  # fmt: skip
        assert np.array_equal(out, want[:, 0]), (mode, seed)


def test_without_its_barrier_it_does_not() -> None:
    """The same program, damaged: every adversary that runs warps one by one sees it, and so does the race detector."""
    values, out = np.ones((6, 128), np.float32), np.zeros(6, np.float32)
    damaged = REDUCTION.replace("HALVE: bar.sync 0;", "HALVE:")
    seen = set()
    for mode, seed in EVERY:
        try:
            run(
                damaged,
                values,
                out,
                threads=128,
                grid=(6,),
                mode=mode,
                seed=seed,
                declared=".shared .align 16 .b8 tile[512];",
            )
        except PtxError as problem:
            seen.add((mode, type(problem).__name__))
        else:
            if not (out == 128).all():
                seen.add((mode, "bits"))
    assert ("race", "Race") in seen and any(mode == "adversarial" for mode, _ in seen)


def test_a_seed_repeats_itself() -> None:
    def order(seed: int) -> list[int]:
        counter, drawn = np.zeros(1, np.uint32), np.zeros(128, np.uint32)
        run("atom.global.add.u32 %r9, [%d1], 1; mov.u32 %r1, %ctaid.x; mad.lo.u32 %tx, %r1, 32, %tx;" + STORE, drawn, counter,
            grid=(4,), mode="adversarial", seed=seed)  # fmt: skip
        assert sorted(drawn) == [*range(128)]
        return drawn.tolist()

    orders = [order(seed) for seed in range(10)]
    assert orders == [order(seed) for seed in range(10)]
    assert len({tuple(o) for o in orders}) == 10


TICKET = "setp.eq.u32 %p3, %lane, 0; @%p3 atom.global.add.u32 %r1, [%d1], 1; shfl.sync.idx.b32 %r1, %r1, 0, 31, -1;"


def test_who_has_drawn_a_ticket_may_be_late() -> None:
    """Ticket t takes what ticket t - 1 wrote, and does not wait for it: it is there unless the other is kept from its work."""
    body = TICKET + """
        mov.u32 %r2, 0; mad.wide.u32 %d5, %r1, 4, %d0; setp.eq.u32 %p1, %r1, 0; @%p1 bra READY;
        ld.acquire.gpu.global.u32 %r2, [%d5+-4];
        READY: add.u32 %r3, %r2, 1; st.release.gpu.global.u32 [%d5], %r3;
    """  # fmt: skip
    stall = ADVERSARIES.index("stall")
    late = 0
    for seed in range(stall, 10 * len(ADVERSARIES), len(ADVERSARIES)):
        out, counter = np.zeros(4, np.uint32), np.zeros(1, np.uint32)
        run(body, out, counter, grid=(4,), mode="adversarial", seed=seed)
        late += out.tolist() != [1, 2, 3, 4]
    assert late >= 5


# -------------------------------------------------------------------------------------------------------- resident CTAs

CHAIN = """
    mov.u32 %r1, %ctaid.x; {order} mad.wide.u32 %d5, %r1, 4, %d0; setp.eq.u32 %p1, %r1, 0; @%p1 bra READY;
    SPIN: ld.acquire.gpu.global.u32 %r2, [%d5+-4]; setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN;
    READY: add.u32 %r3, %r1, 1; st.release.gpu.global.u32 [%d5], %r3;
"""


@pytest.mark.parametrize("resident", [1, 2, 5])
def test_all_ctas_run_whatever_fits(resident: int) -> None:
    out = np.zeros(12 * 32, np.uint32)
    body = "mov.u32 %r9, %ctaid.x; mad.lo.u32 %tx, %r9, 32, %tx;" + STORE
    for mode, seed in EVERY:
        out[:] = 99
        machine = run(body, out, grid=(2, 3, 2), resident=resident, mode=mode, seed=seed)
        assert machine.slots == resident and set(out[:64]) == {0, 1}


def test_waiting_for_a_cta_that_has_no_place() -> None:
    """Each CTA waits for the one before it. In the grid's own order that may hang, with tickets it may not."""
    hung = 0
    for seed in range(5):
        flags, counter = np.zeros(4, np.uint32), np.zeros(1, np.uint32)
        run(CHAIN.format(order=TICKET), flags, counter, grid=(4,), resident=1, mode="adversarial", seed=seed)
        assert flags.tolist() == [1, 2, 3, 4]
        try:
            run(
                CHAIN.format(order=""),
                flags * 0,
                counter,
                grid=(4,),
                resident=1,
                mode="adversarial",
                seed=seed,
                budget=2000,
            )
        except EndlessLoop:
            hung += 1
    assert hung >= 4
