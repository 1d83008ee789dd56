"""The random start of a Krylov space: entries +-1 from Philox4x32 with 10 rounds, the same bits on every device.

    key      = (seed_lo, seed_hi)
    counter  = (row, col // 128, 0, 0)
    bit      = bit ``col % 32`` of output word ``(col % 128) // 32``          entry = 1 - 2 bit

An entry depends on its global (row, column) only: any part of the matrix can be made anywhere, by whoever holds it.

The probe of a certificate has Gaussian entries, from the counters (row, col // 4, 1, 0), which no sketch has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdkern.backends import extension, triton_svd
from svdkern.backends.philox import philox4x32

_LOW = 0xFFFFFFFF
_ROUNDS = 10
_KERNEL_DTYPES = (torch.float32, torch.float64)
_CHUNK_ELEMENTS = 1 << 15  # int64 words made at a time


def sketch(rows: int, columns: int, *, seed: int, first: int = 0, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) of +-1: columns ``first ... first + columns - 1`` of the endless matrix that ``seed`` names."""
    if triton_svd.has_same_bits(device):
        return triton_svd.sketch(rows, columns, seed=seed, first=first, dtype=dtype, device=device)
    if device.type == "cpu" and dtype in _KERNEL_DTYPES and extension.why_missing is None:
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        torch.ops.svdkern._cpu_sketch.default(out, _signed(seed), first)
        return out
    return sketch_in_torch(rows, columns, seed=seed, first=first, dtype=dtype, device=device)


def sketch_in_torch(
    rows: int, columns: int, *, seed: int, first: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """``sketch`` in plain PyTorch."""
    column = torch.arange(first, first + columns, device=device)
    first_group = first // 128
    group = torch.arange(first_group, (first + max(columns, 1) - 1) // 128 + 1, device=device)
    word = torch.div(column, 32, rounding_mode="floor") - 4 * first_group
    key = tuple(torch.tensor(part & _LOW, device=device) for part in (seed, seed >> 32))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    height = max(1, _CHUNK_ELEMENTS // max(columns, 4 * group.numel()))
    for start in range(0, rows, height):
        row = torch.arange(start, min(start + height, rows), device=device).unsqueeze(1)
        words = torch.stack(philox4x32((row, group, zero, zero), (key[0], key[1]), rounds=_ROUNDS), dim=-1)
        bits = (words.flatten(1)[:, word] >> (column % 32)) & 1
        out[start : start + height] = 1 - 2 * bits
    return out


def _signed(seed: int) -> int:
    """The int64 with the low 64 bits of seed."""
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def gaussian(rows: int, columns: int, *, seed: int, device: torch.device) -> Tensor:
    """(rows, columns) float64, independent standard normal entries (Box & Muller), the same to rounding on every device."""
    key = tuple(torch.tensor(part & _LOW, device=device) for part in (seed, seed >> 32))
    row, group = torch.arange(rows, device=device).unsqueeze(1), torch.arange(-(-columns // 4), device=device)
    one, zero = (torch.full((), value, dtype=torch.int64, device=device) for value in (1, 0))
    words = philox4x32((row, group, one, zero), (key[0], key[1]), rounds=_ROUNDS)
    uniform = [(word.to(torch.float64) + 0.5) / 2.0**32 for word in words]  # in (0, 1)
    pairs = []
    for radius, angle in (uniform[:2], uniform[2:]):
        length, turn = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        pairs += [length * turn.cos(), length * turn.sin()]
    return torch.stack(pairs, dim=-1).reshape(rows, -1)[:, :columns]
