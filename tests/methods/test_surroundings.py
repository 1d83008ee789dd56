"""Every method inside what PyTorch puts around a layer: copies, pickles, casts, autocast, checkpointing, compile, other methods."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from recipes import ALL, adapted, batch, configured, data_for, net, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import svdkern
from svdkern.methods import METHODS, SMoRA

COMPOSED = [name for name in ALL if METHODS[name].composes]


@pytest.mark.parametrize("method", ALL)
def test_copies_and_pickles_are_complete_and_independent(method: str) -> None:
    """huggingface/peft#424."""
    model = adapted(method)
    train(model, 2)
    model.eval()
    x, y = batch()["x"], model(batch()["x"])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert repr(other) == repr(model) and torch.equal(other(x), y)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
        train(other, 2)
        model.eval()
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("method", ALL)
def test_casts_and_autocast(method: str) -> None:
    model = adapted(method)
    train(model, 2)
    model.eval()
    x, y = batch()["x"], model(batch()["x"])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    assert mixed.dtype == torch.bfloat16 and (mixed.float() - y).norm() <= 0.05 * y.norm()
    assert torch.equal(model(x), y)
    half = copy.deepcopy(model).to(torch.bfloat16)
    z = half(x.bfloat16())
    assert z.dtype == torch.bfloat16 and (z.float() - y).norm() <= 0.1 * y.norm()
    double = copy.deepcopy(model).double()
    assert (double(x.double()) - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("method", ALL)
def test_activation_checkpointing_gives_the_same_gradients(method: str) -> None:
    gradients: list[Any] = []
    for call in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        model = adapted(SMoRA(active=2, balance_rate=0.5) if method == "smora" else method)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:  # where V starts as 0 little has a gradient
                    p.add_(
                        0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
                    )
        call(model, batch()["x"]).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("method", ALL)
def test_the_gradients_are_those_of_the_float64_equation(method: str) -> None:
    """Finite differences of the loss in random directions, in float64."""
    model = net(dtype=torch.float64)
    torch.manual_seed(0)
    config = configured(method)
    svdkern.adapt(model, config, rank=3, adapter_dtype=torch.float64, data=data_for(config, torch.float64))
    model.eval()
    data = batch(dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.01 * torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def total() -> torch.Tensor:
        return model(**data) + svdkern.regularization(model)

    gradients = torch.autograd.grad(total(), parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            p.add_(direction, alpha=step)
            up = total().item()
            p.sub_(direction, alpha=2 * step)
            down = total().item()
            p.add_(direction, alpha=step)
        assert (up - down) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    "method",
    [
        name if name in ("salt", "sst") else pytest.param(name, marks=pytest.mark.slow)
        for name in COMPOSED
        if name != "smora"
    ],
)
def test_composed_methods_compile_without_a_break(method: str) -> None:
    model = adapted(method)
    train(model, 2)
    model.zero_grad()
    x = batch()["x"]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert torch.allclose(y, model(x), atol=1e-6)
    y.square().sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).square().sum().backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_methods_live_side_by_side() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    for i, method in enumerate(("kasa", "osf", "sst", "codyra")):
        svdkern.adapt(model, method, rank=2, target_modules=[str(i)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    hooks = svdkern.Hooks(model, optimizer)
    x, target = torch.randn(20, 8), torch.randn(20, 8)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        (loss + svdkern.regularization(model)).backward()
        hooks.on_backward_end()
        optimizer.step()
        hooks.on_step_end()
        losses.append(loss.item())
    hooks.on_round_end()
    assert losses[-1] < losses[0] and hooks.step == 0
    assert [layer.method for layer in model] == ["kasa", "osf", "sst", "codyra"]


@pytest.mark.parametrize("method", ALL)
def test_dropout_trains_and_rests(method: str) -> None:
    model = adapted(method, dropout_p=0.5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    x = batch()["x"]
    model.train()
    first, second = model(x), model(x)
    model.eval()
    assert not torch.equal(first, second) and torch.equal(model(x), model(x))
