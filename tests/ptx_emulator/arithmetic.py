"""Instructions that work lane by lane on registers: integers, floats, comparisons, conversions, moves of bits."""

import numpy as np

from .bits import (
    STORAGE,
    TYPES,
    as_bits,
    as_type,
    bf16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    f64_to_f32,
    flush,
    size_of,
)
from .errors import UnknownInstruction
from .machine import Machine, instruction
from .parse import Instruction

PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}

INTEGER, BITS, HALF = r"[us](?:16|32|64)", r"b(?:16|32|64)", r"b?f16(?:x2)?"
FLOAT = rf"(?:rn\.)?(?:(?:ftz\.)?(?:sat\.)?f32|f64|{HALF})"
APPROXIMATE = r"approx\.(?:ftz\.)?f32"
ROUNDED = rf"{APPROXIMATE}|rn\.(?:ftz\.)?f32|rn\.f64"


# ------------------------------------------------------------------------------------------------- lanes of halves


def unpack(bits: np.ndarray, kind: str) -> list[np.ndarray]:
    """Two f32 of a packed pair, the low half first."""
    halves = [(bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)]
    return [widen(h.view(TYPES[kind]), kind) for h in halves]


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return as_bits(low).astype(np.uint32) | (as_bits(high).astype(np.uint32) << np.uint32(16))


