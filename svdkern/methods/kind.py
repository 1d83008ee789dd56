"""KIND: a weight as its singular triplets, some of them for every class ("learngenes"), the others for one group each ("tailors").

    y = ((x U) * sigma * [1, g(c)]) V^T + b,  no W          g(c) in {0, 1}: tailor j is on where j G / T (rounded down) = c
    L learngenes and T tailors, L + T = r, from the r leading triplets of the weight          trains all: r (K + N + 1) numbers
    afterwards (``on_round_end``, once): learngenes are frozen, and T fresh tailors train

c is the group of the sample, the same for all of its positions::

    with svdkern.methods.kind.classes(groups):      # (batch,), 0 <= c < G
        loss = model(x).square().mean()
    loss.backward()

With r = min(K, N) and one group a layer starts as the weight. The published numbers of learngenes and tailors, and how fresh
tailors are drawn, are not verified: here their columns are random (a function of the learngenes and of how often tailors were
drawn, which ``stage`` counts) and of unit length, and their sigma is 0. ``renew_tailors`` draws others, for another task. What
is computed again in the backward (activation checkpointing) needs the backward inside the ``with``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from svdkern import linalg
from svdkern.fingerprint import sha256
from svdkern.methods.method import Card, Factors, Layer, Method, forget
from svdkern.methods.random_numbers import normal

Stage = Literal["together", "tailors"]
_TRIPLETS = ("u", "sigma", "v")
_TAILORS = ("tailor_u", "tailor_sigma", "tailor_v")
_classes: ContextVar[Tensor | None] = ContextVar("svdkern_classes", default=None)


@contextmanager
def classes(groups: Tensor) -> Iterator[None]:
    """Within it, sample i of a batch belongs to class group ``groups[i]``.

    Args:
        groups: integers (batch,) on the model's device, the first dimension of what every layer gets.
    """
    if not isinstance(groups, Tensor) or groups.dim() != 1 or groups.is_floating_point():
        what = f"{groups.dtype} {tuple(groups.shape)}" if isinstance(groups, Tensor) else f"a {type(groups).__name__}"
        raise ValueError(f"groups is {what}, expected integers (batch,)")
    token = _classes.set(groups)
    try:
        yield
    finally:
        _classes.reset(token)


@dataclass(frozen=True)
class KIND(Method):
    """KIND (Xie et al., 2025). Published for diffusion transformers, trained from scratch.

    Args:
        groups: G, class groups; with one, every tailor is always on.
        tailor_share: T / r, rounded down.
        stage: "together", or "tailors" once the learngenes are frozen (``on_round_end`` sets it).
    """

    groups: int = 1
    tailor_share: float = 0.5
    stage: Stage = "together"

    name: ClassVar[str] = "kind"
    citation: ClassVar[str] = (
        "Y. Xie, F. Feng, R. Shi, J. Wang, Y. Rui, X. Geng: KIND: Knowledge Integration and Diversion for Training Decomposable "
        "Models. ICML 2025, arXiv 2408.07337"
    )
    card: ClassVar[Card] = Card(
        "((x U) * sigma * [1, g(class)]) V^T, no W",
        "r leading triplets of the weight; its output only if these are all (`rank=None`) and there is one group, else **not**",
        "r*(K + N + 1)",
        hooks="at the end of the first stage: learngenes are frozen, tailors drawn anew (later ones: `kind.renew_tailors`)",
        differs="Not compared with the authors' code. Numbers of learngenes and "
        "tailors and the draw of fresh tailors are not verified.",
    )
    published_rank: ClassVar[int] = 1152
    state: ClassVar[Mapping[str, torch.dtype]] = {"stage": torch.int64}
    has_sigma: ClassVar[bool] = True
    has_residual: ClassVar[bool] = False
    composes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise ValueError(f"groups is {self.groups}, expected >= 1")
        if self.tailor_share > 1:
            raise ValueError(f"tailor_share is {self.tailor_share}, expected 0 <= tailor_share <= 1")
        if self.stage not in get_args(Stage):
            raise ValueError(f"stage is {self.stage!r}, expected one of {', '.join(get_args(Stage))}")

    @property
    def trains(self) -> tuple[str, ...]:  # type: ignore[override]
        return _TAILORS if self.stage == "tailors" else _TRIPLETS + _TAILORS

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.groups == 1

    def default_rank(self, in_features: int, out_features: int) -> int:
        return min(in_features, out_features)

    def check_scale(self, scale: float) -> None:
        if scale != 1.0:
            raise ValueError(f"scale is {scale}, expected 1 (leave alpha out): the product is the whole weight")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        tailors = int(self.tailor_share * rank)
        made = dict(super().shapes(in_features, out_features, rank - tailors))
        return (
            made
            | {f"tailor_{name}": shape for name, shape in super().shapes(in_features, out_features, tailors).items()}
            | {"stage": (1,)}
        )

    def rank_of(self, layer: Layer) -> int:
        return layer.u.shape[1] + layer.tailor_u.shape[1]

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        genes = rank - int(self.tailor_share * rank)
        u, s, v = (factor.to(dtype) for factor in linalg.factors(weight.detach(), rank))
        tailors = {"tailor_u": u[:, genes:], "tailor_sigma": s[genes:], "tailor_v": v[:, genes:]}
        return Factors(
            u[:, :genes].contiguous(),
            s[:genes].clone(),
            None,
            v[:, :genes].contiguous(),
            {
                **{name: factor.clone(memory_format=torch.contiguous_format) for name, factor in tailors.items()},
                "stage": torch.full((1,), int(self.stage == "tailors"), dtype=torch.int64, device=u.device),
            },
        )

    def product(self, layer: Layer) -> Factors:
        assert layer.sigma is not None
        return Factors(
            torch.cat([layer.u, layer.tailor_u], dim=1),
            torch.cat([layer.sigma, layer.tailor_sigma]),
            None,
            torch.cat([layer.v, layer.tailor_v], dim=1),
        )

    def gate(self, layer: Layer, x: Tensor) -> tuple[Any, Tensor | None]:
        if self.groups == 1:
            return None, None
        given = _classes.get()
        if given is None:
            raise RuntimeError(
                "the samples have no class groups: run the model within svdkern.methods.kind.classes(groups)"
            )
        if x.dim() < 2 or len(given) != len(x):
            raise ValueError(f"there are {len(given)} class groups, expected one for each sample of x {tuple(x.shape)}")
        group = given.reshape(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
        return self.table(layer.u.shape[1], layer.tailor_u.shape[1], layer.u), group

    def table(self, genes: int, tailors: int, like: Tensor) -> Tensor:
        """(G, r): which components are on for each group."""
        owner = torch.arange(tailors, device=like.device) * self.groups // max(1, tailors)
        group = torch.arange(self.groups, device=like.device)
        on = (owner == group.unsqueeze(1)).to(like.dtype)
        return torch.cat([on.new_ones(self.groups, genes), on], dim=1)

    def settle(self, layer: Layer) -> None:
        if layer.stage.is_meta or bool(layer.stage > 0) == (self.stage == "tailors"):
            return
        stage: Stage = "together" if self.stage == "tailors" else "tailors"
        layer.config = dataclasses.replace(self, stage=stage)
        for name in _TRIPLETS:
            getattr(layer, name).requires_grad_(stage == "together")

    def on_round_end(self, layers: Sequence[Layer], optimizer: torch.optim.Optimizer | None) -> None:
        if self.stage == "together":  # once: what has been trained since is not to be lost
            renew_tailors(layers, optimizer)


@torch.no_grad()
def renew_tailors(layers: Iterable[Layer], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Freeze the learngenes of KIND's layers, and draw tailors anew, with sigma = 0: what was trained in the old ones is lost.

    Args:
        layers: the model's (``svdkern.model.adapted_layers``); those of other methods are left alone.
        optimizer: is to forget them.
    """
    for layer in layers:
        if not isinstance(layer.config, KIND):
            continue
        layer.stage.add_(1)
        layer.config.settle(layer)
        seed = int.from_bytes(sha256(layer.u)[:8], "little", signed=True)
        draws = torch.cat([torch.full_like(layer.stage, seed), layer.stage])
        for stream, columns in enumerate((layer.tailor_u, layer.tailor_v)):
            drawn = normal(draws, columns.shape[0], columns.shape[1], stream)
            columns.copy_(drawn / torch.linalg.vector_norm(drawn, dim=0))
        layer.tailor_sigma.zero_()
        tensors = [getattr(layer, name) for name in _TRIPLETS + _TAILORS]
        for tensor in tensors:
            tensor.grad = None
        forget(optimizer, *tensors)
