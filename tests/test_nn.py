"""``SVDLinear`` as a module: equation, weight, merge, state, copies, casts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call

from svdkern.nn import SVDLinear

METHOD_NAMES = ["lora", "pissa", "sorsa"]


def linear_of(k: int = 24, n: int = 18, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(k * 100 + n)
    return nn.Linear(k, n, bias).to(dtype)


def trained_layer(method: str = "sorsa", rank: int = 5, **arguments) -> SVDLinear:  # type: ignore[no-untyped-def]
    """A layer away from its start."""
    layer = SVDLinear.from_linear(linear_of(), rank, method, **arguments)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter += 0.1 * noise.to(parameter.dtype)
    return layer


def activations(k: int = 24, rows: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense(layer: SVDLinear) -> Tensor:
    middle = torch.ones(layer.rank) if layer.sigma is None else layer.sigma
    low_rank = (layer.v.double() * middle.double()) @ layer.u.double().t()
    return layer.residual.double() + float(layer.scale) * low_rank


def bits_of(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------------------ equation


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_the_equation(method: str, bias: bool) -> None:
    layer = SVDLinear.from_linear(linear_of(bias=bias), 5, method, alpha=2.5)
    with torch.no_grad():
        layer.v += 0.1
    x = activations().view(1, 7, 24).requires_grad_()
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
    linear = linear_of()
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
        assert name == other_name and bits_of(a) == bits_of(b)
    assert SVDLinear(24, 18, 4, bias=False).bias is None


def test_repr_says_what_matters() -> None:
    layer = SVDLinear.from_linear(linear_of(), 5, "pissa", alpha=2.5, dropout_p=0.1)
    text = repr(layer)
    for part in ("in_features=24", "out_features=18", "rank=5", "bias=True", "method='pissa'", "scale=0.5", "0.1"):
        assert part in text
    layer.merge()
    assert "merged=True" in repr(layer)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_degenerate_weights_give_the_linear(method: str) -> None:
    """pytorch/pytorch#181641: zeros, ones, rank one, huge range: the layer still computes what the linear does."""
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
        SVDLinear.from_linear(linear_of(), **arguments)


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
    broken = linear_of()
    with torch.no_grad():
        broken.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN or an infinity"):
        SVDLinear.from_linear(broken, 1, "lora")


# -------------------------------------------------------------------------------------------------------- weight


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_is_the_effective_weight(method: str, dtype: torch.dtype) -> None:
    layer = trained_layer(method, alpha=2.0).to(dtype)
    weight = layer.weight
    assert weight.dtype == dtype and weight.shape == (18, 24)
    assert (weight.double() - dense(layer)).abs().max() <= torch.finfo(dtype).eps * dense(layer).abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, weight)


def test_weight_cannot_be_assigned() -> None:
    layer = trained_layer()
    before = bits_of(layer.residual)
    for value in (nn.Parameter(torch.zeros(18, 24)), torch.zeros(18, 24), None):
        with pytest.raises(AttributeError, match="assign to residual"):
            layer.weight = value
    assert bits_of(layer.residual) == before and "weight" not in layer._parameters


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


# ------------------------------------------------------------------------------------- scale, dropout, parameters


def test_assigning_scale_writes_into_the_buffer() -> None:
    layer = trained_layer("pissa")
    buffer, x = layer.scale, activations()
    base = nn.functional.linear(x, layer.residual, layer.bias)
    y1 = layer(x)
    layer.scale = 2.0
    assert layer.scale is buffer and buffer.item() == 2.0 and buffer.dtype == torch.float32
    assert torch.allclose(layer(x) - base, 2 * (y1 - base), atol=1e-4)
    assert "scale" not in layer.state_dict()
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32


def test_dropout_only_while_training() -> None:
    layer = trained_layer("pissa", dropout_p=0.5)
    x = activations()
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    torch.manual_seed(0)
    y0 = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y0)
    assert not torch.equal(layer(x), y0)


def test_the_present_parameters_are_always_used() -> None:
    """changjonathanc/minLoRA#4: a replica that still uses the tensors captured when the layer was made."""
    layer, x = trained_layer("sorsa"), activations()
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
    layer, x = trained_layer("sorsa"), activations()

    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value / 2

    expected = nn.functional.linear(x, (layer.residual + layer.weight) / 2, layer.bias)
    nn.utils.parametrize.register_parametrization(layer, "sigma", Half())
    assert torch.allclose(layer(x), expected, atol=1e-4)


def test_no_cast_copy_survives() -> None:
    """unslothai/unsloth#5766: a cached cast of the factors is used after the compute dtype, or the factors, changed."""
    layer, x = trained_layer("sorsa").eval(), activations()
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
            reference = nn.functional.linear(x.double(), dense(layer), layer.bias.double())
            assert torch.allclose(layer(x).double(), reference, atol=1e-4)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.allclose(layer(x).double(), reference, atol=0.05 * reference.abs().max())


def test_rank_zero_is_the_frozen_linear() -> None:
    """huggingface/peft#1539: layers whose rank was pruned to nothing."""
    layer = trained_layer("sorsa")
    layer.u, layer.v = nn.Parameter(layer.u[:, :0].detach()), nn.Parameter(layer.v[:, :0].detach())
    layer.sigma = nn.Parameter(layer.sigma[:0].detach())
    x = activations().requires_grad_()
    y = layer(x)
    assert torch.allclose(y, nn.functional.linear(x, layer.residual, layer.bias), atol=1e-6)
    y.sum().backward()
    assert layer.rank == 0 and layer.u.grad.shape == (24, 0) and layer.sigma.grad.shape == (0,)
    before = bits_of(layer.residual)
    layer.merge()
    assert bits_of(layer.residual) == before
    assert SVDLinear(24, 18, 0)(x).shape == (7, 18)


def test_compile_of_many_layers_compiles_a_few_times() -> None:
    """Comfy-Org/ComfyUI#9289: every layer guarded on its own attributes, until the recompile limit."""
    layers = []
    for i in range(12):
        layer = SVDLinear.from_linear(linear_of(), 5, "pissa", alpha=float(1 + i))
        layers.append(layer)
    x = activations()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    for layer in layers:
        assert torch.allclose(compiled(layer, x), layer(x), atol=1e-5)
    assert counter.frame_count <= 3
    layers[0].scale = 5.0
    assert torch.allclose(compiled(layers[0], x), layers[0](x), atol=1e-5)
    assert counter.frame_count <= 3
