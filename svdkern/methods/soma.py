"""SoMA: MiLoRA's start, with a weight decay that is annealed while training.

    y = x W_res + s (x U) V^T + b  (r smallest triplets in U and V)          trains U, V: r (K + N) numbers
    weight decay at step t of T:  low + (high - low) (1 + cos(pi t / T)) / 2

The authors anneal the decay of every group of the optimizer, so that groups without any rise to ``low``; here groups of
weight decay 0 and groups without a factor of SoMA stay as they are. They also train the biases of the adapted layers, and
freeze the first blocks of the network: ``target_modules`` chooses blocks, biases stay frozen here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from svdkern.methods.method import Card, Layer
from svdkern.methods.milora import MiLoRA


@dataclass(frozen=True)
class SoMA(MiLoRA):
    """SoMA (Yun et al., 2025). Published: rank 16, alpha 16, learning rate 1e-4, 40000 steps.

    Args:
        weight_decay, final_weight_decay: of the optimizer at the first step and from the last one on.
        total_steps: T; 0 leaves the optimizer's weight decay alone.
    """

    weight_decay: float = 0.05
    final_weight_decay: float = 1e-5
    total_steps: int = 40000

    name: ClassVar[str] = "soma"
    citation: ClassVar[str] = (
        "S. Yun, S. Chae, D. Lee, Y. Ro: SoMA: Singular Value Decomposed Minor Components Adaptation for "
        "Domain Generalizable Representation Learning. CVPR 2025, arXiv 2412.04077"
    )
    card: ClassVar[Card] = Card(
        "x W_res + s (x U) V^T",
        "r smallest triplets, sqrt(S/s) on both sides, cut out; the weight's output",
        "r*(K + N)",
        hooks="after a step: the optimizer's weight decay follows a cosine",
        differs="The code's default start `sora_niter_4` gives *leading* triplets. Groups of the optimizer without weight decay "
        "keep none, those without factors keep theirs. Biases are not trained.",
    )
    published_rank: ClassVar[int] = 16

    def decay(self, step: int) -> float:
        """The weight decay after ``step`` steps."""
        done = min(1.0, step / self.total_steps)
        high, low = self.weight_decay, self.final_weight_decay
        return low + (high - low) * (1 + math.cos(math.pi * done)) / 2

    def on_step_end(self, layers: Sequence[Layer], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None or not self.total_steps:
            return
        factors = {id(factor) for layer in layers for factor in (layer.u, layer.v)}
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(id(parameter) in factors for parameter in group["params"]):
                group["weight_decay"] = self.decay(step)
