"""Singular triplets of a weighted matrix, taken back to the matrix itself.

    diag(row) W diag(col) = P S Q^T          W ~ v diag(sigma) u^T:  v = diag(row)^-1 P, u = diag(col)^-1 Q
    diag(row) W C         = P S Q^T          u = C^-1 Q, by a Cholesky solve

Weights enter as operators in the products of the Krylov method: ``W C`` is made only where the matrix is small or the method does
not converge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from svdkern.linalg.exact import few_threads, with_signs
from svdkern.linalg.krylov import leading
from svdkern.linalg.operand import Operand
from svdkern.linalg.precision import full_precision
from svdkern.linalg.topk import check_dense, in_range, topk_svd

_TOL = 1e-5
_SMALL = 1024  # short side up to which the weighted matrix is made: the exact method takes it
_SHARE = 8
_BLOCK = 64
_MOST_DOUBLINGS = 60


@torch.no_grad()
def weighted_factors(
    weight: Tensor,
    r: int,
    *,
    row_scale: Tensor | None = None,
    col_scale: Tensor | None = None,
    cov: Tensor | None = None,
    damping: float = 0.01,
    which: Literal["largest", "smallest"] = "largest",
) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading triplets of ``diag(row_scale) @ weight @ (diag(col_scale) | cov)``, as factors of ``weight``.

    For all r = min(N, K) triplets ``weight == v @ diag(sigma) @ u.T``. u and v are orthonormal only on a side without a weight.

    - FWSVD (Hsu et al., ICLR 2022, arXiv 2207.00112) and LoKU: ``row_scale = sqrt(fisher.sum(1))``, over outputs
      (``col_scale`` with ``sum(0)``, over inputs).
    - ASVD (Yuan et al., arXiv 2312.05821): ``col_scale = x.abs().mean(0) ** 0.5 + 1e-6``.
    - CorDA (Yang et al., NeurIPS 2024, arXiv 2406.05223): ``cov = X^T X / n`` of the layer's inputs; "largest" is its
      instruction-previewed mode, "smallest" the knowledge-preserved one. cov is damped, ``C = cov + d mean(diag(cov)) I`` with
      d = damping, doubled until C has a Cholesky factor in float64. (W C, not W C^1/2, is what CorDA decomposes; it is
      not the best approximation for those inputs. For that, give the symmetric square root of the covariance as cov.)

    Equivalent to (up to signs, rotations among equal singular values, and an error of sigma of the order of 1e-5)::

        C = torch.diag(col_scale) if cov is None else cov + damping * cov.diagonal().mean() * torch.eye(K)
        p, s, qh = torch.linalg.svd(torch.diag(row_scale) @ weight.float() @ C, full_matrices=False)
        u, sigma, v = torch.linalg.solve(C, qh[:r].t()), s[:r], p[:, :r] / row_scale.unsqueeze(1)

    Args:
        weight: (N, K); float32, bfloat16, float16 or float64.
        r: number of triplets, 1 <= r <= min(N, K).
        row_scale: (N,), > 0. col_scale: (K,), > 0. cov: (K, K), symmetric and positive semidefinite, instead of col_scale.
        damping: d, >= 0.
        which: "largest" or "smallest" (in descending order, too; the weighted matrix is made for these).

    Returns:
        u (K, r), sigma (r,), v (N, r): float32, or float64 for a float64 weight.

    Raises:
        TypeError: weight is not floating-point, or not dense.
        ValueError: a shape that does not fit, a scale that is not positive, a cov that is not symmetric or not positive
            semidefinite, both col_scale and cov, r out of range, a NaN or an infinity, a sigma that its dtype cannot hold.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected a matrix (N, K)")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}, expected float32, bfloat16, float16 or float64")
    check_dense(weight, "weight")
    n, k = weight.shape
    if not 1 <= r <= min(n, k):
        raise ValueError(f"r is {r}, expected 1 <= r <= {min(n, k)} (weight is {tuple(weight.shape)})")
    if which not in ("largest", "smallest"):
        raise ValueError(f"which is {which!r}, expected largest or smallest")
    if col_scale is not None and cov is not None:
        raise ValueError("col_scale and cov are both given, expected one of them (scale cov instead)")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with few_threads(min(n, k), weight.device), full_precision(weight.device):
        rows = _Diagonal(row_scale, n, "row_scale", weight)
        cols = _Diagonal(col_scale, k, "col_scale", weight) if cov is None else _Covariance(cov, k, damping, weight)
        found = _by_operators(weight, r, rows, cols) if which == "largest" else None
        if found is None:
            matrix = cols.times(rows.times(weight.to(torch.float64)).t()).t()
            power = max(-1000, min(1000, math.frexp(float(matrix.abs().max()))[1]))  # to 1/2 ... 1, which float32 holds
            p, sigma, q, _ = topk_svd((matrix * 2.0**-power).to(dtype), r, which=which, tol=_TOL)
            sigma = sigma.to(torch.float64) * 2.0**power
        else:
            p, sigma, q = found
        u, v = with_signs(cols.solve(q.to(torch.float64)), rows.solve(p.to(torch.float64)))
    sigma = in_range(sigma.to(torch.float64) * (rows.unit * cols.unit), dtype, "weight")
    return u.to(dtype).contiguous(), sigma, v.to(dtype).contiguous()


class _Diagonal:
    """``diag(scale)``, which may be the identity."""

    unit = 1.0
    """What products are divided by, so that no weight leads out of float32's range."""

    def __init__(self, scale: Tensor | None, size: int, name: str, like: Tensor) -> None:
        if scale is None:
            self.scale = torch.ones(size, 1, dtype=torch.float64, device=like.device)
            return
        if scale.shape != (size,):
            raise ValueError(f"{name} is {tuple(scale.shape)}, expected ({size},)")
        self.scale = scale.to(like.device, torch.float64).unsqueeze(1)
        if not bool((self.scale.isfinite() & (self.scale > 0)).all()):
            bad = int((~(self.scale > 0)).sum())
            raise ValueError(
                f"{name} has {bad} values that are not positive (or some not finite): add a small number to it"
            )
        self.unit = float(self.scale.max())

    def times(self, x: Tensor) -> Tensor:
        return x * (self.scale / self.unit).to(x.dtype)

    def solve(self, x: Tensor) -> Tensor:
        return x / self.scale


