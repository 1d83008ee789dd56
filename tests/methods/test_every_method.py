"""What holds for every method in the registry: training, saving, loading, merging, counts, shapes, failures."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import ALL, adapted, batch, configured, data_for, dense, layer_of, net, train
from torch import nn

import svdkern
from svdkern.nn import SVDLinear

STARTS_ELSEWHERE = {"kasa", "lora-sb", "kind"}
"""Methods that mean to start with another output than the weight's."""
MERGE_BOUND = 1e-5


@pytest.mark.parametrize("method", ALL)
def test_trains_saves_loads_and_merges(method: str, tmp_path: Path) -> None:
    """A falling loss; the same bits after loading onto a fresh base; the merged output within 1e-5."""
    model = adapted(method)
    config = configured(method)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in before} == set(config.trains)
    losses = train(model)
    assert losses[-1] < losses[0] - 1e-4 * abs(losses[0])
    now = dict(model.named_parameters())
    assert any(not torch.equal(now[name], p) for name, p in before.items())
    for name, p in frozen.items():
        if name.endswith(("residual", "bias")):
            assert torch.equal(now[name], p), name

    model.eval()
    data = batch()["x"]
    y = model(data)
    svdkern.save_adapter(model, tmp_path / "a")
    fresh = net()
    with torch.random.fork_rng():
        torch.manual_seed(99)
        svdkern.load_adapter(fresh, tmp_path / "a")
    fresh.eval()
    assert torch.equal(fresh(data), y)
    for (name, mine), (_, other) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(mine, other) and mine.requires_grad == other.requires_grad, name
    for mine, other in ((model.up, fresh.up), (model.down, fresh.down)):
        assert mine.config == other.config and mine.rank == other.rank
    svdkern.save_adapter(fresh, tmp_path / "b")
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]

    refreshed = copy.deepcopy(model)
    with torch.no_grad():
        for p in refreshed.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    svdkern.load_adapter(refreshed, tmp_path / "a")
    assert torch.equal(refreshed(data), y)

    if not config.merges:
        with pytest.raises(RuntimeError, match="depends on the input"):
            svdkern.merge(model)
        assert torch.equal(model(data), y)
        return
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    svdkern.merge(model)
    assert (model(data) - y).norm() <= MERGE_BOUND * y.norm()
    merged = model.state_dict()
    assert list(merged) == list(state) and all(torch.equal(merged[name], state[name]) for name in state)
    svdkern.unmerge(model)
    assert torch.equal(model(data), y)


@pytest.mark.parametrize("method", ALL)
def test_adapting_and_training_repeat_to_the_bit(method: str) -> None:
    first, second = adapted(method), adapted(method)
    assert train(first, 3) == train(second, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(("k", "n"), [(7, 11), (8, 8), (11, 7)])
def test_the_layer_is_the_equation_and_starts_where_it_should(method: str, k: int, n: int) -> None:
    config = configured(method)
    if config.needs is not None:
        pytest.skip("its start is tested with its data")
    for rank in (1, 3, 6):
        try:
            config.check_rank(k, n, rank)
        except ValueError:
            continue
        alpha = None if method in ("sst", "kind", "codyra") else 2.0 * config.divisor(rank)
        layer, weight = layer_of(method, k, n, rank, alpha=alpha)
        x = torch.randn(5, k, dtype=torch.float32, generator=torch.Generator().manual_seed(3))
        if config.merges:
            effective = dense(layer)
            y = x.double() @ effective.t() + layer.bias.double()
            assert (layer(x).double() - y).norm() <= 2e-6 * y.norm()
            assert (layer.weight.double() - effective).norm() <= 1e-6 * effective.norm()
            distance = (effective - weight.double()).norm() / weight.double().norm()
        else:
            distance = (layer(x) - nn.functional.linear(x, weight, layer.bias)).norm() / layer(x).norm()
        if method in STARTS_ELSEWHERE:
            assert distance > 1e-3
        else:
            assert distance <= (1e-4 if method == "lora-xs" else 2e-6), (rank, distance)


@settings(max_examples=6, deadline=None)
@given(k=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 12))
def test_counts_and_shapes(k: int, n: int, r: int) -> None:
    """The card's formula, ``trainable_parameters`` and a layer on the meta device agree for every method."""
    for method in ALL:
        config = configured(method)
        rank = min(r, k, n)
        try:
            config.check_rank(k, n, rank)
        except ValueError:
            continue
        layer = SVDLinear(k, n, rank, method=config, device="meta")
        trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        count = sum(p.numel() for p in trained.values())
        assert set(trained) == set(config.trains), method
        assert count == config.trainable_parameters(k, n, rank), method
        assert count == formula(config.card.parameters, k, n, rank), method
        assert layer.rank == rank


