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
SMALL_WORK = 1 << 33
"""Up to this M K N what the host does for a call takes longer than the GPU, and one operator is the least there is."""

MOST_RANK, MOST_RANK_LARGE = 64, 16
"""Largest ranks that were measured and won: of layers up to SMALL_WORK, and of larger ones."""

RULE = f"r <= {MOST_RANK} and M K N <= 2^{SMALL_WORK.bit_length() - 1}, or r <= {MOST_RANK_LARGE}"


def takes_cuda(shape: Shape, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer of this shape takes the CUDA kernels."""
    small = shape.M * shape.K * shape.N <= SMALL_WORK
    return 1 <= shape.r <= (MOST_RANK if small else MOST_RANK_LARGE) and may_take_cuda(device, dtype)


def may_take_cuda(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether some layers do, on this device in this dtype."""
    if dtype not in DTYPES or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    return cuda.why_not(device, dtype) is None
