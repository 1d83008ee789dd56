"""mbarriers, and the tensor copies (TMA) that complete on them.

A tensor map is the emulator's own record (TensorMap), made by the host with the rules of cuTensorMapEncodeTiled; in the
parameter block it is 128 bytes that name the record. Late timing: a load lands only when somebody tests the mbarrier it
completes on; a store reads its source only when its group is waited for.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from .errors import BadAddress, PtxError, StillInFlight, Uninitialised, UnknownInstruction, blaming, no_lane
from .machine import PARAM_WINDOW, SHARED_WINDOW, Machine, instruction
from .matrices import swizzle
from .parse import Address, Instruction

LAYOUT_OF_SWIZZLE = {0: 0, 1: 3, 2: 2, 3: 1}  # CUtensorMapSwizzle -> the layout code of matrices.swizzle
SWIZZLE_WIDTH = {1: 32, 2: 64, 3: 128}


@dataclass(frozen=True)
class TensorMap:
    """A tiled map. Sizes are innermost first, as coordinates are; strides (bytes) leave out the innermost dimension."""

    address: int
    element: int  # bytes
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 0  # as CUtensorMapSwizzle: 0 none, 1, 2, 3: 32, 64, 128 bytes

    def __post_init__(self) -> None:
        inner = self.box[0] * self.element
        width = SWIZZLE_WIDTH.get(self.swizzle, inner)
        problems = [
            (self.element not in (1, 2, 4, 8), f"element of {self.element} bytes"),
            (not 0 <= self.swizzle <= 3, f"swizzle {self.swizzle}"),
            (self.address % 16, f"address {self.address:#x} is not a multiple of 16"),
            (any(s % 16 for s in self.strides), f"strides {self.strides} bytes are not multiples of 16"),
            (len(self.strides) != len(self.sizes) - 1, f"{len(self.strides)} strides for {len(self.sizes)} dimensions"),
            (len(self.box) != len(self.sizes), f"box {self.box} of a tensor of {len(self.sizes)} dimensions"),
            (any(not 1 <= b <= 256 for b in self.box), f"box {self.box}: each side is 1 to 256"),
            (inner % 16, f"the innermost side of the box has {inner} bytes, not a multiple of 16"),
            # A narrower side is allowed, but the documents do not say how its rows then lie.
            (inner != width, f"the innermost side of the box has {inner} bytes, its swizzle {width}"),
            (min(self.sizes) < 1, f"sizes {self.sizes}"),
        ]
        for wrong, message in problems:
            if wrong:
                raise PtxError(f"tensor map: {message}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def elements(self, corner: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inside, global addresses, byte offsets in the box) of the box at `corner`, one entry an element."""
        grids = np.meshgrid(*(np.arange(b) for b in reversed(self.box)), indexing="ij")[::-1]
        index = [g.reshape(-1) + c for g, c in zip(grids, corner, strict=True)]
        inside = np.ones(index[0].size, np.bool_)
        address = np.full(index[0].size, self.address, np.int64)
        for i, (at, size, stride) in enumerate(zip(index, self.sizes, (self.element, *self.strides), strict=True)):
            inside &= (at >= 0) & (at < size)
            address += at * stride if i else at * self.element
        return inside, address, np.arange(index[0].size) * self.element


@dataclass(eq=False)
class Mbarrier:
    count: int
    pending: int
    bytes: int = 0
    phase: int = 0
    clock: np.ndarray | None = None  # what those know who arrived (race.py)
    clock_of_last: np.ndarray | None = None
    loads: list = field(default_factory=list)  # that have still to land
    asked: set[int] = field(default_factory=set)  # warps that have tested this phase

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count
            self.clock_of_last, self.clock = self.clock, None
            self.asked.clear()


