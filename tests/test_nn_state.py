"""What an ``SVDLinear`` goes through: merging, copying, casting, moving."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from test_nn import METHOD_NAMES, activations, bits_of, dense, linear_of, trained_layer
from torch import Tensor, nn

from svdkern.nn import SVDLinear

# --------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(method: str, dtype: torch.dtype) -> None:
    """EricLBuehler/candle-lora#26: a merge that is lost, applied twice, or not looked at by forward."""
    layer = trained_layer(method).to(dtype)
    x = activations(dtype=dtype)
    bits, state, y0 = bits_of(layer.residual), copy.deepcopy(layer.state_dict()), layer(x)
    effective = dense(layer)
    layer.merge()
    error = (layer.residual.double() - effective).norm() / effective.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    y1 = layer(x)
    assert torch.allclose(y0, y1, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert torch.equal(y1, nn.functional.linear(x, layer.residual, layer.bias))
    merged = bits_of(layer.residual)
    layer.merge()
    assert bits_of(layer.residual) == merged and torch.equal(layer(x), y1)
    layer.train()
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None and layer.u.grad is None and torch.equal(layer(x), y1)
    assert torch.equal(layer.weight, layer.residual)
    for mode in (True, False):
        layer.train(mode)
        now = layer.state_dict()
        assert list(now) == list(state) and all(bits_of(now[k]) == bits_of(state[k]) for k in state)
    layer.unmerge()
    assert bits_of(layer.residual) == bits and torch.equal(layer(x), y0) and layer.kept is None
    layer.unmerge()
    assert bits_of(layer.residual) == bits


def test_merged_state_dict_loads_into_a_fresh_layer() -> None:
    layer = trained_layer("pissa")
    x, y0 = activations(), None
    y0 = layer(x)
    layer.merge()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for fresh in (trained_layer("pissa"), SVDLinear.from_linear(linear_of(), 5, "pissa")):
        fresh.merge()
        fresh.load_state_dict(torch.load(file))
        assert torch.equal(fresh(x), y0) and not fresh.merged
        file.seek(0)


def test_merge_without_a_kept_copy_refuses_to_go_back() -> None:
    layer = trained_layer("pissa")
    x, state = activations(), copy.deepcopy(layer.state_dict())
    y0 = layer(x)
    layer.merge(keep=False)
    assert layer.kept is None and torch.allclose(layer(x), y0, atol=1e-4)
    for action in (layer.unmerge, layer.state_dict):
        with pytest.raises(RuntimeError, match="keep=False"):
            action()
    assert layer.merged
    layer.load_state_dict(state)  # brings back what was dropped
    assert torch.equal(layer(x), y0)


def test_merge_uses_no_dropout_and_no_random_numbers() -> None:
    """huggingface/peft#3586: merging in train mode bakes a random dropout mask into the weight."""
    merged = []
    for seed, training in ((1, True), (2, True), (3, False)):
        layer = trained_layer("pissa", dropout_p=0.5).train(training)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        ye = layer.eval()(activations())
        layer.train(training).merge()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.allclose(layer.eval()(activations()), ye, atol=1e-4)
        merged.append(bits_of(layer.residual))
    assert len(set(merged)) == 1


def test_merge_leaves_a_live_graph_right() -> None:
    layer = trained_layer("pissa")
    x = activations().requires_grad_()
    expected = layer.weight.detach().sum(0).expand_as(x)
    y = layer(x)
    layer.merge()
    y.sum().backward()
    assert torch.allclose(x.grad, expected, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_shared_weight_is_never_written_to(method: str) -> None:
    embedding = nn.Embedding(18, 24)
    head = nn.Linear(24, 18, bias=False)
    head.weight = embedding.weight
    before = bits_of(embedding.weight)
    layer = SVDLinear.from_linear(head, 4, method)
    with torch.no_grad():
        layer.v += 1.0
    layer.merge()
    layer.unmerge()
    layer.merge(keep=False)
    assert bits_of(embedding.weight) == before and head.weight is embedding.weight


def test_merged_layer_can_be_cast_and_unmerged() -> None:
    layer = trained_layer("pissa")
    expected = layer.residual.detach().bfloat16()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert isinstance(layer.residual, nn.Parameter) and bits_of(layer.residual) == bits_of(expected)


# ------------------------------------------------------------------------------------------ copies and conversions


def _roundtrip_pickle(layer: SVDLinear) -> SVDLinear:
    return pickle.loads(pickle.dumps(layer))


def _roundtrip_save(layer: SVDLinear) -> SVDLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _roundtrip_pickle, _roundtrip_save])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_complete_and_independent(copied, merged: bool) -> None:  # type: ignore[no-untyped-def]
    """huggingface/peft#424: a copy has default settings; microsoft/LoRA#200: not picklable."""
    layer = trained_layer("sorsa", alpha=2.0, dropout_p=0.1)
    layer.scale = 0.75
    layer.eval()
    if merged:
        layer.merge()
    x = activations()
    y = layer(x)
    other = copied(layer)
    assert repr(other) == repr(layer) and other.config == layer.config and other.training == layer.training
    assert torch.equal(other(x), y)
    assert {n: p.requires_grad for n, p in other.named_parameters()} == {
        n: p.requires_grad for n, p in layer.named_parameters()
    }
    mine = {t.data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    assert not mine & {t.data_ptr() for t in [*other.parameters(), *other.buffers()]}
    other.scale = 9.0
    (other.unmerge if merged else other.merge)()
    with torch.no_grad():
        other.u.add_(1.0)
    assert torch.equal(layer(x), y) and layer.merged == merged and layer.scale.item() == 0.75


def test_tied_factors_stay_tied_inside_a_copy() -> None:
    model = nn.ModuleList([trained_layer("pissa"), trained_layer("pissa")])
    model[1].u = model[0].u
    other = copy.deepcopy(model)
    assert other[0].u is other[1].u and other[0].u is not model[0].u


def _run_layer(layer: SVDLinear, x: Tensor, queue) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    queue.put(layer(x).detach().numpy())


@pytest.mark.parametrize("merged", [False, True])
def test_a_spawned_process_takes_the_layer(merged: bool) -> None:
    layer, x = trained_layer("pissa"), activations()
    y = layer(x)
    if merged:
        layer.merge()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_run_layer, args=(layer, x, queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=60))
    process.join()
    assert torch.allclose(found, y, atol=1e-4)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_meta_device(method: str) -> None:
    layer = SVDLinear(24, 18, 5, method=method, alpha=2.0, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta for p in layer.parameters()) and layer.u.dtype == torch.float32
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16
    source = SVDLinear.from_linear(linear_of(dtype=torch.bfloat16), 5, method, alpha=2.0)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = activations(dtype=torch.bfloat16)
    assert torch.equal(layer(x), source(x)) and layer.scale.item() == pytest.approx(0.4)
    layer.to("meta")
    assert layer.residual.is_meta and layer.scale.item() == pytest.approx(0.4)
    with torch.device("meta"):
        assert SVDLinear(8, 8, 2, method=method).u.is_meta


