"""The machine: warps with program counters, the CTAs that are resident, and the loop that runs one turn after another.

A register is an array (warps, 32) of bit patterns, a warp of every resident CTA a row. A turn runs the warps that stand
at one instruction until a branch, a barrier or a flag operation; which warps those are is the schedule's choice
(schedule.py). Lanes of a warp that part at a branch run apart, the lowest program counter first, and join where they
meet. What an instruction does stands in the files that register it (arithmetic.py, data.py, ...): a builder there
turns an Instruction into a function run(rows, mask), rows being the warps and mask the active lanes (None: all).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .bits import TYPES, as_bits, size_of
from .errors import Deadlock, EndlessLoop, PtxError, UnknownInstruction
from .memory import GlobalMemory
from .operands import Mask, Operands, Rows
from .parse import Instruction, Kernel
from .schedule import Schedule
from .shared import SharedMemory

Run = Callable[[Rows, Mask], None]

BUILDERS: dict[str, Callable[["Machine", Instruction], Run]] = {}
FORMS: dict[str, re.Pattern] = {}  # what may follow the first part of an instruction
ENDS_TURN: set[str] = set()  # first parts of instructions after which others may run: atomics, waits

SHARED_WINDOW = 1 << 60  # generic addresses of shared memory begin here
LOCAL_WINDOW = 1 << 61
PARAM_WINDOW = 1 << 62


def instruction(*names: str, form: str | None = None, ends_turn: bool = False):
    """Register the builder of all instructions whose first part is one of `names`.

    form: a pattern of the modifiers behind it that the builder knows; without one it must look at all of them itself.
    """

    def register(builder):
        for name in names:
            BUILDERS[name] = builder
            if form is not None:
                FORMS[name] = re.compile(form)
            if ends_turn:
                ENDS_TURN.add(name)
        return builder

    return register


@dataclass(eq=False)
class Step:
    instruction: Instruction
    run: Run | None
    guard: np.ndarray | None
    kind: str  # "plain", "yield", "branch", "barrier", "exit"


class Machine(Operands):
    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        arguments: bytes,
        memory: GlobalMemory,
        shared_size: int,
        schedule: Schedule,
        resident: int | None = None,
        budget: int = 3_000_000,
    ):
        if threads % 32 or not 0 < threads <= 1024:
            raise PtxError(f"{threads} threads a CTA: the emulator runs whole warps, 32 to 1024 threads")
        self.kernel, self.grid, self.schedule, self.memory = kernel, grid, schedule, memory
        self.ctas = grid[0] * grid[1] * grid[2]
        self.slots = min(resident or self.ctas, self.ctas)
        self.warps_per_cta = threads // 32
        self.warps = self.slots * self.warps_per_cta
        self.budget, self.steps = budget, 0
        self.rng = schedule.rng
        self.parameters = arguments
        self.late = False  # asynchronous operations end as late as they may
        self.statistics = None
        self.tensor_maps: dict[int, object] = {}  # offset in the parameter block -> TensorMap

        self.pc = np.zeros(self.warps, np.int64)  # of the lanes in `active`
        self.active = np.ones((self.warps, 32), np.bool_)
        self.elsewhere: dict[int, list[tuple[int, np.ndarray]]] = {}  # parted lanes of a warp: (pc, lanes)
        self.running = np.zeros(self.warps, np.bool_)
        self.barrier_of = np.full(self.warps, -1)  # the named barrier a warp waits at
        self.barrier_need = np.zeros(self.warps, np.int64)
        # (slot, barrier) -> of each warp that arrived without waiting: the count it named and its clock (race.py) then
        self.arrived: dict[tuple[int, int], list[tuple[int, np.ndarray | None]]] = {}
        self.slot_of = np.arange(self.warps) // self.warps_per_cta
        self.cta_of = np.full(self.slots, -1)
        self.on_barrier: list[Callable[[int, np.ndarray], None]] = []
        self.on_start: list[Callable[[int], None]] = []
        self.on_exit: list[Callable[[np.ndarray], None]] = []

        garbage = np.random.default_rng(schedule.seed)
        self.registers = {}
        for name, kind in kernel.registers.items():
            size = size_of(kind)
            bits = garbage.integers(0, 256, (self.warps, 32 * size), np.uint8)
            dtype = np.bool_ if kind == "pred" else as_bits(np.zeros(1, TYPES[kind])).dtype
            self.registers[name] = (bits > 127) if kind == "pred" else bits.view(dtype)
        self._place_variables(shared_size)
        self._special_registers(threads)
        self.races = None

    def decode(self) -> None:
        """Once the parts that instructions talk to are attached (launch.py)."""
        self.program = [self._decode(i) for i in self.kernel.code]
        self.products.guard_registers()

    # ------------------------------------------------------------------------------------------------ preparing

    def _place_variables(self, dynamic: int) -> None:
        """Static shared variables first, the dynamic ones after them; constants and module globals get memory."""
        self.addresses: dict[str, int] = dict(self.kernel.parameter_offsets())
        self.constants: list[np.ndarray] = []
        top = local = 0
        for name, variable in sorted(self.kernel.variables.items(), key=lambda item: item[1].size == 0):
            if variable.space == "shared":
                top = -(-top // variable.align) * variable.align
                self.addresses[name] = top
                top += variable.size
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                self.addresses[name] = local
                local += variable.size
            else:
                data = np.zeros(variable.size + 256, np.uint8)
                start = -data.ctypes.data % 256
                data[start : start + len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                self.constants.append(data)
                self.addresses[name] = data.ctypes.data + start
                self.memory.allow(name, self.addresses[name], variable.size, variable.space != "const")
        self.shared = SharedMemory(self.slots, max(top + dynamic, 16), self.warps_per_cta)
        self.local_size = local
        self.local = np.full((self.warps * 32, max(local, 1)), 0xFF, np.uint8)

    def _special_registers(self, threads: int) -> None:
        thread = np.arange(self.warps * 32, dtype=np.uint32).reshape(self.warps, 32) % np.uint32(threads)
        lane = np.broadcast_to(np.arange(32, dtype=np.uint32), (self.warps, 32))
        zero = np.zeros((self.warps, 32), np.uint32)
        self.special = {"%tid.x": thread, "%laneid": lane, "%warpid": thread // np.uint32(32)}
        self.special |= {f"%tid.{axis}": zero for axis in "yz"}
        self.special |= {"%ntid.x": zero + np.uint32(threads), "%ntid.y": zero + 1, "%ntid.z": zero + 1}
        self.special |= {f"%nctaid.{axis}": zero + np.uint32(n) for axis, n in zip("xyz", self.grid, strict=True)}
        self.special |= {f"%ctaid.{axis}": zero.copy() for axis in "xyz"}
        self.special |= {"%cluster_ctarank": zero, "%cluster_nctarank": zero + 1, "%clusterid.x": zero}
        one = np.uint64(1)
        wide = lane.astype(np.uint64)
        self.special |= {
            "%lanemask_eq": (one << wide).astype(np.uint32),
            "%lanemask_lt": ((one << wide) - one).astype(np.uint32),
            "%lanemask_le": ((one << (wide + one)) - one).astype(np.uint32),
            "%lanemask_gt": ~((one << (wide + one)) - one).astype(np.uint32),
            "%lanemask_ge": ~((one << wide) - one).astype(np.uint32),
        }

    def _decode(self, instruction: Instruction) -> Step:
        name = instruction.parts[0]
        guard = None
        if instruction.guard is not None:
            guard = self.registers.get(instruction.guard)
            if guard is None:
                raise UnknownInstruction(f"no register {instruction.guard}: {instruction}")
        if name == "bra":
            return Step(instruction, None, guard, "branch")
        if name in ("ret", "exit"):
            return Step(instruction, None, guard, "exit")
        if name not in BUILDERS or (name in FORMS and not FORMS[name].fullmatch(".".join(instruction.parts[1:]))):
            raise UnknownInstruction(str(instruction))
        try:
            run = BUILDERS[name](self, instruction)
        except (UnknownInstruction, KeyError, IndexError, AttributeError, ValueError) as problem:
            raise UnknownInstruction(f"{instruction}: {problem}") from problem
        kind = "barrier" if name in ("bar", "barrier") and "warp" not in instruction.parts else "plain"
        if kind == "plain" and (name in ENDS_TURN or "volatile" in instruction.parts):
            kind = "yield"
        return Step(instruction, run, guard, kind)

    # --------------------------------------------------------------------------------------------------- running

    def run(self) -> None:
        self.memory.begin(self.slots, self.warps_per_cta)
        self.waiting_ctas = list(self.schedule.order(self.ctas))
        for slot in range(self.slots):
            self._start(slot)
        with np.errstate(all="ignore"):
            while self.running.any():
                ready = self.running & (self.barrier_of < 0)
                if not ready.any():
                    raise Deadlock(self._who_waits())
                rows, pc = self.schedule.next(self, ready)
                self._turn(rows, pc)
                if self.steps > self.budget:
                    raise EndlessLoop(f"{self.budget} instructions and no end; {self._where()}")

    def _start(self, slot: int) -> None:
        cta = self.waiting_ctas.pop(0)
        self.cta_of[slot] = cta
        rows = slice(slot * self.warps_per_cta, (slot + 1) * self.warps_per_cta)
        for axis, value in zip(
            "xyz",
            (cta % self.grid[0], cta // self.grid[0] % self.grid[1], cta // self.grid[0] // self.grid[1]),
            strict=True,
        ):
            self.special[f"%ctaid.{axis}"][rows] = value
        self.pc[rows] = 0
        self.active[rows] = True
        self.running[rows] = True
        self.shared.start(slot)
        self.memory.start(slot)
        for hook in self.on_start:
            hook(slot)

    def _turn(self, rows: Rows, pc: int) -> None:
        lanes = self.active[rows]
        whole: Mask = None if lanes.all() else lanes.copy()
        parted = bool(self.elsewhere) and any(int(w) in self.elsewhere for w in self.warp_ids(rows))
        while True:
            step = self.program[pc]
            self.steps += 1
            if self.statistics is not None:
                self.statistics.instructions[step.instruction.parts[0]] += len(lanes)
            mask = whole
            if step.guard is not None:
                guard = step.guard[rows]
                if step.instruction.negated:
                    guard = ~guard
                mask = guard if whole is None else guard & whole
            if step.kind == "branch":
                after = self._branch(rows, step, mask, whole, pc)
                if after is None:
                    return
                pc = after
                continue
            if step.kind == "exit":
                self._exit(rows, mask, pc)
                return
            try:
                if mask is None or mask.any():
                    step.run(rows, mask)
            except PtxError as problem:
                raise self._explain(problem, step, rows, mask) from None
            pc += 1
            if step.kind != "plain" or parted or self.schedule.preempt(step):
                self.pc[rows] = pc
                if parted:
                    for warp in self.warp_ids(rows):
                        self._join(int(warp))
                return

    def _explain(self, problem: PtxError, step: Step, rows: Rows, mask: Mask) -> PtxError:
        warps = self.warp_ids(rows)
        where = f"CTA {sorted({int(c) for c in self.cta_of[self.slot_of[warps]]})}"
        if problem.lane is not None:
            flat = np.arange(len(warps) * 32) if mask is None else np.flatnonzero(mask)
            k = int(flat[problem.lane])
            warp = int(warps[k // 32])
            where = f"CTA {self.cta_of[self.slot_of[warp]]}, thread {warp % self.warps_per_cta * 32 + k % 32}"
        return type(problem)(f"{problem}\n  in {step.instruction}\n  at {where}")

    def _branch(self, rows: Rows, step: Step, mask: Mask, whole: Mask, pc: int) -> int | None:
        """The next pc where all warps stay whole and together and go forward; otherwise the turn has ended."""
        target, warps = step.instruction.target, self.warp_ids(rows)
        here = np.ones((len(warps), 32), np.bool_) if whole is None else whole
        jumping = here if mask is None else mask
        staying = here & ~jumping
        taken = jumping.any(1)
        if target <= pc:
            self.schedule.looped(warps[taken])
        for k in np.flatnonzero(taken & staying.any(1)):  # lanes of a warp part
            warp = int(warps[k])
            self.elsewhere.setdefault(warp, []).append((target, jumping[k].copy()))
            self.active[warp] = staying[k]
            taken[k] = False
        after = np.where(taken, target, pc + 1)
        self.pc[rows] = after
        parted = [int(w) for w in warps if int(w) in self.elsewhere] if self.elsewhere else []
        for warp in parted:
            self._join(warp)
        together = not parted and (after == after[0]).all() and after[0] > pc
        return int(after[0]) if together else None

    def _join(self, warp: int) -> None:
        """Lanes of a warp that stand at one instruction become one again; the lowest runs first."""
        others = self.elsewhere.pop(warp, None)
        if others is None:
            return
        at: dict[int, np.ndarray] = {}
        for pc, lanes in [(int(self.pc[warp]), self.active[warp].copy()), *others]:
            if lanes.any():
                at[pc] = at[pc] | lanes if pc in at else lanes
        if not at:
            return
        lowest = min(at)
        self.pc[warp], self.active[warp] = lowest, at.pop(lowest)
        if at:
            self.elsewhere[warp] = list(at.items())

    def _exit(self, rows: Rows, mask: Mask, pc: int) -> None:
        warps = self.warp_ids(rows)
        for k, warp in enumerate(int(w) for w in warps):
            leaving = self.active[warp] if mask is None else mask[k]
            self.active[warp] = self.active[warp] & ~leaving
            self.pc[warp] = pc + 1
            self._join(warp)
        gone = warps[~self.active[rows].any(1)]
        self.running[gone] = False
        for hook in self.on_exit:
            hook(gone)
        for slot in np.unique(self.slot_of[gone]):
            members = slice(slot * self.warps_per_cta, (slot + 1) * self.warps_per_cta)
            if not self.running[members].any():
                self.memory.finish(int(slot))
                if self.waiting_ctas:
                    self._start(int(slot))

    # -------------------------------------------------------------------------------------------------- barriers

    def barrier(self, rows: Rows, number: np.ndarray, threads: np.ndarray, wait: bool) -> None:
        """Warps arrive at named barriers; those complete whose threads have all come."""
        for k, warp in enumerate(int(w) for w in self.warp_ids(rows)):
            slot, name, need = int(self.slot_of[warp]), int(number[k]), int(threads[k])
            arrivals = self.arrived.setdefault((slot, name), [])
            if wait:
                self.barrier_of[warp], self.barrier_need[warp] = name, need
            else:
                self.memory.barrier(slot, np.array([warp]))
                arrivals.append((need, self.races.arrive(None, warp) if self.races is not None else None))
            members = np.arange(slot * self.warps_per_cta, (slot + 1) * self.warps_per_cta)
            waiting = members[self.barrier_of[members] == name]
            if len({*self.barrier_need[waiting].tolist(), *(n for n, _ in arrivals)}) > 1:
                raise PtxError(f"warps of one CTA name different thread counts at barrier {name}")
            if 32 * (len(waiting) + len(arrivals)) >= need:
                self.barrier_of[waiting] = -1
                del self.arrived[slot, name]
                self.memory.barrier(slot, waiting)
                for hook in self.on_barrier:
                    hook(slot, waiting)
                for _, clock in arrivals:
                    if clock is not None:
                        self.races.join(clock, waiting)

    def _who_waits(self) -> str:
        waits = []
        for warp in np.flatnonzero(self.running):
            step = self.program[self.pc[warp] - 1]
            waits.append(
                f"CTA {self.cta_of[self.slot_of[warp]]} warp {warp % self.warps_per_cta} at {step.instruction}"
            )
        return "every warp waits:\n  " + "\n  ".join(waits)

    def _where(self) -> str:
        places = {int(self.pc[w]) for w in np.flatnonzero(self.running)}
        return "warps stand at " + "; ".join(str(self.program[p].instruction) for p in sorted(places)[:8])
