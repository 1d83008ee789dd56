"""RandLoRA: an update of full rank from frozen random bases, of which only diagonal scales train.

    dW^T = s sum_b B_b diag(lambda_b) A diag(gamma_b)          b = 1 ... n = ceil(min(K, N) / r)
    A (r, min(K, N)), B_b (max(K, N), r) random and frozen; where N < K the sum is transposed
    lambda = 0, gamma = 1 / max(n, min(K, N))          trains lambda (n, r), gamma (n, min(K, N))

A smaller r trains *more* numbers. The bases are a function of ``seed`` (Philox, uniform with variance 1), the same for all
layers of a model, held once for a shape, and not saved: what made them is (``origin``), and they are never cast. The
scaled copies of A are made at every call, for bfloat16 activations in bfloat16, as a product would round them: half the
memory until the backward.

``compat="official"`` pairs A and B as the authors' code and PEFT do: they flatten A with the rank first and B with the basis
first, so that column (b, j) of B meets lambda, A and gamma of another (b', j'). The update still has full rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from svdkern.autocast import autocast_is_on, without_autocast
from svdkern.backends.philox import philox4x32
from svdkern.methods.method import Card, Compat, Factors, Layer, Method, shared

Bases = Literal["dense", "sparse", "very_sparse"]
_CHUNK_ELEMENTS = 1 << 20
_LOW = 0xFFFFFFFF
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_basis(
    rows: int, columns: int, kind: Bases, share: float, seed: int, stream: int, device: torch.device
) -> Tensor:
    """(rows, columns) float32 of mean 0 and variance 1; element (i, j) depends on i, j, seed and stream alone.

    "dense": uniform. Otherwise +-1 with probability ``share / 2`` each, else 0, divided by ``sqrt(share)``.
    """
    out = torch.empty(rows, columns, device=device)
    group = torch.arange(-(-columns // 4), device=device)
    key = torch.tensor(seed & _LOW, device=device), torch.tensor((seed >> 32) & _LOW, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    height = max(1, _CHUNK_ELEMENTS // max(columns, 1))
    for first in range(0, rows, height):
        row = torch.arange(first, min(first + height, rows), device=device).unsqueeze(1)
        words = torch.stack(philox4x32((row, group, zero + stream, zero), key, rounds=10), dim=-1)
        uniform = (words.flatten(1)[:, :columns].double() + 0.5) / 2.0**32
        if kind == "dense":
            made = (2.0 * uniform - 1.0) * math.sqrt(3.0)
        else:
            made = ((uniform > 1.0 - share / 2).double() - (uniform < share / 2).double()) / math.sqrt(share)
        out[first : first + height] = made
    return out


@dataclass(frozen=True)
class RandLoRA(Method):
    """RandLoRA (Albert et al., 2025). Published: rank 32, alpha 640.

    Args:
        seed: of the bases.
        bases: "dense", "sparse" (+-1 with probability 1/6 each, else 0), or "very_sparse" (1 / (2 sqrt(min(K, N))) each).
        compat: "paper", or "official" for the pairing of the authors' code and PEFT.
    """

    seed: int = 0
    bases: Bases = "dense"
    compat: Compat = "paper"

    name: ClassVar[str] = "randlora"
    citation: ClassVar[str] = (
        "P. Albert, F. Z. Zhang, H. Saratchandran, C. Rodriguez-Opazo, A. van den Hengel, E. Abbasnejad: RandLoRA: "
        "Full-Rank Parameter-Efficient Fine-Tuning of Large Models. ICLR 2025, arXiv 2502.00987"
    )
    card: ClassVar[Card] = Card(
        "x W + s sum_b (((x diag(gamma_b) A^T) * lambda_b) B_b^T",
        "A, B random and frozen, lambda = 0, gamma = 1 / max(n, min(K, N)); the weight's output",
        "ceil(min(K, N) / r)*(min(K, N) + r)",
        differs='The code pairs columns of A and B of different bases: `compat="official"`. Bases come from '
        "Philox and are divided by the standard deviation of their distribution, not of the sample.",
    )
    published_rank: ClassVar[int] = 32
    trains: ClassVar[tuple[str, ...]] = ("sigma", "gamma")
    draws: ClassVar[bool] = True
    composes: ClassVar[bool] = True
    state: ClassVar[Mapping[str, torch.dtype]] = {"origin": torch.int64}
    derived: ClassVar[tuple[str, ...]] = ("u", "v")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases not in get_args(Bases):
            raise ValueError(f"bases is {self.bases!r}, expected one of {', '.join(get_args(Bases))}")
        if self.seed >= 2**63:
            raise ValueError(f"seed is {self.seed}, expected < 2**63")

    def shapes(self, in_features: int, out_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        short = min(in_features, out_features)
        n = -(-short // max(rank, 1))
        a, b = (short, rank), (max(in_features, out_features), n * rank)
        u, v = (a, b) if in_features <= out_features else (b, a)
        return {"u": u, "v": v, "sigma": (n * rank,), "gamma": (n, short), "origin": (3,)}

    def rank_of(self, layer: Layer) -> int:
        return min(layer.u.shape[1], layer.v.shape[1])

    def derive(
        self, in_features: int, out_features: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        shapes = self.shapes(in_features, out_features, rank)
        short = min(in_features, out_features)
        share = 1 / math.sqrt(short) if self.bases == "very_sparse" else 1 / 3
        wide = "v" if in_features <= out_features else "u"
        made: dict[str, Tensor] = {}
        for name in ("u", "v"):
            rows, columns = shapes[name]

            def basis(rows: int = rows, columns: int = columns, stream: int = int(name == wide)) -> Tensor:
                return random_basis(rows, columns, self.bases, share, self.seed, stream, device).to(dtype)

            made[name] = shared((self, name == wide, share, rows, columns, dtype, device), basis)
        return made

    def factors(self, weight: Tensor, rank: int, scale: float, dtype: torch.dtype) -> Factors:
        n, k = weight.shape
        bases, shapes = self.derive(k, n, rank, dtype, weight.device), self.shapes(k, n, rank)
        gamma = weight.new_full(shapes["gamma"], 1 / max(shapes["gamma"]), dtype=dtype)
        sigma = weight.new_zeros(shapes["sigma"], dtype=dtype)
        origin = torch.tensor(self._origin(dtype), device=weight.device)
        return Factors(bases["u"], sigma, None, bases["v"], {"gamma": gamma, "origin": origin})

    def _origin(self, dtype: torch.dtype) -> list[int]:
        """What the bases are a function of, beside their shapes."""
        return [self.seed, get_args(Bases).index(self.bases), _DTYPES.index(dtype)]

    def refusal(self, layer: Layer, state: Mapping[str, Tensor]) -> str | None:
        if "origin" not in state:
            return None
        (seed, kind, dtype), wanted = state["origin"].tolist(), self._origin(layer.u.dtype)
        if [seed, kind, dtype] == wanted:
            return None
        return (
            f"the state belongs to {get_args(Bases)[kind]} bases of seed {seed} in {_DTYPES[dtype]}, which are not in it; this "
            f"layer's are {self.bases}, of seed {self.seed}, in {layer.u.dtype}"
        )

    def product(self, layer: Layer) -> Factors:
        a, b, narrow_input = self._bases(layer)
        scaled = _scaled(a, layer.gamma, self.compat == "official")
        return Factors(scaled, layer.sigma, None, b) if narrow_input else Factors(b, layer.sigma, None, scaled)

    def call_factors(self, layer: Layer, x: Tensor) -> Factors:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.product(layer)
        a, b, narrow_input = self._bases(layer)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x.device) else x.dtype
        if dtype != torch.bfloat16 or a.dtype != torch.float32:
            dtype = a.dtype
        scaled: Tensor = _Scaled.apply(a, layer.gamma, self.compat == "official", dtype)
        b = _rounded(b, dtype)
        return Factors(scaled, layer.sigma, None, b) if narrow_input else Factors(b, layer.sigma, None, scaled)

    @staticmethod
    def _bases(layer: Layer) -> tuple[Tensor, Tensor, bool]:
        """A (min, r), all B_b (max, n r), and whether A is on the input side."""
        narrow_input = layer.in_features <= layer.out_features
        return (layer.u, layer.v, True) if narrow_input else (layer.v, layer.u, False)


def _scaled(a: Tensor, gamma: Tensor, official: bool) -> Tensor:
    """The copies ``diag(gamma_b) A`` side by side, (min, n r)."""
    scales = gamma.t()  # (min, n)
    if official:
        return (a.unsqueeze(2) * scales.unsqueeze(1)).flatten(1)  # column j n + b
    return (a.unsqueeze(1) * scales.unsqueeze(2)).flatten(1)  # column b r + j


class _Scaled(torch.autograd.Function):
    """``_scaled`` in ``dtype``, whose backward reads the gradient of the copies once and makes nothing of their size."""

    @staticmethod
    def forward(ctx, a, gamma, official, dtype):
        ctx.save_for_backward(a)
        ctx.official = official
        return _scaled(a, gamma, official).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (a,) = ctx.saved_tensors
        rows, r = a.shape
        shape, terms = ((rows, r, -1), "kjb,kj->bk") if ctx.official else ((rows, -1, r), "kbj,kj->bk")
        with without_autocast(gradient.device):
            return None, torch.einsum(terms, gradient.to(a.dtype).view(shape), a), None, None


_copies = WeakIdKeyDictionary()
"""Rounded copies of the bases that layers share, with the version that they are of."""


def _rounded(basis: Tensor, dtype: torch.dtype) -> Tensor:
    """A frozen basis in dtype, cast once for all layers that share it and not at every call."""
    if basis.dtype == dtype:
        return basis
    version, copy = _copies.get(basis, (-1, basis))
    if version != basis._version or copy.dtype != dtype or copy.device != basis.device:
        copy = basis.detach().to(dtype)
        _copies[basis] = basis._version, copy
    return copy
