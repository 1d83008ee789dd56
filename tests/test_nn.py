"""``SVDLinear`` as a module: equation, weight, merge, state, copies, casts."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call

from svdkern.methods import METHODS
from svdkern.nn import SVDLinear

METHOD_NAMES = list(METHODS)


def _linear(k: int = 24, n: int = 18, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(k * 100 + n)
    return nn.Linear(k, n, bias).to(dtype)


def _trained(method: str = "sorsa", rank: int = 5, **arguments) -> SVDLinear:  # type: ignore[no-untyped-def]
    """A layer away from its start."""
    layer = SVDLinear.from_linear(_linear(), rank, method, **arguments)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter += 0.1 * noise.to(parameter.dtype)
    return layer


def _x(k: int = 24, rows: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def _dense(layer: SVDLinear) -> Tensor:
    middle = torch.ones(layer.rank) if layer.sigma is None else layer.sigma
    low_rank = (layer.v.double() * middle.double()) @ layer.u.double().t()
    return layer.residual.double() + float(layer.scale) * low_rank


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------------------ equation


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_the_equation(method: str, bias: bool) -> None:
    layer = SVDLinear.from_linear(_linear(bias=bias), 5, method, alpha=2.5)
    with torch.no_grad():
        layer.v += 0.1
    x = _x().view(1, 7, 24).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}
    dx = x.grad.clone()
    layer.zero_grad()
    x.grad = None
    reference = torch.nn.functional.linear(x, layer.weight, layer.bias)
    reference.backward(dy)
    assert torch.allclose(y, reference, atol=1e-5)
    assert torch.allclose(dx, x.grad, atol=1e-4)
    assert set(found) == set(layer.config.trains)
    for name, gradient in found.items():
        assert torch.allclose(gradient, getattr(layer, name).grad, atol=1e-4), name


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_from_linear_computes_what_the_linear_computes(method: str, dtype: torch.dtype) -> None:
    """huggingface/peft#1052: half-precision layers convert, and reproduce the layer within rounding."""
    linear = nn.Linear(96, 64).to(dtype)
    original = linear.weight.detach().clone()
    layer = SVDLinear.from_linear(linear, 8, method)
    assert layer.residual.dtype == dtype and layer.u.dtype == torch.float32
    x = torch.randn(11, 96).to(dtype)
    exact = x.double() @ original.double().t() + linear.bias.double()
    bound = 2 * (linear(x).double() - exact).abs().max() + 8 * torch.finfo(dtype).eps * exact.abs().max()
    assert layer(x).dtype == dtype
    assert (layer(x).double() - exact).abs().max() <= bound
    assert torch.equal(linear.weight, original) and linear.weight.requires_grad
    layer.merge()
    assert ((layer.residual - original).abs() <= 2 * torch.finfo(dtype).eps * (original.abs() + 0.2)).all()


def test_bias_and_weight_of_the_linear_stay_trainable_and_untouched() -> None:
    linear = _linear()
    layer = SVDLinear.from_linear(linear, 3, "pissa")
    assert linear.weight.requires_grad and linear.bias.requires_grad
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["u", "v"]
    assert layer.residual.data_ptr() != linear.weight.data_ptr()
    shared = SVDLinear.from_linear(linear, 3, "lora")
    assert shared.residual.data_ptr() == linear.weight.data_ptr()


