"""SVFit: only the leading singular values train.

    U = Q_r, sigma = S_r, V = P_r  (r leading triplets)          W_res = W - s V diag(sigma) U^T
    y = x W_res + s ((x U) * sigma) V^T          trains sigma: r numbers

Of the activations a layer keeps only two (M, r) products for the backward. The paper takes r so that the r leading values
hold over 99 % of "information", without saying whether that is their sum or the sum of their squares: ``rank_holding``
offers both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Method


def rank_holding(weight: Tensor, share: float = 0.99, measure: Literal["values", "squares"] = "squares") -> int:
    """The least r whose r leading singular values hold ``share`` of the sum of all values, or of their squares.

    Args:
        weight: (N, K), floating-point, finite.
        share: in (0, 1].

    Raises:
        ValueError: share or measure is none of these, or the weight has a NaN or an infinity.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share}, expected 0 < share <= 1")
    if measure not in ("values", "squares"):
        raise ValueError(f"measure is {measure!r}, expected 'values' or 'squares'")
    _, sigma, _ = linalg.factors(weight, min(weight.shape))
    held = sigma.double().pow(1 if measure == "values" else 2).cumsum(0)
    return min(len(sigma), 1 + int((held < share * held[-1]).sum()))


@dataclass(frozen=True)
class SVFit(Method):
    """SVFit (Sun et al., 2024). No learning rate could be verified."""

    name: ClassVar[str] = "svfit"
    citation: ClassVar[str] = (
        "C. Sun, J. Wei, Y. Wu, Y. Shi, S. He, Z. Ma, N. Xie, Y. Yang: SVFit: Parameter-Efficient Fine-Tuning "
        "of Large Pre-Trained Models Using Singular Values. arXiv 2409.05926, 2024"
    )
    card: ClassVar[Card] = Card(
        "x W_res + s ((x U) * sigma) V^T",
        "r leading triplets, sigma apart, cut out; the weight's output",
        "r",
        differs="No code was found to compare with. `svdkern.methods.svfit.rank_holding` is the paper's choice of r, by values "
        "or by squares: the paper does not say which.",
    )
    published_rank: ClassVar[int] = 256
    trains: ClassVar[tuple[str, ...]] = ("sigma",)
    has_sigma: ClassVar[bool] = True
    changes_residual: ClassVar[bool] = True

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        u, s, v = linalg.factors(weight.detach(), rank)
        return Factors(u.to(dtype), s.to(dtype), None, v.to(dtype))
