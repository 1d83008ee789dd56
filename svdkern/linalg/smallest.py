"""The smallest singular triplets: a block Krylov method on the inverse, whose largest ones they are.

A method for the largest triplets, run on the matrix itself, would return principal components here. The inverse is that of
an LU factorisation (square) or of the triangle of a QR (not square). The values come from the matrix itself between the two
spaces found, in float64, and so do the residuals. So the factors may be rough: those of a float32 or half matrix are made in
float32 first. Where their residuals fall short, or a pivot is zero to float32's precision, they are made in float64, where
a pivot that is zero to working precision is moved away from zero by a tiny shift, which is recorded; and where that falls short,
too, the exact method takes over.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from svdkern.linalg.exact import (
    Reflections,
    Triplets,
    between,
    householder,
    orthonormal64,
    residual_norms,
    smallest_triplets,
)
from svdkern.linalg.krylov import Leading, leading


class _Inverse:
    """``C = A^-T`` (square) or ``R^-T`` (A = Q R), so that C's right singular vectors are A's."""

    def __init__(self, matrix: Tensor, factor: float, dtype: torch.dtype) -> None:
        self.columns = self.rows = min(matrix.shape)
        self.dtype, self.device = dtype, matrix.device
        self.passes = 0
        self.has_rough = False
        self._pivots: Tensor | None = None
        self._reflections: Reflections | None = None
        if matrix.shape[0] == matrix.shape[1]:
            self._triangle, self._pivots, _ = torch.linalg.lu_factor_ex(matrix.to(dtype) * factor)
        else:
            self._reflections, self._triangle = householder(matrix, factor, dtype)
        pivots = self._triangle.diagonal()
        least = self.rows * torch.finfo(dtype).eps * (float(pivots.abs().max()) or 1.0)
        tiny = pivots.abs() <= least
        self.singular = bool(tiny.any())
        """To working precision, which the shift mends."""
        if self.singular:
            pivots.copy_(torch.where(tiny, torch.copysign(pivots.new_tensor(least), pivots), pivots))

    def times(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self._pivots is not None:
            return torch.linalg.lu_solve(self._triangle, self._pivots, x, adjoint=True)
        return torch.linalg.solve_triangular(self._triangle.t(), x, upper=False)

    def transposed(self, y: Tensor) -> Tensor:
        self.passes += 1
        if self._pivots is not None:
            return torch.linalg.lu_solve(self._triangle, self._pivots, y)
        return torch.linalg.solve_triangular(self._triangle, y, upper=True)

    def both(self, x: Tensor, rough: bool = False) -> tuple[Tensor, Tensor]:
        y = self.times(x)
        return y, self.transposed(y)

    def of_the_matrix(self, left: Tensor) -> Tensor:
        """C's left singular vectors as the matrix's."""
        return left if self._reflections is None else self._reflections.times(left)

    def noise(self, largest: float) -> float:
        return 4 * torch.finfo(self.dtype).eps * math.sqrt(self.rows) * largest


def smallest(
    matrix: Tensor,
    k: int,
    factor: float,
    norm: float,
    *,
    block: int,
    capacity: int,
    tol: float,
    max_passes: int,
    seed: int,
    start: Tensor | None,
) -> tuple[Triplets, Leading]:
    """The k smallest triplets of ``factor * matrix`` (rows >= columns), and how they were found.

    Args:
        norm: the Frobenius norm of ``factor * matrix``; the others as for ``krylov.leading``.
    """
    fallbacks: tuple[str, ...] = ()
    for dtype in (torch.float64,) if matrix.dtype == torch.float64 else (torch.float32, torch.float64):
        inverse = _Inverse(matrix, factor, dtype)
        if inverse.singular and dtype == torch.float32:
            continue
        fallbacks += ("shift",) if inverse.singular else ()
        first = None if start is None else start.to(dtype)
        found = leading(
            inverse, k, block=block, capacity=capacity, tol=tol, max_passes=max_passes, seed=seed, start=first
        )
        fallbacks += found.fallbacks
        if not (found.converged and bool(found.right.isfinite().all() and found.left.isfinite().all())):
            continue
        next_value = 1 / found.next_value if found.next_value > 0 else math.inf
        allowed = max(math.sqrt(tol) * next_value, 16 * torch.finfo(torch.float64).eps * norm * math.sqrt(k))
        left, right = orthonormal64(found.left), orthonormal64(found.right)
        for _ in range(3):
            outer = orthonormal64(inverse.of_the_matrix(left.to(dtype)))
            triplets, residuals = between(matrix, outer, right, factor, next_value)
            if bool((residuals <= allowed).all()):
                fallbacks = tuple(dict.fromkeys(fallbacks))
                return triplets, replace(found, residuals=residuals, passes=inverse.passes, fallbacks=fallbacks)
            # What is small for the inverse may be large for the matrix, along its larger values: one more step takes it out.
            right = _orthonormal(inverse.transposed(left.to(dtype)))
            left = _orthonormal(inverse.times(right.to(dtype)))
    triplets = smallest_triplets(matrix, k, factor)
    residuals = residual_norms(matrix, triplets, factor)
    fallbacks = (*dict.fromkeys(fallbacks), "exact")
    return triplets, replace(found, residuals=residuals, converged=True, fallbacks=fallbacks)


def _orthonormal(x: Tensor) -> Tensor:
    """By reflections in float64; the columns' lengths are the inverse's values, which may be far apart."""
    x = x.to(torch.float64)
    return torch.linalg.qr(x / torch.linalg.vector_norm(x, dim=0).clamp(min=torch.finfo(torch.float64).tiny))[0]
