"""Comparisons, selections, moves, and conversions between types."""

import numpy as np

from .arithmetic import PAIRS, pack, widen
from .bits import STORAGE, TYPES, f32_to_bf16, f32_to_f16, f32_to_tf32, flush, size_of
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
    if name in ("num", "nan"):
        return (
            (lambda a, b: ~(np.isnan(a) | np.isnan(b))) if name == "num" else (lambda a, b: np.isnan(a) | np.isnan(b))
        )
    if name in COMPARE:
        if name == "ne":
            return lambda a, b: (a != b) & ~((a != a) | (b != b))
        return COMPARE[name]
    if name[:-1] in COMPARE and name[-1] == "u":
        return lambda a, b: COMPARE[name[:-1]](a, b) | (a != a) | (b != b)
    raise UnknownInstruction(f"comparison .{name}")


@instruction("setp")
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
        results = [compare(x, y)]
        results.append(~results[0])
        for write, result in zip(writes, results, strict=False):
            write(result if join is None else join(result, other(rows)), rows, mask)

    return run


@instruction("selp")
def _select(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    a, b = (machine.reader(operand, kind) for operand in ins.operands[1:3])
    condition, write = machine.reader(ins.operands[3], "pred"), machine.writer(ins.operands[0])
    return lambda rows, mask: write(np.where(condition(rows), a(rows), b(rows)), rows, mask)


# -------------------------------------------------------------------------------------------- moves and conversions


@instruction("mov")
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
FLOATS = ("f16", "bf16", "f32", "f64")


@instruction("cvt")
def _convert(machine: Machine, ins: Instruction):
    rounding = next((p for p in ins.parts if p in ("rn", "rz", "rna", *ROUND)), None)
    if any(p in ins.parts for p in ("rm", "rp", "relu", "satfinite", "rs")):
        raise UnknownInstruction(ins.name)
    to, source = ins.parts[-2], ins.parts[-1]
    write = machine.writer(ins.operands[0])
    if to in PAIRS:  # d = {a, b}: the first operand is the upper half
        part = PAIRS[to]
        if source != "f32":
            raise UnknownInstruction(ins.name)
        high, low = (machine.reader(operand, "f32") for operand in ins.operands[1:3])
        round_to = f32_to_bf16 if part == "bf16" else f32_to_f16
        return lambda rows, mask: write(pack(round_to(low(rows), rounding), round_to(high(rows), rounding)), rows, mask)
    read = machine.reader(ins.operands[1], source)
    ftz = "ftz" in ins.parts

    def run(rows, mask):
        value = read(rows)
        if source in ("bf16", "f16"):
            value = widen(value, source)
        if ftz and value.dtype == np.float32:
            value = flush(value)
        if to == "bf16":
            value = f32_to_bf16(value.astype(np.float32), rounding or "rn")
        elif to == "f16":
            value = f32_to_f16(value, rounding or "rn") if value.dtype == np.float32 else value.astype(np.float16)
        elif to == "tf32":
            value = f32_to_tf32(value, rounding or "rn")
        elif to in FLOATS:
            value = ROUND[rounding](value) if rounding in ROUND else value
            value = value.astype(TYPES[to])
        elif source in FLOATS:
            value = _float_to_integer(ROUND[rounding or "rzi"](value.astype(np.float64)), to)
        elif "sat" in ins.parts:
            limits = np.iinfo(TYPES[to])
            value = np.clip(value.astype(object), limits.min, limits.max).astype(TYPES[to])
        else:
            value = value.astype(TYPES[to])
        write(value, rows, mask)

    return run


def _float_to_integer(values: np.ndarray, kind: str) -> np.ndarray:
    """Clamped to the range; a NaN gives 0 (of 32 bits and fewer) or the top bit alone (of 64)."""
    limits = np.iinfo(TYPES[kind])
    inside = np.clip(np.nan_to_num(values), float(limits.min), float(limits.max))
    top = inside >= float(limits.max)
    result = np.where(top, limits.max, np.where(top, 0, inside).astype(TYPES[kind])).astype(TYPES[kind])
    if limits.bits == 64:
        result = np.where(np.isnan(values), np.uint64(1 << 63).astype(TYPES[kind]), result)
    return result


@instruction("cvta")
def _to_generic(machine: Machine, ins: Instruction):
    space = next(p.split("::")[0] for p in reversed(ins.parts) if not p.startswith("u"))
    window = np.uint64({"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space, 0))
    read, write = machine.reader(ins.operands[1], "u64"), machine.writer(ins.operands[0])
    if "to" in ins.parts:
        return lambda rows, mask: write(read(rows) - window, rows, mask)
    return lambda rows, mask: write(read(rows) + window, rows, mask)
