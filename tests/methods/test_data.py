"""Statistics of data, and the methods that start from them: CorDA, LoRA-SB, FILA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipes import Net, adapted, batch, data_for, dense, net
from torch import Tensor, nn

import svdkern
from svdkern.calibration import activation_covariance, fisher, weight_gradient
from svdkern.methods import FILA, CorDA, LoRASB

BATCHES = [batch(seed) for seed in (1, 2, 3)]


def inputs_of(model: Net, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"up": data["x"].reshape(-1, 12), "down": torch.tanh(model.up(data["x"])).reshape(-1, 20).detach()}


def gradients_of(model: Net, data: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("up", "down")
    return dict(zip(names, torch.autograd.grad(model(**data), [getattr(model, n).weight for n in names]), strict=True))


# ---------------------------------------------------------------------------------------------------- statistics


def test_covariance_is_the_mean_over_batches_of_normalised_products() -> None:
    model = net()
    found = activation_covariance(model, iter(BATCHES))
    assert list(found) == ["up", "down"]
    for name, covariance in found.items():
        wanted = torch.zeros_like(covariance, dtype=torch.float64)
        for data in BATCHES:
            x = inputs_of(model, data)[name].double()
            x = x / x.abs().max()
            wanted += x.t() @ x / 3
        assert covariance.dtype == torch.float32 and torch.allclose(covariance.double(), wanted, atol=1e-5)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.up._forward_pre_hooks


def test_covariance_of_inputs_without_a_positive_value_is_finite() -> None:
    """The usual implementations divide by |max(x)|, which is 0 here."""
    model = nn.Sequential(nn.Linear(3, 2))
    x = torch.tensor([[0.0, -1.0, -2.0], [-0.5, 0.0, -4.0]])
    found = activation_covariance(model, [x], ["0"])["0"]
    assert torch.allclose(found, (x / 4).t() @ (x / 4))
    assert activation_covariance(model, [torch.zeros(2, 3)], ["0"])["0"].abs().max() == 0


def test_covariance_is_float32_under_autocast_and_inputs_may_be_given_by_name() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(12, 9)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.up(input=x)

    x = batch()["x"]
    found = activation_covariance(Half(), [x])["up"]
    rows = (x / x.abs().max()).reshape(-1, 12).double()
    assert torch.allclose(found.double(), rows.t() @ rows, rtol=1e-6, atol=1e-6)


def test_layers_that_share_a_weight_share_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    x = torch.randn(5, 6)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum()

    found, squares = weight_gradient(model, [x], forward=loss), fisher(model, [x], forward=loss)
    (wanted,) = torch.autograd.grad(loss(model, x), [model[0].weight])
    for name in ("0", "1"):
        assert torch.allclose(found[name], wanted) and torch.allclose(squares[name], wanted.square())


def test_gradient_and_fisher_are_those_of_autograd_and_leave_the_model_as_it_was() -> None:
    model = net()
    model.up.bias.requires_grad_(False)
    kept = torch.ones_like(model.down.weight)
    model.down.weight.grad = kept
    gradients = [gradients_of(model, data) for data in BATCHES]
    found, squares = weight_gradient(model, BATCHES), fisher(model, BATCHES)
    for name in ("up", "down"):
        assert torch.allclose(found[name], sum(g[name] for g in gradients), atol=1e-6)
        assert torch.allclose(squares[name], sum(g[name].square() for g in gradients) / 3, atol=1e-7)
    assert model.down.weight.grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert not model.up.weight._post_accumulate_grad_hooks


def test_fisher_weights_batches_by_their_labels() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    batches = [
        {"x": torch.randn(6, 4), "labels": torch.tensor([0, 1, 2, 1, -100, -100])},
        {"x": torch.randn(2, 4), "labels": torch.tensor([-100, 1])},
    ]

    def loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(data["x"]), data["labels"])

    found = fisher(model, batches, ["0"], forward=loss)["0"]
    squares = [torch.autograd.grad(loss(model, data), model[0].weight)[0].square() for data in batches]
    assert torch.allclose(found, (4 * squares[0] + squares[1]) / 5, atol=1e-6)


def test_statistics_keep_one_accumulator_a_layer_however_much_data_there_is() -> None:
    """Batches stream: a generator is read once, and no batch outlives its own forward."""
    import weakref

    alive: list[Any] = []

    def batches() -> Any:
        for seed in range(20):
            data = batch(seed)
            alive.append(weakref.ref(data["x"]))
            assert sum(ref() is not None for ref in alive) <= 2
            yield data

    for collect in (activation_covariance, weight_gradient, fisher):
        alive.clear()
        found = collect(net(), batches())
        assert len(alive) == 20 and len(found) == 2


@pytest.mark.parametrize("collect", [activation_covariance, weight_gradient, fisher])
def test_statistics_refuse_bad_data(collect: Any) -> None:
    model = net()
    model.spare = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="data reach no spare"):
        collect(model, BATCHES)
    with pytest.raises(ValueError, match="data reach no up, down: is it empty"):
        collect(net(), [])
    bad = batch(2)
    bad["x"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="batch 1 (have a NaN|is nan)"):
        collect(net(), [batch(1), bad])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.up._forward_pre_hooks and not model.up.weight._post_accumulate_grad_hooks


def test_gradients_need_a_loss() -> None:
    with pytest.raises(TypeError, match=r"a tensor of shape \(2, 8, 9\), expected a scalar loss"):
        weight_gradient(net(), [{"x": batch()["x"]}])


# ------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_corda_decomposes_the_weight_times_the_covariance(mode: str, alpha: float | None) -> None:
    base, model = net(), adapted(CorDA(mode=mode), data=BATCHES, alpha=alpha)
    covariances = activation_covariance(base, BATCHES)
    scale = 1.0 if alpha is None else 4.0
    for name in ("up", "down"):
        layer, weight, c = getattr(model, name), getattr(base, name).weight.double(), covariances[name].double()
        damped = c + 0.01 * c.diagonal().mean() * torch.eye(len(c))
        p, s, qh = torch.linalg.svd(weight @ damped, full_matrices=False)
        chosen = slice(0, 3) if mode == "ipm" else slice(len(s) - 3, None)
        product = (p[:, chosen] * s[chosen]) @ torch.linalg.solve(damped, qh[chosen].t()).t()
        found = scale * layer.v.double() @ layer.u.double().t()
        assert (found - product).norm() <= 2e-3 * product.norm()
        assert torch.allclose(dense(layer), weight, atol=1e-6)  # exact whatever the covariance
        assert torch.allclose(layer.v.double().square().sum(0), s[chosen] / scale, rtol=1e-3)


def test_fila_decomposes_the_weight_times_the_importance_of_its_outputs() -> None:
    data = {"forget": BATCHES[:1], "retain": BATCHES[1:]}
    base, model = net(), adapted("fila", data=data)
    forget, retain = fisher(base, data["forget"]), fisher(base, data["retain"])
    for name in ("up", "down"):
        layer, weight = getattr(model, name), getattr(base, name).weight.double()
        d = (forget[name] / (1e-5 + retain[name])).sum(1).sqrt().double() + 1e-5
        p, s, qh = torch.linalg.svd(d[:, None] * weight, full_matrices=False)
        product = (p[:, :3] / d[:, None] * s[:3]) @ qh[:3]
        assert (layer.v.double() @ layer.u.double().t() - product).norm() <= 2e-3 * product.norm()
        assert torch.allclose(dense(layer), weight, atol=1e-6)


def test_lora_sb_starts_with_the_first_step_of_adam() -> None:
    base, model = net(), adapted(LoRASB(learning_rate=0.02, warmup_steps=4), rank=5, data=BATCHES)
    gradients = weight_gradient(base, BATCHES)
    before = base(**BATCHES[0]).item()
    for name in ("up", "down"):
        layer = getattr(model, name)
        p, s, qh = torch.linalg.svd(-0.005 * gradients[name].double().sign(), full_matrices=False)
        step = (p[:, :5] * s[:5]) @ qh[:5]
        assert torch.equal(layer.residual, getattr(base, name).weight)
        assert torch.allclose(dense(layer) - layer.residual.double(), step, atol=1e-5)
        assert torch.allclose(layer.u.t() @ layer.u, torch.eye(5), atol=1e-5)
        assert torch.equal(layer.core, torch.diag(layer.core.diagonal()))
    assert model(**BATCHES[0]).item() < before  # a step that goes down
    with pytest.raises(ValueError, match="scale is .*, expected 1"):
        adapted("lora-sb", data=BATCHES, alpha=6.0)


@pytest.mark.parametrize("config", [CorDA(), LoRASB(), FILA()])
def test_parts_of_the_layers_give_what_all_at_once_give(config: Any) -> None:
    data = data_for(config)
    one, two = adapted(config, data=data), adapted(config, data=data, data_passes=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    if not isinstance(data, dict):
        with pytest.raises(ValueError, match="data can be read once"):
            adapted(config, data=iter(data), data_passes=2)


@pytest.mark.parametrize("method", ["corda", "lora-sb", "fila"])
def test_missing_data_is_said_plainly_and_leaves_the_model(method: str) -> None:
    model = net()
    with pytest.raises(ValueError, match="starts from data .*: give data=batches"):
        svdkern.adapt(model, method, rank=3)
    with pytest.raises(ValueError, match=r"starts from data .*data=batches.*statistic="):
        svdkern.SVDLinear.from_linear(model.up, 3, method)
    bad = torch.full((12, 12), float("nan"))
    with pytest.raises(ValueError, match="has a NaN or an infinity"):
        svdkern.SVDLinear.from_linear(model.up, 3, method, statistic=bad)
    with pytest.raises(TypeError if method != "fila" else ValueError, match="data is "):
        svdkern.adapt(model, method, rank=3, data="some text")
    assert type(model.up) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_data_for_a_method_without_any_is_refused() -> None:
    with pytest.raises(ValueError, match="data is given, but the method starts without any"):
        svdkern.adapt(net(), "lora", rank=3, data=BATCHES)
    with pytest.raises(ValueError, match="data_passes is 0"):
        svdkern.adapt(net(), "corda", rank=3, data=BATCHES, data_passes=0)
    with pytest.raises(ValueError, match="mode is 'both', expected one of ipm, kpm"):
        CorDA(mode="both")  # type: ignore[arg-type]
