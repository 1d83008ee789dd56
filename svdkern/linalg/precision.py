"""Products in their operands' own precision: no autocast, no TF32 on CUDA, no bfloat16 in oneDNN's float32 products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from svdkern.autocast import without_autocast

_lock = threading.Lock()
_inside = 0  # threads' calls that want it at this moment
_changed: list[tuple[Any, str]] = []


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """The settings are the process's; the last of the calls that overlap puts them back."""
    _enter()
    try:
        with without_autocast(device):
            yield
    finally:
        _leave()


def _enter() -> None:
    global _inside
    with _lock:
        if _inside == 0:
            for setting in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")):  # noqa: B009
                value = setting.fp32_precision
                if value in ("none", "ieee"):
                    continue
                # What is read may be the setting's own or that of the one above it, which it goes on following if "none".
                setting.fp32_precision = "none"
                _changed.append((setting, "none" if setting.fp32_precision == value else value))
                setting.fp32_precision = "ieee"
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        while _inside == 0 and _changed:
            setting, value = _changed.pop()
            setting.fp32_precision = value
