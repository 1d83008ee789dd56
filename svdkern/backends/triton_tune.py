"""Tiles measured on a GPU: candidates of each kernel family checked against float64, then timed side by side.

The layer is that of a fine-tuning step: sigma, float32 factors, a scale on the device, gradients of x, u, sigma and v. A
candidate that does not compile, does not fit the part, or errs more than the accuracy rule allows (twice the error of
same-dtype eager and 4 roundoffs of the formula on absolute values, norm-wise and at the worst element) cannot win.

Layer: above ``triton``; ``svdkern/tune.py`` calls it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svdkern import timing
from svdkern.backends import triton_tiles
from svdkern.backends.eager import EagerBackend
from svdkern.backends.formula import Backend
from svdkern.backends.measure import COLD_BYTES, WANT, Clock, Operands
from svdkern.backends.table import MARGIN, Shape
from svdkern.backends.triton import TritonBackend
from svdkern.backends.triton_tiles import Row
from svdkern.triton_kernels import configs
from svdkern.triton_kernels.configs import Config

Results = Mapping[str, Tensor]
Call = Callable[[int], Results]
Runner = Callable[[Config], Call]


class Found(NamedTuple):
    """What became of one layer's candidates, the rule's first: seconds, or why there are none."""

    seconds: dict[Config, float]
    problems: dict[Config, str]
    best: Config | None


def families(shape: Shape) -> tuple[str, str]:
    """Those that a layer of so many rows is computed by."""
    return ("decode" if shape.M <= configs.DECODE_M else "forward"), "backward"


def measure(
    family: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float,
    deadline: float = math.inf,
    cold_bytes: int = COLD_BYTES,
    clock: Clock = timing.cuda_clock,
) -> tuple[Found, Row | None]:
    """Measure one layer by one family of kernels; no row where no candidate could be run.

    Args:
        family: "forward", "backward" or "decode".
        shape: the layer, with its own rank.
        dtype: of its activations and weight.
        device: where.
        seconds: for timing all candidates together; compiling and checking them comes on top.
        deadline: by ``time.monotonic``; candidates that are not reached by then are left out.
        cold_bytes: of weights that take turns.
        clock: as in ``svdkern.timing``.
    """
    from svdkern.triton_kernels import launching
    from svdkern.triton_kernels.pack import padded

    padded_shape = shape._replace(r=padded(shape.r))
    arch, processors = launching.architecture(device), launching.processors(device)
    rule = triton_tiles.rule(family, arch, dtype, False, padded_shape, processors)
    tried = list(dict.fromkeys([rule, *configs.candidates(family, arch, dtype, padded_shape.r)]))
    with torch.no_grad():
        o = operands(shape, dtype, device, cold_bytes)
        found = fastest(tried, runner(family, o), bounds(family, o), seconds=seconds, deadline=deadline, clock=clock)
    if found.best is None:
        return found, None
    row = Row(
        arch,
        str(dtype).removeprefix("torch."),
        family,
        padded_shape,
        found.best,
        found.seconds[found.best],
        found.seconds.get(rule),
        triton_tiles.gpu_name(device) if device.type == "cuda" else str(device),
        triton_tiles.triton_version(),
    )
    return found, row


def fastest(
    tried: Sequence[Config],
    run: Runner,
    allowed: Mapping[str, Bound],
    *,
    seconds: float,
    deadline: float = math.inf,
    clock: Clock = timing.cuda_clock,
) -> Found:
    """The fastest of the candidates that are right; the first, which is the rule's, unless one takes ``MARGIN`` less time."""
    calls: dict[str, Call] = {}
    problems: dict[Config, str] = {}
    for position, config in enumerate(tried):
        if position and time.monotonic() > deadline:
            problems[config] = "no time was left"
            continue
        try:
            call = run(config)
            wrong = why_wrong(call(0), allowed)
        except Exception as error:  # whatever the compiler, its assembler or the driver has: the others may still run
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        if wrong is None:
            calls[str(position)] = call
        else:
            problems[config] = wrong
    times = timing.interleave(calls, seconds=seconds, min_rounds=3, warmup=1, settle=1, clock=clock)
    measured = {tried[int(name)]: timed.median_s for name, timed in times.items()}
    best = min(measured, key=measured.__getitem__, default=None)
    if best is not None and tried[0] in measured and measured[best] >= (1 - MARGIN) * measured[tried[0]]:
        best = tried[0]
    return Found(measured, problems, best)


