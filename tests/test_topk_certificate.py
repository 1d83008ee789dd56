"""The certificate of topk_svd: its bounds against the truth in float64, and how often they are wrong."""

from __future__ import annotations

import math

import pytest
import torch
from spectra import MATRICES, indices, seeded, with_spectrum
from torch import Tensor

from svdkern.linalg import TopkSVD, topk_svd
from svdkern.linalg.certificate import _chi2_quantile, bound_of_the_rest, probe
from svdkern.linalg.krylov import leading
from svdkern.linalg.operand import Operand
from svdkern.linalg.sketch import gaussian


def _rest(a: Tensor, v: Tensor) -> float:
    a, v = a.double(), v.double()
    return float(torch.linalg.matrix_norm(a - (a @ v) @ v.t(), 2))


def check_certificate(a: Tensor, k: int, found: TopkSVD) -> None:
    """Every bound that the certificate gives, where what it supposes is true."""
    said = found.info.certificate
    assert said is not None
    p, s, qh = torch.linalg.svd(a.double(), full_matrices=False)
    rounding = 32 * torch.finfo(found.S.dtype).eps * float(s.norm())
    assert _rest(a, found.V) <= said.missed + rounding
    error = (found.S.double() - s[:k]).abs()
    if said.complete or _rest(a, found.V) <= float(found.S[-1]):
        assert bool((error <= said.values + rounding).all()), (error, said.values)
        best, got = float(s[k:].square().sum()), float(a.double().square().sum() - found.S.double().square().sum())
        assert got - best <= said.energy + 4 * k * rounding * float(s[0])
    if said.complete:
        for factor, truth in ((found.U.double(), p[:, :k]), (found.V.double(), qh[:k].t())):
            sine = float(torch.linalg.matrix_norm(truth - factor @ (factor.t() @ truth), 2))
            assert sine <= said.subspace + 1e-6
    else:
        assert said.subspace == 1.0


@pytest.mark.parametrize("method", ["krylov", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in MATRICES if name not in ("huge range",)])
def test_its_bounds_hold(name: str, dtype: torch.dtype, method: str) -> None:
    make, k = MATRICES[name]
    a = make().to(dtype)
    check_certificate(a, k, topk_svd(a, k, method=method, certify=True))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_it_has_the_scale_of_the_matrix(scale: float) -> None:
    a = MATRICES["spiked"][0]()
    plain, scaled = (
        topk_svd((a * factor).float(), 3, method="krylov", certify=True).info.certificate for factor in (1, scale)
    )
    assert plain is not None and scaled is not None
    assert plain.complete and scaled.complete
    assert scaled.missed / scale == pytest.approx(plain.missed, rel=1e-3)
    assert scaled.energy / scale**2 == pytest.approx(plain.energy, rel=1e-2)


def test_a_gap_is_certified_and_tells_the_space() -> None:
    a = with_spectrum(500, 400, torch.cat([torch.linspace(9, 5, 6), torch.linspace(1, 0.1, 394)]).double()).float()
    found = topk_svd(a, 6, method="krylov", certify=True, tol="accurate")
    said = found.info.certificate
    assert said is not None and said.complete and said.delta == 1e-3
    assert 1 <= said.missed < 3 and said.subspace < 1e-3 and float(said.values.max()) < 1e-4
    assert topk_svd(a, 6, method="krylov").info.certificate is None


def test_nothing_else_changes() -> None:
    a = MATRICES["power"][0]().float()
    plain, certified = topk_svd(a, 6, method="krylov"), topk_svd(a, 6, method="krylov", certify=True)
    assert torch.allclose(plain.S, certified.S, rtol=1e-6)
    again = topk_svd(a, 6, method="krylov", certify=True)
    assert all(torch.equal(x, y) for x, y in zip(certified[:3], again[:3], strict=True))
    assert certified.info.certificate is not None and again.info.certificate is not None
    assert certified.info.certificate.missed == again.info.certificate.missed