class Barriers:
    """The mbarriers of each CTA by shared address, and the loads that have still to land on them."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.all: dict[tuple[int, int], Mbarrier] = {}
        machine.on_start.append(self.start)

    def start(self, slot: int) -> None:
        self.all = {key: b for key, b in self.all.items() if key[0] != slot}

    def find(self, slot: int, address: int) -> Mbarrier:
        if (slot, address) not in self.all:
            raise Uninitialised(f"there is no mbarrier at shared address {address}")
        return self.all[slot, address]

    def init(self, slot: int, address: int, count: int, warp: int) -> None:
        if count < 1:
            raise PtxError(f"mbarrier of {count} arrivals")
        where = self.machine.shared.locate(np.array([address]), 8, np.array([warp]))
        self.machine.shared.written[where[:, None] + np.arange(8)] = False  # opaque: no other instruction may look
        self.all[slot, address] = Mbarrier(count, count)

    def arrive(self, slot: int, address: int, warp: int, arrivals: int = 1, expected: int = 0) -> None:
        barrier = self.find(slot, address)
        if barrier.pending < arrivals:
            raise PtxError(
                f"mbarrier at shared address {address}: {arrivals} arrivals where {barrier.pending} are pending"
            )
        barrier.bytes += expected
        barrier.pending -= arrivals
        if arrivals:
            self.machine.memory.barrier(slot, np.array([warp]))
            if self.machine.races is not None:
                barrier.clock = self.machine.races.arrive(barrier.clock, warp)
        barrier.settle()

    def test(self, slot: int, address: int, parity: int, warp: int) -> bool:
        """Loads land no sooner than at a warp's second question, so that who does not look at the answer is found out."""
        barrier = self.find(slot, address)
        if barrier.phase == parity and barrier.loads and warp not in barrier.asked:
            barrier.asked.add(warp)
            return False
        while barrier.phase == parity and barrier.loads:
            barrier.loads.pop(int(self.machine.rng.integers(len(barrier.loads))))()
        done = barrier.phase != parity
        if done and self.machine.races is not None and barrier.clock_of_last is not None:
            self.machine.races.join(barrier.clock_of_last, warp)
        return done


def _each(machine: Machine, rows, mask):
    """(row, lane) of every active lane."""
    here = np.ones((len(machine.warp_ids(rows)), 32), np.bool_) if mask is None else mask
    return np.argwhere(here)


SCOPED = r"(?:\.(?:relaxed|release|acquire)\.(?:cta|cluster))?"
MBARRIER = rf"(?:init|inval|expect_tx{SCOPED}|arrive(?:\.expect_tx)?{SCOPED}|(?:try|test)_wait\.parity{SCOPED})"


@instruction("mbarrier", form=rf"{MBARRIER}(?:\.shared(?:::cta|::cluster)?)?\.b64", ends_turn=True)
def _mbarrier(machine: Machine, ins: Instruction):
    barriers, verb = machine.barriers, ins.parts[1]
    waits = verb in ("try_wait", "test_wait")
    at = next(o for o in ins.operands if isinstance(o, Address))
    address = machine.address(at)
    after = ins.operands[ins.operands.index(at) + 1 :]
    reads = [machine.reader(o, "u32") for o in after]
    write = machine.writer(ins.operands[0]) if waits else None
    if verb == "arrive" and not isinstance(ins.operands[0], Address) and ins.operands[0] != "_":
        raise UnknownInstruction(f"{ins.name} with a state token")

    def run(rows, mask):
        warps = machine.warp_ids(rows)
        shape = (len(warps), 32)
        where = np.broadcast_to(address(rows), shape)
        where = np.where(where >= SHARED_WINDOW, where - SHARED_WINDOW, where)
        numbers = [np.broadcast_to(r(rows), shape) for r in reads]
        result = np.zeros(shape, np.bool_)
        answers: dict[tuple[int, int, int], bool] = {}  # the lanes of a warp ask together
        for k, lane in _each(machine, rows, mask):
            warp, place = int(warps[k]), int(where[k, lane])
            slot = int(machine.slot_of[warp])
            first = int(numbers[0][k, lane]) if numbers else 1
            if place % 8:
                raise BadAddress(f"mbarrier at shared address {place}, not a multiple of 8")
            if verb == "init":
                barriers.init(slot, place, first, warp)
            elif verb == "inval":
                barriers.find(slot, place)
                del barriers.all[slot, place]
            elif waits:
                question = warp, place, first & 1
                if question not in answers:
                    answers[question] = barriers.test(slot, place, first & 1, warp)
                result[k, lane] = answers[question]
            elif verb == "expect_tx":
                barriers.find(slot, place).bytes += first
            elif verb == "arrive" and "expect_tx" in ins.parts:
                barriers.arrive(slot, place, warp, expected=first)
            else:
                barriers.arrive(slot, place, warp, first)
        if write is not None:
            write(result, rows, mask)

    return run


