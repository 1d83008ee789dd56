"""LoRA-SB: LoRA-XS between the singular vectors of the first step of full fine-tuning.

    G = gradient of the weight on a few batches          -eta sign(G) ~ P diag(S) Q^T  (r leading triplets; sign: Adam's first step)
    U = Q, V = P, R = diag(S)          y = x W + ((x U) R) V^T          trains R: r^2 numbers

W is not reduced: the layer starts one step ahead, not as the weight. eta is the learning rate of the first step, which under a
linear warm-up is ``learning_rate / warmup_steps``. There is no alpha / r: leave alpha out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Method, Start


@dataclass(frozen=True)
class LoRASB(Method):
    """LoRA-SB (Ponkshe et al., 2024). Published: rank 96 (24 for RoBERTa-large), learning rate 1e-4, 2 % of the steps warm-up.

    Args:
        learning_rate: peak learning rate of the run.
        warmup_steps: of its linear warm-up; 0 for none.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 0

    name: ClassVar[str] = "lora-sb"
    citation: ClassVar[str] = (
        "K. Ponkshe, R. Singhal, E. Gorbunov, A. Tumanov, S. Horvath, P. Vepakomma: Initialization using Update Approximation is a "
        "Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning. arXiv 2411.19557, 2024"
    )
    card: ClassVar[Card] = Card(
        "x W + ((x U) R) V^T",
        "-eta sign(gradient) = P S Q^T; U = Q, V = P frozen, R = S: one step ahead, so **not** the weight's output. **Data**: "
        "gradient of the weight",
        "r*r",
        differs="eta is the first step's rate; the code divides by a warm-up counted in calibration batches, about ten times too "
        "long. Factors have `adapter_dtype`; the code rounds them to bfloat16.",
    )
    published_rank: ClassVar[int] = 96
    trains: ClassVar[tuple[str, ...]] = ("core",)
    needs: ClassVar[str | None] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected > 0")

    def check_scale(self, scale: float) -> None:
        if scale != 1.0:
            raise ValueError(f"scale is {scale}, expected 1 (leave alpha out): the core has the length of a step")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(in_features, out_features, rank), "core": (rank, rank)}

    def start(
        self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype, statistic: Tensor | None = None
    ) -> Start:
        assert statistic is not None
        if statistic.shape != weight.shape:
            raise ValueError(f"gradient is {tuple(statistic.shape)}, expected the weight's shape {tuple(weight.shape)}")
        eta = self.learning_rate / max(1, self.warmup_steps)
        u, s, v = linalg.step_factors(statistic, rank, eta)
        return Start(Factors(u.to(dtype), None, torch.diag(s).to(dtype), v.to(dtype)), None)
