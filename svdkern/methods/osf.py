"""OSF, "sculpting subspaces": the small singular triplets train, orthogonally to the large ones.

    W = W_high + V diag(sigma) U^T  (r smallest triplets)          y = x W_high + s ((x U) * sigma) V^T,  s sigma = S
    trains U, sigma, V: r (K + N + 1) numbers
    before a step:  dU -= U_high (U_high^T dU),  dV -= V_high (V_high^T dV)          after it, U and V likewise

The projection of the parameters is there because the elementwise scaling of Adam leads out of the subspace that the gradient was
projected to. ``rank`` is the number of triplets that *train*; None is half of them. On a side whose singular vectors span the
whole space, the complement of the high ones is spanned by the initial low ones, which the layer keeps anyway; on the other
side, if the layer is not square, U_high or V_high is kept, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Layer, Method


@dataclass(frozen=True)
class OSF(Method):
    """Sculpting Subspaces (Nayak et al., 2025). Published: half of the triplets train, learning rate 5e-6 to 1e-4.

    Args:
        project_parameters: project U and V after every step, too, not only their gradients.
    """

    project_parameters: bool = True

    name: ClassVar[str] = "osf"
    citation: ClassVar[str] = (
        "N. S. Nayak, K. Killamsetty, L. Han, A. Bhandwaldar, P. Chanda, K. Xu, H. Wang, A. Pareja, O. Silkin, M. Eyceoz, "
        "A. Srivastava: Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning. arXiv 2504.07097, 2025"
    )
    card: ClassVar[Card] = Card(
        "x W_high + s ((x U) * sigma) V^T",
        "r smallest triplets, s sigma = S, cut out; the weight's output",
        "r*(K + N + 1)",
        hooks="before a step the gradients, after it the factors are projected to the complement of the large triplets",
        differs="W_high is one dense weight: the layer is never rebuilt. PEFT projects gradients only, which is "
        "`project_parameters=False`. "
        "The paper's rule for ranks by layer is not here.",
    )
    published_rank: ClassVar[int] = 64
    trains: ClassVar[tuple[str, ...]] = ("u", "sigma", "v")
    has_sigma: ClassVar[bool] = True
    changes_residual: ClassVar[bool] = True

    def default_rank(self, in_features: int, out_features: int) -> int:
        return max(1, min(in_features, out_features) // 2)

    def check_scale(self, scale: float) -> None:
        super().check_scale(scale)
        if scale <= 0:
            raise ValueError(f"scale is {scale}, expected > 0: OSF starts with sigma = S/scale")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        shapes, high = super().shapes(in_features, out_features, rank), min(in_features, out_features) - rank
        if in_features > out_features:
            shapes["u_high"] = (in_features, high)
        elif out_features > in_features:
            shapes["v_high"] = (out_features, high)
        return shapes

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        n, k = weight.shape
        u, s, v = linalg.factors(weight.detach(), min(n, k))
        high = len(s) - rank
        extra = {}
        if k > n:
            extra["u_high"] = u[:, :high].to(dtype).contiguous()
        elif n > k:
            extra["v_high"] = v[:, :high].to(dtype).contiguous()
        low = (
            u[:, high:].to(dtype).contiguous(),
            (s[high:] / scale).to(dtype),
            None,
            v[:, high:].to(dtype).contiguous(),
        )
        return Factors(*low, extra)

    @torch.no_grad()
    def _project(self, layer: Layer, u: Tensor | None, v: Tensor | None) -> None:
        if u is not None:
            if layer.in_features > layer.out_features:
                linalg.project_out_(u, layer.u_high)
            else:
                linalg.project_onto_(u, layer.u0)
        if v is not None:
            if layer.out_features > layer.in_features:
                linalg.project_out_(v, layer.v_high)
            else:
                linalg.project_onto_(v, layer.v0)

    def on_backward_end(self, layers: Sequence[Layer], step: int) -> None:
        for layer in layers:
            self._project(layer, layer.u.grad, layer.v.grad)

    def on_step_end(self, layers: Sequence[Layer], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        if self.project_parameters:
            for layer in layers:
                self._project(layer, layer.u, layer.v)
