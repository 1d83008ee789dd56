"""The CPU backend: C++ kernels, with ATen where ATen is faster.

A layer has three paths (``PATHS``): "fused", one C++ call for the whole forward and one for the whole backward; "steps", the
formula's steps as calls, the base product ATen's (MKL, oneDNN) where that is a fast one; "eager", all of it ATen's. Which one
a layer takes is looked up (``choices``); ``fuses`` is the rule for what nobody has measured.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
from torch import Tensor

from svdkern.backends import extension
from svdkern.backends.eager import EagerBackend
from svdkern.backends.formula import Backend, Gradients, as_rows, cast, gate_gradient, gate_rows
from svdkern.backends.philox import DROPS_ALL

SMALL_M = 32
"""Up to this many rows each step is ours, whatever ATen has, and one call each way does best: over the layers of
``choices.json`` on every instruction set there."""

SMALL_WORK = 1 << 21
"""Up to so many multiply-adds M * K * N as well: there the one call is what counts."""

FROZEN_M, FROZEN_WEIGHT = 32, 1 << 22
"""Without an adapter PyTorch's call is the shorter one: ours pays from 2 to so many rows of a weight of so many numbers."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def aten_is_fast(dtype: torch.dtype) -> bool:
    """Whether ATen's matrix product for ``dtype`` is a real one on this CPU (else it can be 300 times slower than fp32)."""
    if dtype == torch.float32:
        return True
    if not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE", "NEON")):
        return False
    supported = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, supported)())


def kernels_win(dtype: torch.dtype) -> bool:
    """Whether the fused kernels beat ATen's products for any number of rows of ``dtype`` on this CPU."""
    if dtype not in _kernels_win:
        on_amx = dtype == torch.bfloat16 and torch.ops.svdkern._cpu_isa.default() == "amx_bf16"
        _kernels_win[dtype] = on_amx or not aten_is_fast(dtype)
    return _kernels_win[dtype]


# Known from the start, because a compiler that traces the choice (svdkern.linear) cannot ask the CPU.
_kernels_win: dict[torch.dtype, bool] = {}
if extension.why_missing is None:
    with contextlib.suppress(RuntimeError):  # a wrong SVDKERN_CPU_ISA: the first call says so
        for _dtype in DTYPES:
            kernels_win(_dtype)


def fuses(rows: int, width: int, out: int, dtype: torch.dtype) -> bool:
    """Whether one call each way should be the fastest for a layer of this size: few rows, little work, or ``kernels_win``."""
    return rows <= SMALL_M or kernels_win(dtype) or rows * width * out <= SMALL_WORK


def steps_are_ours(rows: int, dtype: torch.dtype) -> bool:
    """Whether the path "steps" differs from "eager" (with dropout it always does)."""
    return rows <= SMALL_M or kernels_win(dtype)


@functools.cache
def isa() -> str:
    """The instruction sets that times depend on, of our kernels and of ATen: "amx_bf16/AVX512+AMX", "avx2/AVX2"."""
    aten = torch.backends.cpu.get_cpu_capability().split()[0]
    if aten == "AVX512" and torch.cpu._is_amx_tile_supported() and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        aten += "+AMX"  # no CPU has AMX without fp16, and oneDNN can be kept from both (ONEDNN_MAX_CPU_ISA)
    return f"{torch.ops.svdkern._cpu_isa.default()}/{aten}"


class CpuBackend(EagerBackend):
    """The primitives in C++ where that wins, by ATen elsewhere; float32, bfloat16 and float16 on x86-64 and aarch64."""

    name = "cpu"

    def wins_without_adapter(self, rows: int, width: int, out: int, dtype: torch.dtype) -> bool:
        return kernels_win(dtype) or (1 < rows <= FROZEN_M and width * out >= FROZEN_WEIGHT)

    def shrink(self, a: Tensor, factor: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        if threshold or steps_are_ours(a.shape[0], a.dtype):
            return torch.ops.svdkern._cpu_shrink.default(a, factor, rng_state, threshold)
        return super().shrink(a, factor, None, 0)

    def outer(self, a: Tensor, q: Tensor, like: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        if threshold or steps_are_ours(a.shape[0], a.dtype):
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
        if kernels_win(a.dtype):
            z = None if z is None else z.to(torch.float32)
            w, bias = _as(w, a.dtype), _as(bias, a.dtype)
            return torch.ops.svdkern._cpu_linear.default(a, w, z, factor, bias, rng_state, threshold)
        y = super().linear(a, w, None if threshold else z, factor, bias, None, 0)
        if threshold and z is not None:
            branch = torch.mm(z.to(a.dtype), factor.to(a.dtype).t())
            y += torch.ops.svdkern._cpu_dropout.default(branch, rng_state, threshold, 0)
        return y


class FusedBackend(CpuBackend):
    """One C++ call each way; the steps where that call cannot serve (everything dropped, batched gradients)."""

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
        rows = math.prod(x.shape[:-1])
        if threshold != DROPS_ALL:
            w, b = _as(weight, x.dtype), _as(bias, x.dtype)
            g = None if gate is None else gate_rows(cast(gate, torch.float32), index, rows, u.shape[1])
            return torch.ops.svdkern._cpu_forward.default(x, w, u, sigma, v, b, scale, core, g, rng_state, threshold)
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
        rows = math.prod(dy.shape[:-1])
        if threshold != DROPS_ALL and not batched:
            mask = (
                bool(want.x)
                | bool(want.u) << 1
                | bool(want.sigma) << 2
                | bool(want.v) << 3
                | bool(want.bias) << 4
                | bool(want.scale) << 5
                | bool(want.core) << 6
                | bool(want.gate) << 7
            )
            g = None if gate is None else gate_rows(cast(gate, torch.float32), index, rows, u.shape[1])
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
                    g,
                    h,
                    rng_state,
                    threshold,
                    mask,
                )
            )
            dweight = dgate = None
            if want.weight:
                assert x is not None and weight is not None
                dweight = self.weight_gradient(as_rows(dy), as_rows(x), weight)
            if want.gate:
                assert gate is not None
                *rest, of_rows = found
                found, dgate = iter(rest), gate_gradient(of_rows, gate, index)
            return Gradients(
                x=next(found) if want.x else None,
                weight=dweight,
                u=next(found) if want.u else None,
                sigma=next(found) if want.sigma else None,
                v=next(found) if want.v else None,
                bias=next(found) if want.bias else None,
                scale=next(found) if want.scale else None,
                core=next(found) if want.core else None,
                gate=dgate,
            )
        return super().backward(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want)


PATHS: dict[str, Backend] = {"fused": FusedBackend(), "steps": CpuBackend(), "eager": EagerBackend()}
"""The ways to compute a layer on this device, by name."""


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else cast(tensor, dtype)
