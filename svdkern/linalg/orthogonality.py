"""How far the columns of a factor are from orthonormal, as a penalty to train with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svdkern.autocast import without_autocast
from svdkern.backends import triton_gram


def orth_penalty(factor: Tensor, gram: Literal["inner", "outer"] = "inner") -> Tensor:
    """``||F^T F - I||_F`` of a factor (L, r), unsquared, differentiable, computed in float32 (float64 for float64).

    Equivalent to, where that has a gradient::

        torch.linalg.matrix_norm(factor.t() @ factor - torch.eye(factor.shape[1]))

    ``gram="outer"`` is ``||F F^T - I||_F``, from the same (r, r) matrix: its square is larger by L - r.

    The norm has a kink at 0: there the gradient is 0, not NaN. Next to it, where only rounding separates F from
        orthonormal, the gradient already has the full length of a subgradient.

    F^T F is PyTorch's product, or under ``SVDKERN_BACKEND=triton`` on a GPU the kernel of ``triton_kernels/gram.py``.
    """
    if gram not in ("inner", "outer"):
        raise ValueError(f"gram is {gram!r}, expected 'inner' or 'outer'")
    inner = triton_gram.gram(factor) if triton_gram.is_asked_for(factor) else _product(factor)
    squared = (inner - torch.eye(inner.shape[0], dtype=inner.dtype, device=inner.device)).square().sum()
    if gram == "outer":
        squared = squared + (factor.shape[0] - factor.shape[1])
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _product(factor: Tensor) -> Tensor:
    wide = factor if factor.dtype == torch.float64 else factor.to(torch.float32)
    with without_autocast(factor.device):
        return wide.t() @ wide
