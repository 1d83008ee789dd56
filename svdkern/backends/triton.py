"""The Triton backend: NVIDIA GPUs of compute capability 8.0 and later.

    more than 16 rows           forward: pack, then one persistent launch
    up to 16 rows, or no W      forward: shrink, linear (W is read once)
    backward                    pack, one persistent launch

Layer: like ``cpu``; the kernels are in ``triton_kernels``. It takes float32, bfloat16 and float16 activations, r up to 512,
and any strides (an x or dy whose rows are not contiguous is copied). A weight of another dtype than x's is cast at every call.
No tensor on the GPU is read on the host, so calls can be captured in a CUDA graph once the kernels are compiled: by one call, or by
``svdkern.warmup``. A capture that would have to compile one is an error that says so. A scale that is on the CPU is part of what
is captured. Tiles are looked up in ``triton_tiles``.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from svdkern.backends import triton_tiles
from svdkern.backends.eager import EagerBackend
from svdkern.backends.formula import Gradients, as_rows, as_shaped, cast, gate_gradient, gate_rows
from svdkern.backends.philox import DROPS_ALL, keep_scale
from svdkern.backends.table import Shape
from svdkern.backends.tracing import is_watched
from svdkern.triton_kernels.configs import Config

log = logging.getLogger("svdkern")

Tiles = Callable[[str, torch.device, torch.dtype, bool, Shape], Config]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_R = 512
OLDEST = (8, 0)


@functools.cache
def why_missing() -> str | None:
    """None if the kernels can be imported, else the reason in one line."""
    try:
        import triton

        if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 6):
            return f"triton is {triton.__version__}, the kernels need 3.6 or later"
        import svdkern.triton_kernels.forward  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install triton"
    return None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the backend can serve this device and dtype, else the reason in one line."""
    if device.type != "cuda":
        return f"the triton backend was asked for a tensor on {device}"
    if (reason := why_missing()) is not None:
        return reason
    if torch.version.hip is not None:
        return "the triton backend is written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    if dtype not in DTYPES:
        return f"the triton backend has no {dtype} (it has {', '.join(str(d) for d in DTYPES)})"
    return None


def compiles(device: torch.device) -> bool:
    """Whether a kernel can be compiled and started: Triton also needs a C compiler, which a machine may lack.

    Found out by starting one, which cannot be done while a CUDA graph is captured: then False, unless it is known.
    """
    known = _compiles.get(device)
    if known is None:
        if torch.cuda.is_current_stream_capturing():
            return False
        known = _compiles[device] = _starts(device)
    return known


_compiles: dict[torch.device, bool] = {}


def _starts(device: torch.device) -> bool:
    from svdkern.triton_kernels import sketch

    try:
        return float(sketch.sketch(1, 1, seed=0, first=0, dtype=torch.float32, device=device)) in (-1.0, 1.0)
    except Exception as error:  # a compiler, a linker and a driver have their say, each in its own way
        log.warning("Triton's kernels cannot be used, PyTorch's operations are: %s", error)
        return False


