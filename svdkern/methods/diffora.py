"""DiffoRA: a LoRA behind a gate for the whole layer; the layers with the largest gates are kept.

    y = x W + gamma s (x U) V^T          U ~ kaiming_uniform(a = sqrt 5), V = 0, gamma = 1, kept within [0, 1]
    trains U, V, gamma: r (K + N) + 1 numbers
    round end: gamma <- 1 in the ``keep`` share of layers with the largest gamma, 0 in the others, and stays so

With gamma = 0 the layer is the base layer, and neither U nor V has a gradient. No code was found. The paper alternates
between steps of gamma and of U and V: give them to the optimizer as two groups. Its weight sharing for the layers that are
left out is not here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern.methods.lora import LoRA
from svdkern.methods.method import Card, Factors, Layer, forget


@dataclass(frozen=True)
class DiffoRA(LoRA):
    """DiffoRA (Jiang et al., 2025).

    Args:
        keep: share of the layers that keep their adapter at the end of the search, in (0, 1].
    """

    keep: float = 0.5

    name: ClassVar[str] = "diffora"
    citation: ClassVar[str] = (
        "T. Jiang, H. Wang, C. Yuan: DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection. "
        "arXiv 2502.08905, 2025"
    )
    card: ClassVar[Card] = Card(
        "x W + gamma s (x U) V^T",
        "U random (kaiming), V = 0, gamma = 1; the weight's output",
        "r*(K + N) + 1",
        hooks="after a step: gamma within [0, 1]; at the end of the search: 1 in the layers that are kept, 0 elsewhere",
        differs="No code was found to compare with. The gate and its selection only: "
        "the weight sharing between unselected layers is not here.",
    )
    trains: ClassVar[tuple[str, ...]] = ("u", "v", "gamma")
    state: ClassVar[Mapping[str, torch.dtype]] = {"decided": torch.float32}
    composes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep is {self.keep}, expected 0 < keep <= 1")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(in_features, out_features, rank), "gamma": (1,), "decided": (1,)}

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        extra = {"gamma": weight.new_ones(1, dtype=dtype), "decided": weight.new_zeros(1, dtype=torch.float32)}
        return super().factors(weight, rank, scale, dtype)._replace(extra=extra)

    def product(self, layer: Layer) -> Factors:
        return Factors(layer.u, layer.gamma.expand(layer.u.shape[1]), None, layer.v)

    def on_step_end(self, layers: Sequence[Layer], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        for layer in layers:
            gamma = layer.gamma.clamp_(0.0, 1.0)
            torch.where(layer.decided > 0, (layer.decided > 1).to(gamma.dtype), gamma, out=gamma)

    def on_round_end(self, layers: Sequence[Layer], optimizer: torch.optim.Optimizer | None) -> None:
        count = math.ceil(self.keep * len(layers))
        gates = [float(layer.gamma) for layer in layers]
        ranked = sorted(range(len(layers)), key=lambda i: -gates[i])
        if count < len(layers) and gates[ranked[count - 1]] == gates[ranked[count]]:
            value = gates[ranked[count]]
            warnings.warn(
                f"{gates.count(value)} layers have the gate {value:g}, and not all of them can be among the {count} that stay: "
                "the first ones in the model do. Train the gates for longer, or with a larger learning rate",
                stacklevel=2,
            )
        for place, i in enumerate(ranked):
            layers[i].decided.fill_(2.0 if place < count else 1.0)
            layers[i].gamma.fill_(1.0 if place < count else 0.0)
            forget(optimizer, layers[i].gamma)
