"""The Gram matrix of a factor:  G = F^T F,  F (L, r) -> G (r, r), summed in fp32; how far F is from orthonormal.

Tiles (BT, BT) of the lower triangle, split over L into parts of `part_rows` rows: a program is one tile of one part,

    partial[part][i, j] = sum of F[l, i] F[l, j] over the rows l of the part,        BD rows a step

which it writes there and, mirrored, above the diagonal: G is symmetric to the bit. reduce_kernel adds the parts in their
order. Their bounds depend on the shape alone, so the same F has the same G every time; of one part the partial sum is G
itself, and there is one launch. Float32 is multiplied as float32, never as TF32: what is left beside the identity is small.
F is read by its strides (one should be 1): nothing is packed or cast. Floor: one read of F, L r numbers; all tiles together
read it ceil(r / BT) + 1 times, from the L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import ceil_div
from .pack import padded
from .reduce import reduce
from .tiles import fence_async_proxy

PROGRAMS = 256
"""Of a launch at most, unless it has more tiles: the partial sums take up to 8 BT^2 bytes for each."""

STEPS = 4
"""A part has at least so many steps: each costs the reduction a read."""


@triton.jit
def gram_kernel(
    factor, stride_row, stride_rank, L, r, part_rows, partial, BT: tl.constexpr, BD: tl.constexpr, FENCE: tl.constexpr
):
    part, row, column = tl.program_id(0), 0, tl.program_id(1)
    while column > row:  # the tiles of the triangle, row by row: (0, 0), (1, 0), (1, 1), (2, 0), ...
        row += 1
        column -= row
    i, j = row * BT + tl.arange(0, BT), column * BT + tl.arange(0, BT)
    depth = tl.arange(0, BD)
    acc = tl.zeros((BT, BT), tl.float32)
    last = tl.minimum((part + 1) * part_rows, L)
    for start in range(part * part_rows, last, BD):
        rows = start + depth
        at = factor + rows.to(tl.int64) * stride_row
        # loaded as it is multiplied: Triton does not copy asynchronously what tl.trans takes
        left_at = at[None, :] + i[:, None].to(tl.int64) * stride_rank
        left = tl.load(left_at, mask=(i < r)[:, None] & (rows < last)[None, :], other=0.0)
        right_at = at[:, None] + j[None, :].to(tl.int64) * stride_rank
        right = tl.load(right_at, mask=(rows < last)[:, None] & (j < r)[None, :], other=0.0)
        if FENCE:
            fence_async_proxy()
        acc = tl.dot(left, right, acc, input_precision="ieee")
    to = partial + part.to(tl.int64) * r * r
    inside = (i < r)[:, None] & (j < r)[None, :]
    if row == column:  # the order in which tensor cores add is not defined: symmetry is made, not hoped for
        acc = tl.where(i[:, None] >= j[None, :], acc, tl.trans(acc))
    else:
        tl.store(to + j[None, :] * r + i[:, None], acc, mask=inside)
    tl.store(to + i[:, None] * r + j[None, :], acc, mask=inside)


def tile(dtype: torch.dtype, r: int) -> tuple[int, int, int]:
    """BT, BD and the number of stages."""
    if dtype == torch.float32:
        return min(padded(r), 32), 32, 2
    return min(padded(r), 64), 64, 3


def part_rows(L: int, tiles: int, BD: int) -> int:
    """Rows of a part, a multiple of BD."""
    parts = max(1, min(L // (STEPS * BD), PROGRAMS // tiles))
    return ceil_div(L, parts * BD) * BD


def gram(factor: Tensor) -> Tensor:
    """F^T F (r, r) in fp32 of F (L, r) in fp32, bf16 or fp16."""
    (L, r), device = factor.shape, factor.device
    if not factor.numel():
        return torch.zeros(r, r, dtype=torch.float32, device=device)
    BT, BD, num_stages = tile(factor.dtype, r)
    side = ceil_div(r, BT)
    tiles = side * (side + 1) // 2
    rows = part_rows(L, tiles, BD)
    parts = ceil_div(L, rows)
    partial = torch.empty(parts, r * r, dtype=torch.float32, device=device)
    launching.launch(
        gram_kernel, (parts, tiles),
        factor, *factor.stride(), L, r, rows, partial,
        BT=BT, BD=BD, FENCE=launching.wgmma(device)["FENCE"], num_warps=4, num_stages=num_stages,
    )  # fmt: skip
    if parts == 1:
        return partial.view(r, r)
    out = torch.empty(r, r, dtype=torch.float32, device=device)
    reduce(partial, out)
    return out
