"""One tile of y a program, the adapter's z made from partial sums:  y = a W + D * (z F^T) + b.

    h = sum_s partial[s][rows, :]        z = s (h * sigma | h R) * g  or, backward, q = t * sigma | t R^T with t = s h * g
    acc = z F^T                          [D * acc with dropout]      acc += a W        y = acc + b, rounded once

W is the frozen weight (N, K): contracted over K for y (weight.stride() = (K, 1) as b(k, n) = W[n, k]), over N for dx. The
second of two launches (shrink.py is the first): few rows, where W is read once and nothing else counts, and the candidate
"split" for many. Programs of the first column of tiles also write h for the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import Config
from .tiles import keep, kind, load_rows, load_scale, modulate, product, store_rows


@triton.jit
def adapter_rows(
    partial, splits, rows, M, r, sigma, core, gate, s, R: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    BACKWARD: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(h, z) of a tile of rows, from the partial sums of h (or, backward, (p, q) from those of p)."""
    rank = tl.arange(0, R)
    h = load_rows(partial, rows, M, rank, r)
    for _ in range(1, splits):
        partial += tl.cast(M, tl.int64) * r
        h += load_rows(partial, rows, M, rank, r)
    if BACKWARD:
        t = h * s
        if GATED:
            t *= load_rows(gate, rows, M, rank, r)
        return h, modulate(t, sigma, core, rank, r, True, KIND, T, PRECISION)
    z = modulate(h, sigma, core, rank, r, False, KIND, T, PRECISION) * s
    if GATED:
        z *= load_rows(gate, rows, M, rank, r)
    return h, z


@triton.jit(do_not_specialize=["M", "threshold", "splits"])
def linear_kernel(
    a, stride_a, M, K, weight, stride_wk, stride_wn, N, partial, splits, factor, r, sigma, core, gate, scale, bias,
    y, stride_y, h_out, rng_state, threshold, keep_scale,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    BACKWARD: tl.constexpr, SCALE_ON_DEVICE: tl.constexpr, BIAS: tl.constexpr, SAVE_H: tl.constexpr,
    DROPOUT: tl.constexpr, ADAPTER: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = y.dtype.element_ty
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if ADAPTER:
        s = load_scale(scale, SCALE_ON_DEVICE)
        h, z = adapter_rows(partial, splits, rows, M, r, sigma, core, gate, s, R, KIND, GATED, BACKWARD, T, PRECISION)
        if SAVE_H:
            if tl.program_id(0) == 0:
                store_rows(h_out, h, rows, M, tl.arange(0, R), r)
        rank = tl.arange(0, R)
        at = factor + columns[None, :].to(tl.int64) * R + rank[:, None]
        f = tl.load(at, mask=(columns < N)[None, :], other=0.0)
        acc = tl.dot(z.to(T), f, acc, input_precision=PRECISION)
        if DROPOUT:
            kept = keep(rows, tl.program_id(0) * BN, rng_state, threshold, BN)
            acc = tl.where(kept, acc * keep_scale, 0.0)
    if BASE:
        acc = product(
            acc,
            a,
            stride_a,
            rows,
            M,
            weight,
            stride_wk,
            stride_wn,
            columns,
            N,
            0,
            K,
            rng_state,
            threshold,
            BK,
            False,
            PRECISION,
            WGMMA,
        )
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    at = y + rows[:, None].to(tl.int64) * stride_y + columns[None, :]
    tl.store(at, acc.to(T), mask=(rows < M)[:, None] & (columns < N)[None, :])


def linear(
    a: Tensor, weight: Tensor | None, transposed: bool, partial: Tensor | None, factor: Tensor, r: int,
    sigma: Tensor | None, core: Tensor | None, gate: Tensor | None, scale: Tensor, bias: Tensor | None, y: Tensor,
    h: Tensor | None, rng_state: Tensor | None, threshold: int, keep_scale: float, config: Config, precision: str,
) -> None:  # fmt: skip
    """y = a weight^T + z F^T + b, or (transposed) y = a weight + D * (q F^T), from the partial sums of h (or p).

    a (M, K) row-major; weight (N, K), any strides; partial (splits, M, r); factor packed (out, R).
    """
    rows, depth = a.shape
    out = y.shape[1]
    strides = (0, 0) if weight is None else weight.stride() if transposed else weight.stride()[::-1]
    launching.launch(
        linear_kernel, (triton.cdiv(out, config.BN), triton.cdiv(rows, config.BM)),
        a, a.stride(0), rows, depth, weight, *strides, out, partial, 1 if partial is None else partial.shape[0], factor, r,
        sigma, core, gate, scale.item() if scale.is_cpu else scale, bias, y, y.stride(0), h, rng_state, threshold, keep_scale,
        R=factor.shape[1], BM=config.BM, BN=config.BN, BK=config.BK, KIND=kind(sigma, core), GATED=gate is not None,
        BACKWARD=transposed, SCALE_ON_DEVICE=not scale.is_cpu, BIAS=bias is not None, SAVE_H=h is not None,
        DROPOUT=threshold > 0, ADAPTER=partial is not None, BASE=weight is not None, PRECISION=precision,
        WGMMA=launching.wgmma(a.device), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
