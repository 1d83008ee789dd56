"""Instructions of a whole warp or CTA: barriers, shuffles, votes. Reached by only part of whom they name, they complain."""

import numpy as np

from .bits import TYPES
from .errors import PartialWarp
from .machine import Machine, instruction
from .parse import Instruction

LANES = np.arange(32)


def whole_warp(machine: Machine, rows, mask, what: str) -> None:
    """All lanes of each warp must be active."""
    if mask is not None and not mask.all():
        k = int(np.argmin(mask.all(1)))
        raise PartialWarp(
            f"{what} needs all 32 lanes of warp {machine.warp_ids(rows)[k] % machine.warps_per_cta}, {int(mask[k].sum())} are here"
        )


def named_lanes(machine: Machine, members: np.ndarray, rows, mask, what: str) -> None:
    """The lanes that a membermask names must all be here, and those here must be named."""
    here = np.ones((len(machine.warp_ids(rows)), 32), np.bool_) if mask is None else mask
    ballot = _ballot(here)
    wrong = (ballot != members) & here  # a lane that is not here may hold anything
    if wrong.any():
        k, lane = np.argwhere(wrong)[0]
        raise PartialWarp(f"{what} names lanes {members[k, lane]:#010x}, lanes {ballot[k, lane]:#010x} are here")


@instruction("bar", "barrier", form=r"warp\.sync|(?:cta\.)?(?:sync|arrive)(?:\.aligned)?")
def _barrier(machine: Machine, ins: Instruction):
    if "warp" in ins.parts:
        members = machine.reader(ins.operands[0], "b32")

        def run(rows, mask):
            wide = np.broadcast_to(members(rows), (len(machine.warp_ids(rows)), 32))
            named_lanes(machine, wide, rows, mask, "bar.warp.sync")

        return run
    number = machine.reader(ins.operands[0], "u32")
    threads = machine.reader(ins.operands[1], "u32") if len(ins.operands) > 1 else None
    everyone = np.array([[32 * machine.warps_per_cta]])

    def run(rows, mask):
        whole_warp(machine, rows, mask, ins.name)
        count = len(machine.warp_ids(rows))
        need = np.broadcast_to(everyone if threads is None else threads(rows), (count, 32))[:, 0]
        name = np.broadcast_to(number(rows), (count, 32))[:, 0]
        if (need % 32).any() or (need == 0).any() or (name > 15).any():
            raise PartialWarp(f"barrier {int(name[0])} of {int(need[0])} threads: 0 to 15, of whole warps")
        machine.barrier(rows, name, need, "sync" in ins.parts)

    return run


@instruction("shfl", form=r"sync\.(?:up|down|bfly|idx)\.b32")
def _shuffle(machine: Machine, ins: Instruction):
    """shfl.sync.MODE.b32 d|p, a, b, c, membermask; c packs the clamp (4:0) and the segment mask (12:8)."""
    mode = ins.parts[2]
    targets = ins.operands[0] if isinstance(ins.operands[0], tuple) else (ins.operands[0],)
    write = machine.writer(targets[0])
    write_valid = machine.writer(targets[1]) if len(targets) > 1 else None
    value, b, c, members = (machine.reader(o, "b32") for o in ins.operands[1:5])

    def run(rows, mask):
        shape = (len(machine.warp_ids(rows)), 32)
        wide = [np.broadcast_to(r(rows), shape) for r in (value, b, c, members)]
        named_lanes(machine, wide[3], rows, mask, ins.name)
        delta, clamp, segment = (
            x.astype(np.int64)
            for x in (wide[1] & np.uint32(31), wide[2] & np.uint32(31), (wide[2] >> np.uint32(8)) & np.uint32(31))
        )
        top = (LANES & segment) | (clamp & ~segment)
        low = LANES & segment
        if mode == "up":
            source = LANES - delta
            valid = source >= top
        elif mode == "down":
            source = LANES + delta
            valid = source <= top
        elif mode == "bfly":
            source = LANES ^ delta
            valid = source <= top
        else:
            source = low | (delta & ~segment)
            valid = source <= top
        source = np.where(valid, source, LANES)
        if mask is not None and not np.take_along_axis(mask, source, 1)[mask].all():
            raise PartialWarp(f"{ins.name} reads a lane that is not here")
        write(np.take_along_axis(wide[0], source, 1), rows, mask)
        if write_valid is not None:
            write_valid(valid, rows, mask)

    return run


