"""LoRA-XS: a small dense core trains between frozen singular vectors of the weight.

    U = Q_r diag(S_r), V = P_r  (r leading triplets)          R ~ N(0, 1e-5^2)
    y = x W + s ((x U) R) V^T          trains R: r^2 numbers

The input side carries all of S. R starts small, not at zero: the layer starts near the weight. The paper writes the core
between the factors in two orders; here it is the matrix that follows ``x U`` (the authors' ``default_lora_latent_mapping``
holds its transpose).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Method
from svdkern.methods.minor import minor_triplets

Which = Literal["top", "bottom"]


@dataclass(frozen=True)
class LoRAXS(Method):
    """LoRA-XS (Balazy et al., 2024). Published: ranks 4 to 25.

    Args:
        std: of the entries that R starts with.
        which: "top" or "bottom", the end of the spectrum that U and V come from.
    """

    std: float = 1e-5
    which: Which = "top"

    name: ClassVar[str] = "lora-xs"
    citation: ClassVar[str] = (
        "K. Balazy, M. Banaei, K. Aberer, J. Tabor: LoRA-XS: Low-Rank Adaptation with Extremely Small "
        "Number of Parameters. arXiv 2405.17604, 2024"
    )
    card: ClassVar[Card] = Card(
        "x W + s ((x U) R) V^T",
        "U = Q_r S_r, V = P_r frozen, R random (normal, 1e-5); the weight's output to about 1e-5",
        "r*r",
        differs="A converged SVD in place of a randomized one. U and V are saved with R, so that loading needs no SVD.",
    )
    published_rank: ClassVar[int] = 16
    trains: ClassVar[tuple[str, ...]] = ("core",)
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.which not in get_args(Which):
            raise ValueError(f"which is {self.which!r}, expected one of {', '.join(get_args(Which))}")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(in_features, out_features, rank), "core": (rank, rank)}

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        find = linalg.factors if self.which == "top" else minor_triplets
        u, s, v = find(weight.detach(), rank)
        core = self.std * torch.randn(rank, rank, device=weight.device)
        return Factors((u * s).to(dtype), None, core.to(dtype), v.to(dtype))
