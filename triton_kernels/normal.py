"""The products of a Krylov step:  y = s a x  and  z = s a^T y,  s a power of two.

    a (M, L) bf16, fp16 or fp32, two strides of which one is 1        x (L, b), y (M, b), z (L, b) fp32

A launch is one product: tiles (BM, B), split over the depth into ranges of `per_split` by the shape alone, their partial sums
added in order; no bit depends on who ran when. The second product is the same kernel with a's strides swapped.

Accuracy is that of fp32 without TF32: the tensor cores multiply bf16 parts of 8 bits, of which x has three and a one (bf16), two
(fp16) or three (fp32); products of parts are exact in fp32, those below 2^-24 of the whole are left out, 3, 5 or 6 are made. The
sum of one step of BL numbers, which a tensor core may truncate, is added to the others by an fp32 fused multiply-add.

Reading a once would need a row panel to stay on the chip until its y is whole, and no tile holds 16 rows of 14336. It could
stay in the L2: tiles of y and z of one persistent launch, or two launches for every panel. Counted for an H100 (3.0 TB/s from
memory, 5.5 from the L2, 1.5 us a launch), bf16, b = 16: a tile's share of x or y makes 2 + 6 b / BM bytes from the L2 of each
element and product, 5.5 for both, 1.0 ps; two reads from memory take 1.3 ps. So one read could gain a quarter at most, less
what waiting costs; panels of 16 MB, 8 us, lose that to two launches each. What is done instead costs nothing: the second
launch walks a backwards, beginning with what the first one left in the L2 (all of a up to its size, 40 MB of a larger one).
Floor: one read of a, at most two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import ceil_div
from .pack import padded
from .reduce import reduce
from .tiles import fence_async_proxy

PROGRAMS = 512
"""Of a launch at most, unless it has more tiles: partial sums take 4 BM B bytes for each."""

STEPS = 4
"""A range of the depth has at least so many steps."""

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""bf16 parts of an element of a."""


class Tile(NamedTuple):
    BM: int
    BL: int
    B: int
    num_warps: int
    num_stages: int
    maxnreg: int | None


def tile(dtype: torch.dtype, b: int) -> Tile:
    """With two warps there is no wgmma on sm_90, which would wait at every step where a's parts are in registers."""
    if dtype == torch.bfloat16:
        return Tile(128, 64, padded(b), 4, 3, None) if b <= 32 else Tile(128, 32, 64, 4, 4, None)
    return Tile(64, 32, min(padded(b), 32), 2, 3, 240)


@triton.jit
def split(values):
    """Three bf16 numbers of 8 bits each whose sum is values."""
    first = values.to(tl.bfloat16)
    rest = values - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def product_of_parts(a, x0, x1, x2, PARTS: tl.constexpr):
    """a (x0 + x1 + x2), without what is below 2^-24 of it; the small products are added first."""
    if PARTS == 1:
        return tl.dot(a, x0, tl.dot(a, x1, tl.dot(a, x2)))
    a0, a1, a2 = split(a.to(tl.float32))
    sums = tl.dot(a1, x1, tl.dot(a0, x2))
    if PARTS == 3:
        sums = tl.dot(a2, x0, sums)
    return tl.dot(a0, x0, tl.dot(a1, x0, tl.dot(a0, x1, sums)))


