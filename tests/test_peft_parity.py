"""Against PEFT, from the same start: the same products, the same outputs, the same gradients, the same targets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama
from torch import Tensor, nn

from svdkern.model import adapt, merge
from svdkern.nn import SVDLinear

pytestmark = pytest.mark.peer
peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

IDS = torch.arange(24).view(2, 12) % 60


def peft_model(base: Any, init: Any, rank: int, alpha: float, targets: Any = "all-linear") -> Any:
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        init_lora_weights=init,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, config)


def pairs(ours: nn.Module, theirs: Any) -> list[tuple[str, SVDLinear, Any]]:
    return [
        (name, layer, theirs.base_model.model.get_submodule(name))
        for name, layer in ours.named_modules()
        if isinstance(layer, SVDLinear)
    ]


def loss_of(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-12)


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_pissa_has_the_products_and_gradients_of_peft(alpha: float) -> None:
    ours, theirs = tiny_llama(), peft_model(tiny_llama(), "pissa", 4, alpha)
    weights = {n: m.weight.detach().double() for n, m in ours.named_modules() if isinstance(m, nn.Linear)}
    adapt(ours, "pissa", rank=4, alpha=alpha)
    matched = pairs(ours, theirs)
    assert len(matched) == 14
    for name, layer, other in matched:
        a, b, scale = other.lora_A["default"].weight, other.lora_B["default"].weight, other.scaling["default"]
        assert layer.scale.item() == scale
        p, s, qh = torch.linalg.svd(weights[name], full_matrices=False)
        exact = (p[:, :4] * s[:4]) @ qh[:4]
        error, peer = ((scale * m.double() - exact).norm() for m in (layer.v @ layer.u.t(), b @ a))
        assert error <= peer and error <= 2e-7 * exact.norm(), name
        assert peer <= 1e-4 * exact.norm(), name  # their SVD runs in float32; a small gap to the next value shows it
        assert close(layer.residual, other.get_base_layer().weight, 1e-4), name
        # the gauge differs (signs, and rotations among equal values), and with it the gradients: align it to compare
        rotation = torch.linalg.lstsq(layer.u.detach(), a.detach().t()).solution
        with torch.no_grad():
            a.copy_((layer.u @ rotation).t())
            b.copy_(layer.v @ torch.linalg.inv(rotation).t())
            layer.u.copy_(a.t())
            layer.v.copy_(b)
            other.get_base_layer().weight.copy_(layer.residual)
    assert close(ours(IDS).logits, theirs(IDS).logits)
    loss_of(ours).backward()
    loss_of(theirs).backward()
    for name, layer, other in matched:
        assert close(layer.u.grad, other.lora_A["default"].weight.grad.t(), 1e-4), name
        assert close(layer.v.grad, other.lora_B["default"].weight.grad, 1e-4), name


def test_lora_trains_as_in_peft() -> None:
    ours, theirs = tiny_llama(), peft_model(tiny_llama(), True, 4, 8.0)
    adapt(ours, "lora", rank=4, alpha=8.0)
    matched = pairs(ours, theirs)
    with torch.no_grad():
        for _, layer, other in matched:
            assert torch.equal(layer.residual, other.get_base_layer().weight)
            assert layer.v.abs().max() == 0 == other.lora_B["default"].weight.abs().max()
            other.lora_A["default"].weight.copy_(layer.u.t())
    assert torch.equal(ours(IDS).logits, tiny_llama()(IDS).logits) or close(ours(IDS).logits, tiny_llama()(IDS).logits)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (ours, theirs)]
    for _ in range(4):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, layer, other in matched:
        assert close(layer.v, other.lora_B["default"].weight, 1e-3), name
        assert close(layer.u, other.lora_A["default"].weight.t(), 1e-3), name
    merge(ours)
    merged = theirs.merge_and_unload()
    assert close(ours(IDS).logits, merged(IDS).logits, 1e-4)
    assert sum(p.numel() for p in ours.parameters()) > sum(p.numel() for p in merged.parameters())


def test_pissa_of_a_bf16_model_starts_closer_to_it_than_peft() -> None:
    """Factors are rounded before the residual is computed, so the sum is the weight to one rounding."""
    base = tiny_llama(torch.bfloat16)
    weights = {n: m.weight.detach().clone() for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    ours = copy.deepcopy(base)
    adapt(ours, "pissa", rank=4)
    theirs = peft_model(base, "pissa", 4, 4.0)
    for name, layer, other in pairs(ours, theirs):
        weight = weights[name].double()
        mine = layer.residual.double() + layer.v.double() @ layer.u.double().t() - weight
        b, a = other.lora_B["default"].weight, other.lora_A["default"].weight
        peer = other.get_base_layer().weight.double() + b.double() @ a.double() - weight
        assert mine.norm() <= 1.01 * peer.norm(), name
        assert bool(
            (mine.abs() <= 0.51 * torch.finfo(torch.bfloat16).eps * layer.residual.double().abs() + 1e-7).all()
        ), name


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "down_proj"], r".*\.1\.mlp\..*_proj", ["0.self_attn.k_proj"]]
)
def test_the_same_layers_are_adapted(targets: Any) -> None:
    ours, theirs = tiny_llama(), peft_model(tiny_llama(), True, 2, 2.0, targets)
    report = adapt(ours, "lora", rank=2, target_modules=targets)
    expected = [n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "base_layer")]
    assert [row.name for row in report.layers] == expected
    trainable, _ = theirs.get_nb_trainable_parameters()
    assert report.trainable == trainable


def test_sequence_classification_keeps_its_head_trainable_only_if_asked() -> None:
    """NovaSky-AI/SkyRL#2069: a score head of one output is named, and can be left out."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_labels=1
    )
    model = transformers.LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match="score: rank is 4, expected 1 <= rank <= 1"):
        adapt(model, "pissa", rank=4)
    report = adapt(model, "pissa", rank=4, exclude_modules=["score"])
    assert all(row.name != "score" for row in report.layers) and len(report.layers) == 7
