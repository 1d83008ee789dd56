"""Which layers on a GPU take the compiled CUDA kernels when nobody names a backend: those of a kind that an H100 was faster with.

Everything else there is eager. Forward and backward of a layer ask each for themselves, so only what both know counts: not
whether there is a weight, a gate or a core.

Layer: below ``dispatch``.
"""

from __future__ import annotations

import torch

from svdkern.backends import cuda
from svdkern.backends.table import Shape

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
LIMITS = ((1 << 31, 64), (1 << 33, 16))
"""Largest M K N, and largest rank up to there. So far the host's part of a call is most of it, of which one operator is the least
there is; near the limit a replayed CUDA graph, which has no host's part, may be faster with eager."""

RULE = " or ".join(f"M K N <= 2^{work.bit_length() - 1} and r <= {rank}" for work, rank in LIMITS)


def takes_cuda(shape: Shape, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer of this shape takes the CUDA kernels."""
    product = shape.M * shape.K * shape.N
    inside = shape.r > 0 and any(product <= work and shape.r <= rank for work, rank in LIMITS)
    return inside and may_take_cuda(device, dtype)


def may_take_cuda(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether some layers do, on this device in this dtype."""
    if dtype not in DTYPES or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    return cuda.why_not(device, dtype) is None
