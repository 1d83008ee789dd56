"""wgmma: operands in shared memory in every layout, A in registers, scales; the layouts as the CUDA guides draw them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from programs import run
from ptx_emulator.errors import BadAddress, PtxError, Uninitialised, UnknownInstruction

pytestmark = pytest.mark.emulator
CODE = {128: 1, 64: 2, 32: 3}  # bits 62-63 of a descriptor
SIZE = {"bf16": 2, "f16": 2, "tf32": 4}


def chunk_of(width: int, row: int, chunk: int) -> int:
    """Where the 16-byte chunk of a row of `width` bytes goes within the row: rows share lines of 128 bytes."""
    return chunk ^ {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2}[width]


def image(matrix: np.ndarray, width: int, transposed: bool) -> tuple[np.ndarray, int, int, int]:
    """(bytes, leading, stride, step) of an operand (rows, k).

    K-major: a row of the image is `width` bytes of k of one row. MN-major (transposed): it is `width` bytes of rows, at one
    k. Eight such rows are a block; leading and stride are the bytes from block to block, step those from k to k + 32 bytes.
    """
    rows, depth = matrix.shape
    size = matrix.itemsize
    per_row, per_chunk = width // size, 16 // size
    block = 8 * width
    if transposed:
        blocks_k = depth // 8
        leading, stride = blocks_k * block, block  # all of k first, then the next `width` bytes of rows
        total = -(-rows // per_row) * leading
        step = 32 // size // 8 * stride
    else:
        assert depth == per_row
        leading, stride = 0, block
        total = rows // 8 * stride
        step = 32
    data = np.zeros(total // size, matrix.dtype)
    for r, k in itertools.product(range(rows), range(depth)):
        line, place = (k, r % per_row) if transposed else (r, k)
        start = r // per_row * leading + k // 8 * stride if transposed else r // 8 * stride
        at = start + line % 8 * width + 16 * chunk_of(width, line % 8, place // per_chunk)
        data[at // size + place % per_chunk] = matrix[r, k]
    return data.view(np.uint8), leading, stride, step


def descriptor(start: int, leading: int, stride: int, width: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | CODE[width] << 62


def patterns(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return bits if kind == "tf32" else (bits >> 16).astype(np.uint16)


def fill(count: int) -> str:
    """Copy `count` bytes of array 0 to shared memory, and make them known to the async proxy."""
    return f"""
    mov.b32 %r200, tile; mul.lo.u32 %r201, %tx, 16;
    FILL: setp.ge.u32 %p9, %r201, {count}; @%p9 bra FILLED;
    cvt.u64.u32 %d9, %r201; add.s64 %d9, %d0, %d9; ld.global.v4.b32 {{%r202, %r203, %r204, %r205}}, [%d9];
    add.u32 %r206, %r200, %r201; st.shared.v4.b32 [%r206], {{%r202, %r203, %r204, %r205}};
    add.u32 %r201, %r201, 2048; bra.uni FILL;
    FILLED: fence.proxy.async.shared::cta; bar.sync 0;
    """


def accumulators(n: int) -> str:
    return "{" + ", ".join(f"%f{i}" for i in range(n // 2)) + "}"


def store(n: int) -> str:
    lines = [f"st.global.f32 [%d8+{4 * i}], %f{i};" for i in range(n // 2)]
    return f"mad.wide.u32 %d8, %tx, {2 * n}, %d1;" + "".join(lines)


def unpacked(out: np.ndarray) -> np.ndarray:
    """D (64, n) from the registers (128, n / 2) of a warpgroup."""
    n = 2 * out.shape[1]
    d = np.full((64, n), np.nan)
    for thread, i in itertools.product(range(128), range(n // 2)):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i % 4 // 2)
        d[row, 8 * (i // 4) + 2 * (thread % 4) + i % 2] = out[thread, i]
    return d


def multiply(
    a: np.ndarray, b: np.ndarray, kind: str, width_a: int, width_b: int, trans_a: bool, trans_b: bool, **launch
):  # type: ignore[no-untyped-def]
    """D of a (64, k) and b (n, k), both from shared memory, in as many instructions as k needs."""
    size, n, depth = SIZE[kind], len(b), a.shape[1]
    data_a, leading_a, stride_a, step_a = image(patterns(a, kind), width_a, trans_a)
    data_b, leading_b, stride_b, step_b = image(patterns(b, kind), width_b, trans_b)
    data_a = np.pad(data_a, (0, -len(data_a) % 1024))
    data = np.concatenate([data_a, data_b])
    out = np.full((128, n // 2), np.nan, np.float32)
    trans = "" if kind == "tf32" else f", {int(trans_a)}, {int(trans_b)}"
    body = [fill(len(data)), "wgmma.fence.sync.aligned;"]
    for i in range(depth * size // 32):
        at_a, at_b = (
            descriptor(i * step_a, leading_a, stride_a, width_a),
            descriptor(len(data_a) + i * step_b, leading_b, stride_b, width_b),
        )
        body.append(f"mov.b64 %d5, {at_a}; mov.b64 %d6, {at_b}; setp.ne.u32 %p1, {i}, 0;")
        body.append(
            f"wgmma.mma_async.sync.aligned.m64n{n}k{32 // size}.f32.{kind}.{kind} {accumulators(n)}, %d5, %d6, %p1, 1, 1{trans};"
        )
    body += ["wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;", store(n)]
    run("".join(body), data, out, threads=128, declared=f".shared .align 1024 .b8 tile[{len(data)}];", **launch)
    return unpacked(out)


def integers(shape: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, shape)


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("kind", SIZE)
def test_k_major(kind: str, width: int) -> None:
    a, b = integers((64, width // SIZE[kind]), 1), integers((24, width // SIZE[kind]), 2)
    assert np.array_equal(multiply(a, b, kind, width, width, False, False), a @ b.T)


@pytest.mark.parametrize("width_b", [32, 64, 128])
@pytest.mark.parametrize("width_a", [32, 64, 128])
def test_mn_major(width_a: int, width_b: int) -> None:
    """Both operands; m and n reach over several blocks, k over four instructions."""
    a, b = integers((64, 64), 3), integers((128, 64), 4)
    assert np.array_equal(multiply(a, b, "bf16", width_a, width_b, True, True), a @ b.T)


@pytest.mark.parametrize(("trans_a", "trans_b"), [(False, True), (True, False)])
@pytest.mark.parametrize("mode", ["convergent", "late"])
def test_one_operand_of_each(trans_a: bool, trans_b: bool, mode: str) -> None:
    a, b = integers((64, 64), 5), integers((64, 64), 6)
    assert np.array_equal(multiply(a, b, "f16", 128, 128, trans_a, trans_b, mode=mode), a @ b.T)


@pytest.mark.parametrize("n", [8, 16, 40, 96, 192, 256])
def test_every_width_of_n(n: int) -> None:
    a, b = integers((64, 32), 7), integers((n, 32), 8)
    assert np.array_equal(multiply(a, b, "bf16", 64, 64, False, False), a @ b.T)


@pytest.mark.parametrize("kind", SIZE)
@pytest.mark.parametrize("mode", ["convergent", "late"])
def test_a_from_registers(kind: str, mode: str) -> None:
    """The fragments are those of mma.sync, 16 rows a warp; b is MN-major where it may be."""
    size = SIZE[kind]
    depth, each, n = 32 // size, 4 // size, 16
    trans = kind != "tf32"
    a, b = integers((64, depth), 9), integers((n, depth), 10)
    registers = np.zeros((128, 4 * each), patterns(a, kind).dtype)
    for thread, i in itertools.product(range(128), range(4 * each)):
        register, element = divmod(i, each)
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
        registers[thread, i] = patterns(a, kind)[row, thread % 4 * each + element + 16 // size * (register // 2)]
    data, leading, stride, _ = image(patterns(b, kind), 32, trans)
    out = np.full((128, n // 2), np.nan, np.float32)
    run(
        fill(len(data))
        + f"""
        mad.wide.u32 %d7, %tx, 16, %d2; ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d7];
        wgmma.fence.sync.aligned; mov.b64 %d6, {descriptor(0, leading, stride, 32)};
        wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind}
            {accumulators(n)}, {{%r1, %r2, %r3, %r4}}, %d6, 0, 1, 1{", 1" if trans else ""};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        """
        + store(n),
        data,
        out,
        registers,
        threads=128,
        mode=mode,
        declared=f".shared .align 1024 .b8 tile[{len(data)}];",
    )
    assert np.array_equal(unpacked(out), a @ b.T)


@pytest.mark.parametrize(
    ("accumulate", "scale_a", "scale_b"), [(1, 1, 1), (1, -1, 1), (1, 1, -1), (1, -1, -1), (0, -1, 1)]
)
def test_scales(accumulate: int, scale_a: int, scale_b: int) -> None:
    """D = A B + D, or without D (which may be anything, a NaN too); A and B negated or not."""
    a, b = integers((64, 16), 11), integers((8, 16), 12)
    data_a, _, stride_a, _ = image(patterns(a, "bf16"), 32, False)
    data_b, _, stride_b, _ = image(patterns(b, "bf16"), 32, False)
    data = np.concatenate([data_a, data_b])
    out = np.full((128, 4), np.nan, np.float32)
    start = 5.0 if accumulate else np.nan
    run(
        fill(len(data))
        + "".join(f"mov.b32 %f{i}, 0f{np.float32(start).view(np.uint32):08x};" for i in range(4))
        + f"""
        mov.b64 %d5, {descriptor(0, 0, stride_a, 32)}; mov.b64 %d6, {descriptor(len(data_a), 0, stride_b, 32)};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {accumulators(8)}, %d5, %d6, {accumulate}, {scale_a}, {scale_b}, 0, 0;
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        """
        + store(8),
        data,
        out,
        threads=128,
        declared=f".shared .align 1024 .b8 tile[{len(data)}];",
    )
    assert np.array_equal(unpacked(out), scale_a * scale_b * (a @ b.T) + (5 if accumulate else 0))


ONE = """
    wgmma.fence.sync.aligned; mov.b64 %d5, {0};
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %d5, %d5, 0, 1, 1, 0, 0;
"""


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(descriptor(2048, 0, 256, 32), BadAddress, "past the 2048 bytes"), (descriptor(0, 0, 256, 32), Uninitialised, "never written"),
     (0, UnknownInstruction, "layout 0"), (descriptor(0, 0, 256, 32) | 1 << 49, UnknownInstruction, "base offset 1")],
)  # fmt: skip
def test_descriptors_are_checked(value: int, error: type[PtxError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(ONE.format(value), threads=128, declared=".shared .align 1024 .b8 tile[2048];")


@pytest.mark.parametrize(
    "form",
    [
        "m64n8k16.f16.f16.f16",
        "m64n8k32.s32.s8.s8",
        "m64n8k32.f32.e4m3.e4m3",
        "m64n12k16.f32.bf16.bf16",
        "m64n264k16.f32.bf16.bf16",
    ],
)
def test_what_is_not_there_is_refused(form: str) -> None:
    with pytest.raises(UnknownInstruction, match=form):
        run(f"wgmma.mma_async.sync.aligned.{form} {{%f0, %f1, %f2, %f3}}, %d5, %d5, 0, 1, 1, 0, 0;", threads=128)