@triton.jit(do_not_specialize=["scale"])
def normal_kernel(
    a, stride_m, stride_l, M, L, parts, b, scale, per_split, partial,
    WIDE: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, B: tl.constexpr, PARTS: tl.constexpr,
    BACKWARDS: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    """partial[split] (M, b): s a x over the split's range of L; parts (L, 3, WIDE) are x's."""
    block, row_tile, split_of_l = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if BACKWARDS:
        row_tile, split_of_l = tl.num_programs(1) - 1 - row_tile, tl.num_programs(2) - 1 - split_of_l
    rows, columns = row_tile * BM + tl.arange(0, BM), block * B + tl.arange(0, B)
    first = split_of_l * per_split
    last = tl.minimum(first + per_split, L)
    acc = tl.zeros((BM, B), tl.float32)
    for start in range(first, last, BL):
        at = start + tl.arange(0, BL)
        a_at = a + rows[:, None].to(tl.int64) * stride_m + at[None, :].to(tl.int64) * stride_l
        left = tl.load(a_at, mask=(rows < M)[:, None] & (at < last)[None, :], other=0.0)
        x_at = parts + at[:, None].to(tl.int64) * (3 * WIDE) + columns[None, :]
        inside = (at < last)[:, None]
        x0, x1 = tl.load(x_at, mask=inside, other=0.0), tl.load(x_at + WIDE, mask=inside, other=0.0)
        x2 = tl.load(x_at + 2 * WIDE, mask=inside, other=0.0)
        if FENCE:
            fence_async_proxy()
        # a factor between the two sums keeps Triton from making them one inside the tensor cores
        acc += product_of_parts(left, x0, x1, x2, PARTS) * scale
    to = partial + (split_of_l.to(tl.int64) * M + rows[:, None]) * b + columns[None, :]
    tl.store(to, acc, mask=(rows < M)[:, None] & (columns < b)[None, :])


@triton.jit(do_not_specialize=["splits"])
def parts_kernel(partial, splits, rows, b, out, parts, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over splits of partial (splits, rows, b), in order: as it is in out, by bf16 parts in parts (rows, 3, WIDE)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // WIDE, at % WIDE
    inside = (row < rows) & (column < b)
    total = tl.load(partial + row * b + column, mask=inside, other=0.0)
    for i in range(1, splits):
        total += tl.load(partial + (i.to(tl.int64) * rows + row) * b + column, mask=inside, other=0.0)
    if out is not None:
        tl.store(out + row * b + column, total, mask=inside)
    to = parts + row * (3 * WIDE) + column
    x0, x1, x2 = split(total)
    tl.store(to, x0, mask=row < rows)
    tl.store(to + WIDE, x1, mask=row < rows)
    tl.store(to + 2 * WIDE, x2, mask=row < rows)


def by_parts(partial: Tensor, shape: Tile, out: Tensor | None) -> Tensor:
    """The bf16 parts (rows, 3, WIDE) of the sum of partial (splits, rows, b), contiguous; the sum itself in out."""
    splits, rows, b = partial.shape
    wide = ceil_div(b, shape.B) * shape.B
    parts = torch.empty(rows, 3, wide, dtype=torch.bfloat16, device=partial.device)
    launching.launch(
        parts_kernel, (ceil_div(rows * wide, 512),),
        partial, splits, rows, b, out, parts, WIDE=wide, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return parts


def per_split(rows: int, depth: int, b: int, shape: Tile) -> int:
    """The range of one split, a multiple of BL."""
    tiles = ceil_div(rows, shape.BM) * ceil_div(b, shape.B)
    splits = max(1, min(PROGRAMS // tiles, depth // (STEPS * shape.BL)))
    return ceil_div(depth, splits * shape.BL) * shape.BL


def partial_product(a: Tensor, parts: Tensor, b: int, scale: float, shape: Tile, backwards: bool) -> Tensor:
    """(splits, M, b): the parts of s a x."""
    rows, depth = a.shape
    each = per_split(rows, depth, b, shape)
    splits = ceil_div(depth, each)
    partial = torch.empty(splits, rows, b, dtype=torch.float32, device=a.device)
    options = {} if shape.maxnreg is None else {"maxnreg": shape.maxnreg}
    launching.launch(
        normal_kernel, (parts.shape[2] // shape.B, ceil_div(rows, shape.BM), splits),
        a, *a.stride(), rows, depth, parts, b, scale, each, partial,
        WIDE=parts.shape[2], BM=shape.BM, BL=shape.BL, B=shape.B, PARTS=PARTS[a.dtype], BACKWARDS=backwards,
        FENCE=launching.wgmma(a.device)["FENCE"], num_warps=shape.num_warps, num_stages=shape.num_stages, **options,
    )  # fmt: skip
    return partial


def _sum(partial: Tensor) -> Tensor:
    if len(partial) == 1:
        return partial[0]
    out = torch.empty_like(partial[0])
    reduce(partial.view(len(partial), -1), out)
    return out


def product(a: Tensor, x: Tensor, scale: float) -> Tensor:
    """``scale a x``."""
    b = x.shape[1]
    if not (a.numel() and b):
        return torch.zeros(a.shape[0], b, dtype=torch.float32, device=a.device)
    shape = tile(a.dtype, b)
    parts = by_parts(x.contiguous().unsqueeze(0), shape, None)
    return _sum(partial_product(a, parts, b, scale, shape, False))


def both(a: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``y = scale a x`` and ``z = scale a^T y``."""
    b = x.shape[1]
    if not (a.numel() and b):
        return product(a, x, scale), product(a.t(), x, scale)
    shape = tile(a.dtype, b)
    partial = partial_product(a, by_parts(x.contiguous().unsqueeze(0), shape, None), b, scale, shape, False)
    y = torch.empty(a.shape[0], b, dtype=torch.float32, device=a.device)
    return y, _sum(partial_product(a.t(), by_parts(partial, shape, y), b, scale, shape, True))
