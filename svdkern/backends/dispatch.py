"""Which backend a call takes.

``backend=None`` means the fastest correct one for the device and dtype. ``SVDKERN_BACKEND=name`` or ``backend="name"`` force
one: then a case that it cannot do falls back to eager with one log line, or is an error under ``SVDKERN_STRICT=1``.
The environment is read once, when svdkern is imported; ``read_environment`` reads it again.
"""

from __future__ import annotations

import difflib
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor

from svdkern.backends import cpu, extension
from svdkern.backends.eager import EagerBackend
from svdkern.backends.formula import Backend

log = logging.getLogger("svdkern")

BACKENDS: dict[str, Backend] = {"eager": EagerBackend(), "cpu": cpu.CpuBackend()}


class Environment(NamedTuple):
    """What the environment variables ask for."""

    backend: str | None
    strict: bool


def read_environment() -> Environment:
    """Read ``SVDKERN_BACKEND`` and ``SVDKERN_STRICT`` and make them the ones in force."""
    global _environment
    name = os.environ.get("SVDKERN_BACKEND") or None
    if name is not None:
        _check_name(name, "SVDKERN_BACKEND")
    strict = os.environ.get("SVDKERN_STRICT", "0")
    if strict not in ("", "0", "1"):
        raise ValueError(f"SVDKERN_STRICT is {strict!r}, expected 0 or 1")
    _environment = Environment(name, strict == "1")
    _said.clear()
    _chosen.clear()
    return _environment


def strict() -> bool:
    """Whether ``SVDKERN_STRICT=1`` is in force."""
    return _environment.strict


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the backend can serve this device and dtype, else the reason in one line."""
    if name == "eager":
        return None
    if device.type != "cpu":
        return f"the cpu backend was asked for a tensor on {device}"
    if extension.why_missing is not None:
        return f"the compiled extension is not there: {extension.why_missing}"
    if dtype not in cpu.DTYPES:
        return f"the cpu backend has no {dtype} (it has {', '.join(str(d) for d in cpu.DTYPES)})"
    return None


def choose(x: Tensor, requested: str | None) -> Backend:
    """The backend for activations like ``x``.

    Raises:
        ValueError: the requested name is unknown.
        RuntimeError: ``SVDKERN_STRICT=1`` and the requested backend, or the compiled one for this device, cannot serve x.
    """
    name = requested or _environment.backend
    key = (name, x.device.type, x.dtype)
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
    if not by_design:
        if _environment.strict:
            raise RuntimeError(f"SVDKERN_STRICT=1 and backend {name!r} cannot be used: {reason}")
        if reason not in _said:
            _said.add(reason)
            log.warning("falling back to the eager backend: %s", reason)
    return BACKENDS["eager"]


def _check_name(name: str, what: str) -> None:
    if name not in BACKENDS:
        near = difflib.get_close_matches(name, BACKENDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} is {name!r}, expected one of {', '.join(BACKENDS)}{hint}")


_said: set[str] = set()
_chosen: dict[tuple[str | None, str, torch.dtype], Backend] = {}
_environment = Environment(None, False)
read_environment()
