"""The exact residual ``W_res = W - s V diag(sigma) U^T``: the same bits on every machine.

An adapter that was cut out of a weight is saved without the residual: whoever loads it computes the residual again from
the untouched weight and the *initial* factors. That is only safe if the result does not depend on the instruction set,
the number of threads or the device. So the order of operations is fixed, in float64, and nothing is fused:

    a_i = fl(fl(s sigma_i) u_i)
    acc = W;  for i = 0 ... r-1:  acc = fl(acc - fl(v_i a_i))
    W_res = round(acc)

``round`` goes from float64 to weight's dtype once, to nearest, ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.backends import extension, triton_svd

_CACHE_ELEMENTS = 1 << 15  # float64 elements of a row panel on the CPU: two of them stay in the L2 of one core
_DEVICE_ELEMENTS = 1 << 23  # elsewhere: enough to fill the device, 128 MB of temporaries
_HALVES = (torch.bfloat16, torch.float16)
_KERNEL_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_KERNEL_FACTORS = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def exact_residual(weight: Tensor, u: Tensor, sigma: Tensor | None, v: Tensor, scale: float = 1.0) -> Tensor:
    """``weight - scale * v diag(sigma) u^T``, bit for bit the same everywhere.

    Equivalent to::

        acc = weight.double()
        for i in range(u.shape[1]):
            a = (scale * sigma[i].double()) * u[:, i].double()
            acc = acc - torch.outer(v[:, i].double(), a)
        residual = acc.to(weight.dtype)  # rounded once

    One setting reaches it: under ``torch.set_flush_denormal(True)`` subnormal numbers count as 0.

    Args:
        weight: (N, K), float64, float32, bfloat16 or float16; never written to.
        u: (K, r). sigma: (r,), None means 1. v: (N, r). Any floating dtype, each its own.
        scale: s, a Python float (float64).

    Returns:
        (N, K) in weight's dtype, contiguous, a new tensor.
    """
    if _has_kernel(weight, u, sigma, v):
        return torch.ops.svdkern._cpu_residual.default(weight, u, sigma, v, scale)
    if weight.dtype in _KERNEL_WEIGHTS and triton_svd.has_same_bits(weight.device):
        rows, columns = float64_factors(u, sigma, v, scale)
        return triton_svd.residual(weight, columns, rows)
    return residual_in_torch(weight, u, sigma, v, scale)


def _has_kernel(weight: Tensor, u: Tensor, sigma: Tensor | None, v: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and extension.why_missing is None
        and hasattr(torch.ops.svdkern, "_cpu_residual")
        and weight.dtype in _KERNEL_WEIGHTS
        and all(factor is None or factor.dtype in _KERNEL_FACTORS for factor in (u, sigma, v))
    )


def residual_in_torch(weight: Tensor, u: Tensor, sigma: Tensor | None, v: Tensor, scale: float) -> Tensor:
    """``exact_residual`` in plain PyTorch: multiply, then subtract, two operations that no compiler fuses."""
    n, k = weight.shape
    rows, columns = float64_factors(u, sigma, v, scale)
    out = torch.empty(n, k, dtype=weight.dtype, device=weight.device)
    height = max(1, (_CACHE_ELEMENTS if weight.device.type == "cpu" else _DEVICE_ELEMENTS) // max(k, 1))
    product = torch.empty(min(height, n), k, dtype=torch.float64, device=weight.device)
    for start in range(0, n, height):
        panel = weight[start : start + height].to(torch.float64, copy=True)
        part = product[: panel.shape[0]]
        for column, row in zip(columns[:, start : start + height], rows, strict=True):
            torch.mul(column.unsqueeze(1), row, out=part)
            panel.sub_(part)
        out[start : start + height] = _round_once(panel, weight.dtype)
    return out


def float64_factors(u: Tensor, sigma: Tensor | None, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(r, K), whose row i is a_i, and (r, N), whose row i is v_i."""
    modulation = torch.full((u.shape[1],), scale, dtype=torch.float64, device=u.device)
    if sigma is not None:
        modulation *= sigma.to(torch.float64)
    rows = (u.to(torch.float64) * modulation).t().contiguous()
    columns = v.to(torch.float64).t().contiguous()
    return rows, columns


def _round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 to ``dtype`` with one rounding. PyTorch goes to bfloat16 and float16 through float32, which rounds twice.

    Rounding to odd on the way (truncate, and set the last bit if anything was cut off) makes the second rounding the
    only one that counts, as float32 has at least two digits more than either half format.
    """
    if dtype not in _HALVES or x.is_meta:
        return x.to(dtype)
    single = x.to(torch.float32)
    back = single.to(torch.float64)
    bits = single.view(torch.int32)
    bits = bits - (back.abs() > x.abs()).to(torch.int32)
    bits = bits | (back != x).to(torch.int32)
    return torch.where(x.isnan(), single, bits.view(torch.float32)).to(dtype)