def test_constructor_is_from_linear_of_a_fresh_linear() -> None:
    torch.manual_seed(0)
    layer = SVDLinear(24, 18, 4, method="sorsa", alpha=8, dropout_p=0.25, dtype=torch.bfloat16)
    torch.manual_seed(0)
    linear = nn.Linear(24, 18, dtype=torch.bfloat16)
    other = SVDLinear.from_linear(linear, 4, "sorsa", alpha=8, dropout_p=0.25)
    assert repr(layer) == repr(other)
    for (name, a), (other_name, b) in zip(layer.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name and _bits(a) == _bits(b)
    assert SVDLinear(24, 18, 4, bias=False).bias is None


def test_repr_says_what_matters() -> None:
    layer = SVDLinear.from_linear(_linear(), 5, "pissa", alpha=2.5, dropout_p=0.1)
    text = repr(layer)
    for part in ("in_features=24", "out_features=18", "rank=5", "bias=True", "method='pissa'", "scale=0.5", "0.1"):
        assert part in text
    layer.merge()
    assert "merged=True" in repr(layer)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_degenerate_weights_give_the_linear(method: str) -> None:
    """pytorch/pytorch#181641: zeros, ones, rank one, huge range: the layer computes, forward and backward, what it should."""
    for weight in (
        torch.zeros(64, 64),
        torch.eye(64),
        torch.ones(64, 40),
        torch.outer(torch.arange(1.0, 31), torch.arange(-5.0, 15)),
        torch.diag(torch.logspace(0, -38, 40)),
        torch.randn(1, 48).repeat(32, 1),
    ):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight)
        layer = SVDLinear.from_linear(linear, 8, method)
        x = torch.randn(3, weight.shape[1], requires_grad=True)
        y = layer(x)
        assert torch.allclose(y, linear(x), rtol=1e-5, atol=1e-5 * max(1.0, float(weight.abs().max())) * 40)
        y.sum().backward()
        assert all(bool(getattr(layer, name).grad.isfinite().all()) for name in layer.config.trains)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 19}, ValueError, r"rank is 19, expected 1 <= rank <= 18 \(in_features 24, out_features 18\)"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"rank": 2.0}, TypeError, "rank is 2.0, expected an int"),
        ({"rank": 2, "dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
        ({"rank": 2, "alpha": float("inf")}, ValueError, "scale is inf"),
        ({"rank": 2, "adapter_dtype": torch.int8}, TypeError, "adapter_dtype is torch.int8"),
        ({"rank": 2, "method": "svd"}, ValueError, "method is 'svd'"),
    ],
)
def test_from_linear_refuses(arguments: dict, error: type[Exception], message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=message):
        SVDLinear.from_linear(_linear(), **arguments)


def test_from_linear_refuses_what_is_no_plain_linear() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(TypeError, match="is of type Conv2d, expected nn.Linear"):
        SVDLinear.from_linear(nn.Conv2d(3, 3, 1), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Doubled has a forward of its own"):
        SVDLinear.from_linear(Doubled(8, 8), 1)
    with pytest.raises(TypeError, match="UninitializedParameter"):
        SVDLinear.from_linear(nn.LazyLinear(8), 1)
    broken = _linear()
    with torch.no_grad():
        broken.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN or an infinity"):
        SVDLinear.from_linear(broken, 1, "lora")


# -------------------------------------------------------------------------------------------------------- weight


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_is_the_effective_weight(method: str, dtype: torch.dtype) -> None:
    layer = _trained(method, alpha=2.0).to(dtype)
    weight = layer.weight
    assert weight.dtype == dtype and weight.shape == (18, 24)
    assert (weight.double() - _dense(layer)).abs().max() <= torch.finfo(dtype).eps * _dense(layer).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, weight)


def test_weight_cannot_be_assigned() -> None:
    layer = _trained()
    before = _bits(layer.residual)
    for value in (nn.Parameter(torch.zeros(18, 24)), torch.zeros(18, 24), None):
        with pytest.raises(AttributeError, match="assign to residual"):
            layer.weight = value
    assert _bits(layer.residual) == before and "weight" not in layer._parameters


