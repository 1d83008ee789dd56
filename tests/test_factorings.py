"""``resvd``, ``refactor``, ``polar``, ``weighted_factors`` and ``step_factors``, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdkern.linalg import polar, refactor, resvd, step_factors, weighted, weighted_factors


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal_error(x: Tensor) -> float:
    return float((x.double().t() @ x.double() - torch.eye(x.shape[1])).abs().max())


# ------------------------------------------------------------------------------------------------ a product's SVD


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_resvd_is_the_svd_of_the_product(n: int, k: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(n, k)))
    u, v = normal(k, r, seed=n), normal(n, r, seed=k)
    sigma = data.draw(st.sampled_from([None, normal(r, seed=r), torch.zeros(r)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    u, v = u.to(dtype), v.to(dtype)
    new_u, new_sigma, new_v = resvd(u, sigma, v)
    middle = torch.eye(r, dtype=torch.float64) if sigma is None else torch.diag(sigma.double())
    product = v.double() @ middle @ u.double().t()
    exact = torch.linalg.svdvals(product)[:r]
    wide = (
        torch.float64 if dtype == torch.float64 or sigma is not None and sigma.dtype == torch.float64 else torch.float32
    )
    eps = torch.finfo(wide).eps
    size = float(v.double().norm() * middle.norm() * u.double().norm())
    assert new_u.dtype == new_sigma.dtype == new_v.dtype == wide
    assert (new_sigma.double() - exact).abs().max() <= 16 * eps * size
    assert ((new_v.double() * new_sigma.double()) @ new_u.double().t() - product).norm() <= 16 * eps * size
    assert orthonormal_error(new_u) < 16 * eps and orthonormal_error(new_v) < 16 * eps
    assert bool((new_sigma >= 0).all()) and bool((new_sigma.diff() <= 0).all())
    assert bool((new_u.gather(0, new_u.abs().argmax(0, keepdim=True)) > 0).all())


def test_refactor_is_fedsvds() -> None:
    b, a = normal(50, 6).float(), normal(6, 70, seed=1).float()
    new_b, new_a = refactor(b, a)
    assert orthonormal_error(new_a.t()) < 1e-6
    assert (new_b.double() @ new_a.double() - b.double() @ a.double()).abs().max() < 1e-5
    p, s, qh = torch.linalg.svd(b.double() @ a.double())
    assert (new_b.double().norm(dim=0) - s[:6]).abs().max() < 1e-4
    assert (new_a.double().t() @ new_a.double() - qh[:6].t() @ qh[:6]).abs().max() < 1e-5


def test_refactor_before_the_first_round_keeps_what_a_spans() -> None:
    a = normal(6, 70).float()
    b, new_a = refactor(torch.zeros(50, 6), a)
    assert not b.any()
    projector = torch.linalg.pinv(a.double()) @ a.double()
    assert (new_a.double().t() @ new_a.double() - projector).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("u", "sigma", "v", "error", "message"),
    [
        (torch.zeros(5, 3), None, torch.zeros(5, 2), ValueError, r"u \(5, 3\), v \(5, 2\)"),
        (torch.zeros(5, 3), torch.zeros(2), torch.zeros(5, 3), ValueError, r"sigma \(2,\)"),
        (torch.zeros(5), None, torch.zeros(5, 2), ValueError, r"expected u \(K, r\)"),
        (torch.zeros(2, 3), None, torch.zeros(5, 3), ValueError, "r is 3, expected 1 <= r <= 2"),
        (torch.zeros(5, 0), None, torch.zeros(5, 0), ValueError, "r is 0"),
        (torch.full((5, 3), float("nan")), None, torch.zeros(5, 3), ValueError, "u has a NaN"),
        (torch.zeros(5, 3), None, torch.zeros(5, 3, dtype=torch.int8), TypeError, "v is torch.int8"),
    ],
)
def test_resvd_refuses(u: Tensor, sigma: Tensor | None, v: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resvd(u, sigma, v)


# ---------------------------------------------------------------------------------------------------- polar factor


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16), (5, 1), (1, 5)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_polar(shape: tuple[int, int], scale: float) -> None:
    a = (normal(*shape) * scale).float()
    p, _, qh = torch.linalg.svd(a.double() / scale, full_matrices=False)
    found = polar(a)
    assert found.dtype == torch.float32 and (found.double() - p @ qh).abs().max() < 1e-6
    assert torch.equal(found, polar(a.t().contiguous().t()))


@pytest.mark.parametrize("a", [torch.zeros(20, 6), torch.ones(20, 6), torch.eye(9)[:, :4]], ids=["0", "1", "eye"])
def test_polar_of_a_deficient_matrix_is_orthonormal(a: Tensor) -> None:
    assert orthonormal_error(polar(a)) < 1e-6
    assert polar(a.bfloat16()).dtype == torch.bfloat16
    if float(a.norm()) == 2:
        assert torch.equal(polar(a), a)


@pytest.mark.parametrize(
    ("a", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"a is \(3,\)"),
        (torch.zeros(0, 3), ValueError, "not empty"),
        (torch.full((3, 3), float("inf")), ValueError, "NaN or an infinity"),
        (torch.zeros(3, 3, dtype=torch.long), TypeError, "int64"),
    ],
)
def test_polar_refuses(a: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        polar(a)


# --------------------------------------------------------------------------------------------------------- weights


def reference(weight: Tensor, c: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.ones(weight.shape[0]) if row is None else row
    p, s, qh = torch.linalg.svd(torch.diag(rows.double()) @ weight.double() @ c, full_matrices=False)
    return torch.linalg.solve(c, qh.t()), s, p / rows.double().unsqueeze(1)


def covariance(k: int, samples: int) -> Tensor:
    x = normal(samples, k, seed=5) * torch.linspace(0.2, 4, k)
    return x.t() @ x / samples


CASES = ["row", "col", "both", "cov", "row and cov"]


@pytest.mark.parametrize("operators", [False, True])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("case", CASES)
def test_weights(case: str, shape: tuple[int, int], operators: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the weighted matrix, and through operators in the Krylov method's products."""
    if operators:
        monkeypatch.setattr(weighted, "_SMALL", 0)
        monkeypatch.setattr(weighted, "topk_svd", None)
    n, k = shape
    i = torch.arange(1, 41)
    weight = ((normal(n, 40) / i) @ normal(40, k, seed=1)).float()
    arguments: dict[str, Tensor] = {}
    if "row" in case or case == "both":
        arguments["row_scale"] = 1e-3 + normal(n, seed=2).abs()
    if case in ("col", "both"):
        arguments["col_scale"] = 1e20 * (1e-3 + normal(k, seed=3).abs())
    if "cov" in case:
        arguments["cov"] = covariance(k, 2 * k)
    cov = arguments.get("cov")
    c = torch.diag(arguments.get("col_scale", torch.ones(k)).double())
    if cov is not None:
        c = cov + 0.01 * cov.diagonal().mean() * torch.eye(k)
    u, sigma, v = weighted_factors(weight, 4, **arguments)
    exact_u, exact_sigma, exact_v = reference(weight, c, arguments.get("row_scale"))
    assert u.dtype == sigma.dtype == v.dtype == torch.float32
    assert ((sigma.double() - exact_sigma[:4]) / exact_sigma[:4]).abs().max() < 1e-4
    best = (exact_v[:, :4] * exact_sigma[:4]) @ exact_u[:, :4].t()
    rows = torch.diag(arguments.get("row_scale", torch.ones(n)).double())
    optimum = (rows @ (weight.double() - best) @ c).norm()
    reached = (rows @ (weight.double() - (v.double() * sigma.double()) @ u.double().t()) @ c).norm()
    assert reached <= optimum * (1 + 1e-4)


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_all_triplets_give_the_weight_back(which: str) -> None:
    weight = normal(12, 9)
    u, sigma, v = weighted_factors(weight, 9, row_scale=1 + normal(12).abs(), cov=covariance(9, 40), which=which)
    assert u.dtype == torch.float64 and ((v * sigma) @ u.t() - weight).abs().max() < 1e-10