@pytest.mark.parametrize("seed", range(8))
def test_a_missed_copy_of_a_multiple_value_is_never_certified(seed: int) -> None:
    """A block of 4 columns that stops early holds 4 copies of a value, and the next ones it shows have small residuals."""
    sigma = torch.cat([torch.ones(13), torch.linspace(0.95, 0.1, 187)]).double()
    a = with_spectrum(210, 200, sigma, seed=seed)
    options = {"block": 4, "capacity": 200, "tol": 0.5, "max_passes": 60 + 4 * seed, "certify": True}
    found = leading(Operand(a, "A"), 13, seed=seed, **options)  # type: ignore[arg-type]
    said = found.certificate
    assert said is not None
    largest = float(sigma[0]) * 2.0 ** -Operand(a, "A").power
    missed = float((found.sigma < largest * (1 - 1e-6)).sum()) > 0
    assert missed, "the run found all of them: the test no longer misses any"
    assert not said.complete and said.missed >= 0.999 * largest


def test_the_quantile_of_chi_squared() -> None:
    assert _chi2_quantile(2, 0.5) == pytest.approx(2 * math.log(2), rel=1e-9)
    assert _chi2_quantile(16, 1e-3) == pytest.approx(3.942, abs=1e-3)  # tables


def test_gaussian_probe() -> None:
    x = gaussian(5000, 16, seed=3, device=torch.device("cpu"))
    assert x.shape == (5000, 16) and x.dtype == torch.float64
    assert abs(float(x.mean())) < 0.02 and abs(float(x.std()) - 1) < 0.02
    assert abs(float(x.pow(4).mean()) - 3) < 0.15
    assert float((x.t() @ x / 5000 - torch.eye(16)).abs().max()) < 0.08
    assert torch.equal(gaussian(70, 6, seed=3, device=torch.device("cpu")), x[:70, :6])
    assert not torch.equal(gaussian(70, 6, seed=4, device=torch.device("cpu")), x[:70, :6])


@pytest.mark.slow
@pytest.mark.parametrize("delta", [0.2, 1e-3])
def test_a_thousand_seeds_violate_no_more_often_than_delta(delta: float) -> None:
    """The worst case: one direction beside nothing, so that the bound is as near as it can be."""
    a = with_spectrum(60, 50, torch.cat([torch.tensor([4.0, 3.0, 1.0]), torch.full((47,), 1e-4)]).double())
    operand = Operand(a, "A")
    right = torch.linalg.svd(a)[2][:2].t()
    truth = math.ldexp(1.0, -operand.power)
    wrong = 0
    for seed in range(1000):
        omega = probe(operand, right, seed)
        wrong += bound_of_the_rest(operand, right, omega, None, 2, delta) < truth * (1 - 1e-9)
    assert wrong <= 1000 * delta + 3 * math.sqrt(1000 * delta * (1 - delta))
    assert wrong > 0.5 * 1000 * delta or delta < 0.01  # and it is no looser than it claims


@pytest.mark.slow
def test_a_thousand_runs_are_certified_truly() -> None:
    """Every claim of a certificate, over spectra with and without gaps, runs that stop early included."""
    generator = seeded(9)
    wrong = 0
    for seed in range(1000):
        n = 30 + seed % 20
        kinds = (indices(n) ** -0.5, 0.8 ** indices(n), torch.rand(n, generator=generator).double() + 0.01)
        copies = torch.cat([torch.ones(9), 0.9 * torch.ones(n - 9)]).double()
        a = with_spectrum(n + 7, n, (*kinds, copies)[seed % 4].sort(descending=True)[0], seed=seed)
        options = {"block": 2, "capacity": n, "tol": 0.3, "max_passes": 8 + seed % 13, "certify": True}
        found = leading(Operand(a, "A"), 4, seed=seed, **options)  # type: ignore[arg-type]
        said, power = found.certificate, Operand(a, "A").power
        assert said is not None
        s = torch.linalg.svdvals(a) * math.ldexp(1.0, -power)
        rest = torch.linalg.matrix_norm(a - (a @ found.right) @ found.right.t(), 2) * math.ldexp(1.0, -power)
        claims = [bool(rest <= said.missed)]
        if said.complete:
            claims.append(bool(((found.sigma - s[:4]).abs() <= said.values).all()))
        wrong += not all(claims)
    assert wrong <= 1  # delta is 1e-3 of a thousand