def test_core_is_applied_the_right_way_round() -> None:
    """MohammadrezaBanaei/LoRA-XS#1: on a non-square layer with a non-symmetric core R, z = h R (not its transpose)."""
    layer = SVDLinear.from_linear(nn.Linear(48, 80), 6, "lora", alpha=3.0)
    core = torch.randn(6, 6)
    layer.core = nn.Parameter(core)
    layer.v = nn.Parameter(torch.randn(80, 6))
    x = torch.randn(9, 48)
    reference = nn.functional.linear(x, layer.residual, layer.bias) + 0.5 * ((x @ layer.u) @ core) @ layer.v.t()
    assert torch.allclose(layer(x), reference, atol=1e-4)
    assert torch.allclose(nn.functional.linear(x, layer.weight, layer.bias), reference, atol=1e-4)
    layer(x).square().sum().backward()
    found = layer.core.grad.clone()
    layer.core.grad = None
    nn.functional.linear(x, layer.weight, layer.bias).square().sum().backward()
    assert torch.allclose(found, layer.core.grad, rtol=1e-4, atol=1e-3)
    layer.merge()
    assert torch.allclose(layer(x), reference, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(method: str, dtype: torch.dtype) -> None:
    """EricLBuehler/candle-lora#26: a merge that is lost, applied twice, or not looked at by forward."""
    layer = _trained(method).to(dtype)
    x = _x(dtype=dtype)
    bits, state, y0 = _bits(layer.residual), copy.deepcopy(layer.state_dict()), layer(x)
    effective = _dense(layer)
    layer.merge()
    error = (layer.residual.double() - effective).norm() / effective.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    y1 = layer(x)
    assert torch.allclose(y0, y1, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert torch.equal(y1, nn.functional.linear(x, layer.residual, layer.bias))
    merged = _bits(layer.residual)
    layer.merge()
    assert _bits(layer.residual) == merged and torch.equal(layer(x), y1)
    layer.train()
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None and layer.u.grad is None and torch.equal(layer(x), y1)
    assert torch.equal(layer.weight, layer.residual)
    for mode in (True, False):
        layer.train(mode)
        now = layer.state_dict()
        assert list(now) == list(state) and all(_bits(now[k]) == _bits(state[k]) for k in state)
    layer.unmerge()
    assert _bits(layer.residual) == bits and torch.equal(layer(x), y0) and layer.kept is None
    layer.unmerge()
    assert _bits(layer.residual) == bits


def test_merged_state_dict_loads_into_a_fresh_layer() -> None:
    layer = _trained("pissa")
    x, y0 = _x(), None
    y0 = layer(x)
    layer.merge()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for fresh in (_trained("pissa"), SVDLinear.from_linear(_linear(), 5, "pissa")):
        fresh.merge()
        fresh.load_state_dict(torch.load(file))
        assert torch.equal(fresh(x), y0) and not fresh.merged
        file.seek(0)


def test_merge_without_a_kept_copy_refuses_to_go_back() -> None:
    layer = _trained("pissa")
    x, state = _x(), copy.deepcopy(layer.state_dict())
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
        layer = _trained("pissa", dropout_p=0.5).train(training)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        ye = layer.eval()(_x())
        layer.train(training).merge()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.allclose(layer.eval()(_x()), ye, atol=1e-4)
        merged.append(_bits(layer.residual))
    assert len(set(merged)) == 1


def test_merge_leaves_a_live_graph_right() -> None:
    layer = _trained("pissa")
    x = _x().requires_grad_()
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
    before = _bits(embedding.weight)
    layer = SVDLinear.from_linear(head, 4, method)
    with torch.no_grad():
        layer.v += 1.0
    layer.merge()
    layer.unmerge()
    layer.merge(keep=False)
    assert _bits(embedding.weight) == before and head.weight is embedding.weight


def test_merged_layer_can_be_cast_and_unmerged() -> None:
    layer = _trained("pissa")
    expected = layer.residual.detach().bfloat16()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert isinstance(layer.residual, nn.Parameter) and _bits(layer.residual) == _bits(expected)


# ------------------------------------------------------------------------------------- scale, dropout, parameters


def test_assigning_scale_writes_into_the_buffer() -> None:
    layer = _trained("pissa")
    buffer, x = layer.scale, _x()
    base = nn.functional.linear(x, layer.residual, layer.bias)
    y1 = layer(x)
    layer.scale = 2.0
    assert layer.scale is buffer and buffer.item() == 2.0 and buffer.dtype == torch.float32
    assert torch.allclose(layer(x) - base, 2 * (y1 - base), atol=1e-4)
    assert "scale" not in layer.state_dict()
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32


def test_dropout_only_while_training() -> None:
    layer = _trained("pissa", dropout_p=0.5)
    x = _x()
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    y0 = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y0)
    assert not torch.equal(layer(x), y0)


def test_the_present_parameters_are_always_used() -> None:
    """changjonathanc/minLoRA#4: a replica that still uses the tensors captured when the layer was made."""
    layer, x = _trained("sorsa"), _x()
    doubled = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    expected = (
        nn.functional.linear(x, doubled["residual"], doubled["bias"])
        + ((x @ doubled["u"]) * doubled["sigma"]) @ doubled["v"].t()
    )
    assert torch.allclose(functional_call(layer, doubled, (x,)), expected, atol=1e-3)
    y0 = layer(x)
    layer.sigma = nn.Parameter(3 * layer.sigma.detach())
    y1 = layer(x)
    assert torch.allclose(y1, nn.functional.linear(x, layer.weight, layer.bias), atol=1e-4)
    assert not torch.allclose(y0, y1)
    layer.u.data = torch.zeros_like(layer.u)
    assert torch.allclose(layer(x), nn.functional.linear(x, layer.residual, layer.bias), atol=1e-6)
    wide = layer.to(torch.float64)
    assert wide(x.double()).dtype == torch.float64
    replica = layer._replicate_for_data_parallel()  # what nn.DataParallel does on each device
    for name, parameter in layer._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach() * 2)
    replica.scale = torch.tensor(0.5)
    assert layer.scale.item() == 1.0
    expected = (
        nn.functional.linear(x.double(), replica.residual, replica.bias)
        + 0.5 * ((x.double() @ replica.u) * replica.sigma) @ replica.v.t()
    )
    assert torch.allclose(replica(x.double()), expected)


