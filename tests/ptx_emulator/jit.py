"""Run a Triton kernel in the emulator: specialised as Triton's own launcher would do it, compiled, then run_ptx."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .bulk import TensorMap
from .compile import Compiled, compile_kernel
from .launch import run_ptx
from .machine import Machine

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


def specialise(kernel: Any, args: Sequence[Any], meta: dict[str, Any]):
    """(signature, constants, divisible, run-time arguments in order, options) of a launch.

    As Triton's launcher has it: an int that is 1 becomes a constant, pointers and ints that are multiples of 16 are
    marked so, None is a constant.
    """
    meta = dict(meta)
    options = {name: meta.pop(name) for name in OPTIONS if name in meta}
    values = dict(zip((p.name for p in kernel.params), args, strict=False)) | meta
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: set[str] = set()
    run_time: list[Any] = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name], constants[name] = "constexpr", getattr(value, "value", value)
            continue
        run_time.append(value)
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0 and not free:
                divisible.add(name)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                divisible.add(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:  # a host-made tensor descriptor
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>"
    return signature, constants, divisible, run_time, options


def compile_launch(kernel: Any, args: Sequence[Any], meta: dict[str, Any], arch: int, version: str | None = None):
    """(Compiled, run-time arguments) of a launch."""
    signature, constants, divisible, run_time, options = specialise(kernel, args, meta)
    module = kernel.fn.__module__
    compiled = compile_kernel(module, kernel.fn.__name__, signature, constants, divisible, arch, version, **options)
    return compiled, run_time


def emulate(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    arch: int = 80,
    version: str | None = None,
    mode: str = "convergent",
    seed: int = 0,
    resident: int | None = None,
    read_only: Sequence[torch.Tensor] = (),
    write_only: Sequence[torch.Tensor] = (),
    statistics: Any = None,
    budget: int = 3_000_000,
    **meta: Any,
) -> Machine:
    """`kernel[grid](*args, **meta)` in the emulator, on CPU tensors."""
    compiled, run_time = compile_launch(kernel, args, meta, arch, version)
    return run_ptx(
        compiled.ptx,
        grid,
        32 * compiled.num_warps,
        flatten(run_time, compiled),
        shared=compiled.shared,
        mode=mode,
        seed=seed,
        resident=resident,
        read_only=read_only,
        write_only=write_only,
        statistics=statistics,
        budget=budget,
    )


def flatten(run_time: Sequence[Any], compiled: Compiled) -> list[Any]:
    """Tensor descriptors become a map, their sizes and their strides, as Triton passes them."""
    flat: list[Any] = []
    maps = iter(compiled.tensor_maps)
    for value in run_time:
        if not hasattr(value, "block_shape"):
            flat.append(value)
            continue
        about = next(maps)
        size = value.base.element_size()
        flat.append(
            TensorMap(
                value.base.data_ptr(),
                size,
                tuple(reversed(value.shape)),
                tuple(s * size for s in reversed(value.strides[:-1])),
                tuple(reversed(about["block_size"])),
                about["swizzle"],
            )
        )
        flat += [*value.shape, *value.strides]
    return flat
