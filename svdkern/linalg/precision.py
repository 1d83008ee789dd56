"""Products in their operands' own precision: no autocast, no TF32 on CUDA, no bfloat16 in oneDNN's float32 products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from svdkern.autocast import without_autocast


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """The settings are the process's; they are put back at the end."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul"))  # noqa: B009
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting, value in zip(settings, before, strict=True):
            if value not in ("none", "ieee"):
                setting.fp32_precision = "ieee"
        with without_autocast(device):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            if setting.fp32_precision != value:
                setting.fp32_precision = value
