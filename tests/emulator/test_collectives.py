"""What the lanes of a warp do together, against the loops of the ISA's description; reached by a part of them, it complains."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
from programs import lanes, random_bits, run
from ptx_emulator.errors import PartialWarp, UnknownInstruction

pytestmark = pytest.mark.emulator
STORE = "mad.wide.u32 %d9, %tx, 4, %d0; st.global.u32 [%d9], %r9;"
WHOLE = "0xffffffff"


def shuffle(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """(the lane that is read, whether it is in range): the pseudo-code of shfl.sync."""
    bval, cval, segmask = b & 31, c & 31, c >> 8 & 31
    max_lane = (lane & segmask) | (cval & ~segmask & 31)
    min_lane = lane & segmask
    if mode == "up":
        j = lane - bval
        valid = j >= max_lane
    elif mode == "down":
        j = lane + bval
        valid = j <= max_lane
    elif mode == "bfly":
        j = lane ^ bval
        valid = j <= max_lane
    else:
        j = min_lane | (bval & ~segmask & 31)
        valid = j <= max_lane
    return (j if valid else lane), valid


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("c", [0, 0x1F, 0x181F, 0x1C07, 0x1800, 0x1003, 0x0F1F, 0x000B])
def test_shuffles(mode: str, c: int) -> None:
    """Every delta, with clamps and segments as compilers use them and as they do not."""
    value = random_bits(32, np.uint32, 1)
    for b in (0, 1, 2, 5, 8, 16, 31, 33):
        body = f"shfl.sync.{mode}.b32 %o|%p, %a, {b}, {c}, {WHOLE}; @!%p xor.b32 %o, %o, -1;"
        want = [shuffle(mode, lane, b, c) for lane in range(32)]
        expected = [int(value[j]) if valid else int(value[j]) ^ 0xFFFFFFFF for j, valid in want]
        assert lanes(body, value).tolist() == expected, b


def test_each_lane_has_its_own_source_and_a_target_may_be_the_source() -> None:
    value, b = random_bits(64, np.uint32, 2), random_bits(64, np.uint32, 3)
    body = f"mov.b32 %o, %a; shfl.sync.idx.b32 %o, %o, %b, 0x1f, {WHOLE};"
    want = [int(value[32 * (i // 32) + (int(b[i]) & 31)]) for i in range(64)]
    assert lanes(body, value, b).tolist() == want


def test_votes() -> None:
    """By warp, not by CTA: three warps of 0, some and all set bits."""
    flag = np.concatenate([np.zeros(32), np.arange(32) % 3 == 0, np.ones(32)]).astype(np.uint32)
    set_p = "setp.ne.u32 %p, %a, 0; "
    ballot = [0, sum(1 << i for i in range(0, 32, 3)), 2**32 - 1]
    got = lanes(set_p + f"vote.sync.ballot.b32 %o, %p, {WHOLE};", flag)
    assert got[::32].tolist() == ballot and (got.reshape(3, 32) == got.reshape(3, 32)[:, :1]).all()
    got = lanes(set_p + f"vote.sync.ballot.b32 %o, !%p, {WHOLE};", flag)
    assert got[::32].tolist() == [b ^ 0xFFFFFFFF for b in ballot]
    for mode, want in {"any": [0, 1, 1], "all": [0, 0, 1], "uni": [1, 0, 1]}.items():
        got = lanes(set_p + f"vote.sync.{mode}.pred %q, %p, {WHOLE}; selp.u32 %o, 1, 0, %q;", flag)
        assert got.tolist() == np.repeat(want, 32).tolist(), mode


@pytest.mark.parametrize(
    ("name", "kind", "function"),
    [("add", "u32", operator.add), ("add", "s32", operator.add), ("min", "s32", min), ("min", "u32", min),
     ("max", "s32", max), ("max", "u32", max), ("and", "b32", operator.and_), ("or", "b32", operator.or_),
     ("xor", "b32", operator.xor)],
)  # fmt: skip
def test_redux(name: str, kind: str, function) -> None:  # type: ignore[no-untyped-def]
    value = random_bits(64, np.int32 if kind == "s32" else np.uint32, 4)
    got = lanes(f"redux.sync.{name}.{kind} %o, %a, {WHOLE};", value)
    want = [functools.reduce(function, half.tolist()) & 0xFFFFFFFF for half in (value[:32], value[32:])]
    assert got.tolist() == np.repeat(want, 32).tolist()


def test_elect_gives_one_leader_and_its_lane_to_all() -> None:
    got = lanes(f".reg .b32 %l; elect.sync %l|%p, {WHOLE}; selp.u32 %o, 256, 0, %p; or.b32 %o, %o, %l;", np.zeros(32))
    assert got.tolist() == [256] + [0] * 31


# --------------------------------------------------------------------------------------------- a part of the warp

PART = "setp.lt.u32 %p1, %lane, 8; @!%p1 bra SKIP; {0} SKIP: "


@pytest.mark.parametrize(
    "collective",
    ["shfl.sync.bfly.b32 %r9, %tx, 1, 31, {0};", "vote.sync.ballot.b32 %r9, %p1, {0};", "redux.sync.add.u32 %r9, %tx, {0};",
     "elect.sync %r9|%p2, {0};", "bar.warp.sync {0};"],
)  # fmt: skip
def test_a_membermask_must_name_who_is_here(collective: str) -> None:
    """Lanes 0 to 7 alone: under their own mask it works, under all 32 it is an error, as is a mask that leaves one out."""
    out = np.zeros(32, np.uint32)
    run(PART.format(collective.format("0xff") + STORE), out)
    for mask in (WHOLE, "0x7f"):
        with pytest.raises(PartialWarp, match=r"names lanes 0x.*0x000000ff are here"):
            run(PART.format(collective.format(mask)), out)


def test_the_mask_is_that_of_the_lanes_that_are_here() -> None:
    """Lanes 8 to 31 compute their mask behind the branch; what lane 0 holds in that register is nobody's business."""
    out = np.zeros(32, np.uint32)
    body = "setp.lt.u32 %p1, %lane, 8; @%p1 bra SKIP; mov.b32 %r1, 0xffffff00; redux.sync.add.u32 %r9, %lane, %r1;"
    run(f"{body} {STORE} SKIP:", out)
    assert out.tolist() == [0] * 8 + [sum(range(8, 32))] * 24
    with pytest.raises(PartialWarp):
        run(body.replace("mov.b32 %r1, 0xffffff00;", "shl.b32 %r1, -1, %lane;") + STORE + "SKIP:", out)


