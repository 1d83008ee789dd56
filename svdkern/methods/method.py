"""What every method file provides: a frozen configuration that turns a weight into factors and a residual.

Layer: above ``linalg``, below ``nn``. A method never walks a model; what it needs of a model comes in as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from svdkern.linalg import exact_residual

Compat = Literal["paper", "official"]
"""Where a paper and its authors' code differ: which of them is followed."""


class Factors(NamedTuple):
    """The low-rank branch of a layer: u (K, r), sigma (r,) or None, core (r, r) or None, v (N, r), and what else it has."""

    u: Tensor
    sigma: Tensor | None
    core: Tensor | None
    v: Tensor
    extra: Mapping[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor | None]:
        """Every tensor by its name in the layer."""
        return {"u": self.u, "sigma": self.sigma, "core": self.core, "v": self.v, **self.extra}


class Cut(NamedTuple):
    """What is cut out of the original weight: ``W_res = W - scale v diag(sigma) u^T``."""

    u: Tensor
    sigma: Tensor | None
    v: Tensor
    scale: float


class Start(NamedTuple):
    """What a layer starts with. ``cut`` is None where the residual is the weight itself."""

    factors: Factors
    cut: Cut | None


class Layer(Protocol):
    """An ``SVDLinear``, as far as methods look at it; the tensors of ``Method.shapes`` are its attributes."""

    config: Method
    in_features: int
    out_features: int
    training: bool
    dropout_p: float

    @property
    def rank(self) -> int: ...
    @property
    def u(self) -> Tensor: ...
    @property
    def sigma(self) -> Tensor | None: ...
    @property
    def core(self) -> Tensor | None: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    def __getattr__(self, name: str) -> Any: ...


class Card(NamedTuple):
    """What the documentation says of a method. ``parameters`` is an expression in K, N and r: how many numbers train."""

    forward: str
    start: str
    parameters: str
    penalty: str = ""
    hooks: str = ""
    differs: str = ""
    """Where this package differs from the authors' code."""


