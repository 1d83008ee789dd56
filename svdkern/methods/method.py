"""What every method file provides: a frozen configuration that knows how to turn a weight into factors and a residual.

Layer: above ``linalg``, below ``nn``. A method never walks a model; what it needs of a model comes in as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from svdkern.linalg import exact_residual


class Factors(NamedTuple):
    """The low-rank branch of a layer: u (K, r), sigma (r,) or None, core (r, r) or None, v (N, r)."""

    u: Tensor
    sigma: Tensor | None
    core: Tensor | None
    v: Tensor


class HasFactors(Protocol):
    """A layer, as far as penalties look at it."""

    @property
    def u(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """A published method. Subclasses are frozen dataclasses; their fields are what a user may set."""

    name: ClassVar[str]
    citation: ClassVar[str]
    published_rank: ClassVar[int]
    trains: ClassVar[tuple[str, ...]]
    """Names of the factors that train; the rest of the layer is frozen."""
    has_sigma: ClassVar[bool]
    changes_residual: ClassVar[bool]
    """Whether the initial product is cut out of the weight (else the residual is the weight itself)."""
    draws: ClassVar[bool] = False
    """Whether the initial factors are drawn from torch's generator: then layers are made in the model's order."""

    def check_scale(self, scale: float) -> None:
        """Refuse a scale s that the method cannot start from (ValueError)."""
        if not math.isfinite(scale):
            raise ValueError(f"scale is {scale}, expected a finite number")

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        """Initial factors for a weight (N, K), rounded to ``dtype``."""
        raise NotImplementedError

    def start_dtype(self, weight_dtype: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """The dtype that holds the initial factors exactly: that of the factors, or a narrower one to which they are rounded."""
        return dtype

    def empty_factors(self, weight: Tensor, rank: int, dtype: torch.dtype) -> Factors:
        """Uninitialised factors of the right shapes, on weight's device."""
        n, k = weight.shape
        sigma = weight.new_empty(rank, dtype=dtype) if self.has_sigma else None
        return Factors(weight.new_empty(k, rank, dtype=dtype), sigma, None, weight.new_empty(n, rank, dtype=dtype))

    def residual(self, weight: Tensor, factors: Factors, scale: float) -> Tensor:
        """What stays frozen: weight minus the product of the (rounded) factors, or weight itself."""
        if not self.changes_residual:
            return weight.detach()
        return exact_residual(weight.detach(), factors.u, factors.sigma, factors.v, scale)

    def init(
        self, weight: Tensor, rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> tuple[Factors, Tensor]:
        """(factors, residual) for a weight (N, K)."""
        factors = self.factors(weight, rank, scale, dtype)
        return factors, self.residual(weight, factors, scale)

    def trainable_parameters(self, in_features: int, out_features: int, rank: int) -> int:
        """How many numbers train in a layer of this shape."""
        sizes = {
            "u": in_features * rank,
            "sigma": rank if self.has_sigma else 0,
            "core": rank * rank,
            "v": out_features * rank,
        }
        return sum(sizes[name] for name in self.trains)

    def penalty(self, layers: Iterable[HasFactors]) -> Tensor | None:
        """The term this method adds to the loss for its layers (a scalar), or None."""
        return None