def test_values_of_a_part_come_from_that_part() -> None:
    out = np.zeros(32, np.uint32)
    run(PART.format("add.u32 %r1, %tx, 100; vote.sync.ballot.b32 %r8, %p1, 0xff; redux.sync.min.u32 %r9, %r1, 0xff;"
                    "add.u32 %r9, %r9, %r8; activemask.b32 %r7; add.u32 %r9, %r9, %r7;" + STORE), out)  # fmt: skip
    assert out.tolist() == [100 + 255 + 255] * 8 + [0] * 24
    run(PART.format("vote.sync.all.pred %p2, %p1, 0xff; selp.u32 %r9, 5, 6, %p2;" + STORE), out)
    assert out[:8].tolist() == [5] * 8
    run(PART.format("shfl.sync.down.b32 %r9, %tx, 3, 7, 0xff;" + STORE), out)
    assert out[:8].tolist() == [3, 4, 5, 6, 7, 5, 6, 7]


def test_a_shuffle_must_not_read_a_lane_that_is_not_here() -> None:
    with pytest.raises(PartialWarp, match="reads a lane that is not here"):
        run(PART.format("shfl.sync.idx.b32 %r9, %tx, 20, 31, 0xff;"))


MMA = (
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r5}, {%f1, %f2, %f3, %f4};"
)


@pytest.mark.parametrize(
    "instruction",
    ["bar.sync 0;", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r8];",
     "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r8], {%r9};", MMA,
     "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"],
)  # fmt: skip
def test_these_need_the_whole_warp(instruction: str) -> None:
    with pytest.raises(PartialWarp, match=r"(?s)all 32 lanes of warp 0, 8 are here"):
        run("mov.u32 %r8, tile;" + PART.format(instruction), declared=".shared .align 128 .b8 tile[128];")


