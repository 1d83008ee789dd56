"""The methods' initial factors, penalties and parameter counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from svdkern.methods import METHODS, SORSA, LoRA, Method, PiSSA, method_named
from svdkern.model import adapt, regularization
from svdkern.nn import SVDLinear

STARTS_AS_THE_WEIGHT = ["lora", "pissa", "sorsa", "svfit", "milora", "soma"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _weight(n: int = 40, k: int = 56, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)


def _product(method: Method, weight: torch.Tensor, rank: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    factors, residual = method.init(weight, rank, scale, dtype)
    middle = torch.ones(rank) if factors.sigma is None else factors.sigma
    return residual.double() + scale * (factors.v.double() * middle.double()) @ factors.u.double().t()


@pytest.mark.parametrize("name", STARTS_AS_THE_WEIGHT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_starts_as_the_weight(name: str, dtype: torch.dtype, adapter_dtype: torch.dtype, scale: float) -> None:
    """huggingface/peft#1052 (half precision), and G1: exact although the factors were rounded to bf16 first."""
    weight = _weight(dtype=dtype)
    error = (_product(METHODS[name](), weight, 8, scale, adapter_dtype) - weight.double()).abs()
    assert bool((error <= torch.finfo(dtype).eps * (weight.double().abs() + 20)).all())


def test_pissa_splits_the_leading_part_into_square_roots() -> None:
    weight, scale = _weight(), 0.25
    factors, residual = PiSSA().init(weight, 6, scale)
    p, s, qh = torch.linalg.svd(weight.double(), full_matrices=False)
    leading = (p[:, :6] * s[:6]) @ qh[:6]
    assert torch.allclose(scale * factors.v.double() @ factors.u.double().t(), leading, atol=1e-5)
    assert torch.allclose(factors.u.square().sum(0).double(), s[:6] / scale, rtol=1e-5)
    assert torch.allclose(factors.v.square().sum(0).double(), s[:6] / scale, rtol=1e-5)
    assert torch.linalg.svdvals(residual)[0].item() == pytest.approx(s[6].item(), rel=1e-5)
    assert factors.sigma is None and factors.core is None


@pytest.mark.parametrize(
    ("weight_dtype", "adapter_dtype", "start"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float16),
    ],
    ids=str,
)
def test_pissa_starts_on_values_that_the_weights_dtype_has(
    weight_dtype: torch.dtype, adapter_dtype: torch.dtype, start: torch.dtype
) -> None:
    linear = nn.Linear(24, 16, bias=False).to(weight_dtype)
    layer = SVDLinear.from_linear(linear, 4, "pissa", adapter_dtype=adapter_dtype)
    initial = layer.initial
    assert initial is not None
    for trained, kept in ((layer.u, initial.u), (layer.v, initial.v)):
        assert (trained.dtype, kept.dtype) == (adapter_dtype, start)
        assert torch.equal(trained.detach().double(), kept.double())
        assert kept.data_ptr() != trained.data_ptr()


def test_sorsa_keeps_sigma_apart_and_does_not_divide_it() -> None:
    weight = _weight()
    factors, _ = SORSA().init(weight, 6, 2.0)
    assert factors.sigma is not None
    assert torch.allclose(factors.sigma, torch.linalg.svdvals(weight)[:6], rtol=1e-5)
    for side in (factors.u, factors.v):
        assert torch.allclose(side.t() @ side, torch.eye(6), atol=1e-5)


def test_lora_starts_as_kaiming_and_zero() -> None:
    weight = _weight(40, 400)
    factors, residual = LoRA().init(weight, 6)
    assert residual.data_ptr() == weight.data_ptr()
    assert factors.v.abs().max() == 0
    bound = 1 / math.sqrt(400)  # kaiming_uniform with a = sqrt 5
    assert 0.9 * bound < factors.u.abs().max() <= bound
    assert factors.u.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_unknown_method_lists_the_nearest_first() -> None:
    with pytest.raises(ValueError, match="method is 'pisa', expected one of pissa, "):
        method_named("pisa")
    with pytest.raises(TypeError, match="method is int"):
        method_named(3)  # type: ignore[arg-type]
    assert method_named("PiSSA") == PiSSA()


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_pissa_refuses_a_scale_without_square_root(alpha: float) -> None:
    with pytest.raises(ValueError, match="scale is .*, expected > 0"):
        SVDLinear.from_linear(nn.Linear(8, 8), 2, "pissa", alpha=alpha)


@pytest.mark.parametrize("arguments", [{"gamma": -1.0}, {"gamma": math.nan}, {"learning_rate": 0.0}])
def test_sorsa_refuses_bad_settings(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SORSA(**arguments)


def test_factors_that_overflow_their_dtype_are_refused() -> None:
    linear = nn.Linear(8, 8)
    nn.init.constant_(linear.weight, 1e6)
    with pytest.raises(ValueError, match="initial sigma is not finite in torch.float16"):
        SVDLinear.from_linear(linear, 2, "sorsa", adapter_dtype=torch.float16)


# ---------------------------------------------------------------------------------------------------- penalties


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 9))


def test_regularization_is_the_published_mean_over_all_factors() -> None:
    model = _model()
    adapt(model, SORSA(gamma=1e-3, learning_rate=1e-2), rank=4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    norms = [
        torch.linalg.matrix_norm(f.double().t() @ f.double() - torch.eye(4, dtype=torch.float64))
        for layer in model
        for f in (layer.u, layer.v)
    ]
    value = regularization(model)
    assert value.shape == () and value.item() == pytest.approx(0.1 * (sum(norms) / 4).item(), rel=1e-5)
    value.backward()
    for layer in model:
        assert layer.u.grad.abs().max() > 0 and layer.v.grad.abs().max() > 0
        assert layer.sigma.grad is None and layer.residual.grad is None


def test_regularization_descends() -> None:
    model = _model()
    adapt(model, "sorsa", rank=4)
    with torch.no_grad():
        model[0].u.mul_(1.2)
    optimizer = torch.optim.SGD([model[0].u], lr=1e-3)
    before = regularization(model)
    before.backward()
    optimizer.step()
    assert regularization(model) < before


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_regularization_without_a_penalty_is_zero(method: str) -> None:
    model = _model()
    adapt(model, method, rank=4)
    value = regularization(model)
    assert value.shape == () and value.item() == 0.0
    (model(torch.randn(3, 12)).sum() + value).backward()
    assert model[0].v.grad is not None


def test_regularization_of_mixed_methods_adds_up() -> None:
    model = _model()
    adapt(model, SORSA(gamma=1.0, learning_rate=1.0), rank=3, target_modules=["0"])
    adapt(model, "lora", rank=2, target_modules=["1"])
    with torch.no_grad():
        model[0].u.mul_(2.0)
    expected = (torch.linalg.matrix_norm(3 * torch.eye(3)) + 0.0) / 2
    assert regularization(model).item() == pytest.approx(expected.item(), rel=1e-4)
