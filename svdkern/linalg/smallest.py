"""The smallest singular triplets: a block Krylov method on the inverse, whose largest ones they are.

A method for the largest triplets, run on the matrix itself, would return principal components here. The inverse is that of
an LU factorisation (square) or of the triangle of a QR (not square), in float64 whatever the matrix is stored in; a pivot
that is zero to working precision is moved away from zero by a tiny shift, which is recorded. The values then come from the
matrix itself between the two spaces found, and so do the residuals: where those fall short, the exact method takes over.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from svdkern.linalg.exact import Reflections, Triplets, householder, on_bases, residual_norms, smallest_triplets
from svdkern.linalg.krylov import Leading, leading


class _Inverse:
    """``C = A^-T`` (square) or ``R^-T`` (A = Q R), so that C's right singular vectors are A's."""

    def __init__(self, matrix: Tensor, factor: float) -> None:
        self.columns = self.rows = min(matrix.shape)
        self.dtype, self.device = torch.float64, matrix.device
        self.passes = 0
        self.shifted = False
        self._pivots: Tensor | None = None
        self._reflections: Reflections | None = None
        if matrix.shape[0] == matrix.shape[1]:
            self._triangle, self._pivots, _ = torch.linalg.lu_factor_ex(matrix.to(torch.float64) * factor)
        else:
            self._reflections, self._triangle = householder(matrix, factor)
        pivots = self._triangle.diagonal()
        least = self.rows * torch.finfo(torch.float64).eps * (float(pivots.abs().max()) or 1.0)
        tiny = pivots.abs() <= least
        if bool(tiny.any()):
            self.shifted = True
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

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.times(x)
        return y, self.transposed(y)

    def of_the_matrix(self, left: Tensor) -> Tensor:
        """C's left singular vectors as the matrix's."""
        return left if self._reflections is None else self._reflections.times(left)

    def noise(self, largest: float) -> float:
        return 4 * torch.finfo(torch.float64).eps * math.sqrt(self.rows) * largest


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
    inverse = _Inverse(matrix, factor)
    fallbacks: tuple[str, ...] = ("shift",) if inverse.shifted else ()
    found = leading(inverse, k, block=block, capacity=capacity, tol=tol, max_passes=max_passes, seed=seed, start=start)
    next_value = 1 / found.next_value if found.next_value > 0 else math.inf
    if bool(found.right.isfinite().all()):
        left = inverse.of_the_matrix(found.left)
        triplets = on_bases(matrix, left, found.right, factor, next_value)
        residuals = residual_norms(matrix, triplets, factor)
        allowed = max(math.sqrt(tol) * next_value, 16 * torch.finfo(torch.float64).eps * norm * math.sqrt(k))
        if found.converged and bool((residuals <= allowed).all()):
            return triplets, replace(found, residuals=residuals, fallbacks=fallbacks + found.fallbacks)
    triplets = smallest_triplets(matrix, k, factor)
    residuals = residual_norms(matrix, triplets, factor)
    fallbacks = (*fallbacks, *found.fallbacks, "exact")
    return triplets, replace(found, residuals=residuals, converged=True, fallbacks=fallbacks)
