"""Sums of partial sums, in an order that their number alone decides:  out[i, j] = sum over parts of partial[part, i columns + j].

A block has BLOCK of the sums; PARTS parts are read at a time, added up, and added to what came before. The partial sums are
fp32, and the addition too. Floor: one read of the partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import ceil_div

BLOCK = tl.constexpr(64)
PARTS = tl.constexpr(16)


@triton.jit
def add_up(partial, parts, size, columns, out, row_stride, column_stride, block):
    """out (size / columns, columns), by its strides: BLOCK of its elements."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        from_ = partial + part[:, None].to(tl.int64) * size + at[None, :]
        total += tl.sum(tl.load(from_, mask=(part < parts)[:, None] & inside[None, :], other=0.0), 0)
    to = out + (at // columns).to(tl.int64) * row_stride + (at % columns).to(tl.int64) * column_stride
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts"])
def reduce_kernel(partial, parts, size, columns, out, row_stride, column_stride):
    add_up(partial, parts, size, columns, out, row_stride, column_stride, tl.program_id(0))


def reduce(partial: Tensor, out: Tensor) -> None:
    """out (rows, columns), any strides and float dtype, from partial (parts, rows * columns) in fp32."""
    parts, size = partial.shape
    launching.launch(
        reduce_kernel, (ceil_div(size, BLOCK.value),),
        partial, parts, size, out.shape[1], out, *out.stride(), num_warps=4,
    )  # fmt: skip
