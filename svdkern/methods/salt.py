"""SALT: the leading singular values are scaled and shifted, the rest of the spectrum gets a low-rank update.

    Sigma' = [diag(alpha * S_r + beta), 0; 0, diag(S_rest) + X Y]          W' = Q Sigma'^T P^T
    y = x W + s x (Q_r diag((alpha - 1) * S_r + beta) P_r^T + (Q_rest Y^T) (P_rest X)^T)
    alpha = 1, beta = 0, Y = 0, X ~ kaiming_uniform(a = sqrt 20)          trains alpha, beta (r), X (k - r, l), Y (l, k - r)

with k = min(K, N). The two branches are one call of rank r + l; its factors are made from the parameters each time, which
costs a product (K + N, k - r) x (k - r, l). ``compat="official"`` takes relu of the whole k x k matrix Sigma', as the authors'
code does, which also cuts off every negative element of X Y: that is a dense core of rank k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.autocast import without_autocast
from svdkern.methods.method import Card, Compat, Factors, Layer, Method, total


@dataclass(frozen=True)
class SALT(Method):
    """SALT (Elsayed et al., 2025). Published: a tenth of the values scaled, a low-rank part of 256, learning rate 1e-4.

    Args:
        lora_rank: l, rank of X Y.
        penalty_weight: of the penalty; the published runs take 0, the code's default is 0.01.
        compat: "paper", or "official" for relu of Sigma'.
    """

    lora_rank: int = 8
    penalty_weight: float = 0.0
    compat: Compat = "paper"

    name: ClassVar[str] = "salt"
    citation: ClassVar[str] = (
        "A. Elsayed, S. Hashmi, M. Elseiagy, H. Wang, M. Yaqub, I. Almakky: SALT: Parameter-Efficient "
        "Fine-Tuning via Singular Value Adaptation with Low-Rank Transformation. arXiv 2503.16055, 2025"
    )
    card: ClassVar[Card] = Card(
        "x W + s x (Q_r diag((alpha - 1) S_r + beta) P_r^T + (Q_rest Y^T) (P_rest X)^T)",
        "alpha = 1, beta = 0, X random (kaiming), Y = 0; the weight's output",
        "2*r + 2*8*(min(K, N) - r)",
        penalty="penalty_weight times the sum over layers of norm((alpha - 1) S_r + beta) + norm(X Y)",
        differs='relu of the whole matrix Sigma\' only under `compat="official"`. The start is that of the SAM 2 code; the SAM 1 '
        "code draws Y, too. Linear layers only.",
    )
    published_rank: ClassVar[int] = 64
    trains: ClassVar[tuple[str, ...]] = ("alpha", "beta", "x", "y")
    draws: ClassVar[bool] = True
    composes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank is {self.lora_rank}, expected >= 1")

    def default_rank(self, in_features: int, out_features: int) -> int:
        return max(1, min(in_features, out_features) // 10)

    def check_rank(self, in_features: int, out_features: int, rank: int) -> None:
        super().check_rank(in_features, out_features, rank)
        k = min(in_features, out_features)
        if rank == k:
            raise ValueError(f"rank is {rank}, expected 1 <= rank < {k}: X Y works on the other singular values")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        k, low = min(in_features, out_features), self.lora_rank
        return {
            "u": (in_features, k), "v": (out_features, k), "values": (k,), "alpha": (rank,), "beta": (rank,),
            "x": (k - rank, low), "y": (low, k - rank),
        }  # fmt: skip

    def rank_of(self, layer: Layer) -> int:
        return layer.alpha.shape[0]

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        k, device = min(weight.shape), weight.device
        u, s, v = linalg.factors(weight.detach(), k)
        x = torch.empty(k - rank, self.lora_rank, device=device)
        torch.nn.init.kaiming_uniform_(x, a=math.sqrt(20))
        extra = {
            "values": s.to(dtype),
            "alpha": torch.ones(rank, dtype=dtype, device=device),
            "beta": torch.zeros(rank, dtype=dtype, device=device),
            "x": x.to(dtype),
            "y": torch.zeros(self.lora_rank, k - rank, dtype=dtype, device=device),
        }
        return Factors(u.to(dtype), None, None, v.to(dtype), extra)

    def product(self, layer: Layer) -> Factors:
        r, values = layer.alpha.shape[0], layer.values
        if self.compat == "official":
            scaled = torch.diag(layer.alpha * values[:r] + layer.beta)
            core = torch.block_diag(scaled, torch.diag(values[r:]) + layer.x @ layer.y).relu() - torch.diag(values)
            return Factors(layer.u, None, core.t(), layer.v)
        u = torch.cat([layer.u[:, :r], layer.u[:, r:] @ layer.y.t()], dim=1)
        v = torch.cat([layer.v[:, :r], layer.v[:, r:] @ layer.x], dim=1)
        sigma = torch.cat([self._change(layer), torch.ones_like(layer.x[0])])
        return Factors(u, sigma, None, v)

    @staticmethod
    def _change(layer: Layer) -> Tensor:
        change: Tensor = (layer.alpha - 1) * layer.values[: layer.alpha.shape[0]] + layer.beta
        return change

    def penalty(self, layers: Sequence[Layer]) -> Tensor | None:
        if not self.penalty_weight or not layers:
            return None
        terms = []
        for layer in layers:
            with without_autocast(layer.x.device):
                low_rank = (layer.x.t() @ layer.x) * (layer.y @ layer.y.t())  # its sum is |X Y|_F^2
            terms += [_root(self._change(layer).square().sum()), _root(low_rank.sum())]
        return self.penalty_weight * total(terms)


def _root(squared: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)