def formula(expression: str, k: int, n: int, r: int) -> int:
    names = {
        "K": k,
        "N": n,
        "r": r,
        "min": min,
        "max": max,
        "ceil": lambda a: -int(-a // 1),
        "floor": lambda a: int(a // 1),
    }
    return int(eval(expression, {"__builtins__": {}}, names))  # noqa: S307  an expression of ours


@pytest.mark.parametrize("method", ALL)
def test_a_meta_layer_takes_a_state_dict(method: str) -> None:
    model = adapted(method)
    source = model.up
    empty = SVDLinear(12, 20, 3, method=configured(method), device="meta").to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    x = batch()["x"]
    empty.eval()
    source.eval()
    assert torch.equal(empty(x), source(x))


@pytest.mark.parametrize("method", ALL)
def test_a_bfloat16_model_with_float32_factors(method: str, tmp_path: Path) -> None:
    """The factors stay float32, the loss falls, and a saved adapter is the same bits on a bfloat16 base."""
    data = batch(dtype=torch.bfloat16)
    model = net(dtype=torch.bfloat16)
    torch.manual_seed(0)
    config = configured(method)
    svdkern.adapt(model, config, rank=3, data=data_for(config, torch.bfloat16))
    layer = model.up
    assert all(p.dtype == torch.float32 for name, p in layer.named_parameters() if p.requires_grad)
    losses = train(model, 20, data=data)
    assert losses[-1] < losses[0]
    model.eval()
    y = model(data["x"])
    assert y.dtype == torch.bfloat16
    svdkern.save_adapter(model, tmp_path / "a")
    fresh = net(dtype=torch.bfloat16)
    svdkern.load_adapter(fresh, tmp_path / "a")
    fresh.eval()
    assert torch.equal(fresh(data["x"]), y)


@pytest.mark.parametrize("method", ALL)
def test_configuration(method: str) -> None:
    config = configured(method)
    assert config.name == method and "arXiv" in config.citation and config.published_rank > 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"  # type: ignore[misc]
    for field in dataclasses.fields(config):
        if isinstance(field.default, float | int) and not isinstance(field.default, bool):
            for bad in (float("nan"), -1.0):
                with pytest.raises((ValueError, TypeError), match=field.name):
                    dataclasses.replace(config, **{field.name: bad})
        with pytest.raises(TypeError, match=field.name):
            dataclasses.replace(config, **{field.name: [1]})
    names = set(config.shapes(8, 6, 2))
    plain = nn.Linear(8, 6)
    taken = {"residual", "bias", "scale", "kept", "fingerprint", "u0", "sigma0", "v0", "scale0", "weight"}
    assert not names & (taken | (set(dir(plain)) - {"u", "v"}))


@pytest.mark.parametrize("method", ["svfit", "lora-xs"])
def test_a_frozen_factor_is_held_and_saved_once(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    layer = model.up
    if layer.u0 is not None:
        assert layer.u0.data_ptr() == layer.u.data_ptr() and layer.v0.data_ptr() == layer.v.data_ptr()
    svdkern.save_adapter(model, tmp_path / "a")
    stored = safetensors.torch.load_file(tmp_path / "a" / "adapter.safetensors")
    assert sum("u" in name.rpartition(".")[2] for name in stored) == 2
    fresh = net()
    svdkern.load_adapter(fresh, tmp_path / "a")
    if layer.u0 is not None:
        assert fresh.up.u0.data_ptr() == fresh.up.u.data_ptr()


def test_an_unknown_method_lists_all_the_nearest_first() -> None:
    with pytest.raises(ValueError, match="method is 'lora_xs', expected one of lora-xs, ") as error:
        svdkern.adapt(net(), "lora_xs")
    assert all(name in str(error.value) for name in ALL)
