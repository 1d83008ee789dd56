"""CorDA: PiSSA in the metric of the layer's inputs.

    C = covariance of the inputs, damped          W C = P diag(S) Q^T          V = P sqrt(S/s), U = C^-1 Q sqrt(S/s)
    y = x W_res + s (x U) V^T,  W_res = W - s V U^T          trains U, V: r (K + N) numbers

Mode "ipm" (instruction-previewed) trains the r leading triplets, for data of the task to learn; "kpm" (knowledge-preserved) the
r smallest ones, for data of the knowledge to keep. Data: 256 samples of 2048 tokens in the paper. The authors divide each
batch by |max(x)|, which explodes where no activation is positive; here it is max |x|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Start
from svdkern.methods.pissa import PiSSA

Mode = Literal["ipm", "kpm"]


@dataclass(frozen=True)
class CorDA(PiSSA):
    """CorDA (Yang et al., 2024). Published: rank 128, s = 1, learning rate 2e-5.

    Args:
        mode: "ipm" or "kpm".
        damping: of the covariance, as a share of its diagonal's mean; doubled until it is positive definite.
    """

    mode: Mode = "ipm"
    damping: float = 0.01

    name: ClassVar[str] = "corda"
    citation: ClassVar[str] = (
        "Y. Yang, X. Li, Z. Zhou, S. L. Song, J. Wu, L. Nie, B. Ghanem: CorDA: Context-Oriented Decomposition Adaptation of Large "
        "Language Models for Task-Aware Parameter-Efficient Fine-tuning. NeurIPS 2024, arXiv 2406.05223"
    )
    card: ClassVar[Card] = Card(
        "x W_res + s (x U) V^T",
        "W C = P S Q^T; r leading (ipm) or smallest (kpm) triplets, V = P sqrt(S/s), U = C^-1 Q sqrt(S/s), cut out; the weight's "
        "output. **Data**: covariance of the inputs",
        "r*(K + N)",
        differs="Batches are divided by max |x|, not |max x|, and may have any size. A Cholesky solve in float64 in place of an "
        "inverse; damping grows until it exists.",
    )

    needs: ClassVar[str | None] = "covariance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode is {self.mode!r}, expected one of {', '.join(get_args(Mode))}")

    def start(
        self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype, statistic: Tensor | None = None
    ) -> Start:
        which: Literal["largest", "smallest"] = "largest" if self.mode == "ipm" else "smallest"
        u, s, v = linalg.weighted_factors(weight.detach(), rank, cov=statistic, damping=self.damping, which=which)
        root, start = (s / scale).sqrt(), self.start_dtype(weight.dtype, dtype)
        factors = Factors((u * root).to(start).to(dtype), None, None, (v * root).to(start).to(dtype))
        return Start(factors, self.cut(factors, scale, weight.dtype))