def test_parametrized_factors_are_seen() -> None:
    layer, x = _trained("sorsa"), _x()

    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value / 2

    expected = nn.functional.linear(x, (layer.residual + layer.weight) / 2, layer.bias)
    nn.utils.parametrize.register_parametrization(layer, "sigma", Half())
    assert torch.allclose(layer(x), expected, atol=1e-4)


def test_no_cast_copy_survives() -> None:
    """unslothai/unsloth#5766: a cached cast of the factors is used after the compute dtype, or the factors, changed."""
    layer, x = _trained("sorsa").eval(), _x()
    with torch.no_grad():
        y1 = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), y1)
        changes = [
            lambda: layer.u.mul_(1.5),
            lambda: layer.v.data.copy_(torch.randn(18, 5)),
            lambda: layer.residual.data.mul_(0.5),
            lambda: layer.load_state_dict(
                {k: 0.7 * v if v.is_floating_point() else v for k, v in layer.state_dict().items()}
            ),
        ]
        for change in changes:
            change()
            reference = nn.functional.linear(x.double(), _dense(layer), layer.bias.double())
            assert torch.allclose(layer(x).double(), reference, atol=1e-4)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.allclose(layer(x).double(), reference, atol=0.05 * reference.abs().max())


def test_rank_zero_is_the_frozen_linear() -> None:
    """huggingface/peft#1539: layers whose rank was pruned to nothing."""
    layer = _trained("sorsa")
    layer.u, layer.v = nn.Parameter(layer.u[:, :0].detach()), nn.Parameter(layer.v[:, :0].detach())
    layer.sigma = nn.Parameter(layer.sigma[:0].detach())
    x = _x().requires_grad_()
    y = layer(x)
    assert torch.allclose(y, nn.functional.linear(x, layer.residual, layer.bias), atol=1e-6)
    y.sum().backward()
    assert layer.rank == 0 and layer.u.grad.shape == (24, 0) and layer.sigma.grad.shape == (0,)
    before = _bits(layer.residual)
    layer.merge()
    assert _bits(layer.residual) == before
    assert SVDLinear(24, 18, 0)(x).shape == (7, 18)


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
    layer = _trained("sorsa", alpha=2.0, dropout_p=0.1)
    layer.scale = 0.75
    layer.eval()
    if merged:
        layer.merge()
    x = _x()
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
    model = nn.ModuleList([_trained("pissa"), _trained("pissa")])
    model[1].u = model[0].u
    other = copy.deepcopy(model)
    assert other[0].u is other[1].u and other[0].u is not model[0].u


def _run_layer(layer: SVDLinear, x: Tensor, queue) -> None:  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    queue.put(layer(x).detach().numpy())


@pytest.mark.parametrize("merged", [False, True])
def test_a_spawned_process_takes_the_layer(merged: bool) -> None:
    layer, x = _trained("pissa"), _x()
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
    source = SVDLinear.from_linear(_linear(dtype=torch.bfloat16), 5, method, alpha=2.0)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = _x(dtype=torch.bfloat16)
    assert torch.equal(layer(x), source(x)) and layer.scale.item() == pytest.approx(0.4)
    layer.to("meta")
    assert layer.residual.is_meta and layer.scale.item() == pytest.approx(0.4)
    with torch.device("meta"):
        assert SVDLinear(8, 8, 2, method=method).u.is_meta


def test_forward_on_meta() -> None:
    layer = SVDLinear(24, 18, 5, device="meta", dtype=torch.bfloat16)
    y = layer(torch.empty(3, 24, device="meta", dtype=torch.bfloat16))
    assert y.is_meta and y.shape == (3, 18) and y.dtype == torch.bfloat16


def test_casts_do_not_round_the_initial_factors() -> None:
    layer = SVDLinear.from_linear(_linear(), 5, "sorsa")
    before = {name: _bits(b) for name, b in layer.named_buffers() if name != "fingerprint"}
    layer.to(torch.bfloat16).half().double().float()
    assert {name: _bits(b) for name, b in layer.named_buffers() if name != "fingerprint"} == before


def test_compile_of_many_layers_compiles_a_few_times() -> None:
    """Comfy-Org/ComfyUI#9289: every layer guarded on its own attributes, until the recompile limit."""
    layers = []
    for i in range(12):
        layer = SVDLinear.from_linear(_linear(), 5, "pissa", alpha=float(1 + i))
        layers.append(layer)
    x = _x()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    for layer in layers:
        assert torch.allclose(compiled(layer, x), layer(x), atol=1e-5)
    assert counter.frame_count <= 3
    layers[0].scale = 5.0
    assert torch.allclose(compiled(layers[0], x), layers[0](x), atol=1e-5)
    assert counter.frame_count <= 3
