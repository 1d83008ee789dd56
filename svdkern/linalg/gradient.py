"""Factors of the first optimizer step, from a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdkern.linalg.factors import factors


@torch.no_grad()
def step_factors(gradient: Tensor, r: int, learning_rate: float, *, sign: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading triplets of the first step ``-learning_rate * sign(gradient)``: ``step ~ v @ diag(sigma) @ u.T``.

    LoRA-SB starts so (Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient
    Low-Rank Fine-Tuning", arXiv 2411.19557): u and v frozen, the core ``diag(sigma)`` trained, the weight as it is. The sign
    stands for Adam's first step; ``sign=False`` is plain gradient descent's.

    Equivalent to (up to signs, rotations among equal singular values, and ``factors``' error)::

        step = -learning_rate * gradient.float().sign()
        p, s, qh = torch.linalg.svd(step, full_matrices=False)
        u, sigma, v = qh[:r].t(), s[:r], p[:, :r]

    Args:
        gradient: (N, K), as autograd accumulates it for an ``nn.Linear``'s weight; never written to.
        r: number of triplets. learning_rate: of the step, > 0.

    Returns:
        u (K, r), sigma (r,), v (N, r), as ``svdkern.linalg.factors`` gives them.

    Raises:
        TypeError, ValueError: as ``factors``, of the gradient; learning_rate is not positive and finite.
    """
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate is {learning_rate}, expected a positive number")
    if sign and gradient.is_floating_point():
        if bool(gradient.isnan().any()):  # sign() would give some number
            raise ValueError("gradient has a NaN")
        # -1, 0 and 1 are bfloat16 numbers, and half the memory
        gradient = gradient.sign() if gradient.dtype == torch.float64 else gradient.sign().to(torch.bfloat16)
    u, sigma, v = factors(gradient, r)
    return u, sigma * learning_rate, -v
