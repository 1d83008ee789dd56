"""A few lines of PTX made into a kernel, and run on numpy arrays."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ptx_emulator import TensorMap, run_ptx
from ptx_emulator.machine import Machine

CLASSES = {"p": "pred", "h": "b16", "r": "b32", "d": "b64", "f": "f32", "g": "f64"}
ARGUMENT = {np.ndarray: "d", int: "r", float: "f"}


def module(body: str, parameters: Sequence[str], declared: str = "") -> str:
    """A PTX module of one kernel. Registers %p0..., %h0, %r0, %d0, %f0, %g0 (pred, b16, b32, b64, f32, f64) exist as used.

    declared: what stands before the kernel, as `.shared` variables.
    """
    registers = []
    for letter, kind in CLASSES.items():
        used = [int(n) for n in re.findall(rf"%{letter}(\d+)\b", body)]
        if used:
            registers.append(f".reg .{kind} %{letter}<{max(used) + 1}>;")
    return "\n".join(
        [
            ".version 8.7\n.target sm_90a\n.address_size 64",
            declared,
            f".visible .entry kernel({', '.join(parameters)})",
            "{",
            *registers,
            ".reg .b32 %tx, %lane;",
            body,
            "ret;",
            "}",
        ]
    )


def run(
    body: str,
    *arguments: np.ndarray | TensorMap | int | float | bytes,
    threads: int = 32,
    grid: Sequence[int] = (1,),
    declared: str = "",
    read_only: Sequence[int] = (),
    **launch: Any,
) -> Machine:
    """Run `body` with its arguments loaded: the address of array i in %d{i}, an int in %r{i}, a float in %f{i}.

    %tx is the thread's number in its CTA, %lane that in its warp. Structs (bytes) and tensor maps stay parameters, p{i}.
    read_only: numbers of the arrays that may not be written.
    """
    parameters, prologue, given = [], ["mov.u32 %tx, %tid.x;", "mov.u32 %lane, %laneid;"], []
    tensors: dict[int, torch.Tensor] = {}
    for i, argument in enumerate(arguments):
        if isinstance(argument, bytes | TensorMap):
            size = len(argument) if isinstance(argument, bytes) else 128
            parameters.append(f".param .align {8 if isinstance(argument, bytes) else 64} .b8 p{i}[{size}]")
            given.append(argument)
            continue
        kind, letter = {"d": ("u64", "d"), "r": ("u32", "r"), "f": ("f32", "f")}[ARGUMENT[type(argument)]]
        parameters.append(f".param .{kind} p{i}")
        prologue.append(f"ld.param.{kind} %{letter}{i}, [p{i}];")
        if isinstance(argument, np.ndarray):
            tensors[i] = torch.from_numpy(argument.view(f"i{argument.itemsize}"))
        given.append(tensors.get(i, argument))
    return run_ptx(
        module("\n".join([*prologue, body]), parameters, declared),
        grid,
        threads,
        given,
        read_only=[tensors[i] for i in read_only],
        **launch,
    )


def lanes(body: str, *inputs: Any, out: Any = np.uint32, **launch: Any) -> np.ndarray:
    """Every thread runs `body` on its own element of the inputs, in %a, %b, %c, %e, and leaves %o: all of these, in order.

    The registers have the widths of the inputs and of `out`; %p and %q are predicates.
    """
    count = np.broadcast_shapes(*(np.shape(i) for i in inputs))[0]
    padded = -count % 32
    arrays = [np.pad(np.broadcast_to(i, count), (0, padded), mode="edge") for i in map(np.asarray, inputs)]
    arrays.append(np.zeros(count + padded, out))
    threads = next(t for t in (512, 256, 128, 64, 32) if (count + padded) % t == 0)
    lines = [".reg .b32 %n; .reg .b64 %at; .reg .pred %p, %q;"]
    lines.append(f"mov.u32 %n, %ctaid.x; mad.lo.u32 %n, %n, {threads}, %tx;")
    for i, (name, array) in enumerate(zip([*"abce"[: len(inputs)], "o"], arrays, strict=True)):
        size = array.itemsize
        lines.append(f".reg .b{8 * size} %{name};")
        lines.append(f"mad.wide.u32 %at, %n, {size}, %d{i};")
        if name == "o":
            lines.append(f"{body}\nst.global.b{8 * size} [%at], %o;")
        else:
            lines.append(f"ld.global.b{8 * size} %{name}, [%at];")
    run("\n".join(lines), *arrays, threads=threads, grid=((count + padded) // threads,), **launch)
    return arrays[-1][:count]


def zeros(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """Begins at a multiple of 128 bytes, as memory of a GPU does."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 128, np.uint8)
    start = -memory.ctypes.data % 128
    return memory[start : start + size].view(dtype).reshape(shape)


def random_bits(count: int, kind: Any = np.uint32, seed: int = 0) -> np.ndarray:
    """Patterns of all magnitudes: as integers they have few or many bits, as floats every class appears."""
    rng = np.random.default_rng(seed)
    bits = 8 * np.dtype(kind).itemsize
    values = rng.integers(0, 2**bits, count, np.uint64)
    values >>= rng.integers(0, bits, count).astype(np.uint64) * rng.integers(0, 2, count).astype(np.uint64)
    unsigned = values.astype(f"u{bits // 8}")
    special = [0, 1, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1]
    unsigned[: len(special)] = special
    return unsigned.view(kind)