# ----------------------------------------------------------------------------------------------------- bulk copies


class BulkStores:
    """Bulk copies out of shared memory, by the thread that issued them and the group it put them in."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.committed = np.zeros(machine.warps * 32, np.int64)
        self.pending: list[list] = []  # [thread, group, offsets of the source, the write]
        machine.on_exit.append(self.left)

    def issue(self, thread: int, where: np.ndarray, write) -> None:
        if self.machine.late:
            self.machine.in_flight.reading[where] += 1
        else:
            write()
        if self.machine.late or self.machine.races is not None:
            self.pending.append([thread, int(self.committed[thread]), where, write])

    def commit(self, threads: np.ndarray) -> None:
        self.committed[threads] += 1

    def wait(self, threads: np.ndarray, left: int) -> None:
        waiting = set(threads.tolist())
        kept = []
        for entry in self.pending:
            thread, group, where, write = entry
            if thread not in waiting or group >= self.committed[thread] - left:
                kept.append(entry)
            elif self.machine.late:
                self.machine.in_flight.reading[where] -= 1
                write()
            else:
                self.machine.races.read(where, np.full(len(where), thread // 32))
        self.pending = kept

    def left(self, warps: np.ndarray) -> None:
        for thread, *_ in self.pending:
            if thread // 32 in warps:
                raise StillInFlight("a thread ended while a bulk copy that it issued still reads shared memory")


TENSOR = r"cp\.async\.bulk\.tensor\.[1-5]d(?:\.tile)?"
LOAD = TENSOR + r"\.shared(?:::cta|::cluster)?\.global(?:\.tile)?\.mbarrier::complete_tx::bytes(?:\.L2::cache_hint)?"
STORE = TENSOR + r"\.global\.shared(?:::cta)?(?:\.tile)?\.bulk_group(?:\.L2::cache_hint)?"


def bulk_copy(machine: Machine, ins: Instruction):
    """cp.async.bulk...: tensor loads and stores, commit_group, wait_group."""
    stores = machine.stores
    names = ins.parts[3:]

    def threads_of(rows, mask):
        return np.array(
            [int(machine.warp_ids(rows)[k]) * 32 + lane for k, lane in _each(machine, rows, mask)], np.int64
        )

    if names == ("commit_group",):
        return lambda rows, mask: stores.commit(threads_of(rows, mask))
    if names in (("wait_group",), ("wait_group", "read")):
        left = int(ins.operands[0], 0)

        def wait(rows, mask):
            with blaming(no_lane):
                stores.wait(threads_of(rows, mask), left)

        return wait
    if re.fullmatch(LOAD, ins.name):
        return _tensor_load(machine, ins)
    if re.fullmatch(STORE, ins.name):
        return _tensor_store(machine, ins)
    raise UnknownInstruction(ins.name)


def _map_of(machine: Machine, address: int) -> TensorMap:
    offset = address - PARAM_WINDOW if address >= PARAM_WINDOW else address
    found = machine.tensor_maps.get(offset)
    if found is None:
        raise BadAddress(f"no tensor map at {address:#x}: maps are passed as kernel parameters")
    return found


def _box(machine: Machine, map_: TensorMap, at: int, warp: int, corner: tuple[int, ...]):
    """(inside, global addresses, offsets into shared memory) of the box's elements."""
    if len(corner) != len(map_.sizes):
        raise PtxError(f"{len(corner)} coordinates for a tensor map of {len(map_.sizes)} dimensions")
    align = 128 if map_.swizzle == 0 else 8 * SWIZZLE_WIDTH[map_.swizzle]
    if at % align:
        raise BadAddress(f"a box of swizzle {map_.swizzle} at shared address {at}, not a multiple of {align}")
    if at < 0 or at + map_.bytes > machine.shared.allowed:
        raise BadAddress(f"a box of {map_.bytes} bytes at shared address {at}: the CTA has {machine.shared.allowed}")
    inside, address, linear = map_.elements(corner)
    where = swizzle(at + linear, LAYOUT_OF_SWIZZLE[map_.swizzle])
    return inside, address, where + int(machine.slot_of[warp]) * machine.shared.size


