"""mbarriers, and tensor copies: phases, bytes, boxes past the edge, swizzles, what must be waited for and fenced."""

from __future__ import annotations

import numpy as np
import pytest
from programs import run, zeros
from ptx_emulator import TensorMap
from ptx_emulator.errors import (
    BadAddress,
    EndlessLoop,
    MissingFence,
    PtxError,
    Race,
    StillInFlight,
    Uninitialised,
    UnknownInstruction,
)

pytestmark = pytest.mark.emulator
MODES = ["convergent", "late", "race", "adversarial"]

# ---------------------------------------------------------------------------------------------------------- mbarriers

BARRIER = ".shared .align 8 .b64 bar;\n.shared .align 1024 .b8 tile[4096];"
TRY = "mbarrier.try_wait.parity.shared::cta.b64 %p{0}, [%r1], {0}; selp.u32 %r2, 1, 0, %p{0}; st.global.u32 [%d0+{1}], %r2;"
ONE_THREAD = "mov.b32 %r1, bar; setp.ne.u32 %p5, %tx, 0; @%p5 bra DONE;"


def answers(*steps: str) -> list[tuple[bool, bool]]:
    """What try_wait says for parity 0 and 1 after each step of one thread."""
    body = (
        ONE_THREAD + "".join(s + TRY.format(0, 8 * i) + TRY.format(1, 8 * i + 4) for i, s in enumerate(steps)) + "DONE:"
    )
    out = np.zeros((len(steps), 2), np.uint32)
    run(body, out, declared=BARRIER)
    return [(bool(a), bool(b)) for a, b in out]


INIT, ARRIVE = "mbarrier.init.shared::cta.b64 [%r1], {0};", "mbarrier.arrive.shared::cta.b64 _, [%r1];"
FIRST, SECOND = (False, True), (True, False)  # of the phase that runs, only the parity of the one before is over


def test_a_phase_ends_with_its_last_arrival() -> None:
    assert answers(INIT.format(2), ARRIVE, ARRIVE, ARRIVE, ARRIVE) == [FIRST, FIRST, SECOND, SECOND, FIRST]
    assert answers(INIT.format(3), "mbarrier.arrive.shared::cta.b64 _, [%r1], 2;", ARRIVE) == [FIRST, FIRST, SECOND]


def test_a_phase_waits_for_its_bytes_too() -> None:
    expect, arrive = (
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 64;",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {0};",
    )
    assert answers(INIT.format(1), expect, ARRIVE) == [FIRST, FIRST, FIRST]
    assert answers(INIT.format(1), arrive.format(64)) == [FIRST, FIRST]
    assert answers(INIT.format(1), arrive.format(0)) == [FIRST, SECOND]


def test_mbarriers_are_checked() -> None:
    with pytest.raises(PtxError, match="2 arrivals where 1 are pending"):
        answers(INIT.format(1), "mbarrier.arrive.shared::cta.b64 _, [%r1], 2;")
    with pytest.raises(Uninitialised, match="no mbarrier at shared address 0"):
        answers(ARRIVE)
    with pytest.raises(Uninitialised, match="no mbarrier"):
        answers(INIT.format(1), "mbarrier.inval.shared::cta.b64 [%r1];", ARRIVE)
    with pytest.raises(BadAddress, match="not a multiple of 8"):
        answers("add.u32 %r1, %r1, 4;" + INIT.format(1))
    with pytest.raises(Uninitialised, match="never written"):
        answers(INIT.format(1), "ld.shared.u64 %d2, [%r1];")
    with pytest.raises(UnknownInstruction, match="state token"):
        answers(INIT.format(1), "mbarrier.arrive.shared::cta.b64 %d2, [%r1];")


HANDOVER = """
    mov.b32 %r1, bar; setp.eq.u32 %p1, %tx, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 32; bar.sync 0;
    mov.b32 %r3, tile; setp.ge.u32 %p2, %tx, 32; @%p2 bra CONSUMER;
    mad.lo.u32 %r4, %tx, 4, %r3; st.shared.u32 [%r4], %tx; mbarrier.arrive.shared::cta.b64 _, [%r1]; {0} bra.uni DONE;
    CONSUMER: {1}
    sub.u32 %r4, %tx, 32; mad.lo.u32 %r4, %r4, 4, %r3; ld.shared.u32 %r5, [%r4];
    mad.wide.u32 %d1, %tx, 4, %d0; st.global.u32 [%d1+-128], %r5;
    DONE:
"""
SPIN = "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], {0}; @!%p3 bra CONSUMER;"