class _Covariance:
    """The damped covariance and its Cholesky factor, in float64."""

    def __init__(self, cov: Tensor, size: int, damping: float, like: Tensor) -> None:
        if cov.shape != (size, size):
            raise ValueError(f"cov is {tuple(cov.shape)}, expected ({size}, {size})")
        if not damping >= 0:
            raise ValueError(f"damping is {damping}, expected >= 0")
        c = cov.to(like.device, torch.float64)
        largest = float(c.abs().max())
        if not largest < float("inf"):
            raise ValueError("cov has a NaN or an infinity")
        if float((c - c.t()).abs().max()) > 1e-3 * largest:
            raise ValueError("cov is not symmetric")
        mean = float(c.diagonal().mean())
        if not mean > 0:
            raise ValueError(f"the mean of cov's diagonal is {mean}, expected > 0")
        c = (c + c.t()) / 2
        for doublings in range(_MOST_DOUBLINGS):
            damped = c + damping * mean * 2.0**doublings * torch.eye(size, dtype=torch.float64, device=c.device)
            self._triangle, failed = torch.linalg.cholesky_ex(damped)
            if not bool(failed):
                break
            if damping == 0 or damping * 2.0**doublings > 1:
                raise _indefinite(damping * 2.0**doublings)
        else:
            raise _indefinite(damping * 2.0 ** (_MOST_DOUBLINGS - 1))
        self.unit = float(damped.diagonal().max())
        self._wide = damped / self.unit
        self._single = self._wide.to(torch.float32)

    def times(self, x: Tensor) -> Tensor:
        return torch.mm(self._wide if x.dtype == torch.float64 else self._single, x)

    def solve(self, x: Tensor) -> Tensor:
        return torch.cholesky_solve(x, self._triangle)


def _indefinite(damping: float) -> ValueError:
    return ValueError(f"cov is not positive semidefinite, damped by {damping:g} of its mean or not")


class _Weighted:
    """``after W before`` as a Krylov method reads it; both symmetric."""

    def __init__(self, operand: Operand, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        self._operand, self._before, self._after = operand, before, after
        self.rows, self.columns = operand.rows, operand.columns
        self.dtype, self.device = operand.dtype, operand.device
        self.has_rough = False
        self.passes = 0

    def times(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self._after(self._operand.times(self._before(x)))

    def transposed(self, y: Tensor) -> Tensor:
        self.passes += 1
        return self._before(self._operand.transposed(self._after(y)))

    def both(self, x: Tensor, rough: bool = False) -> tuple[Tensor, Tensor]:
        y = self.times(x)
        return y, self.transposed(y)

    def noise(self, largest: float) -> float:
        return 16 * torch.finfo(self.dtype).eps * largest


def _by_operators(
    weight: Tensor, r: int, rows: _Diagonal, cols: _Diagonal | _Covariance
) -> tuple[Tensor, Tensor, Tensor] | None:
    short = min(weight.shape)
    if short <= _SMALL or r > short // _SHARE:
        return None
    tall = weight.shape[0] >= weight.shape[1]
    operand = Operand(weight if tall else weight.t(), "weight")
    operator = _Weighted(operand, *((cols.times, rows.times) if tall else (rows.times, cols.times)))
    block = max(16, min(_BLOCK, -(-r // 16) * 16))
    found = leading(operator, r, block=block, capacity=max(6 * r, 12 * block), tol=_TOL, max_passes=200, seed=0)
    if not found.converged:
        return None
    p, q = (found.left, found.right) if tall else (found.right, found.left)
    return p, found.sigma * 2.0**operand.power, q
