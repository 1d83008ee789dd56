"""The CUDA backend: NVIDIA GPUs of compute capability 8.0 and later, by the compiled kernels of csrc/cuda.

    up to 32 rows           forward: small_shrink, small_linear (W is read once, factors as they are): 2 launches
                            backward: small_shrink, small_linear (p, q, dx), outer (dU), outer (dV): 2 to 4
    more                    forward: pack, then one persistent launch: tiles of h and z, and of y, whose loop has the adapter
                            as more steps: 2
                            forward of float32, of small layers, with no or a transposed W, of rows that are not of 16 bytes'
                            multiples: pack, shrink (h, and z = s (h sigma | h R) g in its epilogue), linear (y): 3
                            backward: pack, shrink (p, q), linear (dx), outer (dU), outer (dV): 3 to 5
    backward                besides: sums over the rows of h and p by PyTorch

Layer: like ``cpu``; the kernels are operators of ``torch.ops.svdkern``. It takes float32 (IEEE), bfloat16 and float16 activations,
any r, and any strides (an x or dy whose rows are not contiguous is copied). A weight of another dtype than x's is cast at every
call. No tensor on the GPU is read on the host and nothing is compiled at run time, so calls can be captured in a CUDA graph after
one call, or ``svdkern.warmup``, has loaded the kernels. A scale that is on the CPU is part of what is captured.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from svdkern.backends import extension
from svdkern.backends.eager import EagerBackend
from svdkern.backends.formula import Gradients, as_rows, as_shaped, cast, gate_gradient, gate_rows
from svdkern.backends.philox import DROPS_ALL

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)
LINES, RANKS = 64, 128  # tiles of split sums: csrc/cuda/params.h
FORWARD_ROWS = 128  # of a row group of the one-launch forward: csrc/cuda/params.h
MOST_SPLITS = 32
SPLIT_STEPS = 4  # a split has at least so many steps of 128 bytes
SMALL_ROWS, SMALL_COLUMNS = 32, 64  # csrc/cuda/params.h
SMALL_STEPS = 4  # of 128 bytes, that a CTA of small_linear takes at once
SMALL_SLICES, SLICE = 16, 256  # most parts of small_shrink's sums, and least of a width
SMALL_SUMS = (
    16384  # numbers of those parts that every column tile of small_linear adds up, at most where one part would do
)
CORE_RANKS = 128
"""Above, a core is a product of its own: the epilogue of shrink needs all ranks of a row in one tile."""


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


@functools.cache
def _refused(device: torch.device) -> str | None:
    """What the driver says against the kernels: it is older than the runtime in the extension, or has no code for this GPU."""
    with torch.cuda.device(device):
        error = torch.ops.svdkern._cuda_probe.default(torch.empty(0, device=device))
    if not error:
        return None
    return (
        f"the CUDA kernels ({torch.ops.svdkern._cuda_build()}) cannot run on {torch.cuda.get_device_name(device)}: {error}; "
        "kernels built with nvcc 13 need a driver of release 580 or later"
    )


def call(name: str, *arguments: object) -> Any:
    """``torch.ops.svdkern._cuda_{name}``, on the device of the first argument: the one place that launches."""
    first = arguments[0]
    assert isinstance(first, Tensor)
    elsewhere = first.device.index != torch.cuda.current_device()
    with torch.cuda.device(first.device) if elsewhere else contextlib.nullcontext():
        return _operator(name)(*arguments)


@functools.cache
def _operator(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.svdkern, f"_cuda_{name}").default


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_host(scale: Tensor) -> bool:
    """Whether a scale is a number of the launch; otherwise the kernels read it from memory."""
    return scale.is_cpu


class CudaBackend(EagerBackend):
    """The three primitives by our kernels, and forward and backward of them with what stands between in their epilogues."""

    name = "cuda"

    def shrink(self, a: Tensor, factor: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        a = _unit(a)
        work = _Work(a)
        h = work.new(a.shape[0], factor.shape[1])
        if not _empty(a, factor, h):
            work.counters_of(a.shape[0], factor.shape[1], a.shape[1])
            (columns,) = work.pack((factor, False))
            work.shrink(a, columns, factor.shape[1], rng_state=rng_state, threshold=threshold, h=h)
        return h if not _empty(a, factor) else h.zero_()

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
        if _empty(a, factor) or (w is not None and _empty(w)):
            return super().linear(a, w, z, factor, bias, rng_state, threshold)
        work = _Work(a)
        if a.shape[0] <= SMALL_ROWS:
            sums = None if z is None else cast(z, torch.float32).contiguous()[None]
            if work.small_counters(a.shape[0], a.shape[1], factor.shape[0], w, sums is not None):
                work.control = a.new_zeros(work.counted, dtype=torch.int32)
            return work.small_linear(a, w, sums, factor, None, bias, rng_state, threshold)
        rows = z16 = None
        if z is not None:
            (rows,) = work.pack((factor, True))
            z16 = work.padded(z)
        return work.linear(a, w, z16, rows, factor.shape[0], factor.shape[1], bias, rng_state, threshold)

    def outer(self, a: Tensor, q: Tensor, like: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        a = _unit(a)
        if _empty(a, like):
            return torch.zeros_like(like)
        work = _Work(a)
        tiles = work.counters_of(a.shape[1], like.shape[1], a.shape[0])
        work.control = None if tiles is None else a.new_zeros(work.counted, dtype=torch.int32)
        return work.outer(a, work.padded(q), like, rng_state, threshold, tiles)

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
        a, r = _unit(as_rows(x)), u.shape[1]
        if threshold == DROPS_ALL or _empty(a, u, v) or (core is not None and r > CORE_RANKS):
            return super().forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold)
        work, h = _Work(a), a.new_empty(a.shape[0], r, dtype=torch.float32)
        by = (sigma, core, _dense(gate, index, a.shape[0], r), False, scale)
        w = None if weight is None else weight.t()
        if a.shape[0] <= SMALL_ROWS:
            work.small_counters(a.shape[0], a.shape[1], v.shape[0], w, True)
            sums = work.small_shrink(a, u, rng_state, threshold)
            return as_shaped(work.small_linear(a, w, sums, v, by, bias, None, 0, h), x), h
        w, bias = work.base(w, bias)
        flags = None if w is None else work.more_counters(1 + -(-a.shape[0] // FORWARD_ROWS))
        work.counters_of(a.shape[0], r, a.shape[1])
        columns, rows = work.pack((u, False), (v, True))
        z = work.new(a.shape[0], _padded(r), dtype=a.dtype)
        if w is not None and flags is not None:
            y = work.forward(a, columns, r, by, rng_state, threshold, w, rows, bias, h, z, flags)
            if y is not None:
                return as_shaped(y, x), h
        work.shrink(a, columns, r, by, rng_state, threshold, h, z)
        return as_shaped(work.linear(a, w, z, rows, v.shape[0], r, bias, None, 0), x), h

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
        if batched:
            composed = EagerBackend().backward
            return composed(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want)
        b, r = _unit(as_rows(dy)), u.shape[1]
        if threshold == DROPS_ALL or _empty(b, u, v) or (core is not None and r > CORE_RANKS):
            return super().backward(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want)
        a = None if x is None else _unit(as_rows(x))
        rows, g = b.shape[0], _dense(gate, index, b.shape[0], r)
        dx = dweight = du = dsigma = dv = dbias = dscale = dcore = dgate = p = q = factor = None
        sums = want.sigma or want.scale or want.core or want.gate  # of p and h over the rows
        work = _Work(b)
        tiles_u = work.counters_of(u.shape[0], r, rows) if want.u else None
        tiles_v = work.counters_of(v.shape[0], r, rows) if want.v else None
        by = (sigma, None if core is None else core.t(), g, True, scale)
        few = want.x and rows <= SMALL_ROWS
        if want.x or want.u or sums:
            q = work.new(rows, _padded(r), dtype=b.dtype) if want.u or (want.x and not few) else None
            p = work.new(rows, r) if sums else None
        if few:
            work.small_counters(rows, v.shape[0], u.shape[0], weight, True)
            parts = work.small_shrink(b, v, None, 0)
            dx = as_shaped(work.small_linear(b, weight, parts, u, by, None, rng_state, threshold, p, q), dy)
        elif want.x or want.u or sums:
            work.counters_of(rows, r, v.shape[0])
            factor, columns = work.pack((u, True), (v, False))
            work.shrink(b, columns, r, by, None, 0, p, q)
        elif want.v:
            work.control = b.new_zeros(work.counted, dtype=torch.int32)
        if want.x and not few:
            dx = as_shaped(work.linear(b, weight, q, factor, u.shape[0], r, None, rng_state, threshold), dy)
        if want.weight:
            assert a is not None and weight is not None
            dweight = self.weight_gradient(b, a, weight)
        if want.u:
            assert a is not None and q is not None
            du = work.outer(a, q, u, rng_state, threshold, tiles_u)
        if want.bias:
            dbias = b.sum(0, dtype=torch.float32).to(b.dtype)
        if want.v or sums:
            assert h is not None
            h = cast(h, torch.float32)
            modulated = h if sigma is None else h * cast(sigma, torch.float32)
            modulated = modulated if core is None else torch.mm(h, cast(core, torch.float32))
            z = modulated if g is None else modulated * g
            s = scale.item() if on_host(scale) else cast(scale, torch.float32)
            if want.v:
                dv = work.outer(b, work.padded(z * s), v, None, 0, tiles_v)
            if sums:
                assert p is not None
                t = p * s if g is None else p * s * g
                if want.sigma:
                    assert sigma is not None
                    dsigma = cast((h * t).sum(0), sigma.dtype)
                if want.core:
                    assert core is not None
                    dcore = cast(torch.mm(h.t(), t), core.dtype)
                if want.scale:
                    dscale = cast((p * z).sum(), scale.dtype)
                if want.gate:
                    assert gate is not None
                    dgate = gate_gradient(p * s * modulated, gate, index)
        return Gradients(dx, dweight, du, dsigma, dv, dbias, dscale, dcore, dgate)


By = tuple[Tensor | None, Tensor | None, Tensor | None, bool, Tensor]
"""What shrink's epilogue is told: sigma, core, gate, whether the gate comes first, scale."""