@instruction("activemask", form="b32")
def _active(machine: Machine, ins: Instruction):
    write = machine.writer(ins.operands[0])

    def run(rows, mask):
        here = np.ones((len(machine.warp_ids(rows)), 32), np.bool_) if mask is None else mask
        write(_ballot(here), rows, mask)

    return run


@instruction("vote", form=r"sync\.(?:ballot\.b32|(?:any|all|uni)\.pred)")
def _vote(machine: Machine, ins: Instruction):
    mode = ins.parts[2]
    write, members = machine.writer(ins.operands[0]), machine.reader(ins.operands[2], "b32")
    predicate = machine.reader(ins.operands[1], "pred")

    def run(rows, mask):
        shape = (len(machine.warp_ids(rows)), 32)
        here = np.ones(shape, np.bool_) if mask is None else mask
        named_lanes(machine, np.broadcast_to(members(rows), shape), rows, mask, ins.name)
        value = np.broadcast_to(predicate(rows), shape)
        yes = value & here
        if mode == "ballot":
            result = _ballot(yes)
        elif mode == "any":
            result = np.broadcast_to(yes.any(1)[:, None], shape)
        elif mode == "all":
            result = np.broadcast_to((value | ~here).all(1)[:, None], shape)
        else:
            result = np.broadcast_to((yes.any(1) != (here & ~value).any(1))[:, None], shape)
        write(result, rows, mask)

    return run


def _ballot(lanes: np.ndarray) -> np.ndarray:
    bits = (lanes.astype(np.uint64) << LANES.astype(np.uint64)).sum(1).astype(np.uint32)
    return np.broadcast_to(bits[:, None], lanes.shape)


@instruction("redux", form=r"sync\.(?:(?:add|min|max)\.[us]32|(?:and|or|xor)\.b32)")
def _reduce(machine: Machine, ins: Instruction):
    kind = ins.parts[-1]
    reduce = {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "min": np.minimum,
        "max": np.maximum,
    }[ins.parts[2]]
    write, value, members = (
        machine.writer(ins.operands[0]),
        machine.reader(ins.operands[1], kind),
        machine.reader(ins.operands[2], "b32"),
    )

    def run(rows, mask):
        shape = (len(machine.warp_ids(rows)), 32)
        named_lanes(machine, np.broadcast_to(members(rows), shape), rows, mask, ins.name)
        here = np.ones(shape, np.bool_) if mask is None else mask
        values = np.broadcast_to(value(rows), shape)
        first = np.argmax(here, 1)
        filled = np.where(here, values, values[np.arange(shape[0]), first][:, None])
        if ins.parts[2] in ("add", "xor"):
            filled = np.where(here, values, TYPES[kind](0))
        result = reduce.reduce(filled, axis=1, dtype=TYPES[kind])
        write(np.broadcast_to(result[:, None], shape), rows, mask)

    return run


@instruction("elect", form="sync")
def _elect(machine: Machine, ins: Instruction):
    """elect.sync d|p, membermask: the lowest lane of the mask is the leader."""
    targets = ins.operands[0]
    write_lane, write_leader = machine.writer(targets[0]), machine.writer(targets[1])
    members = machine.reader(ins.operands[1], "b32")

    def run(rows, mask):
        shape = (len(machine.warp_ids(rows)), 32)
        wide = np.broadcast_to(members(rows), shape)
        named_lanes(machine, wide, rows, mask, ins.name)
        here = np.ones(shape, np.bool_) if mask is None else mask
        leader = np.argmax(here, 1)[:, None]
        write_lane(np.broadcast_to(leader.astype(np.uint32), shape), rows, mask)
        write_leader(LANES == leader, rows, mask)

    return run