def widen(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return bf16_to_f32(values.view(np.uint16))
    return values.astype(np.float32) if kind == "f16" else values


def narrow(values: np.ndarray, kind: str) -> np.ndarray:
    """float64 to halves by one rounding to nearest."""
    return (f32_to_bf16 if kind == "bf16" else f32_to_f16)(f64_to_f32(values, "odd"))


def elementwise(machine: Machine, ins: Instruction, kind: str, operation, inputs: int):
    """run() of an operation on `inputs` operands of one type; halves are computed in float64 and rounded once."""
    read = [machine.reader(operand, kind) for operand in ins.operands[1 : 1 + inputs]]
    write = machine.writer(ins.operands[0])
    ftz = "ftz" in ins.parts

    def values(rows):
        return [flush(r(rows)) if ftz else r(rows) for r in read]

    if kind in PAIRS:
        part = PAIRS[kind]

        def run(rows, mask):
            halves = zip(*(unpack(v, part) for v in (r(rows) for r in read)), strict=True)
            low, high = (narrow(operation(*(h.astype(np.float64) for h in hs)), part) for hs in halves)
            write(pack(low, high), rows, mask)

    elif kind in ("f16", "bf16"):

        def run(rows, mask):
            wide = [widen(r(rows), kind).astype(np.float64) for r in read]
            write(narrow(operation(*wide), kind), rows, mask)

    else:

        def run(rows, mask):
            result = operation(*values(rows)).astype(TYPES[kind], copy=False)
            if "sat" in ins.parts and kind == "f32":
                result = np.clip(np.nan_to_num(result, nan=0.0), 0, 1).astype(np.float32)
            write(flush(result) if ftz else result, rows, mask)

    return run


# ------------------------------------------------------------------------------------------------------ arithmetic

SIMPLE = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction("add", "sub", form=f"{INTEGER}|{FLOAT}")
@instruction("and", "or", "xor", form=f"pred|{BITS}")
def _simple(machine: Machine, ins: Instruction):
    return elementwise(machine, ins, ins.parts[-1], SIMPLE[ins.parts[0]], 2)


@instruction("min", "max", form=rf"{INTEGER}|(?:ftz\.)?(?:NaN\.)?f32|f64|(?:NaN\.)?{HALF}")
def _min_max(machine: Machine, ins: Instruction):
    """Of a number and a NaN the number, unless `.NaN` asks for the NaN; -0 is less than +0."""
    kind, least = ins.parts[-1], ins.parts[0] == "min"
    if len(ins.operands) != 3:
        raise UnknownInstruction(f"{ins.name} of {len(ins.operands) - 1} values")
    if kind[0] in "us":
        return elementwise(machine, ins, kind, np.minimum if least else np.maximum, 2)
    pick = np.minimum if least else np.maximum
    ignore = np.fmin if least else np.fmax

    def operation(a, b):
        result = (pick if "NaN" in ins.parts else ignore)(a, b)
        negative = (np.logical_or if least else np.logical_and)(np.signbit(a), np.signbit(b))
        return np.where((a == 0) & (b == 0), np.where(negative, -0.0, 0.0).astype(result.dtype), result)

    return elementwise(machine, ins, kind, operation, 2)


def _double(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


def _product(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """The whole product of two integers of up to 32 bits."""
    wide = TYPES[_double(kind)]
    return a.astype(wide) * b.astype(wide)


def _high_64(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    wide = (a.astype(object) * b.astype(object)) >> 64
    return np.array([int(v) & (2**64 - 1) for v in wide.reshape(-1)], np.uint64).reshape(wide.shape).view(TYPES[kind])


@instruction("mul", "mad", form=rf"(?:lo|hi)\.{INTEGER}|wide\.[us](?:16|32)|{FLOAT}")
def _multiply(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    add = ins.parts[0] == "mad"
    if kind[0] not in "us":
        if add:
            return _fused(machine, ins)
        return elementwise(machine, ins, kind, np.multiply, 2)
    a, b = (machine.reader(operand, kind) for operand in ins.operands[1:3])
    write = machine.writer(ins.operands[0])
    wide = "wide" in ins.parts
    c = machine.reader(ins.operands[3], _double(kind) if wide else kind) if add else None
    bits = int(kind[1:])

    def run(rows, mask):
        if wide:
            result = _product(a(rows), b(rows), kind)
        elif "hi" in ins.parts and bits == 64:
            result = _high_64(*np.broadcast_arrays(a(rows), b(rows)), kind)
        elif "hi" in ins.parts:
            result = (_product(a(rows), b(rows), kind) >> TYPES[_double(kind)](bits)).astype(TYPES[kind])
        else:
            result = a(rows) * b(rows)
        write(result if c is None else result + c(rows), rows, mask)

    return run


@instruction("fma", form=rf"rn\.(?:(?:ftz\.)?(?:sat\.)?f32|{HALF})")
def _fused(machine: Machine, ins: Instruction):
    """One rounding: f32 through f64, whose product is exact and whose sum is corrected where it would round twice."""
    kind = ins.parts[-1]
    if kind == "f64":
        raise UnknownInstruction(ins.name)
    if kind == "f32":
        return elementwise(machine, ins, kind, fused_multiply_add, 3)
    return elementwise(machine, ins, kind, lambda a, b, c: _to_odd(a * b, c), 3)


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return _to_odd(a.astype(np.float64) * b, np.float64(1) * c).astype(np.float32)


def _to_odd(product: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """product + addend rounded to odd in f64: rounding that to fewer bits gives what one rounding would."""
    total = product + addend
    part = total - product  # Knuth's two-sum: the error of the sum, exactly
    error = (product - (total - part)) + (addend - part)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    towards = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return np.where(inexact, bits + towards, bits).view(np.float64)


@instruction("div", form=rf"{INTEGER}|full\.(?:ftz\.)?f32|{ROUNDED}")
@instruction("rem", form=INTEGER)
def _divide(machine: Machine, ins: Instruction):
    kind, rest = ins.parts[-1], ins.parts[0] == "rem"
    if kind[0] not in "us":
        return elementwise(machine, ins, kind, np.divide, 2)

    def operation(a, b):
        """Towards zero; by zero all ones, as the hardware gives."""
        a, b = np.broadcast_arrays(a, b)
        safe = np.where(b == 0, np.ones_like(b), b)
        quotient = a // safe
        remainder = a - quotient * safe
        if kind[0] == "s":
            quotient = np.where((remainder != 0) & ((a < 0) != (safe < 0)), quotient + 1, quotient)
            remainder = a - quotient * safe
        by_zero = as_type(np.full((1, 1), 2**64 - 1, np.uint64), kind)
        return np.where(b == 0, a if rest else by_zero, remainder if rest else quotient)

    return elementwise(machine, ins, kind, operation, 2)


UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction("neg", "abs", form=rf"s(?:16|32|64)|(?:ftz\.)?f32|f64|{HALF}")
@instruction("sqrt", "rcp", form=ROUNDED)
@instruction("rsqrt", "lg2", "sin", "cos", form=APPROXIMATE)
@instruction("ex2", form=rf"{APPROXIMATE}|approx\.f16(?:x2)?")
@instruction("tanh", form=rf"approx\.(?:f32|{HALF})")
def _unary(machine: Machine, ins: Instruction):
    """Approximations (`.approx`) are as numpy has them: the ISA allows a few units in the last place."""
    name = ins.parts[0]
    if name in ("neg", "abs") and ins.parts[-1] in ("bf16", "f16", "bf16x2", "f16x2"):
        sign = np.uint32(0x80008000) if ins.parts[-1].endswith("x2") else np.uint16(0x8000)
        kind = "b32" if ins.parts[-1].endswith("x2") else "b16"
        return elementwise(machine, ins, kind, (lambda a: a ^ sign) if name == "neg" else (lambda a: a & ~sign), 1)
    return elementwise(machine, ins, ins.parts[-1], UNARY[name], 1)


# ---------------------------------------------------------------------------------------------------- bits


@instruction("not", form=f"pred|{BITS}")
@instruction("cnot", form=BITS)
def _not(machine: Machine, ins: Instruction):
    if ins.parts[0] == "cnot":
        return elementwise(machine, ins, ins.parts[-1], lambda a: (a == 0).astype(a.dtype), 1)
    return elementwise(machine, ins, ins.parts[-1], np.invert, 1)


@instruction("shl", form=BITS)
@instruction("shr", form=r"[bus](?:16|32|64)")
def _shift(machine: Machine, ins: Instruction):
    """Counts past the width act as the width."""
    kind = ins.parts[-1]
    bits = 8 * size_of(kind)
    value, count = machine.reader(ins.operands[1], kind), machine.reader(ins.operands[2], "u32")
    write = machine.writer(ins.operands[0])

    def run(rows, mask):
        a, n = value(rows), count(rows)
        whole = n >= bits
        amount = np.minimum(n, bits - 1).astype(a.dtype)
        if ins.parts[0] == "shl":
            result = np.where(whole, a.dtype.type(0), a << amount)
        else:
            result = a >> amount
            result = np.where(whole, (result < 0) * a.dtype.type(-1) if kind[0] == "s" else a.dtype.type(0), result)
        write(result.astype(a.dtype), rows, mask)

    return run


@instruction("shf", form=r"[lr]\.(?:wrap|clamp)\.b32")
def _funnel(machine: Machine, ins: Instruction):
    low, high, count = (machine.reader(operand, "u32") for operand in ins.operands[1:4])
    write = machine.writer(ins.operands[0])

    def run(rows, mask):
        n = count(rows).astype(np.uint64)
        n = n & np.uint64(31) if "wrap" in ins.parts else np.minimum(n, np.uint64(32))
        pair = (high(rows).astype(np.uint64) << np.uint64(32)) | low(rows)
        result = (pair << n) >> np.uint64(32) if "l" in ins.parts else pair >> n
        write(result.astype(np.uint32), rows, mask)

    return run


@instruction("bfe", form=r"[us](?:32|64)")
def _extract(machine: Machine, ins: Instruction):
    """Behind the field, and past the top bit, a signed one repeats its sign: the last bit of the field, at most the top bit."""
    kind = ins.parts[-1]
    width = 8 * size_of(kind)
    value = machine.reader(ins.operands[1], f"s{width}")
    start, length = (machine.reader(operand, "u32") for operand in ins.operands[2:4])
    write = machine.writer(ins.operands[0])

    def run(rows, mask):
        a, at, n = np.broadcast_arrays(value(rows), start(rows) & np.uint32(255), length(rows) & np.uint32(255))
        place = at.astype(np.int64)[..., None] + np.arange(width)  # of each bit of the result
        inside = (np.arange(width) < n[..., None]) & (place < width)
        bits = (a[..., None] >> np.minimum(place, width - 1).astype(a.dtype)) & a.dtype.type(1)
        last = np.clip(at.astype(np.int64) + n - 1, 0, width - 1).astype(a.dtype)
        sign = np.where(n > 0, (a >> last) & a.dtype.type(1), a.dtype.type(0)) * a.dtype.type(kind[0] == "s")
        bits = np.where(inside, bits, sign[..., None]).astype(STORAGE[width])
        write((bits << np.arange(width, dtype=STORAGE[width])).sum(-1, dtype=STORAGE[width]), rows, mask)

    return run


@instruction("bfi", form="b(?:32|64)")
def _insert(machine: Machine, ins: Instruction):
    """A field of `length` bits goes to `start`; what would lie past the top bit is lost."""
    kind = ins.parts[-1]
    width, bits = 8 * size_of(kind), TYPES[kind]
    value, into = (machine.reader(operand, kind) for operand in ins.operands[1:3])
    start, length = (machine.reader(operand, "u32") for operand in ins.operands[3:5])
    write = machine.writer(ins.operands[0])
    ones = np.array([(1 << n) - 1 for n in range(width + 1)], bits)

    def run(rows, mask):
        at, n = (np.minimum(v(rows) & np.uint32(255), width) for v in (start, length))
        shift, inside = (at % width).astype(bits), at < width
        field = np.where(inside, ones[n] << shift, bits(0))
        write((into(rows) & ~field) | ((value(rows) << shift) & field), rows, mask)

    return run


@instruction("lop3", form="b32")
def _logic(machine: Machine, ins: Instruction):
    a, b, c = (machine.reader(operand, "b32") for operand in ins.operands[1:4])
    table = int(ins.operands[4], 0)
    write = machine.writer(ins.operands[0])

    def run(rows, mask):
        inputs = a(rows), b(rows), c(rows)
        result = np.zeros((1, 1), np.uint32)
        for k in range(8):
            if table >> k & 1:
                x, y, z = (v if k >> (2 - i) & 1 else ~v for i, v in enumerate(inputs))
                result = result | (x & y & z)
        write(result, rows, mask)

    return run


@instruction("prmt", form="b32")
def _permute(machine: Machine, ins: Instruction):
    a, b, selector = (machine.reader(operand, "b32") for operand in ins.operands[1:4])
    write = machine.writer(ins.operands[0])

    def run(rows, mask):
        pair = a(rows).astype(np.uint64) | (b(rows).astype(np.uint64) << np.uint64(32))
        choose = selector(rows)
        result = np.zeros((1, 1), np.uint32)
        for i in range(4):
            nibble = (choose >> np.uint32(4 * i)) & np.uint32(15)
            byte = ((pair >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(
                np.uint32
            )
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i))
        write(result, rows, mask)

    return run


@instruction("popc", "clz", "brev", form="b32")
@instruction("bfind", form="u32")
def _count(machine: Machine, ins: Instruction):
    value, write = machine.reader(ins.operands[1], "u32"), machine.writer(ins.operands[0])

    def run(rows, mask):
        bits = (value(rows)[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
        if ins.parts[0] == "popc":
            result = bits.sum(-1)
        elif ins.parts[0] == "brev":
            result = (bits << (31 - np.arange(32)).astype(np.uint32)).sum(-1)
        else:
            top = np.where(bits.any(-1), 31 - np.argmax(bits[..., ::-1], -1), -1)
            result = 31 - top if ins.parts[0] == "clz" else top
        write(result.astype(np.int64).astype(np.uint32), rows, mask)

    return run


@instruction("dp4a", form=r"s32\.s32|u32\.u32")
def _dot_bytes(machine: Machine, ins: Instruction):
    a, b, c = (machine.reader(operand, "u32") for operand in ins.operands[1:4])
    write, byte = machine.writer(ins.operands[0]), np.int8 if ins.parts[1] == "s32" else np.uint8

    def run(rows, mask):
        x, y = (np.ascontiguousarray(v).view(byte).reshape(*v.shape, 4).astype(np.int64) for v in (a(rows), b(rows)))
        write((c(rows).astype(np.int64) + (x * y).sum(-1)).astype(np.uint32), rows, mask)

    return run
