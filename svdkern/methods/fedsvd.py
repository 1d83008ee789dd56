"""FedSVD: clients train the output side of a LoRA; after a round the server makes the input side orthonormal again.

    y = x W + s (x U) V^T          U ~ kaiming_uniform(a = sqrt 5) frozen, V = 0          trains V: r N numbers
    round end:  V U^T = P diag(S) Q^T,   U <- Q,   V <- P diag(S)

The clients' V are averaged by whoever runs the rounds (U is the same for all); then ``on_round_end`` changes the factors and
not their product. The authors take a dense SVD of the (N, K) product; here it is two QR decompositions and an SVD of r x r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from svdkern import linalg
from svdkern.methods.lora import LoRA
from svdkern.methods.method import Card, Layer, forget


@dataclass(frozen=True)
class FedSVD(LoRA):
    """FedSVD (Lee et al., 2025). Published: rank 8, alpha 8, SGD with learning rate 0.5, 10 local steps, 100 rounds."""

    name: ClassVar[str] = "fedsvd"
    citation: ClassVar[str] = (
        "S. Lee, S. Park, D. B. Lee, D. Wagner, H. Seong, T. Bocklet, J. Lee, S. J. Hwang: FedSVD: Adaptive Orthogonalization "
        "for Private Federated Learning with LoRA. NeurIPS 2025, arXiv 2505.12805"
    )
    card: ClassVar[Card] = Card(
        "x W + s (x U) V^T",
        "U random (kaiming) and frozen, V = 0; the weight's output",
        "r*N",
        hooks="after a round: V U^T = P S Q^T, U <- Q, V <- P S; the optimizer forgets V",
        differs="QR and an SVD of r x r in place of a dense SVD. Averaging the clients, and the noise of differential privacy, "
        "are the caller's.",
    )
    trains: ClassVar[tuple[str, ...]] = ("v",)

    def on_round_end(self, layers: Sequence[Layer], optimizer: torch.optim.Optimizer | None) -> None:
        for layer in layers:
            v, u_t = linalg.refactor(layer.v, layer.u.t())
            layer.u.copy_(u_t.t())
            layer.v.copy_(v)
            forget(optimizer, layer.v)
