"""Comparisons, selections, moves, and conversions between types."""

import numpy as np

from .arithmetic import BITS, INTEGER, PAIRS, pack, widen
from .bits import STORAGE, TYPES, f32_to_bf16, f32_to_f16, f32_to_tf32, f64_to_f32, flush, size_of
from .errors import UnknownInstruction
from .machine import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Machine, instruction
from .parse import Instruction

# ------------------------------------------------------------------------------------------ comparisons, selections

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str):
    """The function of a comparison; `equ`, `ltu` and so on are true where an operand is a NaN, `eq`, `ne`, ... false."""

    def unordered(a, b):
        return (a != a) | (b != b)

    if name == "nan":
        return unordered
    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name in COMPARE:
        return lambda a, b: COMPARE[name](a, b) & ~unordered(a, b)
    return lambda a, b: COMPARE[name[:-1]](a, b) | unordered(a, b)


COMPARISON = "(?:eq|ne|lt|le|gt|ge)u?|lo|ls|hi|hs|num|nan"


@instruction("setp", form=rf"(?:{COMPARISON})(?:\.(?:and|or|xor))?(?:\.ftz)?\.(?:{INTEGER}|{BITS}|f32|f64|b?f16)")
def _set_predicate(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    compare = _comparison(ins.parts[1])
    join = next((JOIN[p] for p in ins.parts[2:] if p in JOIN), None)
    a, b = (machine.reader(operand, kind) for operand in ins.operands[1:3])
    other = machine.reader(ins.operands[3], "pred") if join else None
    targets = ins.operands[0] if isinstance(ins.operands[0], tuple) else (ins.operands[0],)
    writes = [machine.writer(t) for t in targets]

    def run(rows, mask):
        x, y = a(rows), b(rows)
        if kind in ("bf16", "f16"):
            x, y = widen(x, kind), widen(y, kind)
        if "ftz" in ins.parts:
            x, y = flush(x), flush(y)
        results = [compare(x, y)]
        results.append(~results[0])
        if join is not None:
            results = [join(result, other(rows)) for result in results]
        for write, result in zip(writes, results, strict=False):
            write(result, rows, mask)

    return run


@instruction("selp", form=r"[bus](?:16|32|64)|f32|f64")
def _select(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    a, b = (machine.reader(operand, kind) for operand in ins.operands[1:3])
    condition, write = machine.reader(ins.operands[3], "pred"), machine.writer(ins.operands[0])
    return lambda rows, mask: write(np.where(condition(rows), a(rows), b(rows)), rows, mask)


# -------------------------------------------------------------------------------------------- moves and conversions


@instruction("mov", form=r"pred|[bus](?:16|32|64)|f32|f64")
def _move(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    target, source = ins.operands
    if isinstance(source, tuple):
        width = 8 * size_of(kind) // len(source)
        reads = [machine.reader(s, f"b{width}") for s in source]
        write = machine.writer(target)
        wide = STORAGE[width * len(source)]

        def run(rows, mask):
            parts = [r(rows).astype(wide) << wide(width * i) for i, r in enumerate(reads)]
            total = parts[0]
            for part in parts[1:]:
                total = total | part
            write(total, rows, mask)

        return run
    if isinstance(target, tuple):
        width = 8 * size_of(kind) // len(target)
        read = machine.reader(source, kind)
        writes = [machine.writer(t) for t in target]

        def run(rows, mask):
            bits = read(rows)
            for i, write in enumerate(writes):
                write((bits >> bits.dtype.type(width * i)).astype(STORAGE[width]), rows, mask)

        return run
    read, write = machine.reader(source, kind), machine.writer(target)
    return lambda rows, mask: write(read(rows), rows, mask)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ANY = r"(?:[us](?:8|16|32|64)|b?f16|f32|f64)"
PLAIN = rf"(?:r[nz]\.|r[nzmp]i\.)?(?:ftz\.)?(?:sat\.)?{ANY}\.{ANY}"


@instruction("cvt", form=rf"{PLAIN}|(?:rn|rz|rna)\.tf32\.f32|r[nz]\.b?f16x2\.f32")
def _convert(machine: Machine, ins: Instruction):
    to, source = ins.parts[-2], ins.parts[-1]
    rounding = ins.parts[1] if ins.parts[1] in ("rn", "rz", "rna", *ROUND) else None
    write = machine.writer(ins.operands[0])
    if to in PAIRS:  # d = {a, b}: the first operand is the upper half
        high, low = (machine.reader(operand, "f32") for operand in ins.operands[1:3])
        round_to = f32_to_bf16 if PAIRS[to] == "bf16" else f32_to_f16
        return lambda rows, mask: write(pack(round_to(low(rows), rounding), round_to(high(rows), rounding)), rows, mask)
    read = machine.reader(ins.operands[1], source)
    if to[0] in "us":
        convert = _to_integer(ins, to, source, rounding)
    else:
        convert = _to_float(ins, to, source, rounding)
    flushes = flush if "ftz" in ins.parts and source == "f32" else lambda values: values
    wide = (lambda values: widen(values, source)) if source in ("bf16", "f16") else lambda values: values
    return lambda rows, mask: write(convert(flushes(wide(read(rows)))), rows, mask)


def _to_float(ins: Instruction, to: str, source: str, rounding: str | None):
    sat, ftz = "sat" in ins.parts, "ftz" in ins.parts and to == "f32"
    if sat and to == "bf16":
        raise UnknownInstruction(ins.name)
    if source in ("u64", "s64") and (to in ("f16", "bf16") or rounding == "rz"):
        raise UnknownInstruction(ins.name)  # f64, through which integers pass, cannot hold all of them

    def convert(value):
        if rounding in ROUND:
            value = ROUND[rounding](value)
        if to == "f64":
            return value.astype(np.float64)
        if to == "tf32":
            return f32_to_tf32(value, rounding)
        if to == "f32" and (rounding != "rz" or value.dtype == np.float32):
            value = value.astype(np.float32)
        elif value.dtype != np.float32:
            value = f64_to_f32(value.astype(np.float64), "rz" if to == "f32" else "odd")
        if sat:
            value = np.clip(np.where(np.isnan(value), np.float32(0), value), np.float32(0), np.float32(1))
        if ftz:
            value = flush(value)
        if to == "f32":
            return value
        return (f32_to_bf16 if to == "bf16" else f32_to_f16)(value, "rz" if rounding == "rz" else "rn")

    return convert


def _to_integer(ins: Instruction, to: str, source: str, rounding: str | None):
    if source[0] not in "us":
        if rounding not in ROUND:
            raise UnknownInstruction(ins.name)
        return lambda value: _float_to_integer(ROUND[rounding](value.astype(np.float64)), to, source)
    if "sat" not in ins.parts:
        return lambda value: value.astype(TYPES[to])
    own, limits = np.iinfo(TYPES[source]), np.iinfo(TYPES[to])
    low, high = max(own.min, limits.min), min(own.max, limits.max)
    return lambda value: np.clip(value, low, high).astype(TYPES[to])


def _float_to_integer(values: np.ndarray, kind: str, source: str) -> np.ndarray:
    """Clamped to the range; a NaN gives the top bit alone where one of the two types has 64 bits, otherwise 0."""
    limits = np.iinfo(TYPES[kind])
    inside = np.clip(np.nan_to_num(values), float(limits.min), float(limits.max))
    top = inside >= float(limits.max)
    result = np.where(top, limits.max, np.where(top, 0, inside).astype(TYPES[kind])).astype(TYPES[kind])
    nan = limits.min or 1 << (limits.bits - 1)
    if limits.bits == 64 or source == "f64":
        result = np.where(np.isnan(values), np.array(nan, TYPES[kind]), result)
    return result


@instruction("cvta", form=r"(?:to\.)?(?:global|shared(?:::cta)?|local|const|param(?:::entry)?)\.u(?:32|64)")
def _to_generic(machine: Machine, ins: Instruction):
    space = next(p.split("::")[0] for p in reversed(ins.parts) if not p.startswith("u"))
    window = np.uint64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space, 0))
    read, write = machine.reader(ins.operands[1], "u64"), machine.writer(ins.operands[0])
    if "to" in ins.parts:
        return lambda rows, mask: write(read(rows) - window, rows, mask)
    return lambda rows, mask: write(read(rows) + window, rows, mask)
