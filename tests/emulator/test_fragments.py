"""mma.sync, ldmatrix and stmatrix against the formulas by which the ISA says where each element is."""

from __future__ import annotations

import numpy as np
import pytest
from programs import run
from ptx_emulator.errors import BadAddress, Uninitialised, UnknownInstruction

pytestmark = pytest.mark.emulator
LANES = range(32)
TILE = ".shared .align 128 .b8 tile[1024];"


def place_of_a(shape: str, kind: str, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element i of a lane's fragment of A; for C and D see place_of_c."""
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return group + 8 * (i in (1, 3)), thread + 4 * (i in (2, 3))
    if shape == "k8":
        return group + 8 * (i >= 2), thread * 2 + (i & 1)
    return group if 0 <= i < 2 or 4 <= i < 6 else group + 8, thread * 2 + (i & 1) + 8 * (i >= 4)


def place_of_b(kind: str, lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    if kind == "tf32":
        return thread + 4 * i, group
    return thread * 2 + (i & 1) + 8 * (i >= 2), group


def place_of_c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + 8 * (i >= 2), lane % 4 * 2 + (i & 1)


def patterns(values: np.ndarray, kind: str) -> np.ndarray:
    """Small integers as bit patterns of `kind`, in uint16 or (tf32) uint32."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return bits if kind == "tf32" else (bits >> 16).astype(np.uint16)


def fragments(matrix: np.ndarray, places: list[list[tuple[int, int]]]) -> np.ndarray:
    """Registers (32, n) of a matrix of patterns; two 16-bit elements share one, the first in the lower half."""
    return np.ascontiguousarray([[matrix[p] for p in lane] for lane in places]).view(np.uint32)


def load(name: str, letter: str, first: int, count: int) -> str:
    """Registers %{letter}{first}... of a lane from array `name`."""
    lines = [f"mad.wide.u32 %d9, %lane, {4 * count}, {name};"]
    return "".join(lines + [f"ld.global.b32 %{letter}{first + i}, [%d9+{4 * i}];" for i in range(count)])


def names(letter: str, first: int, count: int) -> str:
    return "{" + ", ".join(f"%{letter}{first + i}" for i in range(count)) + "}"


@pytest.mark.parametrize(
    ("depth", "kind"), [(16, "bf16"), (16, "f16"), (8, "bf16"), (8, "f16"), (8, "tf32"), (4, "tf32")]
)
def test_mma(depth: int, kind: str) -> None:
    rng = np.random.default_rng(depth)
    a, b, c = rng.integers(-8, 9, (16, depth)), rng.integers(-8, 9, (depth, 8)), rng.integers(-99, 99, (16, 8))
    each = 1 if kind == "tf32" else 2
    na, nb = 16 * depth // 32 // each, 8 * depth // 32 // each
    fragment_a = fragments(
        patterns(a, kind), [[place_of_a(f"k{depth}", kind, x, i) for i in range(na * each)] for x in LANES]
    )
    fragment_b = fragments(patterns(b, kind), [[place_of_b(kind, x, i) for i in range(nb * each)] for x in LANES])
    fragment_c = fragments(c.astype(np.float32), [[place_of_c(x, i) for i in range(4)] for x in LANES])
    out = np.zeros((32, 4), np.float32)
    run(
        load("%d0", "r", 10, na)
        + load("%d1", "r", 20, nb)
        + load("%d2", "f", 10, 4)
        + f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {names('f', 20, 4)}, {names('r', 10, na)},"
        + f"{names('r', 20, nb) if nb > 1 else '{%r20}'}, {names('f', 10, 4)};"
        + "mad.wide.u32 %d9, %lane, 16, %d3; st.global.v4.f32 [%d9], {%f20, %f21, %f22, %f23};",
        fragment_a,
        fragment_b,
        fragment_c,
        out,
    )
    want = a @ b + c
    assert [[want[place_of_c(x, i)] for i in range(4)] for x in LANES] == out.tolist()


def test_tf32_ignores_the_lower_bits_of_an_f32() -> None:
    """1 + 2^-11 counts as 1: the tensor core reads 10 bits of mantissa and does not round."""
    one, more = np.float32(1).view(np.uint32), np.float32(1 + 2**-11 + 2**-20).view(np.uint32)
    out = np.zeros(32, np.float32)
    run(
        f"""
        mov.b32 %r1, {more}; mov.b32 %r2, {one}; mov.f32 %f1, 0f00000000;
        mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {{%f2, %f3, %f4, %f5}}, {{%r1, %r1}}, {{%r2}}, {{%f1, %f1, %f1, %f1}};
        mad.wide.u32 %d9, %lane, 4, %d0; st.global.f32 [%d9], %f2;
        """,
        out,
    )
    assert out.tolist() == [4.0] * 32


# ------------------------------------------------------------------------------------------------ ldmatrix, stmatrix

FILL = "mov.b32 %r50, tile; mad.lo.u32 %r51, %lane, 16, %r50;"
ROWS = "mad.wide.u32 %d9, %lane, 4, %d1; ld.global.u32 %r52, [%d9]; add.u32 %r52, %r52, %r50;"  # this lane's address


def row_offsets(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(row of the tile that each lane points at, its offset); lanes that do not count point nowhere."""
    row = np.random.default_rng(count).permutation(32)
    offset = np.where(np.arange(32) < 8 * count, row * 16, 10_000_001).astype(np.uint32)
    return row, offset


def held(matrix: np.ndarray, lane: int, trans: bool) -> int:
    """What lane holds of an 8x8 matrix: elements 2 (lane % 4) and the next of row lane / 4, of the transposed one if asked."""
    row = (matrix.T if trans else matrix)[lane // 4]
    return int(row[2 * (lane % 4)]) | int(row[2 * (lane % 4) + 1]) << 16


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, trans: bool) -> None:
    tile = np.arange(256, dtype=np.uint16).reshape(32, 8) + 1000
    row, offset = row_offsets(count)
    out = np.zeros((32, count), np.uint32)
    run(
        FILL
        + "mad.wide.u32 %d9, %lane, 16, %d0; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d9];"
        + "st.shared.v4.b32 [%r51], {%r1, %r2, %r3, %r4};"
        + ROWS
        + f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16 {names('r', 10, count)}, [%r52];"
        + f"mad.wide.u32 %d9, %lane, {4 * count}, %d2;"
        + "".join(f"st.global.b32 [%d9+{4 * i}], %r{10 + i};" for i in range(count)),
        tile,
        offset,
        out,
        declared=TILE,
    )
    matrices = [tile[row[8 * i : 8 * i + 8]] for i in range(count)]
    assert out.tolist() == [[held(m, lane, trans) for m in matrices] for lane in LANES]


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, trans: bool) -> None:
    values = (
        (np.random.default_rng(1).permutation(32 * count * 2) + 1).astype(np.uint16).view(np.uint32).reshape(32, count)
    )
    row, offset = row_offsets(count)
    out = np.zeros((32, 8), np.uint16)
    run(
        FILL
        + "mov.b32 %r1, 0; st.shared.v4.b32 [%r51], {%r1, %r1, %r1, %r1};"
        + ROWS
        + load("%d0", "r", 10, count)
        + f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16 [%r52], {names('r', 10, count)};"
        + "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r51]; mad.wide.u32 %d9, %lane, 16, %d2;"
        + "st.global.v4.b32 [%d9], {%r1, %r2, %r3, %r4};",
        values,
        offset,
        out,
        declared=TILE,
    )
    for i in range(count):
        matrix = out[row[8 * i : 8 * i + 8]]
        assert [held(matrix, lane, trans) for lane in LANES] == values[:, i].tolist()
    untouched = np.setdiff1d(np.arange(32), row[: 8 * count])
    assert not out[untouched].any()


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [("add.u32 %r52, %r51, 8;", BadAddress, "not a multiple of 16"), ("add.u32 %r52, %r51, 768;", BadAddress, "the CTA has 1024"),
     ("mov.u32 %r52, %r51;", Uninitialised, "never written")],
)  # fmt: skip
def test_rows_are_checked(address: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(FILL + address + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r52];", declared=TILE)


A4, A2 = "{%r1, %r2, %r3, %r4}", "{%r1, %r2}"


@pytest.mark.parametrize(
    "instruction",
    [f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {A2}, [%r9]", f"ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {A2}, [%r9]",
     f"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {A2}, {A4}, {A2}, {A2}",
     f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {A4}, {A4}, {A2}, {A4}",
     f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {A4}, {A4}, {A2}, {A4}",
     f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {A4}, {A2}, {A2}, {A4}"],
)  # fmt: skip
def test_what_is_not_there_is_refused(instruction: str) -> None:
    with pytest.raises(UnknownInstruction, match=instruction.split()[0]):
        run(f"{instruction};", declared=TILE)