def test_corda_keeps_the_smallest_of_the_weighted_matrix() -> None:
    weight, cov = normal(30, 20), covariance(20, 100)
    _, sigma, _ = weighted_factors(weight, 5, cov=cov, which="smallest")
    c = cov + 0.01 * cov.diagonal().mean() * torch.eye(20)
    assert (sigma - torch.linalg.svdvals(weight @ c)[-5:]).abs().max() < 1e-8


def test_a_covariance_of_few_samples_is_damped() -> None:
    """CorDA's own code inverts it; huggingface/peft#2324 is about the memory that takes."""
    cov, weight = covariance(40, 5), normal(50, 40)
    u, sigma, v = weighted_factors(weight, 40, cov=cov)
    assert ((v * sigma) @ u.t() - weight).norm() < 1e-9 * weight.norm()
    slightly_indefinite = (cov - 0.015 * cov.diagonal().mean() * torch.eye(40)).float()
    u, sigma, v = weighted_factors(weight, 40, cov=slightly_indefinite)
    assert ((v * sigma) @ u.t() - weight).norm() < 1e-9 * weight.norm()


def test_a_large_weight_is_scaled_before_it_is_cast() -> None:
    weight = torch.zeros(40, 30)
    weight[3] = 1e37
    cov = 50 * torch.ones(30, 30) + 1e-3 * torch.eye(30)
    u, sigma, v = weighted_factors(weight, 2, row_scale=1e-4 * torch.ones(40), cov=cov)
    assert float(sigma[0]) == pytest.approx(30**0.5 * 1e33 * 1500.5, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row_scale": torch.ones(6)}, r"row_scale is \(6,\), expected \(5,\)"),
        ({"col_scale": torch.tensor([1.0, 0, 1, 1, -1, 1])}, "col_scale has 2 values that are not positive"),
        ({"row_scale": torch.full((5,), float("inf"))}, "row_scale"),
        ({"cov": torch.eye(5)}, r"cov is \(5, 5\), expected \(6, 6\)"),
        ({"cov": torch.ones(6, 6).triu()}, "not symmetric"),
        ({"cov": -torch.eye(6)}, "mean of cov's diagonal is -1"),
        ({"cov": torch.diag(torch.tensor([9.0, 1, 1, 1, 1, -9]))}, "not positive semidefinite"),
        ({"cov": torch.diag(torch.tensor([9.0, 1, 1, 1, 1, -1e-3])), "damping": 1e-30}, "not positive semidefinite"),
        ({"weight": torch.ones(5, 6, device="meta")}, "weight is on the meta device"),
        ({"weight": torch.full((5, 6), 3e38)}, r"weight has the singular value 1.64\d*e\+39, beyond torch.float32"),
        ({"cov": torch.full((6, 6), float("nan"))}, "cov has a NaN"),
        ({"cov": torch.eye(6), "damping": -1.0}, "damping is -1"),
        ({"cov": torch.eye(6), "col_scale": torch.ones(6)}, "both given"),
        ({"which": "middle"}, "which is 'middle'"),
        ({"r": 6}, "r is 6, expected 1 <= r <= 5"),
        ({"weight": torch.full((5, 6), float("nan"))}, "NaN or an infinity"),
    ],
)
def test_weights_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_factors(**({"weight": torch.ones(5, 6), "r": 2} | arguments))