@dataclass(frozen=True)
class Method:
    """A published method. Subclasses are frozen dataclasses; their fields are what a user may set."""

    name: ClassVar[str]
    citation: ClassVar[str]
    card: ClassVar[Card]
    published_rank: ClassVar[int]
    trains: ClassVar[tuple[str, ...]]
    """Names of the tensors that train; the rest of the layer is frozen."""
    has_sigma: ClassVar[bool] = False
    has_residual: ClassVar[bool] = True
    """False where the layer is the low-rank product alone."""
    changes_residual: ClassVar[bool] = False
    """Whether something is cut out of the weight (else the residual is the weight itself)."""
    draws: ClassVar[bool] = False
    """Whether the start is drawn from torch's generator, or shared by layers: then these are made in the model's order."""
    composes: ClassVar[bool] = False
    """Whether ``product`` or ``gate`` is more than the parameters as they are."""
    merges: ClassVar[bool] = True
    """False where the branch depends on the input, so that no weight is equal to it."""
    state: ClassVar[Mapping[str, torch.dtype]] = {}
    """What a layer remembers beside its factors (counts, indices): buffers, saved, in this dtype whatever the layer is cast to."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Names of frozen tensors that ``derive`` makes again: they are not saved, and keep their dtype when the layer is cast."""
    needs: ClassVar[str | None] = None
    """The statistic of data that the start depends on (``svdkern.calibration``)."""

    def __post_init__(self) -> None:
        """Values have the type of the default; numbers are finite and >= 0. Subclasses add to it."""
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            kinds = (int, float) if kind is float else (kind,)
            if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"{field.name} is {value!r}, expected {kind.__name__}")
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} is {value}, expected a finite number >= 0")
            if field.name == "compat" and value not in get_args(Compat):
                raise ValueError(f"compat is {value!r}, expected one of {', '.join(get_args(Compat))}")

    def check_scale(self, scale: float) -> None:
        """Refuse a scale s that the method cannot start from (ValueError)."""
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}, expected a finite number")

    def check_rank(self, in_features: int, out_features: int, rank: int) -> None:
        """Refuse a rank that the method has no use for in a layer of this shape (ValueError)."""
        largest = min(in_features, out_features)
        if not 1 <= rank <= largest:
            shape = f"in_features {in_features}, out_features {out_features}"
            raise ValueError(f"rank is {rank}, expected 1 <= rank <= {largest} ({shape})")

    def default_rank(self, in_features: int, out_features: int) -> int:
        """The rank that is published for a layer of this shape."""
        return self.published_rank

    def divisor(self, rank: int) -> int:
        """What alpha is divided by to give the scale s."""
        return rank

    # ------------------------------------------------------------------------------------------------ the start

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        """Initial factors for a weight (N, K), rounded to ``dtype``."""
        raise NotImplementedError

    def start(
        self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype, statistic: Tensor | None = None
    ) -> Start:
        """Factors, and what is cut out of the weight: these factors, where the method does so.

        Args:
            statistic: of this layer, for methods that need one.
        """
        factors = self.factors(weight, rank, scale, dtype)
        return Start(factors, self.cut(factors, scale, weight.dtype) if self.changes_residual else None)

    def cut(self, factors: Factors, scale: float, weight_dtype: torch.dtype) -> Cut:
        """The factors as a cut: copies, but of what is frozen (a layer then holds these numbers once)."""
        start = self.start_dtype(weight_dtype, factors.u.dtype)

        def kept(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(start, copy=name in self.trains)

        sigma = None if factors.sigma is None else kept("sigma", factors.sigma)
        return Cut(kept("u", factors.u), sigma, kept("v", factors.v), scale)

    def start_dtype(self, weight_dtype: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """The dtype that holds the initial factors exactly: that of the factors, or a narrower one to which they are rounded."""
        return dtype

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a layer, by name; -1 where it may be anything."""
        sigma: dict[str, tuple[int, ...]] = {"sigma": (rank,)} if self.has_sigma else {}
        return {"u": (in_features, rank), **sigma, "v": (out_features, rank)}

    def derive(
        self, in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """The tensors named in ``derived``, the same bits everywhere."""
        return {}

    def refusal(self, layer: Layer, state: Mapping[str, Tensor]) -> str | None:
        """Why this layer cannot go on from a saved ``state`` (some of the tensors of ``Method.state``); None if it can."""
        return None

    def settle(self, layer: Layer) -> None:
        """Called when a layer's ``state`` was loaded: what follows from it for the layer's configuration."""

    def cut_rank(self, in_features: int, out_features: int, rank: int) -> int:
        """Rank of the cut."""
        return rank

    def rank_of(self, layer: Layer) -> int:
        """The rank for which ``shapes`` gives the shapes of this layer."""
        return layer.u.shape[1]

    def empty_start(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Start:
        """An uninitialised start of the right shapes, on weight's device."""
        n, k = weight.shape
        made = {
            name: weight.new_empty([max(0, size) for size in shape], dtype=self.state.get(name, dtype))
            for name, shape in self.shapes(k, n, rank).items()
        }
        factors = Factors(made.pop("u"), made.pop("sigma", None), made.pop("core", None), made.pop("v"), made)
        if not self.changes_residual:
            return Start(factors, None)
        r, start = self.cut_rank(k, n, rank), self.start_dtype(weight.dtype, dtype)

        def beside(name: str, factor: Tensor, *shape: int) -> Tensor:
            return weight.new_empty(shape, dtype=start) if name in self.trains else factor

        sigma = None if factors.sigma is None else beside("sigma", factors.sigma, r)
        return Start(factors, Cut(beside("u", factors.u, k, r), sigma, beside("v", factors.v, n, r), scale))

    def residual(self, weight: Tensor, cut: Cut | None) -> Tensor:
        """What stays frozen: the weight without the cut, or the weight itself."""
        if cut is None:
            return weight.detach()
        return exact_residual(weight.detach(), cut.u, cut.sigma, cut.v, cut.scale)

    def init(
        self,
        weight: Tensor,
        rank: int,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        statistic: Tensor | None = None,
    ) -> tuple[Factors, Tensor]:
        """(factors, residual) for a weight (N, K)."""
        factors, cut = self.start(weight, rank, scale, dtype, statistic)
        return factors, self.residual(weight, cut)

    def trainable_parameters(self, in_features: int, out_features: int, rank: int) -> int:
        """How many numbers train in a layer of this shape."""
        shapes = self.shapes(in_features, out_features, rank)
        return sum(math.prod(shapes[name]) for name in self.trains)

    # ---------------------------------------------------------------------------------------------- the forward

    def product(self, layer: Layer) -> Factors:
        """u, sigma, core and v of the one call that computes the layer, differentiable in what trains."""
        return Factors(layer.u, layer.sigma, layer.core, layer.v)

    def call_factors(self, layer: Layer, x: Tensor) -> Factors:
        """What the layer's own call takes: ``product``, or the same values with less of a graph, if ``finish`` adds the rest."""
        return self.product(layer)

    def finish(self, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        """y (..., N) of the call with ``call_factors``, differentiable in what trains."""
        return y

    def gate(self, layer: Layer, x: Tensor) -> tuple[Any, Tensor | None]:
        """(gate, group) of ``svd_linear`` for these activations."""
        return None, None

    def observe(self, layer: Layer, gate: Any) -> None:
        """Called with the gate of every forward while training; a forward may be computed twice (activation checkpointing)."""

    # --------------------------------------------------------------------------------------------- the training

    @property
    def has_penalty(self) -> bool:
        """Whether there may be one."""
        return type(self).penalty is not Method.penalty

    def penalty(self, layers: Sequence[Layer]) -> Tensor | None:
        """The term this method adds to the loss for its layers (a scalar), or None."""
        return None

    def on_backward_end(self, layers: Sequence[Layer], step: int) -> None:
        """After the backward and any clipping, before the optimizer's step: changes gradients in place."""

    def on_step_end(self, layers: Sequence[Layer], step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """After the optimizer's step (``step`` counts from 1, anew after a round): changes parameters in place."""

    @property
    def has_rounds(self) -> bool:
        """Whether ``on_round_end`` does something, so that steps are counted from there."""
        return type(self).on_round_end is not Method.on_round_end

    def on_round_end(self, layers: Sequence[Layer], optimizer: torch.optim.Optimizer | None) -> None:
        """After a round of the method (a federated round, a task): changes parameters in place."""


_shared: ContextVar[dict[Any, nn.Parameter] | None] = ContextVar("svdkern_shared", default=None)


@contextmanager
def sharing() -> Iterator[None]:
    """Layers that are made within it hold one ``shared`` parameter for one key: those of a model do, those of two never."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def shared(key: Any, make: Callable[[], Tensor]) -> nn.Parameter:
    """A frozen parameter, made once for a key within ``sharing``."""
    made = _shared.get()
    if made is None:
        return nn.Parameter(make(), requires_grad=False)
    if key not in made:
        made[key] = nn.Parameter(make(), requires_grad=False)
    return made[key]


def forget(optimizer: torch.optim.Optimizer | None, *tensors: Tensor) -> None:
    """Let the optimizer start anew with these parameters."""
    if optimizer is not None:
        for tensor in tensors:
            optimizer.state.pop(tensor, None)


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of scalars that may be on several devices, on the first one's."""
    listed = list(terms)
    return torch.stack([term.to(listed[0].device) for term in listed]).sum()
