"""Factors as the product kernels want them: cast to the activations' dtype, r padded with zeros to R, 16-byte rows.

    factor (L, r), any strides and float dtype  ->  rows (L, R)  for z F^T        or  columns (R, L)  for a F

One launch packs both factors of a layer: programs [0, ceil(L0 / BLOCK)) the first, the others the second. Program 0 also
zeroes the tickets and counters of the persistent launch that follows. Floor: one read of the factors, L r numbers; every call
packs anew, so nobody has to say when a factor changed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import ceil_div


@triton.jit
def pack_tile(
    factor, stride_row, stride_rank, L, r, out, out_row, out_rank, block, R: tl.constexpr, BLOCK: tl.constexpr
):
    rows, rank = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, R)
    inside = rows[:, None] < L
    at = factor + rows[:, None].to(tl.int64) * stride_row + rank[None, :].to(tl.int64) * stride_rank
    values = tl.load(at, mask=inside & (rank < r)[None, :], other=0.0)
    to = out + rows[:, None].to(tl.int64) * out_row + rank[None, :].to(tl.int64) * out_rank
    tl.store(to, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["counters"])
def pack_kernel(
    first, first_row, first_rank, L0, first_out, first_out_row, first_out_rank,
    second, second_row, second_rank, L1, second_out, second_out_row, second_out_rank,
    r, control, counters, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if control is not None:
        if block == 0:
            for start in range(0, counters, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(control + at, 0, mask=at < counters)
    blocks = tl.cdiv(L0, BLOCK)
    if block < blocks:
        pack_tile(first, first_row, first_rank, L0, r, first_out, first_out_row, first_out_rank, block, R, BLOCK)
    else:
        block -= blocks
        pack_tile(second, second_row, second_rank, L1, r, second_out, second_out_row, second_out_rank, block, R, BLOCK)


def padded(r: int) -> int:
    """R: the power of two, at least 16, that the kernels work with."""
    return max(16, 1 << (r - 1).bit_length())


def pack(
    first: Tensor,
    first_rows: bool,
    second: Tensor,
    second_rows: bool,
    dtype: torch.dtype,
    control: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both factors packed, each as rows (L, R) or as columns (R, L); control (int32) zeroed."""
    r = first.shape[1]
    R = padded(r)
    (first_length, _), (second_length, _) = first.shape, second.shape
    first_out, *first_strides = _packed(first, first_rows, R, dtype)
    second_out, *second_strides = _packed(second, second_rows, R, dtype)
    block = 64 if R <= 128 else 16  # rows of a program
    grid = (ceil_div(first_length, block) + ceil_div(second_length, block),)
    launching.launch(
        pack_kernel, grid,
        first, *first.stride(), first_length, first_out, *first_strides,
        second, *second.stride(), second_length, second_out, *second_strides,
        r, control, 0 if control is None else control.numel(), R=R, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return first_out, second_out


def _packed(factor: Tensor, rows: bool, R: int, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """Where a factor goes, and by which strides (of L, of R)."""
    length = factor.shape[0]
    if rows:
        return factor.new_empty(length, R, dtype=dtype), R, 1
    # 16-byte rows: a length that is no multiple of 8 gets a longer stride
    stride = -(-length // 8) * 8
    return factor.new_empty(R, stride, dtype=dtype), 1, stride
