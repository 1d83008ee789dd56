"""What ends after it was issued: cp.async and wgmma, in two timings.

*Eager*: at issue, the earliest that the ISA allows. *Late*: only when the program waits, the latest. Until then a copy's
destination must not be touched and its source must not change, and a product's operands must not be overwritten nor
its accumulators read. A program that waits where it must gives the same bits in both.
"""

import re
from dataclasses import dataclass

import numpy as np

from .errors import MissingFence, PtxError, StillInFlight, UnknownInstruction, blaming, no_lane
from .machine import Machine, instruction
from .parse import Instruction


class InFlight:
    """Watches shared memory: which bytes pending operations read or write."""

    sees_atomics = sees_async = True

    def __init__(self, machine: Machine):
        self.machine = machine
        self.reading = np.zeros(machine.shared.data.size, np.uint8)
        self.writing = np.zeros(machine.shared.data.size, np.uint8)

    def read(self, where: np.ndarray, warps: np.ndarray) -> None:
        self._refuse(self.writing, where, "read", "written")

    def write(self, where: np.ndarray, warps: np.ndarray) -> None:
        self._refuse(self.writing, where, "written", "written")
        self._refuse(self.reading, where, "written", "read")

    def _refuse(self, busy: np.ndarray, where: np.ndarray, now: str, then: str) -> None:
        touched = busy[where]
        if touched.any():
            k = int(np.argmax(touched.reshape(len(where), -1).any(1)))
            address = int(where[k].reshape(-1)[0]) % self.machine.shared.size
            raise StillInFlight(
                f"shared address {address} is {now} while an asynchronous operation that nobody waited for is still to "
                f"have it {then}",
                k,
            )


class Proxies:
    """Watches which bytes of shared memory the generic proxy wrote since the last proxy fence that covers them.

    A fence covers what its own warp wrote, and what a CTA barrier has ordered before it.
    """

    sees_atomics, sees_async = True, False

    def __init__(self, machine: Machine):
        self.machine = machine
        self.on = False
        self.writer = np.zeros(0, np.int16)
        machine.on_barrier.append(self.barrier)

    def watch(self) -> None:
        self.on = True
        self.writer = np.zeros(self.machine.shared.data.size, np.int16)  # 0 fenced, w + 1 by warp w, -1 ordered
        self.machine.shared.watchers.append(self)
        self.machine.on_start.append(self.start)

    def start(self, slot: int) -> None:
        self.writer[self.machine.shared.span(slot)] = 0

    def read(self, where: np.ndarray, warps: np.ndarray) -> None: ...

    def write(self, where: np.ndarray, warps: np.ndarray) -> None:
        self.writer[where] = (warps % self.machine.warps_per_cta + 1).astype(np.int16)[:, None]

    def barrier(self, slot: int, warps: np.ndarray) -> None:
        if self.on and len(warps) == self.machine.warps_per_cta:
            mine = self.writer[self.machine.shared.span(slot)]
            mine[mine > 0] = -1

    def fence(self, warps: np.ndarray) -> None:
        if not self.on:
            return
        for warp in warps:
            mine = self.writer[self.machine.shared.span(int(self.machine.slot_of[warp]))]
            mine[(mine == -1) | (mine == warp % self.machine.warps_per_cta + 1)] = 0

    def check(self, where: np.ndarray, what: str) -> None:
        if self.on and self.writer[where].any():
            k = int(np.argmax(self.writer[where].reshape(-1) != 0))
            address = int(where.reshape(-1)[k]) % self.machine.shared.size
            raise MissingFence(
                f"{what} reads shared address {address} through the async proxy, which the generic proxy wrote with no "
                f"fence.proxy.async since"
            )


# ---------------------------------------------------------------------------------------------------------- cp.async


@dataclass(eq=False)
class Copy:
    lanes: np.ndarray  # warp * 32 + lane of each element
    group: np.ndarray
    where: np.ndarray  # (elements, bytes) in shared memory
    source: np.ndarray  # global addresses
    used: np.ndarray  # bytes of the source; the rest is zeros
    data: np.ndarray  # what the source held at issue


