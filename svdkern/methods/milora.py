"""MiLoRA: PiSSA at the other end of the spectrum: the smallest singular triplets train, the rest is frozen.

U = Q sqrt(S/s), V = P sqrt(S/s)  (r smallest triplets)          W_res = W - s V U^T
y = x W_res + s (x U) V^T          trains U, V: r (K + N) numbers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern.methods.method import Card, Factors
from svdkern.methods.minor import minor_triplets
from svdkern.methods.pissa import PiSSA


@dataclass(frozen=True)
class MiLoRA(PiSSA):
    """MiLoRA (Wang et al., 2024). Published: rank 32 (64 for mathematics), alpha = rank."""

    name: ClassVar[str] = "milora"
    citation: ClassVar[str] = (
        "H. Wang, Y. Li, S. Wang, G. Chen, Y. Chen: MiLoRA: Harnessing Minor Singular Components for "
        "Parameter-Efficient LLM Finetuning. NAACL 2025, arXiv 2406.09044"
    )
    card: ClassVar[Card] = Card(
        "x W_res + s (x U) V^T",
        "r smallest triplets, sqrt(S/s) on both sides, cut out; the weight's output",
        "r*(K + N)",
        differs="Written from the paper's equations 3 to 5, not compared with the authors' code.",
    )
    published_rank: ClassVar[int] = 32

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        u, s, v = minor_triplets(weight, rank)
        root, start = (s / scale).sqrt(), self.start_dtype(weight.dtype, dtype)
        return Factors((u * root).to(start).to(dtype), None, None, (v * root).to(start).to(dtype))