# ------------------------------------------------------------------------------------------------------ CTA barriers

EXCHANGE = """
    mov.b32 %r1, tile; mad.lo.u32 %r2, %tx, 4, %r1; st.shared.u32 [%r2], %tx;
    {0}
    add.u32 %r3, %tx, {1}; and.b32 %r3, %r3, {2}; mad.lo.u32 %r3, %r3, 4, %r1; ld.shared.u32 %r9, [%r3];
"""
TILE = ".shared .align 16 .b8 tile[1024];"


@pytest.mark.parametrize("mode", ["convergent", "adversarial", "race"])
@pytest.mark.parametrize(
    "barrier", ["bar.sync 0;", "barrier.sync 5;", "barrier.cta.sync.aligned 0, 128;", "bar.sync 15, 128;"]
)
def test_a_barrier_of_all_threads(barrier: str, mode: str) -> None:
    for seed in range(3 if mode == "adversarial" else 1):
        out = np.zeros(128, np.uint32)
        run(EXCHANGE.format(barrier, 32, 127) + STORE, out, threads=128, declared=TILE, mode=mode, seed=seed)
        assert out.tolist() == [(i + 32) % 128 for i in range(128)]


def test_two_halves_of_a_cta_meet_at_barriers_of_their_own() -> None:
    """Warps 0 and 1 three times at barrier 1, warps 2 and 3 once at barrier 2: no count mixes with the other."""
    body = """
    setp.lt.u32 %p1, %tx, 64; @!%p1 bra OTHERS;
    bar.sync 1, 64; st.shared.u32 [tile], %tx; bar.sync 1, 64; ld.shared.u32 %r9, [tile]; bar.sync 1, 64; bra.uni DONE;
    OTHERS: bar.sync 2, 64; mov.u32 %r9, 7;
    DONE:
    """
    for seed in range(5):
        out = np.zeros(128, np.uint32)
        run(body + STORE, out, threads=128, declared=TILE, mode="adversarial", seed=seed)
        assert out[64:].tolist() == [7] * 64 and len({*out[:64].tolist()}) == 1 and out[0] < 64


PRODUCER = """
    mov.b32 %r1, tile; setp.lt.u32 %p1, %tx, 32; @!%p1 bra CONSUMER;
    mad.lo.u32 %r2, %tx, 4, %r1; st.shared.u32 [%r2], %tx; bar.arrive 1, 64; {0} bra.uni DONE;
    CONSUMER: bar.sync 1, 64; sub.u32 %r2, %tx, 32; mad.lo.u32 %r2, %r2, 4, %r1; ld.shared.u32 %r9, [%r2];
    mad.wide.u32 %d9, %tx, 4, %d0; st.global.u32 [%d9], %r9;
    DONE:
"""


@pytest.mark.parametrize("mode", ["convergent", "adversarial", "race"])
def test_who_arrives_goes_on_and_who_syncs_waits(mode: str) -> None:
    for seed in range(5 if mode == "adversarial" else 1):
        out = np.zeros(64, np.uint32)
        run(PRODUCER.format(""), out, threads=64, declared=TILE, mode=mode, seed=seed)
        assert out[32:].tolist() == [*range(32)]


@pytest.mark.parametrize(
    ("barrier", "message"),
    [("bar.sync 16;", "barrier 16"), ("bar.sync 0, 40;", "of 40 threads"), ("bar.sync 0, %r5;", "of 0 threads")],
)
def test_wrong_counts(barrier: str, message: str) -> None:
    with pytest.raises(PartialWarp, match=message):
        run("mov.b32 %r5, 0;" + barrier)


@pytest.mark.parametrize(
    "instruction",
    ["bar.red.popc.u32 %r1, 0, %p1", "barrier.cluster.arrive", "shfl.bfly.b32 %r1, %r2, 1, 31", "vote.ballot.b32 %r1, %p1",
     "redux.sync.min.NaN.f32 %f1, %f2, -1", "match.any.sync.b32 %r1, %r2, -1"],
)  # fmt: skip
def test_what_is_not_there_is_refused(instruction: str) -> None:
    with pytest.raises(UnknownInstruction, match=instruction.split()[0]):
        run(f"{instruction};")
