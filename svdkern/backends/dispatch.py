"""Which backend a call takes.

``backend=None`` means the fastest correct one for the device, dtype and size of the layer; on the CPU that is looked up in
tables of measurements (``choices``), on a GPU it is a rule (``gpu_choice``). ``SVDKERN_BACKEND=name`` or ``backend="name"`` force
one: then a case that it cannot do falls back to eager with one log line, or is an error under ``SVDKERN_STRICT=1``.
The environment is read once, when svdkern is imported; ``read_environment`` reads it again, and the tables.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from svdkern.backends import choices, cpu, cuda, extension, gpu_choice, triton
from svdkern.backends.formula import Backend
from svdkern.backends.table import Shape
from svdkern.backends.tracing import is_watched

log = logging.getLogger("svdkern")

BACKENDS: dict[str, Backend] = {
    "eager": cpu.PATHS["eager"],
    "cpu": cpu.PATHS["fused"],
    "triton": triton.TritonBackend(lambda reason: _fall_back("triton", reason)),
    "cuda": cuda.CudaBackend(),
}

MOST_KEPT = 4096
"""Choices that are remembered; then they are looked up again (about 0.3 ms each)."""


class Environment(NamedTuple):
    """What the environment variables ask for."""

    backend: str | None
    strict: bool
    autotune: bool


def read_environment() -> Environment:
    """Read ``SVDKERN_BACKEND``, ``SVDKERN_STRICT`` and ``SVDKERN_AUTOTUNE`` and make them the ones in force."""
    global _environment
    name = os.environ.get("SVDKERN_BACKEND") or None
    if name is not None:
        _check_name(name, "SVDKERN_BACKEND")
    _environment = Environment(name, _switch("SVDKERN_STRICT"), _switch("SVDKERN_AUTOTUNE"))
    _said.clear()
    _chosen.clear()
    _paths.clear()
    choices.forget()
    return _environment


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} is {value!r}, expected 0 or 1")
    return value == "1"


def named() -> str | None:
    """The backend that ``SVDKERN_BACKEND`` names."""
    return _environment.backend


def strict() -> bool:
    """Whether ``SVDKERN_STRICT=1`` is in force."""
    return _environment.strict


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the backend can serve this device and dtype, else the reason in one line."""
    if name == "eager":
        return None
    if name == "triton":
        return triton.why_not(device, dtype)
    if name == "cuda":
        return cuda.why_not(device, dtype)
    if device.type != "cpu":
        return f"the cpu backend was asked for a tensor on {device}"
    if extension.why_missing is not None:
        return f"the compiled extension is not there: {extension.why_missing}"
    if dtype not in cpu.DTYPES:
        return f"the cpu backend has no {dtype} (it has {', '.join(str(d) for d in cpu.DTYPES)})"
    return None


def choose_path(a: Tensor, factor: Tensor, requested: str | None, threshold: int, *, backward: bool = False) -> Backend:
    """The backend object for one layer.

    Args:
        a: x (..., K), or in the backward dy (..., N).
        factor: v (N, r), or in the backward u (K, r).
        requested: a backend's name, None, or "" as the operators have it: None, and never a reason to measure.
        threshold: of the dropout.
        backward: which of the two.

    Raises:
        ValueError, RuntimeError: as ``choose``.
    """
    key = (requested, a.is_cpu or a.device, a.dtype, a.shape, factor.shape, threshold != 0, backward)
    try:
        found = _paths.get(key)
    except TypeError:  # sizes without a value, as a tracer has them: one call serves them all
        if all(type(size) is int for size in (*a.shape, *factor.shape)):
            raise
        return choose(a, requested)
    return found if found is not None else _look_up(key, a, factor, requested, threshold, backward)


def _look_up(
    key: tuple[object, ...], a: Tensor, factor: Tensor, requested: str | None, threshold: int, backward: bool
) -> Backend:
    global _alone
    alone = not choices.distributed()
    if alone != _alone or len(_paths) >= MOST_KEPT:
        _alone = alone
        _paths.clear()
    found, keep = choose(a, requested), True
    rows, width = math.prod(a.shape[:-1]), a.shape[-1]
    other, rank = factor.shape
    shape = Shape(rows, other, width, rank) if backward else Shape(rows, width, other, rank)
    if found is BACKENDS["cpu"]:
        if _environment.autotune and requested != "":
            keep = choices.autotune(shape, a.dtype)
        found = cpu.PATHS[_path(shape, a.dtype, requested, threshold).path]
    elif a.is_cuda and _is_automatic(requested):
        watched = is_watched(a)  # by what eager serves; it says nothing of the next call of this shape
        keep = not watched and not torch.cuda.is_current_stream_capturing()  # when not everything can be found out
        if not watched and gpu_choice.takes_cuda(shape, a.device, a.dtype):
            found = BACKENDS["cuda"]
    if keep:
        _paths[key] = found
    return found


def _path(shape: Shape, dtype: torch.dtype, requested: str | None, threshold: int) -> choices.Choice:
    return choices.choose(shape, dtype, eager=_is_automatic(requested) and not threshold)


def _is_automatic(requested: str | None) -> bool:
    return not requested and _environment.backend is None


def explain(shape: Shape, dtype: torch.dtype) -> choices.Choice:
    """The path of a layer on the CPU without dropout under ``backend=None``, and where that choice comes from.

    Raises:
        RuntimeError: as ``choose``.
    """
    backend = choose(torch.empty(0, dtype=dtype, device="cpu"), None)
    if backend is BACKENDS["cpu"]:
        return _path(shape, dtype, None, 0)
    forced = _environment.backend == "eager"
    reason = "SVDKERN_BACKEND" if forced else why_not("cpu", torch.device("cpu"), dtype)
    return choices.Choice("eager", reason or "")


def choose(x: Tensor, requested: str | None) -> Backend:
    """The backend for activations like ``x``, whatever the size of the layer; on a GPU some sizes take the CUDA kernels unasked.

    Raises:
        ValueError: the requested name is unknown.
        RuntimeError: ``SVDKERN_STRICT=1`` and the requested backend, or the compiled one for this device, cannot serve x.
    """
    name = requested or _environment.backend
    key = (name, x.device, x.dtype)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _decide(name, x.device, x.dtype)
    return found


def _decide(requested: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    if requested is not None:
        _check_name(requested, "backend")
    name = requested or ("cpu" if device.type == "cpu" else "eager")
    reason = why_not(name, device, dtype)
    if reason is None:
        return BACKENDS[name]
    by_design = requested is None and dtype not in cpu.DTYPES  # float64 is eager's on every device
    if by_design:
        return BACKENDS["eager"]
    # where a driver is too old for the compiled kernels, Triton's have its own compiler's code
    instead = "triton" if name == "cuda" and why_not("triton", device, dtype) is None else "eager"
    return _fall_back(name, reason, instead)


def _fall_back(name: str, reason: str, instead: str = "eager") -> Backend:
    if _environment.strict:
        raise RuntimeError(f"SVDKERN_STRICT=1 and backend {name!r} cannot be used: {reason}")
    if reason not in _said:
        _said.add(reason)
        log.warning("falling back to the %s backend: %s", instead, reason)
    return BACKENDS[instead]


def _check_name(name: str, what: str) -> None:
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} is {name!r}, expected one of {', '.join(BACKENDS)}{hint}")


_said: set[str] = set()
_chosen: dict[tuple[str | None, torch.device, torch.dtype], Backend] = {}
_paths: dict[tuple[object, ...], Backend] = {}
_alone = True
_environment = Environment(None, False, False)
read_environment()
