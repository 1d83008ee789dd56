"""LoRA: a random input side, a zero output side, the weight untouched.

y = x W + s (x U) V^T          U ~ kaiming_uniform(a = sqrt 5), V = 0          trains U, V: r (K + N) numbers
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern.methods.method import Factors, Method


@dataclass(frozen=True)
class LoRA(Method):
    """LoRA (Hu et al., 2021). ``lora_A.weight`` is ``u.t()``, ``lora_B.weight`` is ``v``."""

    name: ClassVar[str] = "lora"
    citation: ClassVar[str] = (
        "E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen: "
        "LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022, arXiv 2106.09685"
    )
    published_rank: ClassVar[int] = 8
    trains: ClassVar[tuple[str, ...]] = ("u", "v")
    has_sigma: ClassVar[bool] = False
    changes_residual: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        n, k = weight.shape
        lora_a = torch.empty(rank, k, device=weight.device)
        if rank:
            torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        return Factors(lora_a.t().to(dtype).contiguous(), None, None, weight.new_zeros(n, rank, dtype=dtype))
