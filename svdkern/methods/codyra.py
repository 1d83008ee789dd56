"""CoDyRA: a LoRA for every task whose ranks are gated, and thinned out while it trains; what is left is kept.

    y = x W + (x U_past * w_past) V_past^T + ((x U) * w) V^T
    U ~ kaiming_uniform(a = sqrt 5), w ~ N(0, 1), V = 0          trains U, w, V: r (K + N + 1) numbers
    after step t > D of T:   w <- sign(w) max(|w| - kappa, 0),   kappa from 0 to kappa_max in 50 equal steps
    task end: ranks with w = 0 are dropped, the others go into the past, and the next task starts with fresh ones

The authors merge a finished task into W. Here its ranks stay factors of the same call, frozen, which computes the same,
and a saved adapter still belongs to the original weight; ``svdkern.merge`` merges everything. There is no alpha / r: leave
alpha out. ``compat="official"`` is the code's threshold, which shrinks by kappa and then sets to 0 what is within kappa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.lora import kaiming
from svdkern.methods.method import Card, Compat, Factors, Layer, Method, forget
from svdkern.methods.past import into_past, with_past
from svdkern.methods.random_numbers import fresh_draws, normal, uniform

LEVELS = 50


@dataclass(frozen=True)
class CoDyRA(Method):
    """CoDyRA (Lu et al., 2024). Published: rank 16, 1000 steps a task, learning rate 1e-3, AdamW with beta_2 = 0.9999.

    Args:
        kappa: the last threshold, kappa_max.
        total_steps: T, steps of a task.
        dense_share: D / T.
        compat: "paper" (soft threshold) or "official".
    """

    kappa: float = 7e-4
    total_steps: int = 1000
    dense_share: float = 0.5
    compat: Compat = "paper"

    name: ClassVar[str] = "codyra"
    citation: ClassVar[str] = (
        "H. Lu, C. Zhao, J. Xue, L. Yao, K. Moore, D. Gong: Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual "
        "Learning Vision-Language Models with Dynamic Rank-Selective LoRA. arXiv 2412.01004, 2024"
    )
    card: ClassVar[Card] = Card(
        "x W + (past tasks) + ((x U) * w) V^T",
        "U random (kaiming), w random (normal), V = 0; the weight's output",
        "r*(K + N + 1)",
        hooks="after a step: w <- soft threshold; after a task: ranks with w = 0 are dropped, the others frozen, fresh ones start",
        differs='Tasks stay frozen factors instead of being merged into W. The code\'s threshold is `compat="official"` (but '
        "for values that equal kappa to the bit, which the code lets pass).",
    )
    published_rank: ClassVar[int] = 16
    trains: ClassVar[tuple[str, ...]] = ("u", "sigma", "v")
    state: ClassVar[Mapping[str, torch.dtype]] = {"draws": torch.int64}
    draws: ClassVar[bool] = True
    has_sigma: ClassVar[bool] = True
    composes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.dense_share <= 1.0:
            raise ValueError(f"dense_share is {self.dense_share}, expected 0 <= dense_share <= 1")

    def check_scale(self, scale: float) -> None:
        if scale != 1.0:
            raise ValueError(f"scale is {scale}, expected 1 (leave alpha out): the ranks' gates are the scale")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        past = {"past_u": (in_features, -1), "past_sigma": (-1,), "past_v": (out_features, -1)}
        return {**super().shapes(in_features, out_features, rank), **past, "draws": (2,)}

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        n, k = weight.shape
        past = {name: weight.new_empty(shape, dtype=dtype) for name, shape in
                (("past_u", (k, 0)), ("past_sigma", (0,)), ("past_v", (n, 0)))}  # fmt: skip
        past["draws"] = fresh_draws(weight.device)
        sigma = torch.randn(rank, device=weight.device).to(dtype)
        return Factors(kaiming(weight, rank, dtype), sigma, None, weight.new_zeros(n, rank, dtype=dtype), past)

    def product(self, layer: Layer) -> Factors:
        return with_past(layer)

    def threshold(self, step: int) -> float:
        """kappa after ``step`` steps of a task; 0 while it is dense."""
        dense = int(self.dense_share * self.total_steps)
        if step <= dense:
            return 0.0
        sparse = self.total_steps - dense
        if sparse >= LEVELS:
            level = (step - dense) // (sparse // LEVELS)
        else:  # not every level has a step; the last one has
            level = (step - dense) * (LEVELS - 1) // max(1, sparse)
        return self.kappa * min(LEVELS - 1, level) / (LEVELS - 1)

    def on_step_end(self, layers: Sequence[Layer], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        kappa = self.threshold(step)
        if kappa:
            for layer in layers:
                assert layer.sigma is not None
                linalg.soft_threshold_(layer.sigma, kappa, twice=self.compat == "official")

    def on_round_end(self, layers: Sequence[Layer], optimizer: torch.optim.Optimizer | None) -> None:
        for layer in layers:
            u, sigma, v = layer.u, layer.sigma, layer.v
            assert sigma is not None
            kept = sigma != 0
            into_past(layer, u[:, kept], sigma[kept], v[:, kept])
            layer.draws[1] += 1
            u.copy_((2.0 * uniform(layer.draws, *u.shape) - 1.0) / math.sqrt(u.shape[0]))  # kaiming, as at the start
            sigma.copy_(normal(layer.draws, 1, len(sigma), stream=1)[0])
            v.zero_()
            forget(optimizer, u, sigma, v)
