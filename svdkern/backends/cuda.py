"""The CUDA backend: NVIDIA GPUs of compute capability 8.0 and later, by the compiled kernels of csrc/cuda.

A layer's forward and its backward are one operator each; which launches they are, csrc/cuda/layer.h says. Sums of p and h for
the gradients of scale, core and gate are PyTorch's.

Layer: like ``cpu``; the kernels are operators of ``torch.ops.svdkern``. It takes float32 (IEEE), bfloat16 and float16 activations,
any r, and any strides (an x or dy whose rows are not contiguous is copied). A weight of another dtype than x's is cast at every
call. No tensor on the GPU is read on the host and nothing is compiled at run time, so calls can be captured in a CUDA graph after
one call, or ``svdkern.warmup``, has loaded the kernels. A scale that is on the CPU is part of what is captured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from svdkern.backends import extension
from svdkern.backends.eager import EagerBackend
from svdkern.backends.formula import Gradients, as_rows, as_shaped, cast, gate_gradient, gate_rows
from svdkern.backends.philox import DROPS_ALL
from svdkern.backends.tracing import is_watched

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)
SMALL_ROWS = 32  # csrc/cuda/params.h
CORE_RANKS = 128
"""Above, a core is a product of its own: the epilogue of shrink needs all ranks of a row in one tile."""

OUTSIDE = 32
"""Among what a call wants: the product with W is PyTorch's (csrc/cuda/layer_ops.cpp)."""

LIBRARY_WORK = 1 << 34
"""M K N above which cuBLAS's product and another for the branch are faster than ours with the branch in its loop, on GPUs whose
fast tensor cores ours does not use; below, the host needs longer for two more operators."""

LIBRARY_GPUS = (9, 10)
"""Major compute capabilities of those."""

MOST_KEPT = 4096
"""Sizes of workspaces that are remembered."""


def why_missing() -> str | None:
    """None if the extension has CUDA kernels, else the reason in one line."""
    if extension.why_missing is not None:
        return f"the compiled extension is not there: {extension.why_missing}"
    if not hasattr(torch.ops.svdkern, "_cuda_build"):
        return "the extension was built from another version of svdkern: build it again"
    if not torch.ops.svdkern._cuda_build():
        return "the extension was built without CUDA kernels (no nvcc, or SVDKERN_CUDA=0)"
    return None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the backend can serve this device and dtype, else the reason in one line."""
    if device.type != "cuda":
        return f"the cuda backend was asked for a tensor on {device}"
    if (reason := why_missing()) is not None:
        return reason
    if torch.version.hip is not None:
        return "the cuda backend is written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    if dtype not in DTYPES:
        return f"the cuda backend has no {dtype} (it has {', '.join(str(d) for d in DTYPES)})"
    return _refused(device)


def _refused(device: torch.device) -> str | None:
    """What the driver says against the kernels: it is older than the runtime in the extension, or has no code for this GPU."""
    found = _answers.get(device)
    if found is None:
        with torch.cuda.device(device):
            found = torch.ops.svdkern._cuda_probe.default(torch.empty(0, device=device))
        if not (found and torch.cuda.is_current_stream_capturing()):  # then it may be the capture that it cannot bear
            _answers[device] = found
    if not found:
        return None
    return (
        f"the CUDA kernels ({torch.ops.svdkern._cuda_build()}) cannot run on {torch.cuda.get_device_name(device)}: {found}; "
        "kernels built with nvcc 13 need a driver of release 580 or later"
    )


_answers: dict[torch.device, str] = {}


def call(name: str, *arguments: object) -> Any:
    """``torch.ops.svdkern._cuda_{name}``, on the device of the first argument: the one place that launches."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    if first.device.index == torch.cuda.current_device():
        return _operator(name)(*arguments)
    with torch.cuda.device(first.device):
        return _operator(name)(*arguments)