# ---------------------------------------------------------------------------------------------------- what is computed


def operands(shape: Shape, dtype: torch.dtype, device: torch.device, cold_bytes: int) -> Operands:
    """Numbers of order one in all products; the running program's generator is not touched."""
    m, k, n, r = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, like: torch.dtype, over: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).mul_(over).to(like)

    x, u = draw(m, k, like=dtype), draw(k, r, like=torch.float32, over=k**-0.5)
    copies = timing.rotation_length(n * k * dtype.itemsize, cap_bytes=cold_bytes)
    weight = draw(n, k, like=dtype, over=k**-0.5)
    return Operands(
        x=x,
        weights=(weight, *(weight.clone() for _ in range(copies - 1))),
        u=u,
        sigma=draw(r, like=torch.float32),
        v=draw(n, r, like=torch.float32, over=r**-0.5),
        scale=torch.tensor(0.5, dtype=torch.float32, device=device),
        dy=draw(m, n, like=dtype, over=n**-0.5),
        h=x.to(torch.float32) @ u,
    )


def runner(family: str, o: Operands) -> Runner:
    """Calls of the Triton backend with tiles that are given."""

    def refuse(reason: str) -> None:
        raise ValueError(reason)

    def run(config: Config) -> Call:
        backend = TritonBackend(refuse, lambda *_: config)
        return lambda number: results(family, backend, o, number)

    return run


def results(family: str, backend: Backend, o: Operands, number: int = 0) -> dict[str, Tensor]:
    """What one family of kernels computes, by name."""
    weight = o.weights[number % len(o.weights)]
    if family != "backward":
        y, h = backend.forward(o.x, weight, o.u, o.sigma, o.v, None, o.scale, None, None, None, None, 0)
        return {"y": y, "h": h}
    found = backend.backward(o.dy, o.x, weight, o.u, o.sigma, o.v, o.scale, None, None, None, o.h, None, 0, WANT)
    return {name: tensor for name, tensor in found._asdict().items() if tensor is not None}


class Bound(NamedTuple):
    """A result in float64, and how far another may be from it: in the norm, and at the worst element."""

    exact: Tensor
    norm: float
    worst: float


def bounds(family: str, o: Operands) -> dict[str, Bound]:
    """The accuracy rule for one layer."""
    eager, roundoff = EagerBackend(), torch.finfo(o.x.dtype).eps / 2
    wide = _each(o, Tensor.double)
    exact, size = results(family, eager, wide), results(family, eager, _each(wide, Tensor.abs))
    allowed = {}
    for name, plain in results(family, eager, o).items():
        error = plain.double() - exact[name]
        norm = 2 * float(error.norm()) + 4 * roundoff * float(size[name].norm())
        worst = 2 * float(error.abs().max()) + 4 * roundoff * float(size[name].max())
        allowed[name] = Bound(exact[name], norm, worst)
    return allowed


def why_wrong(got: Results, allowed: Mapping[str, Bound]) -> str | None:
    """None if every result keeps to its bound, else the first that does not."""
    for name, bound in allowed.items():
        error = got[name].double() - bound.exact
        for measured, most, what in ((error.norm(), bound.norm, "norm"), (error.abs().max(), bound.worst, "largest")):
            if not float(measured) <= most:  # not a number is wrong, too
                return f"wrong: {name} has a {what} error of {float(measured):.2e}, allowed is {most:.2e}"
    return None


def _each(o: Operands, function: Callable[[Tensor], Tensor]) -> Operands:
    rest = {name: function(value) for name, value in o._asdict().items() if name != "weights"}
    return Operands(weights=(function(o.weights[0]),), **rest)
