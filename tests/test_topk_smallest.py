"""topk_svd, the smallest triplets: never the principal ones, whatever the method."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from spectra import check, indices, seeded, with_spectrum
from torch import Tensor

from svdkern.linalg import topk_svd

MATRICES: dict[str, tuple[Callable[[], Tensor], int]] = {
    "square": (lambda: torch.randn(200, 200, generator=seeded(), dtype=torch.float64), 6),
    "tall": (lambda: torch.randn(420, 180, generator=seeded(1), dtype=torch.float64), 6),
    "wide": (lambda: torch.randn(180, 420, generator=seeded(2), dtype=torch.float64), 6),
    "power": (lambda: with_spectrum(210, 210, indices(210) ** -0.5), 10),
    "exponential": (lambda: with_spectrum(230, 210, 0.95 ** indices(210)), 8),
    "step": (lambda: with_spectrum(220, 220, torch.where(indices(220) <= 200, 1.0, 1e-3).double()), 20),
    "orthogonal": (lambda: with_spectrum(200, 200, torch.ones(200, dtype=torch.float64)), 9),
    "singular": (lambda: with_spectrum(200, 200, indices(195)), 4),
    "singular, k beyond the kernel": (lambda: with_spectrum(200, 200, indices(197)), 6),
    "tall and singular": (lambda: with_spectrum(260, 200, indices(197)), 6),
    "zero": (lambda: torch.zeros(200, 200, dtype=torch.float64), 5),
    "identity": (lambda: torch.eye(200, dtype=torch.float64), 5),
    "ill-conditioned": (lambda: with_spectrum(200, 200, torch.logspace(0, -12, 200, dtype=torch.float64)), 5),
}


@pytest.mark.parametrize("method", ["krylov", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_every_kind_of_matrix(name: str, dtype: torch.dtype, method: str) -> None:
    make, k = MATRICES[name]
    a = make().to(dtype)
    found = topk_svd(a, k, which="smallest", method=method)
    assert found.info.which == "smallest" and found.info.method == method
    check(a, k, found, tol=1e-4, smallest=True)


@pytest.mark.parametrize("shape", [(240, 200), (200, 240), (200, 200)])
@pytest.mark.parametrize("method", ["krylov", "exact"])
def test_they_are_the_last_columns_of_the_full_svd(shape: tuple[int, int], method: str) -> None:
    """A published repository returns the principal components here, without a word."""
    sigma = torch.cat([torch.linspace(9, 5, 195), torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])]).double()
    a = with_spectrum(*shape, sigma)
    u, s, v, info = topk_svd(a, 5, which="smallest", method=method)
    assert torch.allclose(s, sigma[-5:], rtol=1e-6)
    p, _, qh = torch.linalg.svd(a, full_matrices=False)
    for factor, reference in ((u, p[:, -5:]), (v, qh[-5:].t())):
        # Each value is simple here: vectors are determined up to sign.
        assert torch.allclose((factor * reference).sum(0).abs(), torch.ones(5).double(), atol=1e-6)
    assert info.next_value == pytest.approx(5.0, rel=0.1)


def test_a_singular_matrix_is_shifted_and_says_so() -> None:
    a = with_spectrum(200, 200, indices(198))
    regular = topk_svd(with_spectrum(200, 200, indices(200)), 4, which="smallest", method="krylov")
    assert "shift" not in regular.info.fallbacks
    a[:, 7] = 0
    a[11] = 0
    found = topk_svd(a, 2, which="smallest", method="krylov")
    assert "shift" in found.info.fallbacks
    check(a, 2, found, tol=1e-4, smallest=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_half_precision(dtype: torch.dtype, scale: float) -> None:
    a = (scale * torch.randn(230, 200, generator=seeded())).to(dtype)
    for method in ("krylov", "exact"):
        check(a, 5, topk_svd(a, 5, which="smallest", method=method), tol=1e-4, smallest=True)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale(scale: float) -> None:
    a = (scale * torch.randn(200, 200, generator=seeded(), dtype=torch.float64)).float()
    for method in ("krylov", "exact"):
        check(a, 5, topk_svd(a, 5, which="smallest", method=method), tol=1e-4, smallest=True)


@pytest.mark.parametrize("k", [1, 60, 100])
def test_one_triplet_to_all(k: int) -> None:
    a = torch.randn(120, 100, generator=seeded())
    for method in ("auto", "krylov", "exact"):
        found = topk_svd(a, k, which="smallest", method=method)
        check(a, k, found, tol=1e-4, smallest=True)
        assert math.isinf(found.info.next_value) == (k == 100)


def test_where_the_krylov_method_ends_early_the_exact_one_takes_over() -> None:
    a = torch.randn(300, 300, generator=seeded())
    found = topk_svd(a, 5, which="smallest", method="krylov", tol="accurate", max_passes=4)
    assert "exact" in found.info.fallbacks
    check(a, 5, found, tol=1e-6, smallest=True)


@pytest.mark.parametrize("seed", range(4))
def test_residuals_of_the_matrix_are_reached_from_the_inverses(seed: int) -> None:
    """What is a small residual of the inverse, along the matrix's larger values, was none of the matrix: exact took over."""
    a = torch.randn(700, 700, generator=seeded(seed))
    found = topk_svd(a, 24, which="smallest", method="krylov")
    assert found.info.converged and "exact" not in found.info.fallbacks
    check(a, 24, found, tol=1e-4, smallest=True)


def test_same_seed_same_bits() -> None:
    a = torch.randn(260, 240, generator=seeded())
    before = torch.get_rng_state()
    first, again = (topk_svd(a, 4, which="smallest", method="krylov") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(first[:3], again[:3], strict=True))


def test_signs_and_a_warm_start() -> None:
    a = torch.randn(260, 240, generator=seeded())
    cold = topk_svd(a, 4, which="smallest", method="krylov", tol="accurate")
    assert bool((cold.U.gather(0, cold.U.abs().argmax(0, keepdim=True)) > 0).all())
    warm = topk_svd(a, 4, which="smallest", method="krylov", tol="accurate", v0=cold.V)
    assert warm.info.passes < cold.info.passes
    check(a, 4, warm, tol=1e-6, smallest=True)


def test_values_of_a_larger_matrix_than_the_exact_method_takes() -> None:
    a = torch.randn(1100, 1100, generator=seeded())
    found = topk_svd(a, 8, which="smallest")
    assert found.info.method == "krylov" and found.info.converged and "exact" not in found.info.fallbacks
    exact = torch.linalg.svdvals(a.double())[-8:]
    assert ((found.S.double() - exact).abs() / exact).max() < 1e-4
