"""The CPU backend: C++ kernels, with ATen where ATen is faster.

Few rows (M <= 16, no gates): one C++ call does the whole forward, one the whole backward; the weight is streamed once each.
More rows: the base product goes to ATen (oneDNN, MKL) and the adapter to whichever of our kernels and ATen is faster.
Where ATen has no fast bf16 or fp16 matrix product (every x86-64 CPU without AVX-512), panels of the half-precision operands
are upcast into a small fp32 workspace and multiplied there: bf16 storage at close to fp32 speed, with no fp32 copy of a
whole operand.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from svdkern.backends.eager import EagerBackend
from svdkern.backends.formula import Gradients
from svdkern.backends.philox import DROPS_ALL

SMALL_M = 16
"""Up to this many rows a call streams the weight once through our own kernels."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PANEL_ROWS = 1024  # rows of activations upcast at a time
_PANEL_BYTES = 4 << 20  # fp32 bytes of weight upcast at a time: stays in the L2 of two cores
_DROPOUT_ROWS = 256  # rows whose dropped copy exists at a time


@functools.cache
def aten_is_fast(dtype: torch.dtype) -> bool:
    """Whether ATen's matrix product for ``dtype`` is a real one on this CPU (else it can be 300 times slower than fp32)."""
    if dtype == torch.float32:
        return True
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE", "NEON")):
        return False
    supported = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, supported)())