class _Work:
    """One call's launches: results, workspace, and the counters that pack zeroes for the launches behind it."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.counted = 0
        self.control: Tensor | None = None
        self.of_shrink: slice | None = None
        self.of_small: tuple[int, slice | None] = (1, None)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def splits(self, lines: int, r: int, depth: int) -> int:
        """Into how many pieces a product of few output tiles is cut, so that every processor has something to read."""
        tiles = -(-lines // LINES) * -(-r // RANKS)
        steps = -(-depth * self.like.element_size() // 128)
        return max(1, min(MOST_SPLITS, steps // SPLIT_STEPS, -(-2 * processors(self.like.device) // tiles)))

    def counters_of(self, lines: int, r: int, depth: int) -> slice | None:
        """Counters for a product of this output and depth, None where it is not split; the last ones asked for are shrink's."""
        self.of_shrink = None
        if self.splits(lines, r, depth) > 1:
            self.of_shrink = self.more_counters(-(-lines // LINES) * -(-r // RANKS))
        return self.of_shrink

    def more_counters(self, count: int) -> slice:
        """So many more of the counters that pack zeroes."""
        self.counted += count
        return slice(self.counted - count, self.counted)

    def small_counters(self, rows: int, depth: int, out: int, w: Tensor | None, adapter: bool) -> bool:
        """Splits of small_linear, as many as keep two CTAs a processor, and counters for them; whether there are any."""
        tiles, steps = -(-out // SMALL_COLUMNS), -(-depth * self.like.element_size() // 128)
        base = max(1, min(MOST_SPLITS, -(-steps // SMALL_STEPS), 2 * processors(self.like.device) // tiles))
        splits = (base if w is not None else 0) + adapter
        self.of_small = splits, self.more_counters(tiles) if splits > 1 else None
        return splits > 1

    def small_shrink(self, a: Tensor, factor: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        """Parts of h (slices, M, r), which small_linear adds up; and all counters zeroed."""
        (rows, width), r = a.shape, factor.shape[1]
        parts = self.new(max(1, min(SMALL_SLICES, -(-width // SLICE), SMALL_SUMS // (rows * r))), rows, r)
        if self.counted:
            self.control = self.new(self.counted, dtype=torch.int32)
        call("small_shrink", a, factor, _state(rng_state, threshold), threshold, parts, self.control)
        return parts

    def pack(self, *factors: tuple[Tensor, bool]) -> list[Tensor]:
        """One or two factors packed, as rows (L, R) or as columns (R, L); and all counters zeroed."""
        outs = []
        for factor, rows in factors:
            length, R = factor.shape[0], _padded(factor.shape[1])
            outs.append(self.new(*((length, R) if rows else (R, -(-length // 8) * 8)), dtype=self.like.dtype))
        if self.counted:
            self.control = self.new(self.counted, dtype=torch.int32)
        second = (factors[1][0], outs[1], factors[1][1]) if len(factors) > 1 else (None, None, False)
        call("pack", factors[0][0], outs[0], factors[0][1], *second, self.control)
        return outs

    def padded(self, z: Tensor) -> Tensor:
        """z (M, r) as the kernels read it: in the activations' dtype, r padded with zeros to R."""
        return torch.nn.functional.pad(cast(z, self.like.dtype), (0, _padded(z.shape[1]) - z.shape[1])).contiguous()

    def shrink(
        self,
        a: Tensor,
        columns: Tensor,
        r: int,
        by: By | None = None,
        rng_state: Tensor | None = None,
        threshold: int = 0,
        h: Tensor | None = None,
        z: Tensor | None = None,
    ) -> None:
        partial, counters = self._split(a.shape[0], r, a.shape[1], self.of_shrink)
        call("shrink", a, columns, r, *_epilogue(by), _state(rng_state, threshold), threshold, h, z, partial, counters)

    def linear(
        self,
        a: Tensor,
        w: Tensor | None,
        z: Tensor | None,
        factor: Tensor | None,
        out: int,
        r: int,
        bias: Tensor | None,
        rng_state: Tensor | None,
        threshold: int,
    ) -> Tensor:
        y = self.new(a.shape[0], out, dtype=a.dtype)
        w, bias = self.base(w, bias)
        call("linear", a, w, z, factor, r, bias, _state(rng_state, threshold), threshold, y)
        return y

    def forward(
        self,
        a: Tensor,
        columns: Tensor,
        r: int,
        by: By,
        rng_state: Tensor | None,
        threshold: int,
        w: Tensor,
        rows: Tensor,
        bias: Tensor | None,
        h: Tensor,
        z: Tensor,
        flags: slice,
    ) -> Tensor | None:
        """y, and h and z on the way, in one launch; None where shrink and linear serve (params.h: linear_tile)."""
        sigma, core, gate, _, scale, value = _epilogue(by)
        assert self.control is not None
        y = self.new(a.shape[0], rows.shape[0], dtype=a.dtype)
        done = call(
            "forward", a, columns, r, sigma, core, gate, scale, value, _state(rng_state, threshold), threshold,
            w, rows, bias, h, z, self.control[flags], y,
        )  # fmt: skip
        return y if done else None

    def small_linear(
        self,
        a: Tensor,
        w: Tensor | None,
        sums: Tensor | None,
        factor: Tensor,
        by: By | None,
        bias: Tensor | None,
        rng_state: Tensor | None,
        threshold: int,
        h: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        y, (splits, counted) = self.new(a.shape[0], factor.shape[0], dtype=a.dtype), self.of_small
        w, bias = self.base(w, bias)
        partial = counters = None
        if counted is not None:
            assert self.control is not None
            partial, counters = self.new(splits, *y.shape), self.control[counted]
        call(
            "small_linear", a, w, sums, None if sums is None else factor, *_epilogue(by), bias,
            _state(rng_state, threshold), threshold, h, z, y, partial, counters,
        )  # fmt: skip
        return y

    def base(self, w: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """w and bias as the kernels read them."""
        if w is not None:
            w = cast(w, self.like.dtype)
            w = w if 1 in w.stride() else w.contiguous()
        return w, None if bias is None else cast(bias, self.like.dtype).contiguous()

    def outer(
        self, a: Tensor, q: Tensor, like: Tensor, rng_state: Tensor | None, threshold: int, counters: slice | None
    ) -> Tensor:
        out = torch.empty_like(like)
        partial, counted = self._split(a.shape[1], like.shape[1], a.shape[0], counters)
        call("outer", a, q, like.shape[1], _state(rng_state, threshold), threshold, out, partial, counted)
        return out

    def _split(self, lines: int, r: int, depth: int, counters: slice | None) -> tuple[Tensor | None, Tensor | None]:
        if counters is None:
            return None, None
        assert self.control is not None
        return self.new(self.splits(lines, r, depth), lines, _padded(r)), self.control[counters]


def _epilogue(by: By | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool, Tensor | None, float]:
    """The operators' sigma, core, gate, gate_first, scale, scale_value."""
    if by is None:
        return None, None, None, False, None, 1.0
    here = on_host(by[4])
    return (*by[:4], None if here else by[4], by[4].item() if here else 1.0)


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
