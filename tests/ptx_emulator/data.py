"""Loads, stores and atomics: which space an address is in, what order an access asks for, and what it may see."""

import numpy as np

from .bits import STORAGE, TYPES, as_bits, as_type, size_of
from .errors import PtxError, UnknownInstruction
from .machine import LOCAL_WINDOW, SHARED_WINDOW, Machine, instruction
from .parse import Instruction

SPACES = ("global", "shared", "local", "const", "param")


def space_of(ins: Instruction) -> str:
    return next((p.split("::")[0] for p in ins.parts if p.split("::")[0] in SPACES), "generic")


def vector(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def by_space(machine: Machine, ins: Instruction, address: np.ndarray):
    """(space, positions, addresses in that space) of an access; a generic one may fall in several."""
    space = space_of(ins)
    if space != "generic":
        return [("global" if space == "const" else space, slice(None), address)]
    found = []
    shared = (address >= SHARED_WINDOW) & (address < LOCAL_WINDOW)
    local = address >= LOCAL_WINDOW
    for name, where, window in (
        ("shared", shared, SHARED_WINDOW),
        ("local", local, LOCAL_WINDOW),
        ("global", ~(shared | local), 0),
    ):
        if where.any():
            at = np.flatnonzero(where)
            found.append((name, at, address[at] - window))
    return found


@instruction("ld", "ldu")
def _load(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    size, targets = size_of(kind), vector(ins.operands[0])
    writes = [machine.writer(t) for t in targets]
    if space_of(ins) == "param":
        return _load_parameter(machine, ins, kind, writes)
    address = machine.address(ins.operands[1])
    acquire = "acquire" in ins.parts
    weak = not (acquire or "volatile" in ins.parts or "relaxed" in ins.parts or "nc" in ins.parts)
    stale = "nc" in ins.parts  # the read-only path: what memory held when the kernel began, whatever was acquired since

    def run(rows, mask):
        where = machine.select(np.broadcast_to(address(rows), (len(machine.warp_ids(rows)), 32)), rows, mask)
        warps = machine.lanes(rows, mask)
        values = [np.empty(len(where), STORAGE[8 * size]) for _ in targets]
        for space, at, addresses in by_space(machine, ins, where):
            if space == "shared":
                part = machine.shared.load(addresses, size, len(targets), warps[at])
            elif space == "local":
                part = _local(machine, addresses, size, len(targets), rows, mask, at)
            else:
                part = machine.memory.load(addresses, size, len(targets), warps[at], weak, stale)
            if machine.statistics is not None and space != "local":
                machine.statistics.access(ins, space, addresses, size * len(targets), warps[at])
            for value, got in zip(values, part, strict=True):
                value[at] = got
        if acquire:
            for slot in np.unique(machine.slot_of[machine.warp_ids(rows)]):
                machine.memory.acquire(int(slot))
        for write, value in zip(writes, values, strict=True):
            write(machine.spread(value.view(TYPES[kind]), rows, mask), rows, mask)

    return run


def _load_parameter(machine: Machine, ins: Instruction, kind: str, writes: list):
    """Kernel parameters are known now: the load is a constant."""
    operand = ins.operands[1]
    parameters = machine.kernel.parameter_offsets()
    if operand.base not in parameters:
        raise UnknownInstruction(f"parameter {operand.base}")
    start = parameters[operand.base] + operand.offset
    size = size_of(kind)
    values = np.frombuffer(machine.parameters[start : start + size * len(writes)], TYPES[kind])

    def run(rows, mask):
        for write, value in zip(writes, values, strict=True):
            write(np.array([[value]]), rows, mask)

    return run


def _local(machine: Machine, address, size, count, rows, mask, at, values=None):
    threads = np.repeat(machine.warp_ids(rows) * 32, 32) + np.tile(np.arange(32), len(machine.warp_ids(rows)))
    threads = (threads if mask is None else threads[mask.reshape(-1)])[at]
    if (address < 0).any() or (address + size * count > machine.local_size).any():
        raise PtxError(f"local address outside the {machine.local_size} bytes of a thread")
    where = address[:, None] + np.arange(size * count)
    if values is None:
        data = np.ascontiguousarray(machine.local[threads[:, None], where]).view(STORAGE[8 * size])
        return [data[:, j] for j in range(count)]
    machine.local[threads[:, None], where] = np.stack(values, 1).view(np.uint8)
    return None


@instruction("st")
def _store(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    size, sources = size_of(kind), vector(ins.operands[1])
    reads = [machine.reader(s, kind) for s in sources]
    address = machine.address(ins.operands[0])
    release = "release" in ins.parts
    weak = not (release or "volatile" in ins.parts or "relaxed" in ins.parts)

    def run(rows, mask):
        count = len(machine.warp_ids(rows))
        where = machine.select(np.broadcast_to(address(rows), (count, 32)), rows, mask)
        warps = machine.lanes(rows, mask)
        values = [machine.select(as_bits(np.broadcast_to(r(rows), (count, 32))), rows, mask) for r in reads]
        if release:
            _release(machine, rows)
        for space, at, addresses in by_space(machine, ins, where):
            part = [v[at] for v in values]
            if machine.statistics is not None and space != "local":
                machine.statistics.access(ins, space, addresses, size * len(part), warps[at])
            if space == "shared":
                machine.shared.store(addresses, part, warps[at])
            elif space == "local":
                _local(machine, addresses, size, len(part), rows, mask, at, part)
            else:
                machine.memory.store(addresses, part, warps[at], weak)

    return run


def _release(machine: Machine, rows) -> None:
    for warp in machine.warp_ids(rows):
        machine.memory.release(int(warp))
        machine.schedule.released(int(machine.slot_of[warp]))


OPERATIONS = {
    "add": lambda old, new: old + new,
    "exch": lambda old, new: new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "min": np.minimum,
    "max": np.maximum,
}


@instruction("atom", "red", ends_turn=True)
def _atomic(machine: Machine, ins: Instruction):
    """One lane after another, in the order that the schedule's seed draws; acquire and release as asked.

    Floating-point atomics are refused: their result depends on the order, and this project has none.
    """
    kind = ins.parts[-1]
    name = next((p for p in ins.parts[1:] if p in OPERATIONS or p in ("cas", "inc", "dec")), None)
    if name is None or name in ("inc", "dec") or kind[0] not in "usb":
        raise UnknownInstruction(ins.name)
    operands = list(ins.operands)
    write = machine.writer(operands.pop(0)) if ins.parts[0] == "atom" else machine.writer("_")
    address = machine.address(operands[0])
    reads = [machine.reader(o, kind) for o in operands[1:]]
    release = "release" in ins.parts or "acq_rel" in ins.parts
    acquire = "acquire" in ins.parts or "acq_rel" in ins.parts
    size = size_of(kind)

    def update(old, new):
        if name == "cas":
            return new[1] if old == new[0] else old
        return OPERATIONS[name](old, new[0])

    def run(rows, mask):
        count = len(machine.warp_ids(rows))
        where = machine.select(np.broadcast_to(address(rows), (count, 32)), rows, mask)
        warps = machine.lanes(rows, mask)
        new = [machine.select(np.broadcast_to(r(rows), (count, 32)), rows, mask) for r in reads]
        if release:
            for warp in np.unique(warps):
                machine.memory.release(int(warp))
        old = np.empty(len(where), TYPES[kind])
        for k in machine.rng.permutation(len(where)) if machine.schedule.adversarial else range(len(where)):
            one = slice(k, k + 1)
            for space, _, at in by_space(machine, ins, where[one]):
                memory = machine.shared if space == "shared" else machine.memory
                got = memory.load(at, size, 1, warps[one], *(() if space == "shared" else (False,)))[0].view(
                    TYPES[kind]
                )
                old[k] = got[0]
                value = as_type(as_bits(np.atleast_1d(update(got, [n[one] for n in new]))), f"b{8 * size}")
                memory.store(at, [value], warps[one], *(() if space == "shared" else (False,)))
        if acquire:
            for slot in np.unique(machine.slot_of[warps]):
                machine.memory.acquire(int(slot))
        if release and "acq_rel" not in ins.parts:
            machine.schedule.released(int(machine.slot_of[warps[0]]))
        write(machine.spread(old, rows, mask), rows, mask)

    return run


@instruction("fence", "membar", ends_turn=True)
def _fence(machine: Machine, ins: Instruction):
    """A thread fence publishes what is ordered before it and makes what others published visible."""
    if "proxy" in ins.parts:

        def proxies(rows, mask):
            warps = machine.warp_ids(rows)
            machine.proxies.fence(warps)
            if not ins.parts[-1].startswith("shared"):
                for slot in np.unique(machine.slot_of[warps]):
                    machine.memory.fence_async(int(slot))

        return proxies
    if "mbarrier_init" in ins.parts or ins.parts[-1] in ("cta", "cluster"):
        return lambda rows, mask: None

    def run(rows, mask):
        _release(machine, rows)
        for slot in np.unique(machine.slot_of[machine.warp_ids(rows)]):
            machine.memory.acquire(int(slot))

    return run


@instruction(
    "prefetch", "prefetchu", "applypriority", "discard", "griddepcontrol", "nanosleep", "setmaxnreg", "pmevent"
)
def _hint(machine: Machine, ins: Instruction):
    return lambda rows, mask: None


@instruction("isspacep")
def _is_space(machine: Machine, ins: Instruction):
    read, write = machine.reader(ins.operands[1], "u64"), machine.writer(ins.operands[0])
    space = ins.parts[1].split("::")[0]

    def run(rows, mask):
        address = read(rows)
        shared = (address >= np.uint64(SHARED_WINDOW)) & (address < np.uint64(LOCAL_WINDOW))
        local = address >= np.uint64(LOCAL_WINDOW)
        write({"shared": shared, "local": local, "global": ~(shared | local)}[space], rows, mask)

    return run


@instruction("createpolicy")
def _policy(machine: Machine, ins: Instruction):
    write = machine.writer(ins.operands[0])
    return lambda rows, mask: write(np.zeros((1, 1), np.uint64), rows, mask)
