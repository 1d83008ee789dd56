"""Against PEFT, from the same start: outputs, gradients and penalties of the methods that it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from recipes import batch, net
from torch import Tensor

import svdkern
from svdkern.nn import SVDLinear

pytestmark = pytest.mark.peer
peft = pytest.importorskip("peft", reason="needs peft")

NAMES = ("up", "down")


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-9)


def pair(ours: Any, theirs: Any) -> list[tuple[SVDLinear, Any]]:
    return [(getattr(ours, name), getattr(theirs.base_model.model, name)) for name in NAMES]


def test_kasa_has_the_outputs_gradients_and_penalty_of_peft() -> None:
    base = net()
    config = peft.LoraConfig(
        r=3, lora_alpha=6.0, target_modules=list(NAMES), kasa_config=peft.KasaConfig(beta=0.1, gamma=0.2)
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = base
    svdkern.adapt(ours, svdkern.methods.KaSA(beta=0.1, gamma=0.2), rank=3, alpha=6.0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer, other in pair(ours, theirs):
            assert close(layer.residual, other.get_base_layer().weight, 1e-5)
            layer.v.copy_(0.3 * torch.randn(layer.v.shape, generator=generator))
            other.lora_A["default"].weight.copy_(layer.u.t())
            other.lora_B["default"].weight.copy_(layer.v)
            other.lora_diag["default"].copy_(layer.sigma)
    data = batch()
    for model, penalty in ((ours, svdkern.regularization(ours)), (theirs, theirs.base_model._get_kasa_loss())):
        (model(**data) + penalty).backward()
    assert close(svdkern.regularization(ours), theirs.base_model._get_kasa_loss(), 1e-6)
    assert close(ours(data["x"]), theirs(data["x"]))
    for layer, other in pair(ours, theirs):
        assert close(layer.u.grad, other.lora_A["default"].weight.grad.t())
        assert close(layer.v.grad, other.lora_B["default"].weight.grad)
        assert close(layer.sigma.grad, other.lora_diag["default"].grad)
    svdkern.merge(ours)
    merged = theirs.merge_and_unload()
    assert close(ours(data["x"]), merged(data["x"]))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_has_the_products_of_peft(mode: str) -> None:
    """From the same covariances (PEFT divides a batch by its largest value, we by its largest magnitude)."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base, data = net(), [batch(seed) for seed in range(4)]
    for item in data:  # the same divisor for both
        item["x"][0, 0, 0] = 5.0
    theirs = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6.0,
        target_modules=["up"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )

    @torch.no_grad()
    def run() -> None:
        for item in data:
            theirs(item["x"].reshape(1, -1, 12))

    preprocess_corda(theirs, config, run_model=run)
    theirs = peft.get_peft_model(theirs, config)
    svdkern.adapt(base, svdkern.methods.CorDA(mode=mode), rank=3, alpha=6.0, target_modules=["up"], data=data)
    layer, other = base.up, theirs.base_model.model.up
    a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
    assert close(layer.v @ layer.u.t(), b @ a, 2e-3)
    assert close(layer.residual, other.get_base_layer().weight, 2e-3)
    assert close(layer.v.square().sum(0), b.square().sum(0), 2e-3)
    x = batch(9)["x"]
    assert close(base(x), theirs(x), 1e-4)


@pytest.mark.parametrize("targets", [["up"], ["down"]])
def test_randlora_official_has_the_outputs_and_gradients_of_peft(targets: list[str]) -> None:
    base = net()
    config = peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=targets, randlora_dropout=0.0)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    svdkern.adapt(base, svdkern.methods.RandLoRA(compat="official"), rank=4, alpha=8.0, target_modules=targets)
    (name,) = targets
    layer, other = getattr(base, name), getattr(theirs.base_model.model, name)
    short = min(layer.in_features, layer.out_features)
    assert close(layer.gamma, other.randlora_gamma["default"], 1e-6) and layer.sigma.abs().max() == 0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.sigma.copy_(torch.randn(layer.sigma.shape, generator=generator))
        other.randlora_lambda["default"].copy_(layer.sigma.view(4, -1))
        a, b = other.randlora_A["default"][:, 0, :short], other.randlora_B["default"].flatten(1)
        narrow = layer.in_features <= layer.out_features
        (layer.u if narrow else layer.v).copy_(a.t())
        (layer.v if narrow else layer.u).copy_(b)
    data = batch()
    theirs.float()
    assert close(base(data["x"]), theirs(data["x"]), 2e-3)  # their bases are bfloat16
    base(**data).backward()
    theirs(**data).backward()
    assert close(layer.sigma.grad.view(4, -1), other.randlora_lambda["default"].grad, 2e-2)
    assert close(layer.gamma.grad, other.randlora_gamma["default"].grad, 2e-2)


def test_osf_has_the_projected_gradients_of_peft() -> None:
    base = net()
    # their effective_rank is what is kept, ours what trains; both layers have 12 and 9 singular values
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.OSFConfig(effective_rank=5, target_modules=["up"]))
    svdkern.adapt(base, "osf", rank=7, target_modules=["up"])
    layer, other = base.up, theirs.base_model.model.up
    factors = other.osf_svd_params["default"]
    data = batch()
    assert close(base(data["x"]), theirs(data["x"]))
    base(**data).backward()
    theirs(**data).backward()
    svdkern.Hooks(base).on_backward_end()
    sign = (layer.v * factors["U_low"]).sum(0).sign()
    assert close(layer.v.grad * sign, factors["U_low"].grad, 1e-3)
    assert close(layer.u.grad * sign, factors["V_low"].grad.t(), 1e-3)
    assert close(layer.sigma.grad, factors["S_low"].grad, 1e-3)
