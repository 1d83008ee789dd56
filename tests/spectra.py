"""Matrices whose singular values are known, and what is promised of their triplets."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svdkern.linalg import TopkSVD


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """(m, n) float64 with these singular values (min(m, n) of them)."""
    generator = seeded(seed)
    p, _ = torch.linalg.qr(torch.randn(m, sigma.numel(), generator=generator, dtype=torch.float64))
    q, _ = torch.linalg.qr(torch.randn(n, sigma.numel(), generator=generator, dtype=torch.float64))
    return (p * sigma) @ q.t()


def indices(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


def spiked() -> Tensor:
    a = torch.randn(260, 220, generator=seeded(4), dtype=torch.float64) / 220**0.5
    return a + with_spectrum(260, 220, torch.tensor([9.0, 6.0, 4.0], dtype=torch.float64), seed=5)


def outlier_row() -> Tensor:
    a = torch.randn(250, 210, generator=seeded(6), dtype=torch.float64)
    a[17] *= 100
    return a


def clustered() -> Tensor:
    values = torch.cat([torch.full((size,), value) for size, value in ((5, 3.0), (9, 2.0), (196, 0.5))]).double()
    return with_spectrum(210, 230, values * (1 + 1e-9 * indices(210)))


MATRICES: dict[str, tuple[Callable[[], Tensor], int]] = {
    "power": (lambda: with_spectrum(230, 210, indices(210) ** -0.5), 12),
    "exponential": (lambda: with_spectrum(210, 230, 0.8 ** indices(210)), 10),
    "steep": (lambda: with_spectrum(210, 230, 0.3 ** indices(210)), 10),
    "step": (lambda: with_spectrum(220, 220, torch.where(indices(220) <= 20, 1.0, 1e-3).double()), 20),
    "more equal ones than k": (lambda: with_spectrum(220, 220, torch.where(indices(220) <= 90, 1.0, 0.1).double()), 5),
    "orthogonal": (lambda: with_spectrum(200, 200, torch.ones(200, dtype=torch.float64)), 9),
    "clustered": (clustered, 14),
    "spiked": (spiked, 6),
    "flat": (lambda: torch.randn(300, 200, generator=seeded(1), dtype=torch.float64), 8),
    "exact low rank": (lambda: with_spectrum(240, 200, indices(10).flip(0)), 10),
    "rank below k": (lambda: with_spectrum(200, 240, indices(4)), 9),
    "rank far below k": (lambda: with_spectrum(200, 240, indices(4)), 40),
    "zero": (lambda: torch.zeros(200, 210, dtype=torch.float64), 5),
    "one entry": (lambda: -2.0 * torch.outer(torch.eye(200)[3], torch.eye(210)[7]).double(), 5),
    "one outlier row": (outlier_row, 4),
    "wide": (lambda: torch.randn(40, 3000, generator=seeded(2), dtype=torch.float64), 6),
    "tall": (lambda: torch.randn(3000, 40, generator=seeded(3), dtype=torch.float64), 6),
    "equal rows": (lambda: torch.randn(1, 220, generator=seeded(7), dtype=torch.float64).repeat(200, 1), 5),
    "huge range": (lambda: torch.diag(torch.logspace(0, -38, 200, dtype=torch.float64)), 12),
}  # fmt: skip


def check(a: Tensor, k: int, found: TopkSVD, *, tol: float, smallest: bool = False) -> None:
    """Everything that is promised of one result, against LAPACK in float64."""
    size = float(a.double().abs().max()) or 1.0
    wide = a.double() / size
    p, s, qh = torch.linalg.svd(wide, full_matrices=False)
    wanted = slice(s.numel() - k, None) if smallest else slice(0, k)
    exact = s[wanted]
    u, v = found.U.double(), found.V.double()
    sigma = found.S.double() / size
    info = found.info
    eps = torch.finfo(found.S.dtype).eps
    rounding = (64 if eps < 1e-15 else 32) * eps * float(wide.norm()) + 1e-300
    assert found.U.shape == (a.shape[0], k) and found.V.shape == (a.shape[1], k) and found.S.shape == (k,)
    assert found.U.dtype == found.S.dtype == found.V.dtype
    assert all(bool(t.isfinite().all()) for t in found[:3])
    assert bool((found.S >= 0).all()) and bool((found.S.diff() <= 0).all())
    for factor in (u, v):
        assert (factor.t() @ factor - torch.eye(k)).abs().max() < (200 if eps < 1e-15 else 20) * eps
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())

    assert info.converged
    left = torch.linalg.vector_norm(wide @ v - u * sigma, dim=0)
    right = torch.linalg.vector_norm(wide.t() @ u - v * sigma, dim=0)
    claimed = info.residuals / size
    assert bool((torch.maximum(left, right) <= claimed + rounding).all()), (left, right, claimed)
    neighbour = (float(s[-k - 1]) if k < s.numel() else math.inf) if smallest else (float(s[k]) if k < s.numel() else 0)
    limit = math.sqrt(tol) * neighbour
    assert bool((claimed <= 1.01 * limit + rounding).all())

    # Values: to first order in the residual for any of them, to second order against what is left out.
    error = (sigma.square() - exact.square()).abs()
    floor = 2 * rounding * exact + rounding * rounding
    allowed = 4 * tol * neighbour**2 if neighbour < math.inf else 0.0
    assert bool((error <= allowed + floor).all()), (error / max(neighbour, rounding) ** 2, sigma, exact)
    best = float(s.square().sum() - exact.square().sum())
    got = float((wide - (u * sigma) @ v.t()).square().sum())
    assert abs(got - best) <= k * (allowed + 4 * rounding)
    assert info.tail / size == pytest.approx(math.sqrt(got), rel=1e-3, abs=20 * math.sqrt(eps) * float(wide.norm()))

    # The space is determined where a gap separates it; Wedin: sin(angle) <= residual / gap.
    inner = float(exact[0 if smallest else -1])
    gap = abs(neighbour - inner)
    if rounding * 10 < gap < math.inf:
        bound = 2 * math.sqrt(k) * (float(claimed.max()) + rounding) / gap
        sides = [(u, p[:, wanted]), (v, qh[wanted].t())]
        if float(exact[-1]) <= 100 * rounding and a.shape[0] != a.shape[1]:
            del sides[0 if a.shape[0] > a.shape[1] else 1]  # any vectors of the larger kernel will do
        for factor, reference in sides:
            sine = torch.linalg.matrix_norm(reference - factor @ (factor.t() @ reference), 2)
            assert sine <= bound, (sine, bound)