class Copies:
    def __init__(self, machine: Machine):
        self.machine = machine
        self.committed = np.zeros(machine.warps * 32, np.int64)
        self.pending: list[Copy] = []
        machine.on_exit.append(self.left)

    def issue(self, copy: Copy) -> None:
        warps = copy.lanes // 32
        shared, flight = self.machine.shared, self.machine.in_flight
        shared.watch("write", copy.where, warps)
        if self.machine.late:
            flight.writing[copy.where] = 1
        else:
            shared.data[copy.where] = copy.data
            shared.written[copy.where] = True
        if self.machine.late or self.machine.races is not None:
            copy.group = self.committed[copy.lanes]
            self.pending.append(copy)

    def commit(self, lanes: np.ndarray) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: np.ndarray, left: int | None) -> None:
        """left: groups that may stay open; None: none, and what was not committed is waited for too."""
        waiting = np.zeros(len(self.committed), np.bool_)
        waiting[lanes] = True
        kept = []
        for copy in self.pending:
            done = waiting[copy.lanes]
            if left is not None:
                done &= copy.group < self.committed[copy.lanes] - left
            if done.any():
                self._finish(copy, done)
            if not done.all():
                stay = ~done
                kept.append(
                    Copy(*(getattr(copy, f)[stay] for f in ("lanes", "group", "where", "source", "used", "data")))
                )
        self.pending = kept

    def _finish(self, copy: Copy, done: np.ndarray) -> None:
        if self.machine.races is not None:
            self.machine.races.write(copy.where[done], copy.lanes[done] // 32)
            return
        data = read_global(
            self.machine, copy.source[done], copy.used[done], copy.where.shape[1], copy.lanes[done] // 32
        )
        if not np.array_equal(data, copy.data[done]):
            raise StillInFlight("the source of a cp.async was overwritten before the copy was waited for")
        where = copy.where[done]
        self.machine.in_flight.writing[where] = 0
        self.machine.shared.data[where] = data
        self.machine.shared.written[where] = True
        if self.machine.proxies.on:
            self.machine.proxies.write(where, copy.lanes[done] // 32)

    def left(self, warps: np.ndarray) -> None:
        """Copies of warps that ended without waiting: nobody can have read them."""
        self.wait((warps[:, None] * 32 + np.arange(32)).reshape(-1), None)


def read_global(machine: Machine, address: np.ndarray, used: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
    """(elements, size) bytes: the first `used` of each address, zeros behind them. Only whole or empty reads are common."""
    data = np.zeros((len(address), size), np.uint8)
    whole = used == size
    if whole.any():
        word = min(size, 8)
        got = machine.memory.load(address[whole], word, size // word, warps[whole])
        data[whole] = np.stack(got, 1).view(np.uint8)
    for k in np.flatnonzero(~whole & (used > 0)):
        for byte in range(int(used[k])):
            data[k, byte] = machine.memory.load(address[k : k + 1] + byte, 1, 1, warps[k : k + 1])[0][0]
    return data


COPY = r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::(?:cache_hint|64B|128B|256B))*"


@instruction("cp")
def _copy(machine: Machine, ins: Instruction):
    from .bulk import bulk_copy

    if ins.parts[1:3] == ("async", "bulk"):
        return bulk_copy(machine, ins)
    copies = machine.copies

    def lanes_of(rows, mask):
        flat = (machine.warp_ids(rows)[:, None] * 32 + np.arange(32)).reshape(-1)
        return flat if mask is None else flat[mask.reshape(-1)]

    if ins.parts[2:] == ("commit_group",):
        return lambda rows, mask: copies.commit(lanes_of(rows, mask))
    if ins.parts[2:] in (("wait_group",), ("wait_all",)):
        left = int(ins.operands[0], 0) if ins.parts[2] == "wait_group" else None

        def wait(rows, mask):
            with blaming(no_lane):
                copies.wait(lanes_of(rows, mask), left)

        return wait
    if not re.fullmatch(COPY, ins.name):
        raise UnknownInstruction(ins.name)
    operands = ins.operands[:-1] if "L2::cache_hint" in ins.parts else ins.operands
    to, source, size = machine.address(operands[0]), machine.address(operands[1]), int(operands[2], 0)
    if size not in ((16,) if ins.parts[2] == "cg" else (4, 8, 16)):
        raise UnknownInstruction(f"{ins.name} of {size} bytes")
    if len(operands) > 3 and machine.kernel.registers.get(operands[3]) == "pred":
        raise UnknownInstruction(f"{ins.name} with an ignore-src predicate")
    used = machine.reader(operands[3], "u32") if len(operands) > 3 else None

    def run(rows, mask):
        shape = (len(machine.warp_ids(rows)), 32)
        warps, lanes = machine.lanes(rows, mask), lanes_of(rows, mask)
        pick = lambda values: machine.select(np.broadcast_to(values, shape), rows, mask)  # noqa: E731
        at = machine.shared.locate(pick(to(rows)), size, warps)
        address = pick(source(rows))
        count = np.full(len(lanes), size) if used is None else pick(used(rows)).astype(np.int64)
        if (count > size).any():
            raise PtxError(f"cp.async of {size} bytes with a source size of {int(count.max())}")
        if machine.statistics is not None:
            machine.statistics.access(ins, "global", address[count > 0], size, warps[count > 0])
            machine.statistics.access(ins, "shared", pick(to(rows)), size, warps)
        data = read_global(machine, address, count, size, warps)
        copies.issue(Copy(lanes, lanes, at[:, None] + np.arange(size), address, count, data))

    return run


# ------------------------------------------------------------------------------------------------------------- wgmma


@dataclass(eq=False)
class Pending:
    product: object
    registers: tuple  # the accumulators
    busy: set[str]  # these, and the registers that hold A
    where: np.ndarray
    group: int
    text: str


class Products:
    """wgmma of every warp, in order. `wgmma.fence` must stand between an access to their registers and a wgmma."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.pending: list[list[Pending]] = [[] for _ in range(machine.warps)]
        self.held: list[dict[tuple, np.ndarray]] = [{} for _ in range(machine.warps)]
        self.committed = np.zeros(machine.warps, np.int64)
        self.touched: dict[str, np.ndarray] = {}  # register -> warps that used it since their last wgmma.fence
        machine.on_start.append(self.start)

    def start(self, slot: int) -> None:
        """The first wgmma needs a fence in any case."""
        for touched in self.touched.values():
            touched[slot * self.machine.warps_per_cta : (slot + 1) * self.machine.warps_per_cta] = True

    def uses(self, registers: tuple) -> None:
        for name in registers:
            self.touched.setdefault(name, np.zeros(self.machine.warps, np.bool_))

    def guard_registers(self) -> None:
        """Once all instructions are known: those that touch a register of a wgmma look here first."""
        for step in self.machine.program:
            if step.run is None or step.instruction.parts[0] == "wgmma":
                continue
            names = {n for o in step.instruction.operands for n in (o if isinstance(o, tuple) else (o,))}
            if not names.isdisjoint(self.touched):
                step.run = self._guarded(step.run, names & self.touched.keys())

    def _guarded(self, run, names: set[str]):
        def guarded(rows, mask):
            warps = self.machine.here(rows, mask)
            for warp in warps:
                self._refuse_pending(warp, names)
            for name in names:
                self.touched[name][warps] = True
            run(rows, mask)

        return guarded

    def _refuse_pending(self, warp: int, names: set[str]) -> None:
        for pending in self.pending[warp]:
            if not names.isdisjoint(pending.busy):
                raise StillInFlight(f"registers of a wgmma are used before wgmma.wait_group: {pending.text}")

    def fence(self, warps: np.ndarray) -> None:
        for touched in self.touched.values():
            touched[warps] = False

    def issue(self, warp: int, registers: tuple, sources: tuple, product, where: np.ndarray, text: str) -> None:
        """registers hold the accumulators, sources hold A (none: it is in shared memory); where: bytes that it reads."""
        machine = self.machine
        for name in (*registers, *sources):
            if self.touched[name][warp]:
                raise MissingFence(
                    f"register {name} is used by a wgmma with no wgmma.fence since it was used otherwise"
                )
        for pending in self.pending[warp]:
            if not set(sources).isdisjoint(pending.registers):
                raise StillInFlight(f"A is in accumulators that nobody waited for: {pending.text}")
        machine.shared.watch("read", where, np.full(len(where), warp))
        machine.shared.check_written(where)
        machine.proxies.check(where, "wgmma")
        if machine.late or machine.races is not None:
            busy = {*registers, *sources}
            self.pending[warp].append(Pending(product, registers, busy, where, int(self.committed[warp]), text))
        if not machine.late:
            self._write(warp, registers, product.finish(self._registers(warp, registers)))
            return
        machine.in_flight.reading[where] += 1
        if registers not in self.held[warp]:
            self.held[warp][registers] = self._registers(warp, registers)
            for name in registers:
                machine.registers[name][warp] = 0xFFFFFFFF

    def _registers(self, warp: int, registers: tuple) -> np.ndarray:
        return np.stack([self.machine.registers[n][warp].view(np.float32) for n in registers], 1)

    def _write(self, warp: int, registers: tuple, values: np.ndarray) -> None:
        for i, name in enumerate(registers):
            self.machine.registers[name][warp] = np.ascontiguousarray(values[:, i]).view(np.uint32)

    def commit(self, warps: np.ndarray) -> None:
        self.committed[warps] += 1

    def wait(self, warps: np.ndarray, left: int) -> None:
        for warp in (int(w) for w in warps):
            queue = self.pending[warp]
            while queue and queue[0].group < self.committed[warp] - left:
                done = queue.pop(0)
                if self.machine.races is not None:
                    self.machine.races.read(done.where, np.full(len(done.where), warp))
                    continue
                self.machine.in_flight.reading[done.where] -= 1
                result = done.product.finish(self.held[warp][done.registers])
                self.held[warp][done.registers] = result
                if not any(p.registers == done.registers for p in queue):
                    self._write(warp, done.registers, self.held[warp].pop(done.registers))
