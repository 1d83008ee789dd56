"""OSF, "sculpting subspaces": the small singular triplets train, orthogonally to the large ones.

    W = W_high + V diag(sigma) U^T  (r smallest triplets)          y = x W_high + s ((x U) * sigma) V^T,  s sigma = S
    trains U, sigma, V: r (K + N + 1) numbers
    before a step:  dU -= U_high (U_high^T dU),  dV -= V_high (V_high^T dV)          after it, U and V likewise
    task end (``on_round_end``):  of the SVD of the present weight, the larger triplets that still train join the large ones

The projection of the parameters is there because the elementwise scaling of Adam leads out of the subspace that the gradient was
projected to. ``rank`` is the number of triplets that *train*; None is half of them. On a side whose singular vectors span the
whole space, the complement of the high ones is spanned by the initial low ones, which the layer keeps anyway; on the other
side, if the layer is not square, U_high or V_high is kept, too.

These products are a large part of a step. Under a bfloat16 weight gradients, which have its rounding error anyway, are projected
in bfloat16, and parameters in float32 but for a correction.

What trains is orthogonal to the large triplets on both sides, so that the SVD of the present weight is theirs and that of
``V diag(sigma) U^T``. At a task's end the latter's larger triplets become frozen factors of the same call (``past_u``,
``past_sigma``, ``past_v``), and the next task is kept orthogonal to them, too. W_high stays, and a saved adapter still belongs to
the original weight. What once is large stays so, even where a trained value grows beyond it. U, sigma and V keep their size: a
column for each triplet that joined is 0 from then on, and stays 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.methods.method import Card, Factors, Layer, Method, forget
from svdkern.methods.past import into_past, with_past


@dataclass(frozen=True)
class OSF(Method):
    """Sculpting Subspaces (Nayak et al., 2025). Published: half of the triplets train, learning rate 5e-6 to 1e-4.

    Args:
        project_parameters: project U and V after every step, too, not only their gradients.
        grow: share (rounded down) of the triplets that still train which join the large ones at the end of a task. 0 joins none,
            and the next task may overwrite what this one learned. Not published: the paper chooses ranks by layer importance.
    """

    project_parameters: bool = True
    grow: float = 0.5

    name: ClassVar[str] = "osf"
    citation: ClassVar[str] = (
        "N. S. Nayak, K. Killamsetty, L. Han, A. Bhandwaldar, P. Chanda, K. Xu, H. Wang, A. Pareja, O. Silkin, M. Eyceoz, "
        "A. Srivastava: Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning. arXiv 2504.07097, 2025"
    )
    card: ClassVar[Card] = Card(
        "x W_high + s ((x U) * sigma) V^T",
        "r smallest triplets, s sigma = S, cut out; the weight's output",
        "r*(K + N + 1)",
        hooks="before a step the gradients, after it the factors are projected to the complement of the large triplets; after a "
        "task the larger half of the triplets that train (`grow`) joins the large ones",
        differs="W_high is one dense weight: the layer is never rebuilt. PEFT projects gradients only, which is "
        "`project_parameters=False`. "
        "The paper's rule for ranks by layer, and after a task, is not here. Triplets that joined are frozen factors.",
    )
    published_rank: ClassVar[int] = 64
    trains: ClassVar[tuple[str, ...]] = ("u", "sigma", "v")
    has_sigma: ClassVar[bool] = True
    changes_residual: ClassVar[bool] = True
    composes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grow > 1:
            raise ValueError(f"grow is {self.grow}, expected 0 <= grow <= 1")

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
        return shapes | {"past_u": (in_features, -1), "past_sigma": (-1,), "past_v": (out_features, -1)}

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
        for name, shape in (("past_u", (k, 0)), ("past_sigma", (0,)), ("past_v", (n, 0))):
            extra[name] = weight.new_empty(shape, dtype=dtype)
        return Factors(*low, extra)

    def product(self, layer: Layer) -> Factors:
        return with_past(layer)

    @torch.no_grad()
    def _project(
        self, layer: Layer, u: Tensor | None, v: Tensor | None, products: Sequence[torch.dtype | None] | None
    ) -> None:
        first = products[0] if products else None
        if u is not None:
            if layer.in_features > layer.out_features:
                linalg.project_out_(u, layer.u_high, first)
            else:
                linalg.project_onto_(u, layer.u0, products)
            linalg.project_out_(u, layer.past_u, first)
        if v is not None:
            if layer.out_features > layer.in_features:
                linalg.project_out_(v, layer.v_high, first)
            else:
                linalg.project_onto_(v, layer.v0, products)
            linalg.project_out_(v, layer.past_v, first)

    def on_backward_end(self, layers: Sequence[Layer], step: int) -> None:
        for layer in layers:
            self._project(layer, layer.u.grad, layer.v.grad, (torch.bfloat16,) if _is_rough(layer) else None)

    def on_step_end(self, layers: Sequence[Layer], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        if self.project_parameters:
            for layer in layers:
                self._project(layer, layer.u, layer.v, (None, torch.bfloat16) if _is_rough(layer) else None)

    def on_round_end(self, layers: Sequence[Layer], optimizer: torch.optim.Optimizer | None) -> None:
        for layer in layers:
            u, sigma, v = layer.u, layer.sigma, layer.v
            assert sigma is not None
            live = len(sigma) - len(layer.past_sigma)
            joining = int(self.grow * live)
            if not joining:
                continue
            triplets = linalg.resvd(u, sigma, v)  # the largest first
            into_past(layer, *(factor[..., :joining] for factor in triplets))
            for parameter, factor in zip((u, sigma, v), triplets, strict=True):
                parameter.zero_()
                parameter[..., : live - joining] = factor[..., joining:live]
            forget(optimizer, u, sigma, v)


def _is_rough(layer: Layer) -> bool:
    """Whether gradients have bfloat16's rounding error anyway, under factors that do not."""
    return bool(layer.residual.dtype == torch.bfloat16 and layer.u.dtype == torch.float32)
