"""cp.async and the order of wgmma: what a program may touch before it has waited, in both timings."""

from __future__ import annotations

import numpy as np
import pytest
from programs import run
from ptx_emulator.errors import BadAddress, MissingFence, PtxError, StillInFlight, UnknownInstruction

pytestmark = pytest.mark.emulator
TILE = ".shared .align 1024 .b8 tile[4096];"
LATE = {"mode": "late", "declared": TILE}

# each thread copies its 16 bytes of array 0 to its 16 bytes of shared memory, and later stores them to array 1
HERE = (
    "mov.b32 %r1, tile; mad.lo.u32 %r1, %tx, 16, %r1; mad.wide.u32 %d2, %tx, 16, %d0; mad.wide.u32 %d3, %tx, 16, %d1;"
)
COPY = "cp.async.cg.shared.global [%r1], [%d2], 16;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"
BACK = "ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1]; st.global.v4.b32 [%d3], {%r2, %r3, %r4, %r5};"


def arrays(threads: int = 32) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(4 * threads, dtype=np.uint32) + 7, np.zeros(4 * threads, np.uint32)


# ----------------------------------------------------------------------------------------------------- cp.async: data


@pytest.mark.parametrize("mode", ["convergent", "late"])
@pytest.mark.parametrize("wait", [COMMIT + WAIT, "cp.async.wait_all;"])
def test_a_copy_lands(mode: str, wait: str) -> None:
    source, target = arrays()
    run(HERE + COPY + wait + BACK, source, target, mode=mode, declared=TILE)
    assert np.array_equal(source, target)