def test_forward_on_meta() -> None:
    layer = SVDLinear(24, 18, 5, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(3, 24, device="meta", dtype=torch.bfloat16))
    assert y.is_meta and y.shape == (3, 18) and y.dtype == torch.bfloat16


def test_a_state_dict_brings_its_initial_factors_unrounded() -> None:
    """An adapter may have float32 initial factors where a new layer would keep them in the weight's bfloat16."""
    layer = SVDLinear.from_linear(nn.Linear(24, 16).bfloat16(), 4, "pissa")
    state = layer.state_dict()
    state["u0"] = state["u0"].float() + 2.0**-20
    other = SVDLinear.from_linear(nn.Linear(24, 16).bfloat16(), 4, "pissa")
    other.load_state_dict(state)
    assert other.u0 is not None and other.u0.dtype == torch.float32 and torch.equal(other.u0, state["u0"])
    assert other.v0 is not None and other.v0.dtype == torch.bfloat16


def test_casts_do_not_round_the_initial_factors() -> None:
    layer = SVDLinear.from_linear(linear_of(), 5, "sorsa")
    before = {name: bits_of(b) for name, b in layer.named_buffers() if name != "fingerprint"}
    layer.to(torch.bfloat16).half().double().float()
    assert {name: bits_of(b) for name, b in layer.named_buffers() if name != "fingerprint"} == before
