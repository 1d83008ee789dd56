"""Matrix instructions: ldmatrix, stmatrix, mma.sync, wgmma, with the fragment layouts of the PTX ISA.

Products are summed in float64 and rounded to f32 once an instruction, in a fixed order; the ISA leaves order and
intermediate rounding free.
"""

import re

import numpy as np

from .arithmetic import unpack
from .bits import bf16_to_f32
from .collectives import whole_warp
from .data import vector
from .errors import BadAddress, PtxError, UnknownInstruction, blaming, no_lane
from .machine import Machine, instruction
from .parse import Instruction

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4


def _warps(machine: Machine, rows) -> np.ndarray:
    return machine.warp_ids(rows)


# ------------------------------------------------------------------------------------- 8x8 matrices of 16-bit elements


def _matrix_rows(machine: Machine, address: np.ndarray, count: int, warps: np.ndarray, verb: str) -> np.ndarray:
    """Offsets (warps, count, 8) into shared memory of the rows whose addresses lanes 8i ... 8i + 7 hold.

    verb: "read" or "write", what is done with them.
    """
    of_rows = np.repeat(warps, 8 * count)
    with blaming(lambda row: row // (8 * count) * 32 + row % (8 * count)):
        flat = machine.shared.locate(address[:, : 8 * count].reshape(-1), 16, of_rows)
        where = flat[:, None] + np.arange(16)
        machine.shared.watch(verb, where, of_rows)
        if verb == "read":
            machine.shared.check_written(where)
        else:
            machine.shared.written[where] = True
    return flat.reshape(len(warps), count, 8)


MATRICES = r"sync\.aligned\.m8n8\.x[124](?:\.trans)?\.shared(?:::cta)?\.b16"


def _matrix_registers(ins: Instruction, operand) -> tuple:
    """One for each matrix that the name says."""
    if f"x{len(vector(operand))}" not in ins.parts:
        raise UnknownInstruction(f"{ins.name} of {len(vector(operand))} registers")
    return vector(operand)


@instruction("ldmatrix", form=MATRICES)
def _load_matrices(machine: Machine, ins: Instruction):
    writes = [machine.writer(t) for t in _matrix_registers(ins, ins.operands[0])]
    address, count = machine.address(ins.operands[1]), len(writes)

    def run(rows, mask):
        whole_warp(machine, rows, mask, "ldmatrix")
        warps = _warps(machine, rows)
        at = _matrix_rows(machine, np.broadcast_to(address(rows), (len(warps), 32)), count, warps, "read")
        if machine.statistics is not None:
            machine.statistics.rows(ins, at % machine.shared.size)
        matrices = machine.shared.data.view(np.uint16)[at[..., None] // 2 + np.arange(8)]
        if "trans" in ins.parts:
            matrices = matrices.swapaxes(2, 3)
        for i, write in enumerate(writes):  # lane l holds row l / 4, columns 2 (l % 4) and the next
            write(np.ascontiguousarray(matrices[:, i]).reshape(len(warps), 64).view(np.uint32), rows, mask)

    return run


@instruction("stmatrix", form=MATRICES)
def _store_matrices(machine: Machine, ins: Instruction):
    reads = [machine.reader(s, "b32") for s in _matrix_registers(ins, ins.operands[1])]
    address, count = machine.address(ins.operands[0]), len(reads)

    def run(rows, mask):
        whole_warp(machine, rows, mask, "stmatrix")
        warps = _warps(machine, rows)
        at = _matrix_rows(machine, np.broadcast_to(address(rows), (len(warps), 32)), count, warps, "write")
        if machine.statistics is not None:
            machine.statistics.rows(ins, at % machine.shared.size)
        fragments = [np.ascontiguousarray(np.broadcast_to(r(rows), (len(warps), 32))) for r in reads]
        matrices = np.stack([f.view(np.uint16).reshape(len(warps), 8, 8) for f in fragments], 1)
        if "trans" in ins.parts:
            matrices = matrices.swapaxes(2, 3)
        machine.shared.data.view(np.uint16)[at[..., None] // 2 + np.arange(8)] = matrices

    return run


# --------------------------------------------------------------------------------------------------------- mma.sync


def _tf32(bits: np.ndarray) -> np.ndarray:
    """What the tensor core sees of an f32: the lower 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _elements(bits: np.ndarray, kind: str) -> list[np.ndarray]:
    """The elements of a 32-bit fragment register, the lowest first."""
    return [_tf32(bits)] if kind == "tf32" else unpack(bits, kind)


@instruction(
    "mma", form=r"sync\.aligned\.m16n8k(?:(?:8|16)\.row\.col\.f32\.(b?f16)\.\1|[48]\.row\.col\.f32\.tf32\.tf32)\.f32"
)
def _multiply(machine: Machine, ins: Instruction):
    """mma.sync.aligned.mMnNkK.row.col.f32.A.B.f32 for f16, bf16 (k8, k16) and tf32 (k4, k8)."""
    depth, kind = int(ins.parts[3].removeprefix("m16n8k")), ins.parts[-2]
    each = 1 if kind == "tf32" else 2  # elements in a register
    d, a, b, c = ins.operands
    writes = [machine.writer(t) for t in d]
    read_a, read_b = ([machine.reader(r, "b32") for r in operand] for operand in (vector(a), vector(b)))
    read_c = [machine.reader(r, "f32") for r in c]
    block = 4 * each  # columns of A that one register row covers
    if len(read_a) != 2 * depth // block or len(read_b) != depth // block:
        raise UnknownInstruction(ins.name)

    def run(rows, mask):
        whole_warp(machine, rows, mask, "mma.sync")
        n = len(_warps(machine, rows))
        wide = lambda read: np.broadcast_to(read(rows), (n, 32))  # noqa: E731
        left, right, total = np.empty((n, 16, depth)), np.empty((n, depth, 8)), np.empty((n, 16, 8))
        for i, read in enumerate(read_a):  # registers alternate between rows g and g + 8, then the next columns
            for e, value in enumerate(_elements(wide(read), kind)):
                left[:, GROUP + 8 * (i % 2), IN_GROUP * each + e + block * (i // 2)] = value
        for i, read in enumerate(read_b):
            for e, value in enumerate(_elements(wide(read), kind)):
                right[:, IN_GROUP * each + e + block * i, GROUP] = value
        for i, read in enumerate(read_c):
            total[:, GROUP + 8 * (i // 2), IN_GROUP * 2 + i % 2] = wide(read)
        result = (left @ right + total).astype(np.float32)
        for i, write in enumerate(writes):
            write(result[:, GROUP + 8 * (i // 2), IN_GROUP * 2 + i % 2], rows, mask)

    return run


# ------------------------------------------------------------------------------------------------------------ wgmma

SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}  # by the descriptor's bits 62-63


def swizzle(offset: np.ndarray, layout: int) -> np.ndarray:
    """The address bits 4.. are xored by bits 7..: 3, 2 or 1 of them for rows of 128, 64 or 32 bytes."""
    bits = {1: 7, 2: 3, 3: 1}.get(layout, 0)
    return offset ^ (((offset >> 7) & bits) << 4)


def operand_offsets(descriptor: int, rows: int, depth: int, size: int, transposed: bool) -> np.ndarray:
    """Shared addresses (rows, depth) of a wgmma operand of `size`-byte elements.

    Descriptor: bits 0-13 start / 16, 16-29 leading byte offset / 16, 32-45 stride byte offset / 16, 49-51 base offset,
    62-63 layout. K-major: 8 rows of `SWIZZLE_BYTES` each, stride bytes to the next 8 rows. Transposed (MN-major): 8
    rows are 8 values of k, a row holds `SWIZZLE_BYTES` of m or n; leading bytes to the next such block along m or n,
    stride bytes to the next 8 of k.
    """
    start, leading, stride = ((descriptor >> s & 0x3FFF) << 4 for s in (0, 16, 32))
    layout = descriptor >> 62 & 3
    if layout == 0 or descriptor >> 49 & 7:
        raise UnknownInstruction(
            f"wgmma descriptor {descriptor:#018x}: layout {layout}, base offset {descriptor >> 49 & 7}"
        )
    width = SWIZZLE_BYTES[layout]
    r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if not transposed:
        if depth * size > width:
            raise PtxError(f"an operand row of {depth * size} bytes in a swizzle of {width}")
        linear = start + r // 8 * stride + r % 8 * width + k * size
    else:
        per_row = width // size
        linear = start + r // per_row * leading + k // 8 * stride + k % 8 * width + r % per_row * size
    return swizzle(linear, layout)


class WarpgroupProduct:
    """One wgmma of one warp: its 16 rows of D += A B. Reads its operands when `finish` is called."""

    def __init__(
        self, machine: Machine, warp: int, a, b: np.ndarray, shape: tuple[int, int], kind: str, accumulate, scale
    ):
        self.machine, self.warp, self.a, self.b = machine, warp, a, b  # a: offsets (16, k) or values (16, k)
        self.columns, self.depth = shape
        self.kind, self.accumulate, self.scale = kind, accumulate, scale

    def sources(self) -> np.ndarray:
        """Offsets of the bytes of shared memory that it reads."""
        size = 4 if self.kind == "tf32" else 2
        parts = [self.b.reshape(-1)]
        if self.a.dtype.kind == "i":
            parts.append(self.a.reshape(-1))
        return np.concatenate(parts)[:, None] + np.arange(size)

    def value(self, offsets: np.ndarray) -> np.ndarray:
        if self.kind == "tf32":
            return _tf32(self.machine.shared.data.view(np.uint32)[offsets // 4]).astype(np.float64)
        bits = self.machine.shared.data.view(np.uint16)[offsets // 2]
        return (bf16_to_f32(bits) if self.kind == "bf16" else bits.view(np.float16)).astype(np.float64)

    def finish(self, accumulator: np.ndarray) -> np.ndarray:
        """accumulator (32, columns / 2), as the registers hold it, and what takes its place."""
        a = self.value(self.a) if self.a.dtype.kind == "i" else self.a
        scale_a, scale_b = self.scale
        product = (scale_a * a) @ (scale_b * self.value(self.b)).T
        # register 4 j + i of lane l: row l / 4 + 8 (i / 2), column 8 j + 2 (l % 4) + i % 2
        tiles = product.reshape(2, 8, self.columns // 8, 4, 2)
        mine = tiles.transpose(1, 3, 2, 0, 4).reshape(32, self.columns // 2)
        total = np.where(self.accumulate[:, None], mine + accumulator, mine)
        return total.astype(np.float32)


@instruction("wgmma", form=r"(?:fence|commit_group|wait_group)\.sync\.aligned|mma_async\.sync\.aligned\.m64.*")
def _warpgroup(machine: Machine, ins: Instruction):
    name = ins.parts[1]
    queue = machine.products
    if name == "fence":
        return lambda rows, mask: whole_warp(machine, rows, mask, ins.name) or queue.fence(_warps(machine, rows))
    if name == "commit_group":
        return lambda rows, mask: whole_warp(machine, rows, mask, ins.name) or queue.commit(_warps(machine, rows))
    if name == "wait_group":
        left = int(ins.operands[0], 0)

        def wait(rows, mask):
            whole_warp(machine, rows, mask, ins.name)
            with blaming(no_lane):
                queue.wait(_warps(machine, rows), left)

        return wait
    form = re.search(r"\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3$", ins.name)
    if form is None:
        raise UnknownInstruction(ins.name)
    columns, depth, kind = int(form.group(1)), int(form.group(2)), form.group(3)
    size = 4 if kind == "tf32" else 2
    if depth * size != 32 or columns % 8 or not 8 <= columns <= 256 or len(ins.operands[0]) != columns // 2:
        raise UnknownInstruction(ins.name)
    registers = ins.operands[0]
    queue.uses(registers)
    from_registers = isinstance(ins.operands[1], tuple)
    read_a = (
        [machine.reader(r, "b32") for r in ins.operands[1]]
        if from_registers
        else machine.reader(ins.operands[1], "u64")
    )
    sources = ins.operands[1] if from_registers else ()
    queue.uses(sources)
    read_b, accumulate = machine.reader(ins.operands[2], "u64"), machine.reader(ins.operands[3], "pred")
    numbers = [int(o, 0) for o in ins.operands[4:]]
    scale = numbers[0], numbers[1]
    transposed = ([0] * (from_registers and len(numbers) > 2) + numbers[2:] + [0, 0])[:2]

    def run(rows, mask):
        whole_warp(machine, rows, mask, "wgmma")
        warps = _warps(machine, rows)
        shape = (len(warps), 32)
        b = np.broadcast_to(read_b(rows), shape)
        a = (
            [np.broadcast_to(r(rows), shape) for r in read_a]
            if from_registers
            else np.broadcast_to(read_a(rows), shape)
        )
        keep = np.broadcast_to(accumulate(rows), shape)
        for k, warp in enumerate(int(w) for w in warps):
            base = int(machine.slot_of[warp]) * machine.shared.size
            right = operand_offsets(int(b[k, 0]), columns, depth, size, bool(transposed[1])) + base
            if from_registers:
                left = np.empty((16, depth))
                each, block = 4 // size, 16 // size
                for i, bits in enumerate(a):
                    for e, value in enumerate(_elements(np.ascontiguousarray(bits[k]), kind)):
                        left[GROUP + 8 * (i % 2), IN_GROUP * each + e + block * (i // 2)] = value
            else:
                whole = operand_offsets(int(a[k, 0]), 64, depth, size, bool(transposed[0]))
                left = whole[16 * (warp % 4) : 16 * (warp % 4) + 16] + base
            product = WarpgroupProduct(machine, warp, left, right, (columns, depth), kind, keep[k].copy(), scale)
            where = product.sources()
            limit = base + machine.shared.allowed
            if (where < base).any() or (where >= limit).any():
                raise BadAddress(f"a wgmma operand reaches past the {machine.shared.allowed} bytes of shared memory")
            with blaming(lambda _, k=k: 32 * k):
                queue.issue(warp, registers, sources, product, where, str(ins))

    return run
