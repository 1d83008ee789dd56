"""PiSSA: the leading singular triplets train, the rest of the weight is frozen.

    U = Q sqrt(S/s), V = P sqrt(S/s)  (r leading triplets of the stored weight P diag(S) Q^T)          W_res = W - s V U^T
    y = x W_res + s (x U) V^T          trains U, V: r (K + N) numbers

The residual is computed from the factors after they are rounded, so that the layer starts as the weight (the usual
implementation subtracts first and rounds afterwards). They are rounded to the weight's dtype where the factors' dtype holds
it: the residual takes up the difference, a product in that dtype then starts without rounding them, and the copy of the
initial factors that every layer keeps has half the size under float32 factors of a bfloat16 weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Method


@dataclass(frozen=True)
class PiSSA(Method):
    """PiSSA (Meng et al., 2024). Published: rank 128, s = 1, learning rate 2e-5."""

    name: ClassVar[str] = "pissa"
    citation: ClassVar[str] = (
        "F. Meng, Z. Wang, M. Zhang: PiSSA: Principal Singular Values and Singular Vectors Adaptation "
        "of Large Language Models. NeurIPS 2024, arXiv 2404.02948"
    )
    card: ClassVar[Card] = Card(
        "x W_res + s (x U) V^T",
        "r leading triplets, sqrt(S/s) on both sides, cut out; the weight's output",
        "r*(K + N)",
        differs="A converged SVD, the same every time; the residual is computed after the factors are rounded.",
    )
    published_rank: ClassVar[int] = 128
    trains: ClassVar[tuple[str, ...]] = ("u", "v")
    changes_residual: ClassVar[bool] = True

    def check_scale(self, scale: float) -> None:
        super().check_scale(scale)
        if scale <= 0:
            raise ValueError(f"scale is {scale}, expected > 0: PiSSA splits S/scale into two square roots")

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        u, s, v = linalg.factors(weight.detach(), rank)
        root, start = (s / scale).sqrt(), self.start_dtype(weight.dtype, dtype)
        return Factors((u * root).to(start).to(dtype), None, None, (v * root).to(start).to(dtype))

    def start_dtype(self, weight_dtype: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        return weight_dtype if torch.promote_types(weight_dtype, dtype) == dtype else dtype