@pytest.mark.parametrize("mode", ["convergent", "late"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_what_lies_behind_the_source_size_is_zeros(size: int, mode: str) -> None:
    """Lane l copies l bytes of its element (at most all); nothing behind them is read, not even past the tensor's end."""
    source = np.arange(1, 17 * size + 1, dtype=np.uint8)
    out = np.full(32 * size, 255, np.uint8)
    run(
        f"""
        mov.b32 %r1, tile; mad.lo.u32 %r1, %tx, {size}, %r1;
        mad.wide.u32 %d2, %tx, {size}, %d0; mad.wide.u32 %d3, %tx, {size}, %d1;
        min.u32 %r2, %tx, {size}; setp.ge.u32 %p1, %tx, 17; selp.b32 %r2, 0, %r2, %p1;
        cp.async.ca.shared.global [%r1], [%d2], {size}, %r2; cp.async.wait_all;
        """
        + "".join(f"ld.shared.b8 %r3, [%r1+{i}]; st.global.b8 [%d3+{i}], %r3;" for i in range(size)),
        source,
        out,
        mode=mode,
        declared=TILE,
    )
    want = np.zeros((32, size), np.uint8)
    for lane in range(17):
        used = min(lane, size)
        want[lane, :used] = source[lane * size : lane * size + used]
    assert np.array_equal(out.reshape(32, size), want)


def test_a_guard_leaves_shared_memory_alone() -> None:
    source, target = arrays()
    body = "st.shared.v4.b32 [%r1], {%tx, %tx, %tx, %tx}; setp.lt.u32 %p1, %tx, 4; @%p1 " + COPY + COMMIT + WAIT + BACK
    run(HERE + body, source, target, **LATE)
    assert np.array_equal(target, np.where(np.arange(128) < 16, source, np.arange(128) // 4))


@pytest.mark.parametrize(
    ("copy", "error", "message"),
    [
        ("cp.async.cg.shared.global [%r1], [%d2], 16, 20;", PtxError, "source size of 20"),
        ("cp.async.cg.shared.global [%r1], [%d2], 8;", UnknownInstruction, "of 8 bytes"),
        ("cp.async.ca.shared.global [%r1+4], [%d2], 16;", BadAddress, "shared address 4 is not a multiple of 16"),
        ("cp.async.ca.shared.global [%r1], [%d2+4], 16;", BadAddress, "not a multiple of 16"),
        ("cp.async.ca.shared.global [%r1], [%d2+16], 16;", BadAddress, "at byte 512 of argument 0"),
        ("cp.async.ca.shared.global [%r1], [%d2], 16, %p1;", UnknownInstruction, "ignore-src"),
        ("cp.async.mbarrier.arrive.shared.b64 [%r1];", UnknownInstruction, "mbarrier"),
    ],
)
def test_copies_are_checked(copy: str, error: type[PtxError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(HERE + copy, *arrays(), declared=TILE)


def test_a_cache_hint_is_no_source_size() -> None:
    source, target = arrays()
    copy = "createpolicy.fractional.L2::evict_first.b64 %d5, 1.0; cp.async.ca.shared.global.L2::cache_hint [%r1], [%d2], 16, %d5;"
    run(HERE + copy + COMMIT + WAIT + BACK, source, target, declared=TILE)
    assert np.array_equal(source, target)


# -------------------------------------------------------------------------------------------------- cp.async: waiting


@pytest.mark.parametrize(
    "between",
    ["", COMMIT, COMMIT + "cp.async.wait_group 1;", "cp.async.wait_group 0;"],
    ids=["nothing", "commit", "one group too many", "wait before commit"],
)
def test_reading_what_was_not_waited_for(between: str) -> None:
    """In eager timing it reads right, which is why there is a late one."""
    source, target = arrays()
    run(HERE + COPY + between + BACK, source, target, declared=TILE)
    assert np.array_equal(source, target)
    with pytest.raises(StillInFlight, match=r"(?s)shared address 0 is read.*to have it written.*ld.shared.v4"):
        run(HERE + COPY + between + BACK, source, target, **LATE)


def test_groups_complete_in_order() -> None:
    """Three groups; after wait_group 1 the first two may be read, the third not."""
    source = np.arange(96, dtype=np.uint32)
    body = (
        "mov.b32 %r1, tile; mad.lo.u32 %r1, %tx, 4, %r1; mad.wide.u32 %d2, %tx, 4, %d0; mad.wide.u32 %d3, %tx, 4, %d1;"
    )
    body += "".join(
        f"cp.async.ca.shared.global [%r1+{128 * i}], [%d2+{128 * i}], 4; cp.async.commit_group;" for i in range(3)
    )
    read = "ld.shared.u32 %r2, [%r1+{0}]; st.global.u32 [%d3+{0}], %r2;"
    target = np.zeros(96, np.uint32)
    run(body + "cp.async.wait_group 1;" + read.format(0) + read.format(128), source, target, **LATE)
    assert np.array_equal(target[:64], source[:64])
    with pytest.raises(StillInFlight):
        run(body + "cp.async.wait_group 1;" + read.format(256), source, target, **LATE)


def test_one_warp_waits_for_its_own_copies_only() -> None:
    """Warp 1 waits, the copies of warp 0 stay in flight."""
    source, target = arrays(64)
    body = COPY + COMMIT + "setp.lt.u32 %p1, %tx, 32; @%p1 bra SKIP;" + WAIT + "SKIP: bar.sync 0;"
    with pytest.raises(StillInFlight, match="thread 0"):
        run(HERE + body + BACK, source, target, threads=64, **LATE)


@pytest.mark.parametrize("touch", ["st.shared.b32 [%r1], %tx;", COPY], ids=["store", "another copy"])
def test_writing_where_a_copy_will_land(touch: str) -> None:
    with pytest.raises(StillInFlight, match="is written while"):
        run(HERE + COPY + touch + COMMIT + WAIT, *arrays(), **LATE)


def test_the_source_may_not_change_before_the_wait() -> None:
    source, target = arrays()
    with pytest.raises(StillInFlight, match="source of a cp.async was overwritten"):
        run(HERE + COPY + COMMIT + "st.global.b32 [%d2], %tx;" + WAIT, source, target, **LATE)
    run(HERE + COPY + COMMIT + WAIT + "st.global.b32 [%d2], %tx;", source, target, **LATE)


def test_copies_that_nobody_waits_for_harm_nobody() -> None:
    source, target = arrays(64)
    run(HERE + COPY + COMMIT, source, target, threads=32, grid=(2,), resident=1, **LATE)
    assert not target.any()


# --------------------------------------------------------------------------------------------- wgmma: fence and wait

DESCRIPTOR = f"mov.b64 %d5, {256 >> 4 << 32 | 3 << 62};"
READY = (
    "mov.b32 %r1, tile; mad.lo.u32 %r1, %tx, 16, %r1; mov.b32 %r2, 0x3f803f80; st.shared.v4.b32 [%r1], {%r2, %r2, %r2, %r2};"
    "fence.proxy.async.shared::cta; bar.sync 0;" + DESCRIPTOR
)
FENCE, CLOSE, DONE = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
D = "{%f0, %f1, %f2, %f3}"
PRODUCT = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {D}, %d5, %d5, 0, 1, 1, 0, 0;"
AGAIN = PRODUCT.replace("%d5, 0,", "%d5, 1,")
RESULT = f"mad.wide.u32 %d3, %tx, 16, %d0; st.global.v4.f32 [%d3], {D};"
FROM_REGISTERS = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {D}, {{%r5, %r6, %r7, %r8}}, %d5, 0, 1, 1, 0;"


def wgmma(body: str, mode: str = "late") -> np.ndarray:
    out = np.zeros(512, np.float32)
    run(READY + body + RESULT, out, threads=128, mode=mode, declared=TILE)
    return out


@pytest.mark.parametrize("mode", ["convergent", "late", "race", "adversarial"])
def test_products_in_order(mode: str) -> None:
    """One fence for a chain on the same accumulators; two groups, the first waited for alone."""
    assert set(wgmma(FENCE + PRODUCT + AGAIN + CLOSE + DONE, mode)) == {32.0}
    assert set(wgmma(FENCE + PRODUCT + CLOSE + AGAIN + CLOSE + "wgmma.wait_group.sync.aligned 1;" + DONE, mode)) == {
        32.0
    }
    added = "add.f32 %f0, %f0, %f0; add.f32 %f1, %f1, %f1; add.f32 %f2, %f2, %f2; add.f32 %f3, %f3, %f3;"
    assert set(wgmma(FENCE + PRODUCT + CLOSE + DONE + added + FENCE + AGAIN + CLOSE + DONE, mode)) == {48.0}


@pytest.mark.parametrize(
    "body",
    [
        FENCE + PRODUCT + CLOSE,
        FENCE + PRODUCT + DONE,
        FENCE + PRODUCT + CLOSE + AGAIN + CLOSE + "wgmma.wait_group.sync.aligned 1;",
    ],
    ids=["no wait", "no commit", "one group too many"],
)
def test_accumulators_before_the_wait(body: str) -> None:
    with pytest.raises(StillInFlight, match=r"(?s)before wgmma.wait_group.*st.global"):
        wgmma(body)


def test_an_operand_may_not_be_overwritten_before_the_wait() -> None:
    overwrite = "bar.sync 0; st.shared.b32 [%r1], 0;"
    with pytest.raises(StillInFlight, match=r"is written.*to have it read"):
        wgmma(FENCE + PRODUCT + CLOSE + overwrite + DONE)
    assert set(wgmma(FENCE + PRODUCT + CLOSE + DONE + overwrite)) == {16.0}


@pytest.mark.parametrize("mode", ["convergent", "late"])
@pytest.mark.parametrize(
    "body",
    [
        PRODUCT,
        FENCE + "mov.f32 %f2, 0f00000000;" + PRODUCT,
        FENCE + PRODUCT + CLOSE + DONE + "add.f32 %f1, %f1, %f1;" + AGAIN,
    ],
    ids=["the first", "after a write", "after use of the result"],
)
def test_missing_wgmma_fence(body: str, mode: str) -> None:
    with pytest.raises(MissingFence, match="no wgmma.fence since"):
        wgmma(body + CLOSE + DONE, mode)


def test_registers_of_a_have_the_same_rules() -> None:
    fill = "".join(f"mov.b32 %r{i}, 0x3f803f80;" for i in (5, 6, 7, 8))
    assert set(wgmma(fill + FENCE + FROM_REGISTERS + CLOSE + DONE)) == {16.0}
    with pytest.raises(MissingFence, match="%r5"):
        wgmma(FENCE + fill + FROM_REGISTERS + CLOSE + DONE)
    with pytest.raises(StillInFlight, match="used before wgmma.wait_group"):
        wgmma(fill + FENCE + FROM_REGISTERS + CLOSE + "mov.b32 %r7, 0;" + DONE)


# ------------------------------------------------------------------------------------------------- the async proxy

WRITE = "mov.b32 %r1, tile; mad.lo.u32 %r1, %tx, 16, %r1; mov.b32 %r2, 0x3f803f80; st.shared.v4.b32 [%r1], {%r2, %r2, %r2, %r2};"
PROXY = "fence.proxy.async.shared::cta;"
USE = DESCRIPTOR + FENCE + PRODUCT + CLOSE + DONE + RESULT


@pytest.mark.parametrize(
    ("order", "right"),
    [(PROXY + "bar.sync 0;", True), ("bar.sync 0;" + PROXY, True), ("fence.proxy.async; bar.sync 0;", True),
     ("bar.sync 0;", False), (PROXY + WRITE + "bar.sync 0;", False), ("fence.proxy.async.global; bar.sync 0;", False),
     ("setp.ge.u32 %p1, %tx, 32; @%p1 bra S;" + PROXY + "S: bar.sync 0;", False)],
    ids=["fence, barrier", "barrier, fence", "all spaces", "none", "written again", "of global memory", "by one warp, too early"],
)  # fmt: skip
def test_wgmma_reads_only_what_a_proxy_fence_covers(order: str, right: bool) -> None:
    out = np.zeros(512, np.float32)
    run(WRITE + order + USE, out, threads=128, declared=TILE)  # eager timing does not look
    assert set(out) == {16.0}
    if right:
        run(WRITE + order + USE, out, threads=128, **LATE)
        assert set(out) == {16.0}
    else:
        with pytest.raises(MissingFence, match="no fence.proxy.async since"):
            run(WRITE + order + USE, out, threads=128, **LATE)


def test_what_cp_async_wrote_needs_the_fence_too() -> None:
    ones = np.full(1024, 0x3F80, np.uint16)
    out = np.zeros(512, np.float32)
    copy = "mov.b32 %r1, tile; mad.lo.u32 %r1, %tx, 16, %r1; mad.wide.u32 %d2, %tx, 16, %d1;" + COPY + COMMIT + WAIT
    run(copy + PROXY + "bar.sync 0;" + USE, out, ones, threads=128, **LATE)
    assert set(out) == {16.0}
    early = copy.replace(WAIT, PROXY + WAIT)  # the fence comes before the bytes do
    for wrong in (copy, early):
        with pytest.raises(MissingFence):
            run(wrong + "bar.sync 0;" + USE, out, ones, threads=128, **LATE)
