"""SST, sparse spectral training: the weight is its SVD; all singular values train, and of the vectors a sample.

    y = ((x U) * sigma) V^T + b,  no W          U, sigma, V from the SVD of the weight, k = min(K, N) triplets
    trains sigma (k), and r columns of U and V: k + r (K + N) numbers
    gradients of the columns:  dL/dW v_i and dL/dW^T u_i, those of the product divided by sigma_i
    after a step:  sigma <- max(sigma, 0), the columns <- unit norm
    every ``interval`` steps:  other r columns, drawn with p_i = (1/k + sigma_i / sum sigma) / 2
    every ceil(k / r) intervals (a round):  the SVD of the present product

The columns that train are parameters of their own, so that gradients and optimizer states have their size; a call writes them
into U and V, and its backward makes their gradients alone. While sigma_i is
0 (or denormal in float32) its columns stand still (the paper's gradient is a limit there). Use no weight decay on them. The
lengths of interval and round are not verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.autograd import ColumnsFunction
from svdkern.backends.dispatch import choose_path
from svdkern.methods.method import Card, Factors, Layer, Method, forget
from svdkern.methods.random_numbers import choose, fresh_draws


@dataclass(frozen=True)
class SST(Method):
    """Sparse Spectral Training (Zhao et al., 2025). Published: rank 64.

    Args:
        interval: steps between two draws of columns.
    """

    interval: int = 200

    name: ClassVar[str] = "sst"
    citation: ClassVar[str] = (
        "J. Zhao, Y. Zhang, X. Li, H. Liu, C. V. Cannistraci: Sparse Spectral Training and Inference on Euclidean and Hyperbolic "
        "Neural Networks. ICML 2025, arXiv 2405.15481"
    )
    card: ClassVar[Card] = Card(
        "((x U) * sigma) V^T, no W",
        "all triplets of the weight; the weight's output",
        "min(K, N) + r*(K + N)",
        hooks="after a step: sigma >= 0, unit columns; every interval other columns; every round an SVD of the product",
        differs="No code was found to compare with. The lengths of interval and round are not verified. "
        "The warm-up of the learning rate after a draw is the caller's.",
    )
    published_rank: ClassVar[int] = 64
    trains: ClassVar[tuple[str, ...]] = ("sigma", "u_active", "v_active")
    draws: ClassVar[bool] = True
    has_residual: ClassVar[bool] = False
    composes: ClassVar[bool] = True
    state: ClassVar[Mapping[str, torch.dtype]] = {"active": torch.int64, "draws": torch.int64}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval < 1:
            raise ValueError(f"interval is {self.interval}, expected >= 1")

    def check_scale(self, scale: float) -> None:
        if scale != 1.0:
            raise ValueError(f"scale is {scale}, expected 1 (leave alpha out): the product is the whole weight")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        k = min(in_features, out_features)
        return {
            "u": (in_features, k), "sigma": (k,), "v": (out_features, k),
            "u_active": (in_features, rank), "v_active": (out_features, rank), "active": (rank,), "draws": (2,),
        }  # fmt: skip

    def rank_of(self, layer: Layer) -> int:
        return layer.active.shape[0]

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        u, s, v = (factor.to(dtype) for factor in linalg.factors(weight.detach(), min(weight.shape)))
        draws = fresh_draws(weight.device)
        active = self._draw(draws, s, rank)
        extra = {"u_active": u[:, active].clone(), "v_active": v[:, active].clone(), "active": active, "draws": draws}
        return Factors(u, s, None, v, extra)

    @staticmethod
    def _draw(draws: Tensor, sigma: Tensor, count: int) -> Tensor:
        draws[1] += 1
        values = sigma.double()
        share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return choose(draws, (1.0 / len(values) + share) / 2, count)

    def product(self, layer: Layer) -> Factors:
        u = layer.u.index_copy(1, layer.active, layer.u_active)
        return Factors(u, layer.sigma, None, layer.v.index_copy(1, layer.active, layer.v_active))

    def call_factors(self, layer: Layer, x: Tensor) -> Factors:
        """U and V with the active columns written into them, whatever their version: what a backward needs unchanged are the
        active columns, which ``finish`` saves."""
        if not self._by_columns(layer):
            return self.product(layer)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter((layer.u, layer.v)):
            layer.u.index_copy_(1, layer.active, layer.u_active)
            layer.v.index_copy_(1, layer.active, layer.v_active)
        return Factors(layer.u, layer.sigma, None, layer.v)

    def finish(self, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and (layer.u_active.requires_grad or layer.v_active.requires_grad)
        if not trains or not self._by_columns(layer):
            return y
        assert layer.sigma is not None
        sigma = layer.sigma.detach()[layer.active]
        backend = choose_path(x, layer.v_active, None, 0)
        found: Tensor = ColumnsFunction.apply(
            backend, y, x.detach().to(y.dtype), layer.u_active, sigma, layer.v_active, layer.scale
        )
        return found

    @staticmethod
    def _by_columns(layer: Layer) -> bool:
        """Not where something looks on that a tensor written in place would escape, nor where a mask is drawn."""
        looked_on = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        return not looked_on and not (layer.training and layer.dropout_p)

    @torch.no_grad()
    def on_backward_end(self, layers: Sequence[Layer], step: int) -> None:
        for layer in layers:
            assert layer.sigma is not None
            wide = torch.promote_types(layer.sigma.dtype, torch.float32)  # 1 / sigma overflows float16 below 1.5e-5
            sigma = layer.sigma[layer.active].to(wide)
            inverse = torch.where(sigma >= torch.finfo(wide).tiny, 1 / sigma, 0.0)
            for grad in (layer.u_active.grad, layer.v_active.grad):
                if grad is not None:
                    grad.copy_(grad.to(wide) * inverse)

    def on_step_end(self, layers: Sequence[Layer], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        for layer in layers:
            assert layer.sigma is not None
            layer.sigma.clamp_(min=0.0)
            for columns in (layer.u_active, layer.v_active):
                columns.div_(torch.linalg.vector_norm(columns, dim=0).clamp_min(torch.finfo(columns.dtype).tiny))
            if step % self.interval == 0:
                rounds = -(-layer.sigma.shape[0] // layer.active.shape[0])
                self._next(layer, optimizer, new_round=step // self.interval % rounds == 0)

    def on_round_end(self, layers: Sequence[Layer], optimizer: torch.optim.Optimizer | None) -> None:
        for layer in layers:
            self._next(layer, optimizer, new_round=True)

    def _next(self, layer: Layer, optimizer: torch.optim.Optimizer | None, new_round: bool) -> None:
        """Put the active columns back, decompose again if a round is over, and draw others."""
        sigma = layer.sigma
        assert sigma is not None
        layer.u.index_copy_(1, layer.active, layer.u_active)
        layer.v.index_copy_(1, layer.active, layer.v_active)
        if new_round:
            u, s, v = linalg.resvd(layer.u, sigma, layer.v)
            layer.u.copy_(u)
            sigma.copy_(s)
            layer.v.copy_(v)
            forget(optimizer, sigma)
        layer.active.copy_(self._draw(layer.draws, sigma, layer.active.shape[0]))
        layer.u_active.copy_(layer.u[:, layer.active])
        layer.v_active.copy_(layer.v[:, layer.active])
        forget(optimizer, layer.u_active, layer.v_active)
