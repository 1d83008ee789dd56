"""KaSA: the smallest singular triplets of the weight are dropped, and a LoRA with singular values of its own trains.

    W_world = W - (r smallest triplets)          y = x W_world + s ((x U) * sigma) V^T
    U ~ kaiming_uniform(a = sqrt 5), sigma ~ N(0, 1), V = 0          trains U, sigma, V: r (K + N + 1) numbers
    L = L_train + sum over layers of beta |sigma|^2 + gamma (||V^T V - I||_F + ||U^T U - I||_F)

What is dropped is not put back: a layer starts as W_world, not as W. ``compat="official"`` is the authors' code where it
differs: it keeps ``K - r`` triplets (none is dropped where K - r >= N), takes the outer Gram matrices U U^T and V V^T,
which no r < K, N can make the identity, and divides the penalty by the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.lora import kaiming
from svdkern.methods.method import Card, Compat, Cut, Factors, Layer, Method, Start
from svdkern.methods.minor import minor_triplets


@dataclass(frozen=True)
class KaSA(Method):
    """KaSA (Wang et al., 2025). Published: rank 8, alpha 16, learning rate 4e-4.

    Args:
        beta: weight of ``|sigma|^2``; the published runs take 1e-4 to 1.
        gamma: weight of the orthonormality; the published runs take 1e-5 to 1.
        compat: "paper", or "official" for what the authors' code computes.
    """

    beta: float = 1e-4
    gamma: float = 1e-3
    compat: Compat = "paper"

    name: ClassVar[str] = "kasa"
    citation: ClassVar[str] = (
        "F. Wang, J. Jiang, C. Park, S. Kim, J. Tang: KaSA: Knowledge-Aware Singular-Value Adaptation "
        "of Large Language Models. ICLR 2025, arXiv 2412.06071"
    )
    card: ClassVar[Card] = Card(
        "x W_world + s ((x U) * sigma) V^T",
        "U random (kaiming), sigma random (normal), V = 0; the r smallest triplets are dropped, so **not** the weight's output",
        "r*(K + N + 1)",
        penalty="sum over layers of beta norm(sigma)^2 + gamma (norm(U^T U - I) + norm(V^T V - I))",
        differs="The code keeps K - r triplets, takes outer Gram matrices and divides by the number of layers: "
        '`compat="official"`.',
    )
    published_rank: ClassVar[int] = 8
    trains: ClassVar[tuple[str, ...]] = ("u", "sigma", "v")
    draws: ClassVar[bool] = True
    has_sigma: ClassVar[bool] = True
    changes_residual: ClassVar[bool] = True

    def check_rank(self, in_features: int, out_features: int, rank: int) -> None:
        super().check_rank(in_features, out_features, rank)
        if rank == min(in_features, out_features):
            shape = f"in_features {in_features}, out_features {out_features}"
            raise ValueError(f"rank is {rank}, expected 1 <= rank < {rank} ({shape}): KaSA drops as many triplets")

    def cut_rank(self, in_features: int, out_features: int, rank: int) -> int:
        if self.compat == "official":
            return max(0, min(in_features, out_features) - (in_features - rank))
        return rank

    def start(
        self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype, statistic: Tensor | None = None
    ) -> Start:
        n, k = weight.shape
        factors = Factors(
            kaiming(weight, rank, dtype),
            torch.randn(rank, device=weight.device).to(dtype),
            None,
            weight.new_zeros(n, rank, dtype=dtype),
        )
        dropped = self.cut_rank(k, n, rank)
        u, sigma, v = minor_triplets(weight, dropped) if dropped else self._nothing(weight)
        return Start(factors, Cut(u.to(dtype), sigma.to(dtype), v.to(dtype), 1.0))

    @staticmethod
    def _nothing(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, k = weight.shape
        return weight.new_empty(k, 0), weight.new_empty(0), weight.new_empty(n, 0)

    def penalty(self, layers: Sequence[Layer]) -> Tensor | None:
        if not layers:
            return None
        official = self.compat == "official"
        gram: Literal["inner", "outer"] = "outer" if official else "inner"
        sigmas: list[Tensor] = [layer.sigma for layer in layers if layer.sigma is not None]
        device, wide = sigmas[0].device, torch.promote_types(sigmas[0].dtype, torch.float32)
        values = torch.cat([sigma.to(device, wide) for sigma in sigmas])
        norms = linalg.orth_penalties([factor for layer in layers for factor in (layer.u, layer.v)], gram)
        penalty = self.beta * values.square().sum() + self.gamma * norms.sum()
        return penalty / len(layers) if official else penalty
