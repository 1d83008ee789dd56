"""The leading singular triplets by Chebyshev-filtered subspace iteration on the Gram matrix of the short side.

    G = A^T A                                              A (m, n), m >= n; in float32
    X <- T_d(2 G / b - I) X                                damps what lies in [0, b], b the smallest Ritz value of X
    (X^T G X) c = lambda (X^T X) c,  X <- X c              Rayleigh-Ritz; both small matrices in float64
    A X = left diag(sigma) right^T                         at the end, from A itself

After the one pass over A that makes G, a step costs n^2 per column whatever m is, and G of a bfloat16 matrix is made by the
bfloat16 units of the CPU, exactly but for its accumulation in float32. Values come from A on the space that was found, so an
error E of G counts as |E|^2. What G cannot tell apart in float32, small values beside a large one, is refused here: the
exact method is for that.

References: Zhou, Saad, Tiago, Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered subspace iteration",
J. Comput. Phys. 2006; Rutishauser, "Computational aspects of F. L. Bauer's simultaneous iteration method", Numer. Math. 1969.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from svdkern.backends import extension
from svdkern.linalg.exact import Triplets
from svdkern.linalg.orthogonal import gram
from svdkern.linalg.sketch import sketch

_PANEL_ELEMENTS = 1 << 23  # cast to float32 at a time: 32 MB; every panel reads and writes all of G
_BLOCK = 192  # columns of a block of G
_BLOCK_BFLOAT16, _WHOLE_BFLOAT16 = 512, 1024  # of bfloat16 units, which are fastest with the whole of a small G
_MOST_SHARE = 3  # the space may have a third of the short side's columns
_MOST_STEPS = 24
_MOST_GROWTH = math.log(1e6)  # of the largest value over the smallest one in one filter: rounding grows with it
_MARGIN = 6  # a degree too many costs less than another step
_PLAIN = 2.0**80  # |A|_F^2 between its inverse and this: nothing overflows in float32, nothing vanishes
_EPS = torch.finfo(torch.float32).eps


class _Ritz(NamedTuple):
    values: Tensor
    """Descending, float64."""
    vectors: Tensor
    images: Tensor
    """G times the vectors."""


def width_of(k: int) -> int:
    """Columns of the space for k triplets: values beyond the wanted ones are what convergence depends on."""
    return -(-(k + max(k // 4, 16)) // 16) * 16


def fits(matrix: Tensor, k: int) -> bool:
    """Whether k triplets of such a matrix can be found here."""
    return matrix.dtype != torch.float64 and _MOST_SHARE * width_of(k) <= min(matrix.shape)


def leading_triplets(tall: Tensor, k: int, tol: float, seed: int) -> Triplets | None:
    """The k leading triplets of ``tall`` (m, n), m >= n; None where float32 is not enough or the iteration does not converge.

    Args:
        tall: finite or not (not: None), any strides, on any device.
        k: at most n / 2 or so: ``width_of(k)`` columns have to be less than n.
        tol: every residual ``|A^T u_i - sigma_i v_i|^2`` is at most ``tol * sigma_{k+1}^2``.
    """
    n = tall.shape[1]
    width = width_of(k)
    panels = _Panels(tall)
    product = _gram_matrix(panels)
    energy = float(product.diagonal().sum(dtype=torch.float64))
    if not 1 / _PLAIN < energy < _PLAIN:
        return None
    x = torch.mm(product, sketch(n, width, seed=seed, dtype=torch.float32, device=product.device))
    # A product costs a third of a look at the Ritz values, and the first of these tell more after three products than after one.
    if 3 * math.log(float(torch.linalg.vector_norm(product)) * n / energy) <= _MOST_GROWTH:
        for _ in range(2):
            x = torch.mm(product, x / torch.linalg.vector_norm(x))
    ritz = _rayleigh_ritz(x, torch.mm(product, x))
    for step in range(_MOST_STEPS):
        if ritz is None or not float(ritz.values[k]) > 0:
            return None
        largest, last = float(ritz.values[0]), float(ritz.values[k - 1])
        allowed = math.sqrt(tol * float(ritz.values[k]))
        # A residual below the error of G, which is about 16 roundings of the largest value, would mean nothing. The first
        # estimates are too low to tell.
        reachable = math.sqrt(last) * allowed > 16 * _EPS * largest
        if not reachable and step >= 2:
            return None
        values = ritz.values[:k].to(torch.float32)
        away = torch.linalg.vector_norm(torch.addcmul(ritz.images[:, :k], ritz.vectors[:, :k], values, value=-1), dim=0)
        excess = float((away / values.sqrt()).max()) / allowed
        if excess <= 1:
            return _from_the_matrix(panels, ritz, k) if reachable else None
        bound = float(ritz.values[-1])
        if not bound > 0:
            return None
        slow, fast = (math.acosh(max(2 * value / bound - 1, 1 + 1e-9)) for value in (last, largest))
        degree = min(12, math.ceil(math.log(_MARGIN * excess) / slow), int(_MOST_GROWTH / fast))
        x = _filter(product, ritz, bound, max(2, degree))
        ritz = _rayleigh_ritz(x, torch.mm(product, x))
    return None


class _Panels:
    """Rows of a matrix (m, n) as they are stored and in float32, a few MB at a time; what fits into one panel is cast once."""

    def __init__(self, tall: Tensor) -> None:
        self.tall = tall
        self.shape, self.device = tall.shape, tall.device
        self._only: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.tall.numel() > _PANEL_ELEMENTS:
            step = max(1, _PANEL_ELEMENTS // self.tall.shape[1])
            yield from (self._cast(self.tall[start : start + step]) for start in range(0, self.tall.shape[0], step))
            return
        if self._only is None:
            self._only = self._cast(self.tall)
        yield self._only

    def _cast(self, panel: Tensor) -> tuple[Tensor, Tensor]:
        return panel, panel.to(torch.float32)


def _gram_matrix(panels: _Panels) -> Tensor:
    """``A^T A`` (n, n) in float32. Blocks of columns, from the diagonal down; what lies above is their mirror image."""
    n = panels.shape[1]
    units = by_bfloat16_units(panels.tall)
    if units and 1 in panels.tall.stride() and torch.ops.svdkern._cpu_isa() == "amx_bf16":
        product: Tensor = torch.ops.svdkern._cpu_gram.default(panels.tall)
        return product
    block = _BLOCK if not units else n if n <= _WHOLE_BFLOAT16 else _BLOCK_BFLOAT16
    out = torch.empty(n, n, dtype=torch.float32, device=panels.device)
    blocks = [(first, out[first:, first : first + block]) for first in range(0, n, block)]
    for i, (narrow, wide) in enumerate(panels):
        for first, part in blocks:
            columns = wide[:, first : first + block]
            if not units:
                part.addmm_(wide[:, first:].t(), columns, beta=0 if i == 0 else 1)
                continue
            # These units round their second operand to bfloat16, which changes no value here.
            product = torch.ops.svdkern._cpu_outer.default(narrow.contiguous()[:, first:], columns, part, None, 0)
            part.copy_(product) if i == 0 else part.add_(product)
    for first, part in blocks:
        out[first : first + block, first + block :] = part[block:].t()
    return out


def by_bfloat16_units(matrix: Tensor) -> bool:
    """Whether its Gram matrix is made by units that multiply bfloat16."""
    return matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and _has_bfloat16_units()


@lru_cache(maxsize=1)
def _has_bfloat16_units() -> bool:
    return extension.why_missing is None and "bf16" in torch.ops.svdkern._cpu_isa()


def _rayleigh_ritz(x: Tensor, image: Tensor) -> _Ritz | None:
    """The Ritz pairs of G on the span of x (n, p), ``image = G x``; None where x has lost its rank."""
    wide = x.to(torch.float64)
    overlap, projected = torch.mm(wide.t(), wide), torch.mm(wide.t(), image.to(torch.float64))
    scale = overlap.diagonal().clamp(min=torch.finfo(x.dtype).tiny).rsqrt()
    both = torch.outer(scale, scale)
    triangle, failed = torch.linalg.cholesky_ex(overlap * both)
    if bool(failed) or not bool(triangle.diagonal().min() > 1e-6):
        return None
    projected = torch.linalg.solve_triangular(triangle, projected * both, upper=False)
    projected = torch.linalg.solve_triangular(triangle.t(), projected, upper=True, left=False)
    values, vectors = torch.linalg.eigh((projected + projected.t()) / 2)
    turn = torch.linalg.solve_triangular(triangle.t(), vectors.flip(1), upper=True)
    turn = (scale.unsqueeze(1) * turn).to(x.dtype)
    return _Ritz(values.flip(0), torch.mm(x, turn), torch.mm(image, turn))


def _filter(product: Tensor, ritz: _Ritz, bound: float, degree: int) -> Tensor:
    """``T_d(2 G / bound - I)`` of the Ritz vectors, each scaled by its own value's growth so that all stay near 1."""
    before, now = ritz.vectors, torch.sub(ritz.images, ritz.vectors, alpha=bound / 2).mul_(2 / bound)
    for _ in range(degree - 1):
        following = torch.sub(torch.mm(product, now), now, alpha=bound / 2).mul_(4 / bound).sub_(before)
        before, now = now, following
    return now


def _from_the_matrix(panels: _Panels, ritz: _Ritz, k: int) -> Triplets:
    """The triplets of the matrix itself on the k leading Ritz vectors, orthonormal to float64's rounding."""
    vectors = ritz.vectors[:, :k].contiguous()
    image = torch.cat([torch.mm(wide, vectors) for _, wide in panels])
    triangle = torch.linalg.cholesky(gram(vectors)).t()
    right, left = (
        torch.linalg.solve_triangular(triangle, t.to(torch.float64), upper=True, left=False) for t in (vectors, image)
    )
    squares, turn = torch.linalg.eigh(left.t() @ left)
    sigma, turn = squares.flip(0).sqrt(), turn.flip(1)
    return Triplets(left @ (turn / sigma), sigma, right @ turn, math.sqrt(float(ritz.values[k])))