def _corner(machine: Machine, operand: Address):
    """A function (rows, row, lane) that gives the coordinates."""
    reads = [machine.reader(c, "s32") for c in operand.coordinates]

    def corner(rows, k: int, lane: int) -> tuple[int, ...]:
        shape = (len(machine.warp_ids(rows)), 32)
        return tuple(int(np.broadcast_to(read(rows), shape)[k, lane]) for read in reads)

    return corner


def _tensor_load(machine: Machine, ins: Instruction):
    to, source, barrier = ins.operands[:3]
    address, map_at, barrier_at = machine.address(to), machine.address(source), machine.address(barrier)
    corner = _corner(machine, source)

    def run(rows, mask):
        warps = machine.warp_ids(rows)
        shape = (len(warps), 32)
        at, maps, barriers = (np.broadcast_to(a(rows), shape) for a in (address, map_at, barrier_at))
        for i, (k, lane) in enumerate(_each(machine, rows, mask)):
            warp = int(warps[k])
            map_ = _map_of(machine, int(maps[k, lane]))
            inside, source_at, where = _box(machine, map_, int(at[k, lane]), warp, corner(rows, int(k), int(lane)))
            slot = int(machine.slot_of[warp])
            mbarrier = machine.barriers.find(slot, int(barriers[k, lane]))
            bytes_ = where[:, None] + np.arange(map_.element)
            with blaming(lambda _, i=i: i):
                machine.shared.watch("write", bytes_, np.full(len(where), warp), generic=False)
            if machine.statistics is not None:
                machine.statistics.bulk(ins, map_.bytes)

            def land(
                inside=inside, source_at=source_at, bytes_=bytes_, map_=map_, mbarrier=mbarrier, slot=slot, warp=warp
            ):
                data = np.zeros(bytes_.shape, np.uint8)
                if inside.any():
                    data[inside] = machine.memory.load_async(source_at[inside], map_.element, slot).reshape(
                        -1, map_.element
                    )
                machine.shared.data[bytes_] = data
                machine.shared.written[bytes_] = True
                if machine.proxies.on:
                    machine.proxies.writer[bytes_] = 0
                if machine.late:
                    machine.in_flight.writing[bytes_] = 0
                if machine.races is not None:  # who waits for the bytes is ordered behind the copy
                    mbarrier.clock = machine.races.arrive(mbarrier.clock, warp)
                mbarrier.bytes -= map_.bytes
                mbarrier.settle()

            if machine.late:
                machine.in_flight.writing[bytes_] = 1
                mbarrier.loads.append(land)
            else:
                land()

    return run


def _tensor_store(machine: Machine, ins: Instruction):
    to, source = ins.operands[:2]
    address, map_at = machine.address(source), machine.address(to)
    corner = _corner(machine, to)

    def run(rows, mask):
        warps = machine.warp_ids(rows)
        shape = (len(warps), 32)
        at, maps = np.broadcast_to(address(rows), shape), np.broadcast_to(map_at(rows), shape)
        for i, (k, lane) in enumerate(_each(machine, rows, mask)):
            warp = int(warps[k])
            map_ = _map_of(machine, int(maps[k, lane]))
            inside, target, where = _box(machine, map_, int(at[k, lane]), warp, corner(rows, int(k), int(lane)))
            bytes_ = where[:, None] + np.arange(map_.element)
            with blaming(lambda _, i=i: i):
                machine.shared.watch("read", bytes_, np.full(len(where), warp))
                machine.shared.check_written(bytes_[inside])
            machine.proxies.check(bytes_[inside], "a tensor store")
            if machine.statistics is not None:
                machine.statistics.bulk(ins, map_.bytes)

            def write(inside=inside, target=target, bytes_=bytes_, warp=warp):
                if inside.any():
                    values = np.ascontiguousarray(machine.shared.data[bytes_[inside]])
                    view = values.view(f"u{values.shape[1]}").reshape(-1)
                    machine.memory.store(target[inside], [view], np.full(int(inside.sum()), warp), weak=False)

            with blaming(lambda _, i=i: i):
                machine.stores.issue(warp * 32 + int(lane), bytes_, write)

    return run
