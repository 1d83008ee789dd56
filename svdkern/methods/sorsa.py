"""SORSA: the leading singular triplets train with sigma apart, and a penalty keeps both sides orthonormal.

    U = Q_r, sigma = S_r, V = P_r  (r leading triplets of the stored weight P diag(S) Q^T)
    W_res = W - s V diag(sigma) U^T
    y = x W_res + s ((x U) * sigma) V^T          trains U, sigma, V: r (K + N + 1) numbers
    L = L_train + (gamma / eta) mean over all U and V of the model of ||F^T F - I||_F

The paper's update is ``W - eta grad(L_train) - gamma grad(L_reg)``; as one loss for an optimizer of learning rate eta,
the penalty's weight is gamma / eta, which is also what the authors' code does (with eta the peak of the schedule).
Their code adds that gradient after gradient clipping; adding the penalty to the loss puts it before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Layer, Method


@dataclass(frozen=True)
class SORSA(Method):
    """SORSA (Cao, 2024). Published: rank 128, s = 1, gamma 4e-4, learning rate 3e-5.

    Args:
        gamma: step of the penalty.
        learning_rate: peak learning rate eta of the optimizer that will train the model: the penalty's weight in the
            loss is ``gamma / learning_rate``.
    """

    gamma: float = 4e-4
    learning_rate: float = 3e-5

    name: ClassVar[str] = "sorsa"
    citation: ClassVar[str] = (
        "Y. Cao: SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation "
        "of Large Language Models. arXiv 2409.00055, 2024"
    )
    card: ClassVar[Card] = Card(
        "x W_res + s ((x U) * sigma) V^T",
        "r leading triplets, sigma apart, cut out; the weight's output",
        "r*(K + N + 1)",
        penalty="gamma / learning_rate times the mean over all U and V of norm(F^T F - I)",
        differs="The penalty is part of the loss; `MethodCallback` adds its gradient after clipping, as the authors do.",
    )
    published_rank: ClassVar[int] = 128
    trains: ClassVar[tuple[str, ...]] = ("u", "sigma", "v")
    has_sigma: ClassVar[bool] = True
    changes_residual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected > 0")

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        u, s, v = linalg.factors(weight.detach(), rank)
        return Factors(u.to(dtype), s.to(dtype), None, v.to(dtype))

    def penalty(self, layers: Sequence[Layer]) -> Tensor | None:
        if not layers:
            return None
        norms = linalg.orth_penalties([factor for layer in layers for factor in (layer.u, layer.v)])
        return (self.gamma / self.learning_rate) * norms.mean()
