"""LoRA: a random input side, a zero output side, the weight untouched.

y = x W + s (x U) V^T          U ~ kaiming_uniform(a = sqrt 5), V = 0          trains U, V: r (K + N) numbers
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern.methods.method import Card, Factors, Method


def kaiming(weight: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """(K, rank): the transposed ``lora_A.weight`` of a fresh LoRA, from torch's generator."""
    lora_a = torch.empty(rank, weight.shape[1], device=weight.device)
    if rank:
        torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    return lora_a.t().to(dtype).contiguous()


@dataclass(frozen=True)
class LoRA(Method):
    """LoRA (Hu et al., 2021). ``lora_A.weight`` is ``u.t()``, ``lora_B.weight`` is ``v``."""

    name: ClassVar[str] = "lora"
    citation: ClassVar[str] = (
        "E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen: "
        "LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022, arXiv 2106.09685"
    )
    card: ClassVar[Card] = Card("x W + s (x U) V^T", "U random (kaiming), V = 0; the weight's output", "r*(K + N)")
    published_rank: ClassVar[int] = 8
    trains: ClassVar[tuple[str, ...]] = ("u", "v")
    draws: ClassVar[bool] = True

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        return Factors(kaiming(weight, rank, dtype), None, None, weight.new_zeros(weight.shape[0], rank, dtype=dtype))