# -------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("shape", [(40, 30), (200, 260)])
def test_factors_of_the_first_step(shape: tuple[int, int], sign: bool) -> None:
    """With all its triplets a small step is reproduced; of a larger one the leading values are right."""
    gradient = (normal(shape[0], 8) @ normal(8, shape[1], seed=1)).float() * 1e-3
    step = -2e-4 * (gradient.sign() if sign else gradient).double()
    kept = gradient.clone()
    r = min(shape) if shape[0] == 40 else 8
    u, sigma, v = step_factors(gradient, r, 2e-4, sign=sign)
    exact = torch.linalg.svdvals(step)[:r]
    assert (sigma.double() - exact).abs().max() < 1e-4 * exact[0] and bool((sigma >= 0).all())
    assert ((v.double() * sigma.double()) @ u.double().t() - step).norm() <= (
        torch.linalg.svdvals(step)[r:].norm() * (1 + 1e-4) + 1e-6 * step.norm()
    )
    assert float((step * ((v.double() * sigma.double()) @ u.double().t())).sum()) > 0
    assert torch.equal(gradient, kept)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_step_needs_a_length(rate: float) -> None:
    with pytest.raises(ValueError, match="learning_rate is"):
        step_factors(torch.ones(4, 4), 1, rate)


def test_a_gradient_with_a_nan() -> None:
    gradient = torch.ones(4, 4)
    gradient[1, 2] = float("nan")
    with pytest.raises(ValueError, match="gradient has a NaN"):
        step_factors(gradient, 1, 0.1)
