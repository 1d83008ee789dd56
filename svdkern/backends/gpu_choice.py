"""Which layers on a GPU take Triton's kernels when nobody names a backend: those of a kind that an H100 was faster with.

Everything else there is eager. Forward and backward of a layer ask each for themselves, so only what both know counts: not
whether there is a weight, a gate or a core.

Layer: below ``dispatch``.
"""

from __future__ import annotations

import torch

from svdkern.backends import triton
from svdkern.backends.table import Shape

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
LEAST_ROWS = 1024
LEAST_WIDTH = 2048
MOST_RANK = 32
"""Measured at 16, whose kernels are those of every rank up to 16; at 128 eager was faster."""

RULE = f"M >= {LEAST_ROWS}, K and N >= {LEAST_WIDTH}, r <= {MOST_RANK}, no dropout"


def takes_triton(shape: Shape, device: torch.device, dtype: torch.dtype, threshold: int) -> bool:
    """Whether a layer of this shape takes Triton's kernels. Where they cannot be compiled it does not, which is logged once."""
    if threshold or shape.M < LEAST_ROWS or min(shape.K, shape.N) < LEAST_WIDTH or not 1 <= shape.r <= MOST_RANK:
        return False
    return may_take_triton(device, dtype)


def may_take_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether some layers do, on this device in this dtype."""
    if dtype not in DTYPES or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    return triton.why_not(device, dtype) is None and triton.compiles(device)
