"""A failing ``adapt`` or ``load_adapter`` leaves the model as it was, whichever stage fails and however."""

from __future__ import annotations

import gc
import os
import pkgutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_model import IDS, Net, snapshot, unchanged
from torch import nn

from svdkern import adapt, load_adapter, save_adapter
from svdkern.nn import SVDLinear

STAGES = {  # what is called, and its call that fails; the model has six layers
    "check": ("svdkern.model.check_linear", 6),
    "SVD": ("svdkern.linalg.factors", 4),
    "rehearsed residual": ("svdkern.methods.method.exact_residual", 6),
    "hash": ("svdkern.initialisation.sha256", 11),
    "layer": ("svdkern.nn.SVDLinear.before_cut", 5),
    "place": ("svdkern.targets.Target.put", 5),
    "freeze": ("svdkern.model._freeze", 1),
    "first cut": ("svdkern.nn.SVDLinear.cut_out", 1),
    "first residual": ("svdkern.methods.method.exact_residual", 7),
}


def acting_at(patch: pytest.MonkeyPatch, name: str, number: int, action: Callable[[], object]) -> None:
    """Call ``action`` before call number 1, 2, ... of the function of this dotted name."""
    owner_name, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    real, calls = getattr(owner, attribute), iter(range(1, 1000))

    def acting(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            action()
        return real(*args, **kwargs)

    patch.setattr(owner, attribute, acting)


def raising(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [MemoryError("no"), KeyboardInterrupt("no")], ids=lambda e: type(e).__name__)
def test_a_failure_at_any_stage(monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException) -> None:
    model = Net()
    model.layers[0].norm.weight.requires_grad_(False)
    before = snapshot(model)
    with monkeypatch.context() as patch:
        acting_at(patch, *STAGES[stage], raising(error))
        with pytest.raises(type(error), match="no"):
            adapt(model, "pissa", rank=4)
    assert unchanged(model, before)
    assert len(adapt(model, "pissa", rank=4).layers) == 6


@pytest.mark.parametrize("stage", ["check", "layer", "place", "freeze"])
def test_lora_at_any_stage(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    model = Net()
    before = snapshot(model)
    acting_at(monkeypatch, *STAGES[stage], raising(MemoryError()))
    with pytest.raises(MemoryError):
        adapt(model, "lora", rank=4)
    assert unchanged(model, before)


@pytest.mark.parametrize("stage", ["rehearsed residual", "layer", "place", "freeze", "first cut", "first residual"])
def test_loading_at_any_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str) -> None:
    saved = Net()
    adapt(saved, "sorsa", rank=4)
    save_adapter(saved, tmp_path / "a")
    model = Net()
    before = snapshot(model)
    with monkeypatch.context() as patch:
        acting_at(patch, *STAGES[stage], raising(MemoryError()))
        with pytest.raises(MemoryError):
            load_adapter(model, tmp_path / "a")
    assert unchanged(model, before)
    load_adapter(model, tmp_path / "a")
    assert all(torch.equal(t, saved.state_dict()[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_a_parent_that_refuses_the_new_layer(method: str) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def __setattr__(self, name: str, value: object) -> None:
            if name == "b" and not isinstance(value, nn.Linear):
                raise TypeError("b must be an nn.Linear")
            super().__setattr__(name, value)

    model = Strict()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"b must be an nn\.Linear"):
        adapt(model, method, rank=2)
    assert unchanged(model, before)


def test_a_residual_that_overflows_is_named() -> None:
    """The weight fits into float16, and what is left of it without its leading triplet does not."""
    first = torch.eye(8)[0] - 1 / 8
    weight = 93000.0 * torch.outer(first, first) - 95000.0 / 8
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight.copy_(weight)
    model = nn.Sequential(nn.Linear(8, 8), linear).to(torch.float16)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^1: the residual is not finite in torch\.float16"):
        adapt(model, "sorsa", rank=1)
    assert unchanged(model, before)


def test_memory_that_runs_out_in_the_last_moment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight that is gone cannot be had back: finished layers stay, the rest is as it was, a second call goes on."""
    model, expected = Net(), Net()
    original, y = dict(model.named_modules()), model(IDS)
    with monkeypatch.context() as patch:
        acting_at(patch, "svdkern.methods.method.exact_residual", 6 + 3, raising(MemoryError()))
        with pytest.raises(MemoryError):
            adapt(model, "pissa", rank=4)
    assert "2 of 6 layers are adapted and stay so" in caplog.text
    now = dict(model.named_modules())
    adapted = [name for name, module in now.items() if isinstance(module, SVDLinear)]
    assert len(adapted) == 2 and all(now[name] is original[name] for name in original if name not in adapted)
    assert all(p.requires_grad for module in now.values() if type(module) is nn.Linear for p in module.parameters())
    assert torch.allclose(model(IDS), y, atol=1e-5)
    assert len(adapt(model, "pissa", rank=4).layers) == 4
    adapt(expected, "pissa", rank=4)
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]


@pytest.mark.parametrize("stage", ["place", "first cut"])
def test_signals_while_replacing_wait_for_a_whole_model(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Ctrl-C, and an alarm (a test's or a notebook's time limit) whose handler raises: both come, afterwards."""
    model, seen = Net(), []
    y = model(IDS)

    def on_alarm(number: int, frame: object) -> None:
        seen.append([type(layer) for block in model.layers for layer in (block.q_proj, block.k_proj, block.down)])
        raise TimeoutError

    def both() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGALRM)

    acting_at(monkeypatch, STAGES[stage][0], 1, both)
    on_interrupt, before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGALRM, on_alarm)
    try:
        with pytest.raises(KeyboardInterrupt):
            adapt(model, "pissa", rank=4)
        assert signal.getsignal(signal.SIGINT) is on_interrupt and signal.getsignal(signal.SIGALRM) is on_alarm
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [[SVDLinear] * 6]
    assert torch.allclose(model(IDS), y, atol=1e-5)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"u", "v"}


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_old_weights_are_let_go_one_by_one(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """NovaSky-AI/SkyRL#2069: the memory of about one weight on top, not of all."""
    model, old = nn.Sequential(*(nn.Linear(24, 24) for _ in range(6))), []
    for layer in model:  # an array lives as long as the storage that is made of it
        array = np.random.default_rng(0).standard_normal((24, 24), dtype=np.float32)
        layer.weight = nn.Parameter(torch.from_numpy(array))
        old.append(weakref.ref(array))
    del array, layer
    alive: list[int] = []
    real = SVDLinear.cut_out

    def counting(*args: Any) -> None:
        alive.append(sum(ref() is not None for ref in old))
        real(*args)

    gc.collect()
    monkeypatch.setattr(SVDLinear, "cut_out", counting)
    adapt(model, method, rank=4)
    assert alive == ([6, 5, 4, 3, 2, 1] if method == "pissa" else [])
    assert all((ref() is None) == (method == "pissa") for ref in old)