@functools.cache
def _operator(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.svdkern, f"_cuda_{name}").default


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def major(device: torch.device) -> int:
    """Of a device's compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def by_library(rows: int, width: int, out: int, device: torch.device) -> bool:
    """Whether the product with W is cuBLAS's; then float32 is as precise as PyTorch's settings have it, and y is rounded twice."""
    return rows > SMALL_ROWS and rows * width * out > LIBRARY_WORK and major(device) in LIBRARY_GPUS


def on_host(scale: Tensor) -> bool:
    """Whether a scale is a number of the launch; otherwise the kernels read it from memory."""
    return scale.is_cpu


_EAGER = EagerBackend()


class CudaBackend(EagerBackend):
    """Whole layers by one operator each way; the primitives, which few calls need by themselves, by a kernel each."""

    name = "cuda"

    def shrink(self, a: Tensor, factor: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        if is_watched(a, factor):
            return super().shrink(a, factor, rng_state, threshold)
        a = _unit(a)
        h = a.new_empty(a.shape[0], factor.shape[1], dtype=torch.float32)
        if _empty(a, factor):
            return h.zero_()
        columns, none = _packed(factor, a.dtype, rows=False), (None, None, None, False, None, 1.0)
        state = _state(rng_state, threshold)
        call("shrink", a, columns, factor.shape[1], *none, state, threshold, h, None, None, None)
        return h

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
        a = _unit(a)
        if is_watched(a, w, z, factor) or _empty(a, factor) or (w is not None and _empty(w)):
            return super().linear(a, w, z, factor, bias, rng_state, threshold)
        w, bias = _base(a, w, bias)
        y = a.new_empty(a.shape[0], factor.shape[0])
        rows = None if z is None else _packed(factor, a.dtype, rows=True)
        z16 = None if z is None else _padded_to(z, a.dtype)
        call("linear", a, w, z16, rows, factor.shape[1], bias, _state(rng_state, threshold), threshold, y)
        return y

    def outer(self, a: Tensor, q: Tensor, like: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        if is_watched(a, q, like):
            return super().outer(a, q, like, rng_state, threshold)
        a = _unit(a)
        if _empty(a, like):
            return torch.zeros_like(like)
        out, q = torch.empty_like(like), _padded_to(q, a.dtype)
        call("outer", a, q, like.shape[1], _state(rng_state, threshold), threshold, out, None, None)
        return out

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
        if is_watched(x, weight, u, v):
            return _EAGER.forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold)
        a, r = _unit(as_rows(x)), u.shape[1]
        if threshold == DROPS_ALL or _empty(a, u, v) or (core is not None and r > CORE_RANKS):
            return super().forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold)
        (rows, width), out = a.shape, v.shape[0]
        w, bias = _base(a, None if weight is None else weight.t(), bias)
        h = a.new_empty(rows, r, dtype=torch.float32)
        before = (*_scale(scale), core, _dense(gate, index, rows, r), _state(rng_state, threshold), threshold)
        if w is not None and by_library(rows, width, out, a.device):
            z, factor = a.new_empty(rows, _padded(r)), a.new_empty(out, _padded(r))
            work = _workspace(a, rows, width, out, r, False, False, OUTSIDE)
            call("layer_forward", a, None, u, sigma, v, None, *before, None, h, z, factor, work)
            y = torch.mm(a, w) if bias is None else torch.addmm(bias, a, w)
            return as_shaped(y.addmm_(z, factor.t()), x), h
        y = a.new_empty(rows, out)
        work = _workspace(a, rows, width, out, r, w is not None, False, 0)
        call("layer_forward", a, w, u, sigma, v, bias, *before, y, h, None, None, work)
        return as_shaped(y, x), h

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
        if batched or is_watched(dy, x, weight, u, v):
            return _EAGER.backward(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want)
        b, r = _unit(as_rows(dy)), u.shape[1]
        if threshold == DROPS_ALL or _empty(b, u, v) or (core is not None and r > CORE_RANKS):
            return super().backward(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want)
        a = None if x is None else _unit(as_rows(x))
        (rows, out), width, g = b.shape, u.shape[0], _dense(gate, index, b.shape[0], r)
        dx = du = dsigma = dv = p = q = factor = dweight = dbias = None
        sums = want.scale or want.core or want.gate  # of p and h over the rows
        if want.x or want.u or want.sigma or want.v or sums:
            w = _base(b, weight, None)[0] if want.x else None
            outside = w is not None and not threshold and by_library(rows, out, width, b.device)
            if outside:
                q, factor = b.new_empty(rows, _padded(r)), b.new_empty(width, _padded(r))
            elif want.x:
                dx = b.new_empty(rows, width)
            du = torch.empty_like(u) if want.u else None
            dsigma = torch.empty_like(sigma) if want.sigma and sigma is not None else None
            dv = torch.empty_like(v) if want.v else None
            p = b.new_empty(rows, r, dtype=torch.float32) if sums else None
            h = None if h is None else cast(h, torch.float32).contiguous()
            mask = (dx is not None) + 2 * want.u + 4 * want.sigma + 8 * want.v + 16 * sums + OUTSIDE * outside
            call(
                "layer_backward", b, a if want.u else None, None if outside else w, u, sigma, v, *_scale(scale), core, g, h,
                _state(rng_state, threshold), threshold, dx, du, dsigma, dv, p, q, factor,
                _workspace(b, rows, width, out, r, w is not None, True, mask),
            )  # fmt: skip
            if q is not None and factor is not None and w is not None:
                # dy W added to the branch: that costs cuBLAS less than the other way round
                dx = torch.mm(q, factor.t()).addmm_(b, w)
        if want.weight:
            assert a is not None and weight is not None
            dweight = self.weight_gradient(b, a, weight)
        if want.bias:
            dbias = b.sum(0, dtype=torch.float32).to(b.dtype)
        rest = self._sums(p, h, sigma, scale, core, gate, index, g, want) if sums else (None, None, None)
        return Gradients(None if dx is None else as_shaped(dx, dy), dweight, du, dsigma, dv, dbias, *rest)

    @staticmethod
    def _sums(
        p: Tensor | None,
        h: Tensor | None,
        sigma: Tensor | None,
        scale: Tensor,
        core: Tensor | None,
        gate: Tensor | None,
        index: Tensor | None,
        g: Tensor | None,
        want: Gradients,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of scale, core and gate, which few layers have, by PyTorch."""
        assert p is not None and h is not None
        dscale = dcore = dgate = None
        modulated = h if sigma is None else h * cast(sigma, torch.float32)
        modulated = modulated if core is None else torch.mm(h, cast(core, torch.float32))
        s = scale.item() if on_host(scale) else cast(scale, torch.float32)
        if want.scale:
            dscale = cast((p * (modulated if g is None else modulated * g)).sum(), scale.dtype)
        if want.core:
            assert core is not None
            dcore = cast(torch.mm(h.t(), p * s if g is None else p * s * g), core.dtype)
        if want.gate:
            assert gate is not None
            dgate = gate_gradient(p * s * modulated, gate, index)
        return dscale, dcore, dgate


