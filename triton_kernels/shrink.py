"""Partial sums of h = (D * x) U, split over K:  out[s] = (D * x)[:, K_s] U[K_s, :],  (SPLITS, M, r) in fp32.

Tiles of BM rows and one split each; whoever needs h adds the splits up in their order (linear.py), so no bit depends on who
ran when. Floor: one read of x and U, K (M + r) numbers. For few rows, where a persistent launch has nothing to hide it behind,
and where one more launch would cost more than it saves: U is read as it is, by its strides, and cast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import Config, ceil_div
from .pack import padded
from .tiles import product, store_rows


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    a, stride_a, M, K, u, stride_uk, stride_ur, r, out, rng_state, threshold, keep_scale, per_split,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ONE_STAGE: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(1)
    first = split * per_split
    h = product(
        tl.zeros((BM, R), tl.float32), a, stride_a, rows, M, u, stride_uk, stride_ur, tl.arange(0, R), r,
        first, tl.minimum(first + per_split, K), rng_state, threshold, BK, DROPOUT, PRECISION, ONE_STAGE, FENCE,
    )  # fmt: skip
    if DROPOUT:
        h *= keep_scale
    store_rows(out + split.to(tl.int64) * M * r, h, rows, M, tl.arange(0, R), r)


def shrink(
    a: Tensor, u: Tensor, rng_state: Tensor | None, threshold: int, keep_scale: float, precision: str, splits: int, config: Config,
) -> Tensor:  # fmt: skip
    """(splits, M, r) partial sums; a (M, K) row-major, u (K, r) of any strides and float dtype."""
    (rows, width), r = a.shape, u.shape[1]
    BM, BK = config.BM, config.BK
    per_split = -(-width // (splits * BK)) * BK
    splits = -(-width // per_split)
    out = a.new_empty(splits, rows, r, dtype=torch.float32)
    launching.launch(
        shrink_kernel, (ceil_div(rows, BM), splits),
        a, a.stride(0), rows, width, u, *u.stride(), r, out, rng_state, threshold, keep_scale, per_split,
        R=padded(r), BM=BM, BK=BK, DROPOUT=threshold > 0, PRECISION=precision,
        num_warps=config.num_warps, num_stages=config.num_stages, **launching.wgmma(a.device),
    )  # fmt: skip
    return out
