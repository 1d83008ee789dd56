"""The exact residual  W_res = round(W - sum of v_i a_i),  W (N, K), in float64, in the order of svdkern.linalg.residual.

    acc = W;  for i = 0 ... r-1:  acc = fl(acc - fl(v_i a_i));  rounded once, to W's dtype            v (r, N), a (r, K) float64

A program is one tile (BM, BN), its sums in registers for all r steps: W is read once and W_res written once, where PyTorch's
operations pass over it twice for every rank. The two operations of a step are instructions with a rounding of their own,
mul.rn and sub.rn: neither Triton nor ptxas may make one fused multiply-add of them, whatever it is told.
Floor: 2 N K r operations of the float64 units, which a consumer's GPU has few of; the vectors of a step, (BM + BN) numbers,
come from the L1 or L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .configs import ceil_div

BM, BN = 32, 64


@triton.jit
def minus_product(acc, x, y):
    """fl(acc - fl(x y))."""
    product = tl.inline_asm_elementwise(
        "mul.rn.f64 $0, $1, $2;", "=d,d,d", [x, y], dtype=tl.float64, is_pure=True, pack=1
    )
    return tl.inline_asm_elementwise(
        "sub.rn.f64 $0, $1, $2;", "=d,d,d", [acc, product], dtype=tl.float64, is_pure=True, pack=1
    )


@triton.jit
def round_once(x, T: tl.constexpr):
    """Float64 to T by one rounding: to a half format through float32 rounded to odd, which has two digits more than it."""
    single = x.to(tl.float32)
    if T == tl.bfloat16 or T == tl.float16:
        back = single.to(tl.float64)
        bits = single.to(tl.int32, bitcast=True)
        bits = (bits - (tl.abs(back) > tl.abs(x)).to(tl.int32)) | (back != x).to(tl.int32)  # a NaN stays one
        single = bits.to(tl.float32, bitcast=True)
    return single.to(T)


@triton.jit
def residual_kernel(
    weight, stride_row, stride_column, N, K, v, a, r, out, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    rows, columns = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    from_ = weight + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    acc = tl.load(from_, mask=inside, other=0.0).to(tl.float64)
    v_at, a_at = v + rows, a + columns
    for _ in range(r):
        left, right = tl.load(v_at, mask=rows < N, other=0.0), tl.load(a_at, mask=columns < K, other=0.0)
        acc = minus_product(acc, left[:, None], right[None, :])
        v_at += N
        a_at += K
    T: tl.constexpr = out.dtype.element_ty
    to = out + rows[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(to, acc if T == tl.float64 else round_once(acc, T), mask=inside)


def residual(weight: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """W_res (N, K), a new tensor; weight of any strides and float dtype, v (r, N) and a (r, K) float64 and contiguous."""
    N, K = weight.shape
    out = torch.empty(N, K, dtype=weight.dtype, device=weight.device)
    if out.numel():
        launching.launch(
            residual_kernel, (ceil_div(N, BM), ceil_div(K, BN)),
            weight, *weight.stride(), N, K, v, a, v.shape[0], out, BM=BM, BN=BN, num_warps=4,
        )  # fmt: skip
    return out
