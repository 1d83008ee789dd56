"""FILA, the initialisation of LoKU: PiSSA in the metric of what matters for the data to forget.

    F = Fisher information of the weight          d_i = sqrt(sum_j F_forget / (1e-5 + F_retain)) + 1e-5 for each output i
    diag(d) W = P diag(S) Q^T          V = diag(d)^-1 P sqrt(S/s), U = Q sqrt(S/s)          W_res = W - s V U^T
    y = x W_res + s (x U) V^T          trains U, V: r (K + N) numbers

LoKU trains this with its inverted hinge loss on the data to forget, which is the caller's. The authors' code adds 1e-5 only where
it divides, and subtracts the product before the factors are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Start
from svdkern.methods.pissa import PiSSA


@dataclass(frozen=True)
class FILA(PiSSA):
    """FILA (Cha et al., 2024)."""

    name: ClassVar[str] = "fila"
    citation: ClassVar[str] = (
        "S. Cha, S. Cho, D. Hwang, M. Lee: Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs. ICLR 2025, "
        "arXiv 2408.06621"
    )
    card: ClassVar[Card] = Card(
        "x W_res + s (x U) V^T",
        "diag(d) W = P S Q^T, d the importance of each output; r leading triplets, V = diag(d)^-1 P sqrt(S/s), U = Q sqrt(S/s), "
        "cut out; the weight's output. **Data**: Fisher information of what to forget and to retain",
        "r*(K + N)",
        differs="Deterministic SVD; the residual is computed after the factors are rounded. The code saves the model after "
        "unloading the adapter without merging it. The inverted hinge loss is the caller's.",
    )
    published_rank: ClassVar[int] = 16
    needs: ClassVar[str | None] = "importance"

    def start(
        self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype, statistic: Tensor | None = None
    ) -> Start:
        assert statistic is not None
        u, s, v = linalg.weighted_factors(weight.detach(), rank, row_scale=statistic.sqrt() + 1e-5)
        root, start = (s / scale).sqrt(), self.start_dtype(weight.dtype, dtype)
        factors = Factors((u * root).to(start).to(dtype), None, None, (v * root).to(start).to(dtype))
        return Start(factors, self.cut(factors, scale, weight.dtype))