@pytest.mark.parametrize("mode", MODES)
def test_who_waits_sees_what_was_written_before_the_arrival(mode: str) -> None:
    for seed in range(5):
        out = np.zeros(32, np.uint32)
        run(HANDOVER.format("", SPIN.format(0)), out, threads=64, declared=BARRIER, mode=mode, seed=seed)
        assert out.tolist() == [*range(32)]


@pytest.mark.parametrize("seed", range(5))
def test_the_wrong_parity(seed: int) -> None:
    """That of the phase before: over at first, and never again once the phase has ended."""
    with pytest.raises((Uninitialised, EndlessLoop)):
        run(HANDOVER.format("", SPIN.format(1)), np.zeros(32, np.uint32), threads=64, declared=BARRIER,
            mode="adversarial", seed=seed, budget=3000)  # fmt: skip


def test_a_write_behind_the_arrival_races() -> None:
    with pytest.raises(Race):
        run(
            HANDOVER.format("st.shared.u32 [%r4], 5;", SPIN.format(0)),
            np.zeros(32, np.uint32),
            threads=64,
            declared=BARRIER,
            mode="race",
        )


# -------------------------------------------------------------------------------------------------------- tensor maps


def tensor_map(array: np.ndarray, box: tuple[int, ...], swizzle: int = 0) -> TensorMap:
    """box: outermost first, as shapes are."""
    strides = tuple(int(s) for s in array.strides[-2::-1])
    return TensorMap(array.ctypes.data, array.itemsize, array.shape[::-1], strides, box[::-1], swizzle)


def counted(shape: tuple[int, ...], dtype: type = np.uint16) -> np.ndarray:
    """Filled with 1, 2, ..."""
    array = zeros(shape, dtype)
    array[...] = np.arange(1, array.size + 1).reshape(shape)
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [({"address": 0x1008}, "address"), ({"strides": (24,)}, "strides"), ({"strides": ()}, "0 strides for 2 dimensions"),
     ({"box": (8, 8, 8)}, "box"), ({"box": (8, 257)}, "1 to 256"), ({"box": (4, 8)}, "8 bytes, not a multiple of 16"),
     ({"box": (32, 8), "swizzle": 1}, "swizzle"), ({"sizes": (0, 8)}, "sizes"), ({"box": (0, 8)}, "1 to 256"),
     ({"box": (8, 8), "swizzle": 3}, "swizzle"), ({"swizzle": 4}, "swizzle"), ({"element": 3}, "element")],
)  # fmt: skip
def test_rules_of_tensor_maps(change: dict, message: str) -> None:
    right = {"address": 0x1000, "element": 2, "sizes": (32, 8), "strides": (64,), "box": (16, 8), "swizzle": 0}
    assert TensorMap(**right).bytes == 256
    with pytest.raises(PtxError, match=f"tensor map: .*{message}"):
        TensorMap(**(right | change))


# ------------------------------------------------------------------------------------------------------ tensor copies

# thread 0 loads a box at {coordinates} to shared memory and all wait for it; then they copy the tile to array 1, warp 1 first
LOAD = """
    mov.b32 %r1, bar; mov.b32 %r3, tile; setp.eq.u32 %p1, %tx, 0; mov.b64 %d5, p0; cvta.param.u64 %d5, %d5;
    @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {expect};
    @%p1 cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%d5, {coordinates}], [%r1];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], 0; @!%p3 bra WAIT;
"""
OUT = """
    xor.b32 %r4, %tx, 32; mul.lo.u32 %r4, %r4, 16;
    COPY: setp.ge.u32 %p4, %r4, {bytes}; @%p4 bra DONE;
    add.u32 %r5, %r3, %r4; ld.shared.v4.b32 {{%r6, %r7, %r8, %r9}}, [%r5]; cvt.u64.u32 %d6, %r4; add.s64 %d6, %d1, %d6;
    st.global.v4.b32 [%d6], {{%r6, %r7, %r8, %r9}}; add.u32 %r4, %r4, 1024; bra.uni COPY;
    DONE:
"""