class CpuBackend(EagerBackend):
    """C++ where it wins, ATen elsewhere; float32, bfloat16 and float16 on x86-64 and aarch64."""

    name = "cpu"

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        u: Tensor,
        sigma: Tensor | None,
        v: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        core: Tensor | None,
        gate: Tensor | None,
        index: Tensor | None,
        rng_state: Tensor | None,
        threshold: int,
    ) -> tuple[Tensor, Tensor]:
        if x.shape[0] <= SMALL_M and gate is None and threshold != DROPS_ALL:
            w, b = _as(weight, x.dtype), _as(bias, x.dtype)
            return torch.ops.svdkern._cpu_forward.default(x, w, u, sigma, v, b, scale, core, rng_state, threshold)
        return super().forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold)

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        u: Tensor,
        sigma: Tensor | None,
        v: Tensor,
        scale: Tensor,
        core: Tensor | None,
        gate: Tensor | None,
        index: Tensor | None,
        h: Tensor | None,
        rng_state: Tensor | None,
        threshold: int,
        want: Gradients,
    ) -> Gradients:
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # autograd.grad(is_grads_batched=True)
        if dy.shape[0] <= SMALL_M and gate is None and threshold != DROPS_ALL and not batched:
            mask = (
                bool(want.x)
                | bool(want.u) << 1
                | bool(want.sigma) << 2
                | bool(want.v) << 3
                | bool(want.bias) << 4
                | bool(want.scale) << 5
                | bool(want.core) << 6
            )
            found = iter(
                torch.ops.svdkern._cpu_backward.default(
                    dy,
                    x if want.u else None,
                    _as(weight, dy.dtype),
                    u,
                    sigma,
                    v,
                    scale,
                    core,
                    h,
                    rng_state,
                    threshold,
                    mask,
                )
            )
            dweight = None
            if want.weight:
                assert x is not None and weight is not None
                dweight = self.weight_gradient(dy, x, weight)
            return Gradients(
                x=next(found) if want.x else None,
                weight=dweight,
                u=next(found) if want.u else None,
                sigma=next(found) if want.sigma else None,
                v=next(found) if want.v else None,
                bias=next(found) if want.bias else None,
                scale=next(found) if want.scale else None,
                core=next(found) if want.core else None,
                gate=None,
            )
        return super().backward(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want)

    def shrink(self, a: Tensor, factor: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        if threshold or a.shape[0] <= SMALL_M or not aten_is_fast(a.dtype):
            return torch.ops.svdkern._cpu_shrink.default(a, factor, rng_state, threshold)
        return super().shrink(a, factor, None, 0)

    def outer(self, a: Tensor, q: Tensor, like: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        if threshold or a.shape[0] <= SMALL_M or not aten_is_fast(a.dtype):
            return torch.ops.svdkern._cpu_outer.default(a, q.to(torch.float32), like, rng_state, threshold)
        return super().outer(a, q, like, None, 0)

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if aten_is_fast(x.dtype):
            return super().weight_gradient(dy, x, weight)
        return torch.mm(dy.to(torch.float32).t(), x.to(torch.float32)).to(weight.dtype)

    def linear(
        self,
        a: Tensor,
        w: Tensor | None,
        z: Tensor | None,
        factor: Tensor,
        bias: Tensor | None,
        rng_state: Tensor | None,
        threshold: int,
    ) -> Tensor:
        undropped = None if threshold else z
        if aten_is_fast(a.dtype):
            y = super().linear(a, w, undropped, factor, bias, None, 0)
        elif w is None or a.shape[0] <= SMALL_M:
            y = _linear_of_few_rows(a, w, undropped, factor, bias)
        else:
            y = _linear_by_panels(a, w, undropped, factor, bias)
        if threshold and z is not None:
            assert rng_state is not None
            _add_dropped_branch(y, z, factor, rng_state, threshold)
        return y


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _linear_of_few_rows(a: Tensor, w: Tensor | None, z: Tensor | None, factor: Tensor, bias: Tensor | None) -> Tensor:
    """``a w + z factor^T + bias`` without a half-precision product of ATen's; w may be None for any number of rows."""
    if w is None:
        y = a.new_zeros(a.shape[0], factor.shape[0])
        if bias is not None:
            y += bias
    else:
        y = torch.ops.svdkern._cpu_gemv.default(a, _as(w, a.dtype), _as(bias, a.dtype))
    if z is not None:
        y += torch.mm(z.to(torch.float32), factor.to(torch.float32).t())
    return y


def _add_dropped_branch(y: Tensor, z: Tensor, factor: Tensor, rng_state: Tensor, threshold: int) -> None:
    z, transposed = z.to(torch.float32), factor.to(torch.float32).t()
    for row in range(0, y.shape[0], _DROPOUT_ROWS):
        branch = torch.mm(z[row : row + _DROPOUT_ROWS], transposed)
        y[row : row + _DROPOUT_ROWS] += torch.ops.svdkern._cpu_dropout.default(branch, rng_state, threshold, row)


def _linear_by_panels(a: Tensor, w: Tensor, z: Tensor | None, factor: Tensor, bias: Tensor | None) -> Tensor:
    """``a w + z factor^T + bias`` with the operands upcast panel by panel and one rounding at the end."""
    rows, width, out = a.shape[0], w.shape[0], w.shape[1]
    y = a.new_empty(rows, out)
    columns = max(16, min(out, _PANEL_BYTES // (4 * max(width, 1)) // 16 * 16))
    height = min(rows, _PANEL_ROWS)
    a_panel = torch.empty(height, width, dtype=torch.float32, device="cpu")
    # in w's own orientation, so that the upcast copies whole rows or row segments
    w_panel = torch.empty_like(w[:, :columns], dtype=torch.float32)
    y_panel = torch.empty(height * columns, dtype=torch.float32, device="cpu")
    transposed = factor.to(torch.float32).t()
    for row in range(0, rows, height):
        a_part = a_panel[: min(height, rows - row)].copy_(a[row : row + height])
        for column in range(0, out, columns):
            span = slice(column, min(column + columns, out))
            w_part = w_panel[:, : span.stop - column].copy_(w[:, span])
            y_part = y_panel[: a_part.shape[0] * w_part.shape[1]].view(a_part.shape[0], -1)
            torch.mm(a_part, w_part, out=y_part)
            if bias is not None:
                y_part += bias[span]
            if z is not None:
                y_part.addmm_(z[row : row + height].to(torch.float32), transposed[:, span])
            y[row : row + height, span] = y_part
    return y
