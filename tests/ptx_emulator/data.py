"""Loads, stores and atomics: which space an address is in, what order an access asks for, and what it may see."""

import numpy as np

from .bits import STORAGE, TYPES, as_bits, size_of
from .errors import BadAddress, UnknownInstruction, blaming
from .machine import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Machine, instruction
from .parse import Instruction

SPACES = ("global", "shared", "local", "const", "param")

ORDER = r"(?:(?:weak|volatile|relaxed|acquire|release)\.)?(?:(?:cta|cluster|gpu|sys)\.)?"
SPACE = r"(?:(?:global|shared(?:::cta|::cluster)?|local|const|param(?:::entry)?)\.)?"
CACHE = r"(?:(?:nc|ca|cg|cs|lu|cv|wb|wt|L[12]::\w+(?:::\w+)?)\.)*"
VALUE = r"(?:v[248]\.)?(?:[bus](?:8|16|32|64)|f32|f64)"


def space_of(ins: Instruction) -> str:
    return next((p.split("::")[0] for p in ins.parts if p.split("::")[0] in SPACES), "generic")


def vector(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def elements(ins: Instruction, operand) -> tuple:
    """The registers of a load or store, as many as it says (`.v4`)."""
    count = next((int(p[1]) for p in ins.parts if p in ("v2", "v4", "v8")), 1)
    if len(vector(operand)) != count:
        raise UnknownInstruction(f"{ins.name} of {len(vector(operand))} registers")
    return vector(operand)


def beyond_cta(ins: Instruction) -> bool:
    """Whether what the access orders, it orders for other CTAs too."""
    return not {"cta", "cluster"} & set(ins.parts)


WINDOWS = {"global": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


def in_window(address: np.ndarray, space: str) -> np.ndarray:
    """Which generic addresses are of `space`."""
    which = np.searchsorted([*WINDOWS.values()], address.astype(np.int64), side="right") - 1
    return which == [*WINDOWS].index(space)


def by_space(machine: Machine, ins: Instruction, address: np.ndarray):
    """(space, positions, addresses in that space) of an access; a generic one may fall in several."""
    space = space_of(ins)
    if space != "generic":
        return [("global" if space == "const" else space, slice(None), address)]
    found = []
    for name, window in WINDOWS.items():
        where = in_window(address, name)
        if where.any():
            at = np.flatnonzero(where)
            found.append((name, at, address[at] - window))
    return found


@instruction("ld", form=ORDER + SPACE + CACHE + VALUE)
def _load(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    size, targets = size_of(kind), elements(ins, ins.operands[0])
    writes = [machine.writer(t) for t in targets]
    if space_of(ins) == "param" and ins.operands[1].base in machine.kernel.parameter_offsets():
        return _load_parameter(machine, ins, kind, writes)
    address = machine.address(ins.operands[1])
    acquire = "acquire" in ins.parts
    weak = not {"acquire", "volatile", "relaxed", "nc"} & set(ins.parts)
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
            elif space == "param":
                part = _parameters(machine, addresses, size, len(targets))
            else:
                part = machine.memory.load(addresses, size, len(targets), warps[at], weak, stale)
            if machine.statistics is not None and space in ("global", "shared"):
                machine.statistics.access(ins, space, addresses, size * len(targets), warps[at])
            for value, got in zip(values, part, strict=True):
                value[at] = got
        if acquire:
            _acquire(machine, ins, np.unique(warps))
        for write, value in zip(writes, values, strict=True):
            write(machine.spread(value.view(TYPES[kind]), rows, mask), rows, mask)

    return run


def _load_parameter(machine: Machine, ins: Instruction, kind: str, writes: list):
    """A parameter by its name is known now: the load is a constant."""
    start = np.array([machine.addresses[ins.operands[1].base] + ins.operands[1].offset])
    values = [v.view(TYPES[kind])[None] for v in _parameters(machine, start, size_of(kind), len(writes))]

    def run(rows, mask):
        for write, value in zip(writes, values, strict=True):
            write(value, rows, mask)

    return run


def _parameters(machine: Machine, address: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """Values from the parameter block, as bit patterns."""
    wrong = (address % (size * count) != 0) | (address < 0) | (address + size * count > len(machine.parameters))
    if wrong.any():
        k = int(np.argmax(wrong))
        raise BadAddress(
            f"{size * count} bytes at {int(address[k])} of the {len(machine.parameters)} bytes of parameters", k
        )
    where = address[:, None] + np.arange(size * count)
    data = np.frombuffer(machine.parameters, np.uint8)[where].view(STORAGE[8 * size])
    return [data[:, j] for j in range(count)]


def _local(machine: Machine, address, size, count, rows, mask, at, values=None):
    threads = np.repeat(machine.warp_ids(rows) * 32, 32) + np.tile(np.arange(32), len(machine.warp_ids(rows)))
    threads = (threads if mask is None else threads[mask.reshape(-1)])[at]
    wrong = (address < 0) | (address + size * count > machine.local_size) | (address % (size * count) != 0)
    if wrong.any():
        k = int(np.argmax(wrong))
        raise BadAddress(
            f"{size * count} bytes at local address {int(address[k])}: a thread has {machine.local_size}", k
        )
    where = address[:, None] + np.arange(size * count)
    if values is None:
        data = np.ascontiguousarray(machine.local[threads[:, None], where]).view(STORAGE[8 * size])
        return [data[:, j] for j in range(count)]
    machine.local[threads[:, None], where] = np.stack(values, 1).view(np.uint8)
    return None


@instruction("st", form=ORDER + SPACE + CACHE + VALUE)
def _store(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    size, sources = size_of(kind), elements(ins, ins.operands[1])
    reads = [machine.reader(s, kind) for s in sources]
    address = machine.address(ins.operands[0])
    weak = not {"release", "volatile", "relaxed"} & set(ins.parts)

    def run(rows, mask):
        count = len(machine.warp_ids(rows))
        where = machine.select(np.broadcast_to(address(rows), (count, 32)), rows, mask)
        warps = machine.lanes(rows, mask)
        values = [machine.select(as_bits(np.broadcast_to(r(rows), (count, 32))), rows, mask) for r in reads]
        if "release" in ins.parts:
            _release(machine, ins, np.unique(warps))
        for space, at, addresses in by_space(machine, ins, where):
            part = [v[at] for v in values]
            if machine.statistics is not None and space in ("global", "shared"):
                machine.statistics.access(ins, space, addresses, size * len(part), warps[at])
            if space == "shared":
                machine.shared.store(addresses, part, warps[at])
            elif space == "local":
                _local(machine, addresses, size, len(part), rows, mask, at, part)
            elif space == "param":
                raise BadAddress(f"{ins.name} to the parameters, which are constant")
            else:
                machine.memory.store(addresses, part, warps[at], weak)
        if not weak:
            _show(machine, warps)

    return run


def _release(machine: Machine, ins: Instruction, warps: np.ndarray, hold: bool = True) -> None:
    """Publish what these warps stored and what is ordered before it; at the scope of the CTA, order it.

    hold: others get the time to look before the CTA goes on.
    """
    for warp in warps:
        slot = int(machine.slot_of[warp])
        if beyond_cta(ins):
            machine.memory.release(int(warp))
            if hold:
                machine.schedule.released(slot)
        else:
            machine.memory.barrier(slot, np.array([warp]))


def _show(machine: Machine, warps: np.ndarray) -> None:
    """A strong write is seen at once: should others take it for a flag, they get the time to look at what is not."""
    for slot in np.unique(machine.slot_of[warps]):
        if machine.memory.unpublished(int(slot)):
            machine.schedule.released(int(slot))


def _acquire(machine: Machine, ins: Instruction, warps: np.ndarray) -> None:
    """See what others published; the CTA's own threads see each other's stores without it."""
    if beyond_cta(ins):
        for slot in np.unique(machine.slot_of[warps]):
            machine.memory.acquire(int(slot))


OPERATIONS = {
    "add": lambda old, new: old + new,
    "exch": lambda old, new: new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "min": np.minimum,
    "max": np.maximum,
}


ATOMIC = r"(?:(?:relaxed|acquire|release|acq_rel|cta|cluster|gpu|sys|global|shared(?:::cta)?)\.)*"


@instruction("atom", "red", form=ATOMIC + r"(?:add|exch|and|or|xor|min|max|cas)\.[usb](?:32|64)", ends_turn=True)
def _atomic(machine: Machine, ins: Instruction):
    """One lane after another, in the order that the schedule's seed draws; acquire and release as asked.

    Floating-point atomics are refused: their result depends on the order, and this project has none.
    """
    name, kind = ins.parts[-2:]
    operands = list(ins.operands)
    write = machine.writer(operands.pop(0)) if ins.parts[0] == "atom" else machine.writer("_")
    address = machine.address(operands[0])
    reads = [machine.reader(o, kind) for o in operands[1:]]
    size = size_of(kind)

    def update(old, new):
        if name == "cas":
            return np.where(old == new[0], new[1], old)
        return OPERATIONS[name](old, new[0])

    def one_lane(where, warp, new):
        ((space, _, at),) = by_space(machine, ins, where)
        if space == "shared":
            old = machine.shared.load(at, size, 1, warp, atomic=True)[0].view(TYPES[kind])
            machine.shared.store(at, [as_bits(update(old, new))], warp, atomic=True)
        else:
            old = machine.memory.load(at, size, 1, warp, weak=False)[0].view(TYPES[kind])
            machine.memory.store(at, [as_bits(update(old, new))], warp, weak=False)
        return old[0]

    def run(rows, mask):
        count = len(machine.warp_ids(rows))
        where = machine.select(np.broadcast_to(address(rows), (count, 32)), rows, mask)
        warps = machine.lanes(rows, mask)
        new = [machine.select(np.broadcast_to(r(rows), (count, 32)), rows, mask) for r in reads]
        if "release" in ins.parts or "acq_rel" in ins.parts:
            _release(machine, ins, np.unique(warps), hold="release" in ins.parts)
        old = np.empty(len(where), TYPES[kind])
        for k in machine.rng.permutation(len(where)) if machine.schedule.adversarial else range(len(where)):
            with blaming(lambda _, k=k: int(k)):
                old[k] = one_lane(where[k : k + 1], warps[k : k + 1], [n[k : k + 1] for n in new])
        if "acquire" in ins.parts or "acq_rel" in ins.parts:
            _acquire(machine, ins, np.unique(warps))
        _show(machine, warps)
        for slot in np.unique(machine.slot_of[warps]):
            machine.schedule.drew(int(slot))
        write(machine.spread(old, rows, mask), rows, mask)

    return run


FENCE = r"(?:sc|acq_rel)\.(?:cta|cluster|gpu|sys)|mbarrier_init\.release\.cluster"


@instruction("fence", form=rf"{FENCE}|proxy\.async(?:\.(?:global|shared(?:::cta|::cluster)?))?", ends_turn=True)
@instruction("membar", form="cta|gl|sys", ends_turn=True)
def _fence(machine: Machine, ins: Instruction):
    """A thread fence publishes what is ordered before it and makes what others published visible."""
    if "proxy" in ins.parts:
        space = space_of(ins)

        def proxies(rows, mask):
            warps = machine.here(rows, mask)
            if space != "global":
                machine.proxies.fence(warps)
            if space != "shared":
                for slot in np.unique(machine.slot_of[warps]):
                    machine.memory.fence_async(int(slot))

        return proxies
    if "mbarrier_init" in ins.parts:
        return lambda rows, mask: None

    def run(rows, mask):
        warps = machine.here(rows, mask)
        _release(machine, ins, warps)
        _acquire(machine, ins, warps)

    return run


@instruction("prefetch", "prefetchu", "applypriority", "griddepcontrol", "nanosleep", "setmaxnreg", "pmevent")
def _hint(machine: Machine, ins: Instruction):
    return lambda rows, mask: None


@instruction("isspacep", form=r"global|shared(?:::cta)?|local|param(?:::entry)?")
def _is_space(machine: Machine, ins: Instruction):
    read, write = machine.reader(ins.operands[1], "u64"), machine.writer(ins.operands[0])
    return lambda rows, mask: write(in_window(read(rows), space_of(ins)), rows, mask)


@instruction("createpolicy")
def _policy(machine: Machine, ins: Instruction):
    write = machine.writer(ins.operands[0])
    return lambda rows, mask: write(np.zeros((1, 1), np.uint64), rows, mask)