def load(
    array: np.ndarray,
    box: tuple[int, ...],
    corner: tuple[int, ...],
    swizzle: int = 0,
    expect: int | None = None,
    **launch,
) -> np.ndarray:  # type: ignore[no-untyped-def]
    """The box at `corner` (outermost first) as shared memory holds it."""
    map_ = tensor_map(array, box, swizzle)
    out = np.zeros(box, array.dtype)
    coordinates = "{" + ", ".join(map(str, reversed(corner))) + "}"
    body = LOAD.format(expect=map_.bytes if expect is None else expect, rank=array.ndim, coordinates=coordinates)
    run(body + OUT.format(bytes=map_.bytes), map_, out, threads=64, declared=BARRIER, **launch)
    return out


def cut(array: np.ndarray, box: tuple[int, ...], corner: tuple[int, ...]) -> np.ndarray:
    """The box, zeros outside the array."""
    want = np.zeros(box, array.dtype)
    for index in np.ndindex(*box):
        at = tuple(c + i for c, i in zip(corner, index, strict=True))
        if all(0 <= a < n for a, n in zip(at, array.shape, strict=True)):
            want[index] = array[at]
    return want


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("corner", [(0, 0), (4, 8), (-3, 0), (0, -5), (9, 30), (-1, 28), (10, 0), (0, 40), (-20, -20)])
def test_loads_fill_with_zeros_outside(corner: tuple[int, int], mode: str) -> None:
    array = counted((10, 40))
    assert np.array_equal(load(array, (8, 16), corner, mode=mode), cut(array, (8, 16), corner))


@pytest.mark.parametrize(
    ("shape", "box", "corner"),
    [((100,), (32,), (90,)), ((4, 6, 16), (2, 3, 8), (3, -1, 8)), ((2, 3, 4, 8), (2, 2, 2, 8), (1, 2, -1, 0))],
)
def test_ranks(shape: tuple[int, ...], box: tuple[int, ...], corner: tuple[int, ...]) -> None:
    array = counted(shape)
    assert np.array_equal(load(array, box, corner), cut(array, box, corner))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_elements_of_every_size(dtype: type) -> None:
    array = counted((8, 32), dtype)
    assert np.array_equal(load(array, (4, 16), (5, 20)), cut(array, (4, 16), (5, 20)))


