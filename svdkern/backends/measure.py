"""How long each path of a layer takes: one forward and backward, side by side, on tensors of its own.

The layer is that of a fine-tuning step: sigma, factors in float32, gradients of x, u, sigma and v. What autograd adds around
the two calls is the same for every path and is left out. The generator and the tensors of the running program are not touched.

Layer: below ``choices``; beside the backends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from svdkern import timing
from svdkern.backends.formula import Backend, Gradients
from svdkern.backends.table import Shape

HOPELESS = 8.0
"""A path that takes this many times as long as another on a part of the layer, and by that too long for the whole, is not
tried further: ATen's bf16 product without bf16 instructions takes up to 300 times as long, that is minutes."""

COLD_BYTES = 256 << 20
"""As many bytes of weights take turns, so that they come from memory, as those of a model do."""

WANT = Gradients(x=True, weight=False, u=True, sigma=True, v=True, bias=False, scale=False, core=False, gate=False)

Clock = Callable[[Callable[[int], object], int, int], float]


class Operands(NamedTuple):
    """Of one layer; several weights of the same numbers, that take turns."""

    x: Tensor
    weights: tuple[Tensor, ...]
    u: Tensor
    sigma: Tensor
    v: Tensor
    scale: Tensor
    dy: Tensor
    h: Tensor | None = None
    """What a forward has saved, where the backward is measured alone."""


def seconds_of_paths(
    shape: Shape,
    dtype: torch.dtype,
    paths: Mapping[str, Backend],
    *,
    seconds: float,
    slowest: float,
    cold_bytes: int = COLD_BYTES,
    clock: Clock = timing.cpu_clock,
) -> dict[str, float | None]:
    """The median seconds of one forward and backward by each path.

    Args:
        shape: the layer.
        dtype: of x and the weight.
        paths: the backends to compare.
        seconds: for all of them together, about.
        slowest: seconds of one call beyond which a path is left out (None in the result).
        cold_bytes: of weights that take turns.
        clock: as in ``svdkern.timing``.
    """
    if _least_seconds(shape, dtype) > slowest:  # before a byte of it is taken
        return dict.fromkeys(paths)
    operands = _operands(shape, dtype, cold_bytes)
    with torch.no_grad():
        kept = _quick_enough(operands, paths, slowest, clock)
        calls = {path: functools.partial(step, backend, operands) for path, backend in kept.items()}
        times = timing.interleave(calls, seconds=seconds, min_rounds=3, warmup=1, settle=1, clock=clock)
    return {path: times[path].median_s if path in times else None for path in paths}


def step(backend: Backend, o: Operands, number: int) -> Gradients:
    """One forward and backward."""
    weight = o.weights[number % len(o.weights)]
    _, h = backend.forward(o.x, weight, o.u, o.sigma, o.v, None, o.scale, None, None, None, None, 0)
    return backend.backward(o.dy, o.x, weight, o.u, o.sigma, o.v, o.scale, None, None, None, h, None, 0, WANT)


def _least_seconds(shape: Shape, dtype: torch.dtype) -> float:
    """What no CPU can beat: the layer's bytes at 1 TB/s, or its operations at 20 Tflop/s, there and back."""
    m, k, n, _ = shape
    return max(2 * (k * n + m * (k + n)) * dtype.itemsize / 1e12, 4.0 * m * k * n / 20e12)


def _quick_enough(o: Operands, paths: Mapping[str, Backend], slowest: float, clock: Clock) -> dict[str, Backend]:
    """The paths whose call takes up to ``slowest`` seconds: tried on a corner of the layer, then on 4 rows, 16, … of it."""
    kept, all_rows = dict(paths), o.x.shape[0]
    rows = min(4, all_rows)
    part = _corner(o)
    while True:
        enough = slowest * _work(part) / _work(o)
        least: dict[str, float] = {}
        for path, backend in kept.items():
            call = functools.partial(step, backend, part)
            good = max(enough, HOPELESS * min(least.values(), default=0.0))
            least[path] = timing.least_seconds(call, good, tries=3, clock=clock)
        best = min(least.values(), default=0.0)
        kept = {path: backend for path, backend in kept.items() if least[path] <= max(enough, HOPELESS * best)}
        kept = {path: backend for path, backend in kept.items() if least[path] <= slowest}
        if _work(part) == _work(o) or all(least[path] <= enough for path in kept):
            return kept
        part = o._replace(x=o.x[:rows], dy=o.dy[:rows])
        rows = min(4 * rows, all_rows)


def _work(o: Operands) -> int:
    return max(1, o.x.shape[0] * o.u.shape[0] * o.v.shape[0])


def _corner(o: Operands) -> Operands:
    rows, width = 16, 512
    return o._replace(
        x=o.x[:rows, :width],
        weights=tuple(weight[:width, :width] for weight in o.weights),
        u=o.u[:width],
        v=o.v[:width],
        dy=o.dy[:rows, :width],
    )


def _operands(shape: Shape, dtype: torch.dtype, cold_bytes: int) -> Operands:
    m, k, n, r = shape
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int, like: torch.dtype) -> Tensor:
        """A line of numbers again and again: as good for a clock, and made as fast as memory is written."""
        return (
            torch.randn(size[-1], generator=generator, device="cpu", dtype=torch.float32).to(like).expand(size).clone()
        )

    copies = timing.rotation_length(n * k * dtype.itemsize, cap_bytes=cold_bytes)
    return Operands(
        x=numbers(m, k, like=dtype),
        weights=tuple(numbers(n, k, like=dtype) for _ in range(copies)),
        u=numbers(k, r, like=torch.float32),
        sigma=numbers(r, like=torch.float32),
        v=numbers(n, r, like=torch.float32),
        scale=torch.tensor(0.5, dtype=torch.float32, device="cpu"),
        dy=numbers(m, n, like=dtype),
    )
