"""One tile of y a program, the adapter's z made from partial sums:  y = x W + z V^T + b.

    h = sum_s partial[s][rows, :]        z = s (h * sigma | h R) * g        y = x W + z V^T + b, rounded once

The second of two launches (shrink.py is the first): few rows, where W is read once and nothing else counts; or no W at all.
V is read as it is, by its strides, and cast.
Programs of the first column of tiles also write h for the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import Config, ceil_div
from .pack import padded
from .tiles import kind, load_rows, load_scale, modulate, product, store_rows


@triton.jit(do_not_specialize=["M", "threshold", "splits"])
def linear_kernel(
    x, stride_x, M, K, weight, stride_wn, stride_wk, N, partial, splits, v, stride_vn, stride_vr, r,
    sigma, core, gate, scale, bias, y, stride_y, h_out,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, BIAS: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
    ONE_STAGE: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = y.dtype.element_ty
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rank = tl.arange(0, R)
    h = load_rows(partial, rows, M, rank, r)
    for _ in range(1, splits):
        partial += tl.cast(M, tl.int64) * r
        h += load_rows(partial, rows, M, rank, r)
    if tl.program_id(1) == 0:
        store_rows(h_out, h, rows, M, rank, r)
    z = modulate(h, sigma, core, rank, r, False, KIND, T, PRECISION) * load_scale(scale, SCALE_ON_DEVICE)
    if GATED:
        z *= load_rows(gate, rows, M, rank, r)
    f_at = v + columns[None, :].to(tl.int64) * stride_vn + rank[:, None].to(tl.int64) * stride_vr
    f = tl.load(f_at, mask=(columns < N)[None, :] & (rank < r)[:, None], other=0.0)
    acc = tl.dot(z.to(T), f.to(T), tl.zeros((BM, BN), tl.float32), input_precision=PRECISION)
    if BASE:
        acc = product(
            acc, x, stride_x, rows, M, weight, stride_wk, stride_wn, columns, N, 0, K, None, 0, BK, False,
            PRECISION, ONE_STAGE, FENCE,
        )  # fmt: skip
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = y + rows[:, None].to(tl.int64) * stride_y + columns[None, :]
    tl.store(at, acc.to(T), mask=(rows < M)[:, None] & (columns < N)[None, :])


def linear(
    x: Tensor, weight: Tensor | None, partial: Tensor, v: Tensor, sigma: Tensor | None, core: Tensor | None,
    gate: Tensor | None, scale: Tensor, bias: Tensor | None, y: Tensor, h: Tensor, config: Config, precision: str,
) -> None:  # fmt: skip
    """y (M, N) and h (M, r) fp32 from the partial sums (splits, M, r) of h.

    x (M, K) row-major; weight (N, K), any strides; v (N, r), any strides and float dtype; gate (M, r) fp32.
    """
    (rows, width), (out, r) = x.shape, v.shape
    on_host = launching.on_host(scale)
    launching.launch(
        linear_kernel, (ceil_div(rows, config.BM), ceil_div(out, config.BN)),
        x, x.stride(0), rows, width, weight, *((0, 0) if weight is None else weight.stride()), out,
        partial, partial.shape[0], v, *v.stride(), r,
        sigma, core, gate, scale.item() if on_host else scale, bias, y, y.stride(0), h,
        R=padded(r), BM=config.BM, BN=config.BN, BK=config.BK, KIND=kind(sigma, core), GATED=gate is not None,
        SCALE_ON_DEVICE=not on_host, BIAS=bias is not None, BASE=weight is not None, PRECISION=precision,
        num_warps=config.num_warps, num_stages=config.num_stages, **launching.wgmma(x.device),
    )  # fmt: skip
