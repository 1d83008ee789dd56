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