class TritonBackend(EagerBackend):
    """Whole calls by the Triton kernels; PyTorch's operators where something is empty or r is too large, everything is dropped, or
    somebody looks on who sees operators alone."""

    name = "triton"

    def __init__(self, refuse: Callable[[str], object], tiles: Tiles = triton_tiles.choose) -> None:
        self.refuse = refuse  # called with the reason where a call asks for what the kernels do not have
        self.tiles = tiles

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
        rows, r = math.prod(x.shape[:-1]), u.shape[1]
        empty = not (rows and u.numel() and v.numel())
        if threshold == DROPS_ALL or empty or is_watched(x, weight, u, v) or not self._serves(x.dtype, r, core):
            return super().forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold)
        from svdkern.triton_kernels import configs, forward, launching, linear, pack, shrink

        a, (out, R), precision = _rows(x), (v.shape[0], pack.padded(r)), _precision(x.dtype)
        weight = None if weight is None else cast(weight, a.dtype)
        sigma, core, bias, rng_state = _packed(sigma), _packed(core), _packed(bias), _packed(rng_state)
        g = _dense(gate, index, rows, r)
        h = a.new_empty(rows, r, dtype=torch.float32)
        y = a.new_empty(rows, out)
        shape = Shape(rows, a.shape[1], out, R)
        if rows <= configs.DECODE_M or weight is None:
            config = self.tiles("decode", a.device, a.dtype, core is not None, shape)
            splits = max(1, a.shape[1] // (4 * config.BK)) if rows <= configs.DECODE_M else 1
            partial = shrink.shrink(
                a, u, rng_state, threshold, keep_scale(threshold), precision, min(16, splits), config
            )
            linear.linear(a, weight, partial, v, sigma, core, g, scale, bias, y, h, config, precision)
            return as_shaped(y, x), h
        arch, processors = launching.architecture(a.device), launching.processors(a.device)
        config = self.tiles("forward", a.device, a.dtype, core is not None, shape)
        control = forward.control(a, config)
        columns, factor = pack.pack(u, False, v, True, a.dtype, control)
        forward.forward(
            a, weight, columns, factor, r, sigma, core, g, scale, bias, y, a.new_empty(rows, R), h,
            rng_state, threshold, keep_scale(threshold), control, config, processors, precision, _tma(arch, a, weight),
        )  # fmt: skip
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
        rows, r = math.prod(dy.shape[:-1]), u.shape[1]
        empty = batched or not (rows and u.numel() and v.numel())
        if threshold == DROPS_ALL or empty or is_watched(dy, x, weight, u, v) or not self._serves(dy.dtype, r, core):
            return super().backward(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want)
        from svdkern.triton_kernels import backward, launching, pack

        b = _rows(dy)
        a = None if x is None else _rows(x)
        dweight = None
        if want.weight:
            assert a is not None and weight is not None
            dweight = self.weight_gradient(b, a, weight)
        ours = backward.Want(want.x, want.u, want.sigma, want.v, want.bias, want.scale, want.core, want.gate)
        outs = _outputs(want, b, u, sigma, v, scale, core)
        if any(ours):
            base = cast(weight, b.dtype) if want.x and weight is not None else None
            R = pack.padded(r)
            arch, processors = launching.architecture(b.device), launching.processors(b.device)
            config = self.tiles("backward", b.device, b.dtype, core is not None, Shape(rows, u.shape[0], v.shape[0], R))
            control = backward.control(b, u.shape[0], R, config)
            factor, columns = pack.pack(u, True, v, False, b.dtype, control)
            backward.backward(
                b, a if want.u else None, base, factor, columns, None if h is None else cast(h, torch.float32).contiguous(),
                r, _packed(sigma), _packed(core), _dense(gate, index, rows, r), scale, outs,
                _packed(rng_state), threshold, keep_scale(threshold), control, config, processors, _precision(b.dtype),
                base is not None and _tma(arch, b, base), ours,
            )  # fmt: skip
        dgate = None
        if want.gate:
            assert gate is not None
            dgate = gate_gradient(outs["gate"], gate, index)
        dx = as_shaped(outs["x"], dy) if want.x else None
        du, dsigma, dv, dbias, dscale, dcore = (outs.get(n) for n in ("u", "sigma", "v", "bias", "scale", "core"))
        return Gradients(dx, dweight, du, dsigma, dv, dbias, dscale, dcore, dgate)

    def _serves(self, dtype: torch.dtype, r: int, core: Tensor | None) -> bool:
        """Whether the kernels have this rank; if not, why is said."""
        from svdkern.triton_kernels import configs

        if r > LARGEST_R:
            self.refuse(f"r={r}, the triton backend takes r up to {LARGEST_R}")
        elif core is not None and r > configs.core_ranks(dtype):
            self.refuse(
                f"a core of r={r}, the triton backend takes one of up to {configs.core_ranks(dtype)} in {dtype}"
            )
        else:
            return True
        return False


def _outputs(
    want: Gradients, dy: Tensor, u: Tensor, sigma: Tensor | None, v: Tensor, scale: Tensor, core: Tensor | None
) -> dict[str, Tensor]:
    """Where the kernels write: in the operands' dtypes, dU and dV in their layout too, a gate's gradient row by row."""
    rows, r = dy.shape[0], u.shape[1]
    outs = {}
    for name, like in (("u", u), ("v", v)):
        if getattr(want, name):
            outs[name] = torch.empty_like(like)
    for name, small in (("sigma", sigma), ("core", core)):
        if getattr(want, name):
            assert small is not None
            outs[name] = small.new_empty(small.shape)
    if want.x:
        outs["x"] = dy.new_empty(rows, u.shape[0])
    if want.bias:
        outs["bias"] = dy.new_empty(v.shape[0])
    if want.scale:
        outs["scale"] = dy.new_empty((), dtype=scale.dtype)
    if want.gate:
        outs["gate"] = dy.new_empty(rows, r, dtype=torch.float32)
    return outs


def _rows(x: Tensor) -> Tensor:
    """x as a matrix (M, L) with contiguous rows."""
    a = as_rows(x)
    return a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous()


def _dense(gate: Tensor | None, index: Tensor | None, rows: int, r: int) -> Tensor | None:
    """The gate of every row, (M, r) in fp32."""
    if gate is None:
        return None
    return gate_rows(cast(gate, torch.float32), index, rows, r).expand(rows, r).contiguous()


def _packed(tensor: Tensor | None) -> Tensor | None:
    """A small tensor as the kernels read it: contiguous."""
    return None if tensor is None else tensor.contiguous()


def _precision(dtype: torch.dtype) -> str:
    """Of products of float32: TF32 where PyTorch's own may use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _tma(arch: int, a: Tensor, weight: Tensor) -> bool:
    """Whether both operands can be read through tensor descriptors: 16-byte rows, at addresses that are multiples of 16."""
    return arch >= 90 and a.dtype != torch.float32 and _described(a) and _described(weight)


def _described(matrix: Tensor) -> bool:
    """Whether a descriptor can have this matrix of 16-bit numbers."""
    row, column = matrix.stride()
    return column == 1 and row % 8 == 0 and row >= matrix.shape[1] and matrix.data_ptr() % 16 == 0
