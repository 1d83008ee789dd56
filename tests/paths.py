"""Rows and tables of measured choices, for the tests of dispatch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from svdkern.backends import cpu
from svdkern.backends.table import Row, Shape


def row(
    shape: tuple[int, int, int, int],
    choice: str,
    dtype: str = "float32",
    seconds: Mapping[str, float | None] | None = None,
    isa: str | None = None,
) -> Row:
    """A row for this machine."""
    times = seconds or {path: 1e-3 if path == choice else 2e-3 for path in ("fused", "steps", "eager")}
    return Row(isa or cpu.isa(), dtype, Shape(*shape), times, choice, torch.__version__, torch.get_num_threads())