def _workspace(a: Tensor, *sizes: int) -> Tensor:
    """Memory for what the launches of one call hand on (csrc/cuda/layer.h); ``sizes`` as ``_cuda_workspace`` has them."""
    key = (a.device, a.dtype, processors(a.device), sizes)
    size = _sizes.get(key)
    if size is None:
        if len(_sizes) >= MOST_KEPT:
            _sizes.clear()
        size = _sizes[key] = max(1, call("workspace", a, *sizes))
    return a.new_empty(size, dtype=torch.uint8)


_sizes: dict[tuple[object, ...], int] = {}


def _packed(factor: Tensor, dtype: torch.dtype, *, rows: bool) -> Tensor:
    """A factor (L, r) as the kernels read it: rows (L, R), or columns (R, L)."""
    length, R = factor.shape[0], _padded(factor.shape[1])
    out = factor.new_empty((length, R) if rows else (R, -(-length // 8) * 8), dtype=dtype)
    call("pack", factor, out, rows, None, None, False, None)
    return out


def _padded_to(z: Tensor, dtype: torch.dtype) -> Tensor:
    """z (M, r) as the kernels read it: in the activations' dtype, r padded with zeros to R."""
    return torch.nn.functional.pad(cast(z, dtype), (0, _padded(z.shape[1]) - z.shape[1])).contiguous()


def _base(a: Tensor, w: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """w and bias as the kernels read them beside a."""
    if w is not None:
        w = cast(w, a.dtype)
        w = w if 1 in w.stride() else w.contiguous()
    return w, None if bias is None else cast(bias, a.dtype).contiguous()


def _scale(scale: Tensor) -> tuple[Tensor | None, float]:
    """The operators' scale and scale_value."""
    return (None, scale.item()) if on_host(scale) else (scale, 1.0)


def _padded(r: int) -> int:
    """R: r up to a multiple of 16."""
    return -(-r // 16) * 16


def _unit(a: Tensor) -> Tensor:
    """A matrix with contiguous rows."""
    return a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous()


def _empty(*tensors: Tensor) -> bool:
    return any(tensor.numel() == 0 for tensor in tensors)


def _state(rng_state: Tensor | None, threshold: int) -> Tensor | None:
    return rng_state.contiguous() if threshold and rng_state is not None else None


def _dense(gate: Tensor | None, index: Tensor | None, rows: int, r: int) -> Tensor | None:
    """The gate of every row, (M, r) in fp32."""
    if gate is None:
        return None
    return gate_rows(cast(gate, torch.float32), index, rows, r).expand(rows, r).contiguous()
