"""Run PTX on tensors: run_ptx for any kernel, emulate for a Triton kernel that is compiled on the way.

Modes (a program that is right gives the same bits in all of them, for every seed):

- "convergent": all CTAs at once, asynchronous operations end at issue. The fastest; what most tests use.
- "late": as convergent, but asynchronous operations end only when waited for, and proxy fences are checked.
- "adversarial": few warps at a time, unfair, fewer CTAs resident than the grid has, weak memory, early or late by seed.
- "race": as convergent, with the race detector on shared memory.
"""

from collections.abc import Sequence

import numpy as np
import torch

from . import arithmetic, asynchronous, bulk, collectives, conversions, data, matrices  # noqa: F401 (they register instructions)
from .asynchronous import Copies, InFlight, Products, Proxies
from .bulk import Barriers, BulkStores, TensorMap
from .errors import PtxError
from .machine import Machine
from .memory import GlobalMemory
from .parse import Kernel, parse
from .race import RaceDetector
from .schedule import Schedule
from .statistics import Statistics

MODES = ("convergent", "late", "adversarial", "race")
ADVERSARIES = ("warp", "cta", "starve_cta", "priority", "starve_warp", "stall")
ASYNC_PROXY = ("wgmma", "cp.async.bulk")

Argument = torch.Tensor | TensorMap | int | float | bytes


def run_ptx(
    ptx: str | Kernel,
    grid: Sequence[int],
    threads: int,
    arguments: Sequence[Argument],
    *,
    shared: int = 0,
    memory: Sequence[torch.Tensor] = (),
    mode: str = "convergent",
    seed: int = 0,
    resident: int | None = None,
    read_only: Sequence[torch.Tensor] = (),
    write_only: Sequence[torch.Tensor] = (),
    statistics: Statistics | None = None,
    budget: int = 3_000_000,
) -> Machine:
    """Launch a kernel of `threads` threads a CTA on CPU tensors; raises a PtxError where the program is wrong.

    arguments are in the order of the kernel's parameters, structs as bytes; those left over are zeros. What the kernel may
    touch is the memory of the tensors given, as arguments or in `memory` (what pointers in a struct lead to). Tensors in
    `read_only` may not be written, those in `write_only` not read.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: one of {MODES}")
    kernel = parse(ptx) if isinstance(ptx, str) else ptx
    adversary = ADVERSARIES[seed % len(ADVERSARIES)] if mode == "adversarial" else ""
    reach = GlobalMemory()
    reach.weak = mode == "adversarial"
    kept, written = ({t.data_ptr() for t in tensors} for tensors in (read_only, write_only))
    given = [(f"argument {i}", argument) for i, argument in enumerate(arguments)]
    for name, argument in [*given, *((f"memory {i}", tensor) for i, tensor in enumerate(memory))]:
        if isinstance(argument, torch.Tensor) and argument.numel():
            start = argument.data_ptr()
            reach.allow(name, start, extent(argument), start not in kept, start not in written)
        if isinstance(argument, TensorMap):
            last = sum((n - 1) * s for n, s in zip(argument.sizes, (argument.element, *argument.strides), strict=True))
            reach.allow(name, argument.address, last + argument.element)
    schedule = Schedule(seed, adversary)
    count = int(np.prod([*grid]))
    if count == 0:
        raise PtxError(f"a grid of {tuple(grid)}: launches nothing, and CUDA refuses it")
    if mode == "adversarial" and resident is None:
        resident = 1 + int(schedule.rng.integers(min(count, 4)))
        if adversary == "stall":  # somebody must be there to go on
            resident = max(resident, min(count, 2))
    block, maps = pack(kernel, arguments)
    machine = Machine(
        kernel, (*grid, *(1,) * (3 - len(grid))), threads, block, reach, shared, schedule, resident, budget
    )
    machine.late = mode == "late" or (mode == "adversarial" and (seed + seed // len(ADVERSARIES)) % 2 == 1)
    machine.tensor_maps = maps
    machine.in_flight, machine.proxies = InFlight(machine), Proxies(machine)
    machine.copies, machine.products = Copies(machine), Products(machine)
    machine.barriers, machine.stores = Barriers(machine), BulkStores(machine)
    if machine.late:
        machine.shared.watchers.append(machine.in_flight)
        if any(i.name.startswith(ASYNC_PROXY) for i in kernel.code):
            machine.proxies.watch()
    if mode == "race":
        machine.races = RaceDetector(machine)
    machine.statistics = statistics
    machine.decode()
    machine.run()
    return machine


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the tensor's first element to its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def pack(kernel: Kernel, arguments: Sequence[Argument]) -> tuple[bytes, dict[int, TensorMap]]:
    """The parameter block, and where tensor maps lie in it."""
    if len(arguments) > len(kernel.parameters):
        raise PtxError(f"{len(arguments)} arguments for the {len(kernel.parameters)} parameters of {kernel.name}")
    offsets = kernel.parameter_offsets()
    block = bytearray(max((offsets[p.name] + p.size for p in kernel.parameters), default=0))
    maps = {}
    for parameter, argument in zip(kernel.parameters, arguments, strict=False):
        at = offsets[parameter.name]
        if isinstance(argument, TensorMap):
            maps[at] = argument
            continue
        if isinstance(argument, bytes):
            raw = argument
        elif isinstance(argument, torch.Tensor):
            raw = argument.data_ptr().to_bytes(8, "little")
        elif isinstance(argument, float) or parameter.type[0] == "f":
            raw = (np.float64 if parameter.size == 8 else np.float32)(argument).tobytes()
        else:
            raw = int(argument).to_bytes(parameter.size, "little", signed=argument < 0)
        if len(raw) != parameter.size:
            raise PtxError(f"parameter {parameter.name} has {parameter.size} bytes, {len(raw)} were given")
        block[at : at + len(raw)] = raw
    return bytes(block), maps
