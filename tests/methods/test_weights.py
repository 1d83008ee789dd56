"""Every method on weights that make trouble: degenerate ones, half precision, all ranks; and on the demo model."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import ALL, configured, dense
from torch import nn

import svdkern
from svdkern.methods import METHODS
from svdkern.nn import SVDLinear

ROOT = Path(__file__).resolve().parents[2]
STARTS_AS_THE_WEIGHT = [
    name for name in ALL if name not in ("kasa", "lora-sb", "kind", "lora-xs") and METHODS[name].merges
]
DEGENERATE = {
    "zeros": torch.zeros(6, 9),
    "ones": torch.ones(9, 6),
    "eye": torch.eye(8),
    "rank one": torch.outer(torch.arange(7.0), torch.arange(5.0) - 2),
    "equal rows": torch.arange(8.0).expand(6, 8).clone(),
    "huge range": torch.diag(torch.logspace(0, -30, 7)),
    "huge": 1e30 * torch.eye(6),
}


def statistic_for(method: str, weight: torch.Tensor) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(4)
    needs = METHODS[method].needs
    if needs == "covariance":
        x = torch.randn(5, weight.shape[1], generator=generator)  # fewer rows than columns: the covariance is singular
        return x.t() @ x / 5
    if needs == "gradient":
        return torch.randn(weight.shape, generator=generator)
    return None if needs is None else torch.rand(weight.shape[0], generator=generator)


def layer_on(weight: torch.Tensor, method: str, rank: int) -> SVDLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    statistic = statistic_for(method, weight.float())
    return SVDLinear.from_linear(linear, rank, configured(method), statistic=statistic)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_weights_start_finite_and_as_themselves(method: str, kind: str) -> None:
    """pytorch/pytorch#181641."""
    weight = DEGENERATE[kind]
    layer = layer_on(weight, method, 3)
    assert all(bool(p.isfinite().all()) for p in layer.parameters())
    if method in STARTS_AS_THE_WEIGHT:
        bound = 4e-6 * weight.abs().max().double()
        assert (dense(layer) - weight.double()).abs().max() <= bound
    x = torch.randn(4, weight.shape[1]) * (1e-30 if kind == "huge" else 1.0)
    layer(x).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.parameters())


@pytest.mark.parametrize("method", STARTS_AS_THE_WEIGHT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_starts_as_a_weight_of_any_dtype(method: str, dtype: torch.dtype) -> None:
    """huggingface/peft#1052."""
    weight = torch.randn(10, 14, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = layer_on(weight, method, 4)
    wide = max(torch.finfo(dtype).eps, 1e-6 if method == "sst" else 0.0)  # the factors are all there is of it
    assert (dense(layer) - weight.double()).abs().max() <= 2 * wide * weight.abs().max().double()


@settings(max_examples=8, deadline=None)
@given(k=st.integers(2, 24), n=st.integers(2, 24), data=st.data())
def test_any_shape_and_rank_starts_trains_and_merges(k: int, n: int, data: Any) -> None:
    method = data.draw(st.sampled_from(STARTS_AS_THE_WEIGHT))
    rank = data.draw(st.integers(1, min(k, n)))
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(k * 100 + n))
    try:
        configured(method).check_rank(k, n, rank)
    except ValueError:
        return
    layer = layer_on(weight, method, rank)
    assert (dense(layer) - weight.double()).norm() <= 1e-5 * weight.double().norm() + 1e-6, (method, rank)
    model = nn.Sequential(layer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    hooks = svdkern.Hooks(model, optimizer)
    x = torch.randn(6, k)
    model(x).square().mean().backward()
    hooks.on_backward_end()
    optimizer.step()
    hooks.on_step_end()
    hooks.on_round_end()
    y = model(x)
    svdkern.merge(model)
    assert (model(x) - y).norm() <= 2e-5 * y.norm() + 1e-6


@pytest.mark.parametrize("method", [name for name in ALL if METHODS[name].composes])
def test_a_composed_method_refuses_rank_0(method: str) -> None:
    with pytest.raises(ValueError, match="rank is 0, expected"):
        SVDLinear(8, 6, 0, method=configured(method), device="meta")


@pytest.fixture(scope="module")
def demo_model() -> Any:
    """SmolLM2-135M with its first two blocks."""
    pytest.importorskip("transformers", reason="needs transformers")
    sys.path.insert(0, str(ROOT / "examples"))
    import finetune_smollm2 as demo

    try:
        gguf = demo.find_gguf()
    except SystemExit as missing:
        pytest.skip(str(missing))
    model: Any = demo.load_model(gguf, torch.float32, torch.device("cpu"))
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("method", ALL)
def test_the_demo_model_learns_saves_and_loads(method: str, demo_model: Any, tmp_path: Path) -> None:
    """A falling loss on one batch, and the same bits after loading."""
    ids = torch.arange(64).view(2, 32) * 7 % 1000
    batches = [{"input_ids": ids, "labels": ids}]
    config = METHODS[method]()
    needs = {None: None, "importance": {"forget": batches, "retain": batches}}.get(config.needs, batches)
    model, other = copy.deepcopy(demo_model), copy.deepcopy(demo_model)
    torch.manual_seed(0)
    report = svdkern.adapt(model, config, rank=None if method in ("osf", "kind") else 16, data=needs)
    assert len(report.layers) == 14
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = 1e-2 if method in ("lora-xs", "svfit", "lora-sb", "randlora") else 1e-3
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    hooks = svdkern.Hooks(model, optimizer)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batches[0]).loss
        (loss + svdkern.regularization(model)).backward()
        hooks.on_backward_end()
        optimizer.step()
        hooks.on_step_end()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    logits = model(input_ids=ids).logits
    svdkern.save_adapter(model, tmp_path / "adapter")
    svdkern.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other.eval()(input_ids=ids).logits, logits)
    if config.merges:
        svdkern.merge(other)
        assert (other(input_ids=ids).logits - logits).norm() <= 1e-4 * logits.norm()