@pytest.mark.parametrize(("swizzle", "width"), [(1, 32), (2, 64), (3, 128)])
def test_swizzles(swizzle: int, width: int) -> None:
    """16-byte chunk c of row r lies in chunk c xor r (of lines of 128 bytes), modulo as many as a row has."""
    array = counted((20, width // 2))
    got = load(array, (16, width // 2), (0, 0), swizzle)
    rows = got.reshape(16, width // 16, 8)
    for r in range(16):
        line = r * width // 128 % 8 % (width // 16)
        for c in range(width // 16):
            assert np.array_equal(rows[r, c ^ line], array[r, 8 * c : 8 * c + 8])


@pytest.mark.parametrize("mode", ["convergent", "late"])
def test_too_many_bytes_expected_never_end_and_too_few_end_too_early(mode: str) -> None:
    array = counted((8, 16))
    with pytest.raises(EndlessLoop):
        load(array, (8, 16), (0, 0), expect=512, mode=mode, budget=3000)
    with pytest.raises(EndlessLoop):
        load(array, (8, 16), (0, 0), expect=128, mode=mode, budget=3000)


def test_reading_before_the_wait() -> None:
    array, box = counted((8, 16)), (8, 16)
    body = (
        LOAD.format(expect=256, rank=2, coordinates="{0, 0}").split("WAIT:")[0] + "bar.sync 0;" + OUT.format(bytes=256)
    )
    with pytest.raises(StillInFlight, match="is read while"):
        run(body, tensor_map(array, box), np.zeros(box, np.uint16), threads=64, declared=BARRIER, mode="late")


def test_looking_once_is_not_waiting() -> None:
    array, box = counted((8, 16)), (8, 16)
    body = LOAD.format(expect=256, rank=2, coordinates="{0, 0}").replace("@!%p3 bra WAIT;", "") + OUT.format(bytes=256)
    with pytest.raises(StillInFlight, match="is read while"):
        run(body, tensor_map(array, box), np.zeros(box, np.uint16), threads=64, declared=BARRIER, mode="late")


def test_loads_are_checked() -> None:
    array = counted((64, 64))
    with pytest.raises(BadAddress, match="not a multiple of 128"):
        body = LOAD.format(expect=256, rank=2, coordinates="{0, 0}").replace(
            "mov.b32 %r3, tile;", "mov.b32 %r3, tile; add.u32 %r3, %r3, 64;"
        )
        run(body, tensor_map(array, (8, 16)), threads=64, declared=BARRIER)
    with pytest.raises(BadAddress, match="the CTA has"):
        load(array, (64, 64), (0, 0))
    with pytest.raises(BadAddress, match="no tensor map"):
        run(LOAD.format(expect=256, rank=2, coordinates="{0, 0}"), b"\0" * 128, threads=64, declared=BARRIER)
    with pytest.raises(PtxError, match="3 coordinates for a tensor map of 2"):
        run(
            LOAD.format(expect=256, rank=3, coordinates="{0, 0, 0}"),
            tensor_map(array, (8, 16)),
            threads=64,
            declared=BARRIER,
        )


# every thread writes its 16 bytes of the tile; thread 0 stores the box
STORE = """
    mov.b32 %r3, tile; mul.lo.u32 %r4, %tx, 16; add.u32 %r5, %r3, %r4; mov.b64 %d5, p0;
    mad.wide.u32 %d6, %tx, 16, %d1; ld.global.v4.b32 {{%r6, %r7, %r8, %r9}}, [%d6];
    st.shared.v4.b32 [%r5], {{%r6, %r7, %r8, %r9}};
    {order}
    setp.ne.u32 %p1, %tx, 0; @%p1 bra DONE;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d5, {coordinates}], [%r3];
    cp.async.bulk.commit_group; {wait}
    DONE:
"""
PROXY, WAIT = "fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;"
ORDER = PROXY + "bar.sync 0;"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("corner", [(0, 0), (4, 8), (-3, 0), (0, -5), (9, 30), (-20, 0)])
def test_stores_write_inside_only(corner: tuple[int, int], mode: str) -> None:
    array, box = counted((10, 40)), counted((16, 16)) + np.uint16(1000)
    want = array.copy()
    for index in np.ndindex(16, 16):
        at = corner[0] + index[0], corner[1] + index[1]
        if 0 <= at[0] < 10 and 0 <= at[1] < 40:
            want[at] = box[index]
    body = STORE.format(order=ORDER, wait=WAIT, coordinates=f"{{{corner[1]}, {corner[0]}}}")
    run(body, tensor_map(array, (16, 16)), box, declared=BARRIER, mode=mode)
    assert np.array_equal(array, want)


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_a_load_and_a_store_undo_each_other(swizzle: int) -> None:
    width = {0: 64, 1: 16, 2: 32, 3: 64}[swizzle]
    source, target = counted((8, width)), counted((8, width))
    target[:] = 0
    body = (
        LOAD.format(expect=16 * width, rank=2, coordinates="{0, 0}")
        + """
    mov.b64 %d6, p1; @!%p1 bra DONE;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d6, {0, 0}], [%r3];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    DONE:
    """
    )
    maps = tensor_map(source, (8, width), swizzle), tensor_map(target, (8, width), swizzle)
    run(body, *maps, threads=64, declared=BARRIER, mode="late")
    assert np.array_equal(source, target)


@pytest.mark.parametrize(
    ("order", "wait", "error"),
    [
        ("bar.sync 0;", WAIT, MissingFence),
        (ORDER, "", StillInFlight),
        (ORDER, "st.shared.u32 [%r3], 0;" + WAIT, StillInFlight),
    ],
    ids=["no fence", "no wait", "source overwritten"],
)
def test_stores_are_ordered(order: str, wait: str, error: type[PtxError]) -> None:
    array, box = counted((16, 16)), counted((16, 16))
    body = STORE.format(order=order, wait=wait, coordinates="{0, 0}")
    with pytest.raises(error):
        run(body, tensor_map(array, (16, 16)), box, declared=BARRIER, mode="late")


def test_a_store_without_a_barrier_races() -> None:
    array, box = counted((32, 16)), counted((32, 16))
    body = STORE.format(order=PROXY, wait=WAIT, coordinates="{0, 0}")
    with pytest.raises(Race):
        run(body, tensor_map(array, (32, 16)), box, threads=64, declared=BARRIER, mode="race")


@pytest.mark.parametrize(
    "instruction",
    ["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d1], 16, [%r2]",
     "cp.async.bulk.tensor.2d.im2col.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%d1, {0, 0}], [%r2]",
     "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%d1, {0, 0}], [%r1]",
     "mbarrier.test_wait.shared.b64 %p1, [%r1], %d1"],
)  # fmt: skip
def test_what_is_not_there_is_refused(instruction: str) -> None:
    with pytest.raises(UnknownInstruction, match=instruction.split()[0]):
        run(f"{instruction};")
