"""The race detector: what orders two warps on a byte of shared memory, and what does not."""

from __future__ import annotations

import numpy as np
import pytest
from programs import run
from ptx_emulator.errors import Race

pytestmark = pytest.mark.emulator
TILE = ".shared .align 1024 .b8 tile[4096];"
# %r2: this thread's word, %r3: that of a thread of the other warp
MINE = "mov.b32 %r1, tile; mad.lo.u32 %r2, %tx, 4, %r1; xor.b32 %r3, %tx, 32; mad.lo.u32 %r3, %r3, 4, %r1;"
WRITE, READ_OTHER = "st.shared.u32 [%r2], %tx;", "ld.shared.u32 %r4, [%r3];"
BAR = "bar.sync 0;"


def races(body: str, threads: int = 64, **launch) -> None:  # type: ignore[no-untyped-def]
    run(MINE + body, threads=threads, declared=TILE, mode="race", **launch)


@pytest.mark.parametrize(
    "body",
    [WRITE + BAR + READ_OTHER, WRITE + BAR + READ_OTHER + BAR + WRITE, WRITE + "ld.shared.u32 %r4, [%r2];" + WRITE,
     "st.shared.u32 [%r2], 0;" + BAR + READ_OTHER + "ld.shared.u32 %r4, [%r2];", WRITE + "bar.sync 1, 64;" + READ_OTHER],
    ids=["write, read", "write, read, write", "one's own", "two readers", "named barrier"],
)  # fmt: skip
def test_ordered(body: str) -> None:
    races(body)


@pytest.mark.parametrize(
    "body",
    [WRITE + "bar.warp.sync -1;" + READ_OTHER, WRITE + BAR + READ_OTHER + WRITE,
     WRITE + BAR + "st.shared.u32 [%r3], %tx;" + "ld.shared.u32 %r4, [%r2];"],
    ids=["read", "write after read", "read after another's write"],
)  # fmt: skip
def test_unordered(body: str) -> None:
    with pytest.raises(Race, match=r"(?s)shared address \d+: warp [01] and warp [01] with no barrier.*thread \d+"):
        races(body)


def test_at_once_the_same_value_or_a_race() -> None:
    """Compilers let every warp store what all of them hold."""
    races("st.shared.u32 [%r1], 5;")
    for value in ("%tx", "%lane"):
        with pytest.raises(Race, match="different values at once"):
            races(f"st.shared.u32 [%r1], {value};", threads=64 if value == "%tx" else 32)


def test_a_barrier_of_others_orders_nothing() -> None:
    """Warps 0 and 1 meet; warp 2 reads what warp 0 wrote."""
    body = """
    setp.ge.u32 %p1, %tx, 64; @%p1 bra THIRD;
    st.shared.u32 [%r2], %tx; bar.sync 1, 64; bra.uni DONE;
    THIRD: sub.u32 %r5, %tx, 64; mad.lo.u32 %r5, %r5, 4, %r1; ld.shared.u32 %r6, [%r5];
    DONE:
    """
    with pytest.raises(Race):
        races(body, threads=96)


ARRIVE = """
    setp.ge.u32 %p1, %tx, 32; @%p1 bra SECOND;
    {0} bar.arrive 1, 64; {1} bra.uni DONE;
    SECOND: bar.sync 1, 64; {2}
    DONE:
"""


def test_arriving_publishes_what_came_before_and_learns_nothing() -> None:
    other = "st.shared.u32 [%r3], %tx;"
    races(ARRIVE.format(WRITE, "", other))
    with pytest.raises(Race):
        races(ARRIVE.format("", WRITE, other))
    with pytest.raises(Race):  # what warp 1 wrote before its sync is not known to warp 0, who did not wait
        races(ARRIVE.format("", "mad.lo.u32 %r5, %lane, 0, 100; SPIN: sub.u32 %r5, %r5, 1; setp.gt.s32 %p2, %r5, 0; @%p2 bra SPIN;"
                                + READ_OTHER, "").replace("SECOND:", "SECOND:" + WRITE))  # fmt: skip


@pytest.mark.parametrize("right", [True, False])
def test_a_copy_writes_until_it_is_waited_for(right: bool) -> None:
    """Issued before a barrier, waited for behind it: another barrier must follow before other warps read."""
    body = "mad.wide.u32 %d1, %tx, 4, %d0; cp.async.ca.shared.global [%r2], [%d1], 4; cp.async.commit_group;"
    body += BAR + "cp.async.wait_group 0;" + (BAR if right else "") + READ_OTHER
    data = np.zeros(64, np.uint32)
    if right:
        run(MINE + body, data, threads=64, declared=TILE, mode="race")
    else:
        with pytest.raises(Race):
            run(MINE + body, data, threads=64, declared=TILE, mode="race")


@pytest.mark.parametrize("right", [True, False])
def test_a_product_reads_until_it_is_waited_for(right: bool) -> None:
    wait = "wgmma.wait_group.sync.aligned 0;"
    body = f"""
    mad.lo.u32 %r5, %tx, 16, %r1; mov.b32 %r6, 0; st.shared.v4.b32 [%r5], {{%r6, %r6, %r6, %r6}};
    fence.proxy.async; bar.sync 0; mov.b64 %d5, {256 >> 4 << 32 | 3 << 62}; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %d5, %d5, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; {wait + BAR if right else BAR + wait}
    setp.ge.u32 %p1, %tx, 32; @!%p1 st.shared.u32 [%r2], 0;
    """
    if right:
        races(body, threads=128)
    else:
        with pytest.raises(Race):
            races(body, threads=128)


def test_atomics_do_not_race_each_other() -> None:
    zero = "setp.eq.u32 %p1, %tx, 0; @%p1 st.shared.u32 [%r1], 0; bar.sync 0;"
    races(zero + "atom.shared.add.u32 %r4, [%r1], 1;")
    out = np.zeros(1, np.uint32)
    run(MINE + zero + "red.shared.add.u32 [%r1], 1; bar.sync 0; ld.shared.u32 %r4, [%r1]; st.global.u32 [%d0], %r4;", out,
        threads=128, declared=TILE, mode="race")  # fmt: skip
    assert out[0] == 128


def test_ctas_share_no_shared_memory() -> None:
    """A slot's next CTA starts with a clean record."""
    races(WRITE + BAR + READ_OTHER, grid=(5,), resident=2)
    with pytest.raises(Race):
        races(WRITE + BAR + READ_OTHER + WRITE, grid=(5,), resident=2)
