"""Partial sums added up in their order:  out_i = sum_p partial_i[p]  for up to six gradients in one launch.

A program adds BLOCK elements of one gradient, rounds once and writes them with the gradient's own strides and dtype. Floor:
one read of the partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launching

BLOCK = 256
MOST = 6


class Sum(NamedTuple):
    """partial (parts, rows * columns) fp32 -> out (rows, columns) by its strides."""

    partial: Tensor
    out: Tensor
    rows: int
    columns: int
    row_stride: int
    column_stride: int


@triton.jit
def add_up(partial, parts, size, columns, out, row_stride, column_stride, block, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    from_ = partial + at
    for _ in range(parts):
        total += tl.load(from_, mask=inside, other=0.0)
        from_ += size
    to = out + (at // columns).to(tl.int64) * row_stride + (at % columns).to(tl.int64) * column_stride
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[f"{name}{i}" for name in "nc" for i in range(6)])
def reduce_kernel(
    p0, n0, s0, c0, o0, r0, t0, p1, n1, s1, c1, o1, r1, t1, p2, n2, s2, c2, o2, r2, t2,
    p3, n3, s3, c3, o3, r3, t3, p4, n4, s4, c4, o4, r4, t4, p5, n5, s5, c5, o5, r5, t5,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    b0, b1, b2 = tl.cdiv(s0, BLOCK), tl.cdiv(s1, BLOCK), tl.cdiv(s2, BLOCK)
    b3, b4 = tl.cdiv(s3, BLOCK), tl.cdiv(s4, BLOCK)
    if block < b0:
        add_up(p0, n0, s0, c0, o0, r0, t0, block, BLOCK)
    elif block < b0 + b1:
        if COUNT > 1:
            add_up(p1, n1, s1, c1, o1, r1, t1, block - b0, BLOCK)
    elif block < b0 + b1 + b2:
        if COUNT > 2:
            add_up(p2, n2, s2, c2, o2, r2, t2, block - b0 - b1, BLOCK)
    elif block < b0 + b1 + b2 + b3:
        if COUNT > 3:
            add_up(p3, n3, s3, c3, o3, r3, t3, block - b0 - b1 - b2, BLOCK)
    elif block < b0 + b1 + b2 + b3 + b4:
        if COUNT > 4:
            add_up(p4, n4, s4, c4, o4, r4, t4, block - b0 - b1 - b2 - b3, BLOCK)
    else:
        if COUNT > 5:
            add_up(p5, n5, s5, c5, o5, r5, t5, block - b0 - b1 - b2 - b3 - b4, BLOCK)


def reduce(sums: Sequence[Sum]) -> None:
    """Add up every Sum in one launch; at most six."""
    assert len(sums) <= MOST
    if not sums:
        return
    arguments: list[object] = []
    blocks = 0
    for each in sums:
        size = each.rows * each.columns
        parts = each.partial.shape[0]
        arguments += [each.partial, parts, size, each.columns, each.out, each.row_stride, each.column_stride]
        blocks += triton.cdiv(size, BLOCK)
    arguments += [sums[0].partial, 0, 0, 1, sums[0].out, 0, 0] * (MOST - len(sums))
    launching.launch(reduce_kernel, (blocks,), *arguments, COUNT=len(sums), BLOCK=BLOCK, num_warps=4)
