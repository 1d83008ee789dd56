"""How far the columns of a factor are from orthonormal, as a penalty to train with."""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.autocast import without_autocast
from svdkern.backends import triton_gram


def orth_penalty(factor: Tensor) -> Tensor:
    """``||F^T F - I||_F`` of a factor (L, r), unsquared, differentiable, computed in float32 (float64 for float64).

    Equivalent to, where that has a gradient::

        torch.linalg.matrix_norm(factor.t() @ factor - torch.eye(factor.shape[1]))

    The norm has a kink at 0: there the gradient is 0, not NaN. Next to it, where only rounding separates F from
        orthonormal, the gradient already has the full length of a subgradient.

    F^T F is PyTorch's product, or under ``SVDKERN_BACKEND=triton`` on a GPU the kernel of ``triton_kernels/gram.py``.
    """
    gram = triton_gram.gram(factor) if triton_gram.is_asked_for(factor) else _product(factor)
    squared = (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).square().sum()
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _product(factor: Tensor) -> Tensor:
    wide = factor if factor.dtype == torch.float64 else factor.to(torch.float32)
    with without_autocast(factor.device):
        return wide.t() @ wide
