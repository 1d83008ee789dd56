"""FedSVD, SST, CoDyRA: methods that do something around a step or at the end of a round."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from recipes import adapted, batch, dense, layer_of, net, stepped, train

import svdkern
from svdkern.linalg import soft_threshold_
from svdkern.methods import SST, CoDyRA

SHAPES = [(12, 9), (9, 12), (10, 10)]


# -------------------------------------------------------------------------------------------------------- FedSVD


def test_fedsvd_round_keeps_the_averaged_product_and_makes_the_input_side_orthonormal() -> None:
    server = adapted("fedsvd")
    clients = [copy.deepcopy(server) for _ in range(2)]
    for client, seed in zip(clients, (1, 2), strict=True):
        train(client, 3, data=batch(seed))
        assert torch.equal(client.up.u, server.up.u)
    with torch.no_grad():
        for name in ("up", "down"):
            parts = [getattr(client, name).v for client in clients]
            getattr(server, name).v.copy_(0.25 * parts[0] + 0.75 * parts[1])
    products = {name: dense(getattr(server, name)) for name in ("up", "down")}
    optimizer = torch.optim.AdamW([p for p in server.parameters() if p.requires_grad])
    server(**batch()).backward()
    optimizer.step()
    with torch.no_grad():  # the step is not part of the round
        for name in ("up", "down"):
            parts = [getattr(client, name).v for client in clients]
            getattr(server, name).v.copy_(0.25 * parts[0] + 0.75 * parts[1])
    svdkern.Hooks(server, optimizer).on_round_end()
    assert not optimizer.state
    for name in ("up", "down"):
        layer = getattr(server, name)
        assert torch.allclose(dense(layer), products[name], atol=1e-6)
        assert torch.allclose(layer.u.t() @ layer.u, torch.eye(3), atol=1e-5)
        singular = torch.linalg.svdvals(layer.v @ layer.u.t())[:3]
        assert torch.allclose(layer.v.norm(dim=0), singular, atol=1e-5)
        assert layer.v.requires_grad and not layer.u.requires_grad


def test_fedsvd_round_of_an_untrained_layer_is_finite() -> None:
    model = adapted("fedsvd")
    svdkern.Hooks(model).on_round_end()
    assert model.up.v.abs().max() == 0
    assert torch.allclose(model.up.u.t() @ model.up.u, torch.eye(3), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- SST


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_sst_gradients_are_those_of_the_weight_times_the_other_side(k: int, n: int) -> None:
    layer, weight = layer_of("sst", k, n, 3)
    assert layer.residual is None and torch.allclose(dense(layer), weight.double(), atol=1e-6)
    x, dy = torch.randn(6, k), torch.randn(6, n)
    layer(x).backward(dy)
    layer.config.on_backward_end([layer], 0)
    dw = dy.t() @ x  # (N, K)
    u, v = layer.u[:, layer.active], layer.v[:, layer.active]
    assert torch.allclose(layer.u_active.grad, dw.t() @ v, atol=1e-4)
    assert torch.allclose(layer.v_active.grad, dw @ u, atol=1e-4)
    assert torch.allclose(layer.sigma.grad, ((dw @ layer.u) * layer.v).sum(0), atol=1e-4)
    assert layer.u.grad is None and layer.v.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sst_keeps_no_copy_of_its_factors_and_gradients_of_its_columns_alone(dtype: torch.dtype) -> None:
    layer, _ = layer_of("sst", 40, 30, 3)
    x = torch.randn(6, 40, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.no_grad():
        layer.u_active.mul_(1.1)  # no hook has written them into u
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda s: (saved.append(s), s)[1], lambda s: s),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        y = layer(x)
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    own = [s for s in saved if s.untyped_storage().data_ptr() not in known and s.dim()]
    assert sorted(tuple(s.shape) for s in own) == [(3,), (6, 30), (6, 40)]  # sigma of the columns, h, x
    dy = torch.randn(6, 30)
    y.backward(dy.to(y.dtype))
    u, sigma, _, v, _ = layer.config.product(layer)
    leaves = [layer.u_active, layer.sigma, layer.v_active, x]
    expected = torch.autograd.grad(((x @ u) * sigma) @ v.t(), leaves, dy)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for leaf, grad in zip(leaves, expected, strict=True):
        assert leaf.grad.dtype == torch.float32 and (leaf.grad - grad).norm() <= bound * grad.norm()


def test_sst_takes_several_forwards_before_a_backward_and_notices_a_step_in_between() -> None:
    layer, _ = layer_of("sst", 12, 9, 3)
    x = torch.randn(6, 12)
    once = torch.autograd.grad(layer(x).sum(), layer.u_active)[0]
    losses = [layer(x).sum() for _ in range(3)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(layer.u_active.grad, 3 * once, rtol=1e-5)
    late = layer(x).sum()
    with torch.no_grad():
        layer.u_active.mul_(0.9)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.parametrize("how", ["dropout", "func", "twice"])
def test_sst_elsewhere_differentiates_the_whole_factors(how: str) -> None:
    layer, _ = layer_of("sst", 12, 9, 3, dropout_p=1.0 if how == "dropout" else 0.0)
    x = torch.randn(6, 12)
    if how == "twice":
        (grad,) = torch.autograd.grad(layer(x).sum(), layer.u_active, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()
        return
    expected = torch.autograd.grad(layer(x).sum(), layer.u_active)[0]
    if how == "dropout":
        assert expected.abs().max() == 0
        return

    def loss(u_active: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"u_active": u_active}, (x,)).sum()

    assert torch.allclose(torch.func.grad(loss)(layer.u_active), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "small"), [(torch.float16, 1e-5), (torch.float32, 1e-39), (torch.float32, 0.0)])
def test_sst_gradients_are_finite_for_every_sigma(dtype: torch.dtype, small: float) -> None:
    layer, _ = layer_of("sst", 12, 9, 3, adapter_dtype=dtype)
    with torch.no_grad():
        layer.sigma[layer.active[0]] = small
        layer.sigma[layer.active[1]] = 0.5
    layer(torch.randn(6, 12)).backward(10 * torch.randn(6, 9))
    plain = layer.u_active.grad.clone()
    layer.config.on_backward_end([layer], 0)
    assert layer.u_active.grad.isfinite().all() and layer.v_active.grad.isfinite().all()
    assert (layer.u_active.grad[:, 0].abs().max() > 0) == (small == 1e-5)
    assert torch.equal(layer.u_active.grad[:, 1], plain[:, 1] * 2)


def test_sst_step_draws_and_decomposes() -> None:
    model = net()
    torch.manual_seed(0)
    svdkern.adapt(model, SST(interval=2), rank=3, target_modules=["up"])
    layer = model.up  # 12 singular values: a round is 4 draws
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    hooks = svdkern.Hooks(model, optimizer)
    drawn = []
    for step in range(1, 9):
        optimizer.zero_grad()
        model(**batch()).backward()
        hooks.on_backward_end()
        optimizer.step()
        with torch.no_grad():
            layer.sigma[0] = -0.1 if step == 3 else layer.sigma[0]
        before = layer.active.clone()
        hooks.on_step_end()
        assert layer.sigma.min() >= 0
        assert torch.allclose(layer.u_active.norm(dim=0), torch.ones(3), atol=1e-5)
        if step % 2 == 0:
            assert layer.u_active not in optimizer.state and layer.v_active not in optimizer.state
            assert torch.equal(layer.u_active, layer.u[:, layer.active])
            drawn.append(tuple(layer.active.tolist()))
        else:
            assert torch.equal(layer.active, before) and layer.u_active in optimizer.state
    assert len(set(drawn)) > 1 and all(len(set(row)) == 3 for row in drawn)
    assert torch.allclose(layer.u.t() @ layer.u, torch.eye(12), atol=1e-5)  # the round's SVD
    assert torch.equal(layer.sigma, layer.sigma.sort(descending=True).values)


def test_sst_round_keeps_the_product() -> None:
    model = adapted("sst")
    train(model, 5)
    before = dense(model.up)
    svdkern.Hooks(model).on_round_end()
    assert torch.allclose(dense(model.up), before, atol=1e-5)


def test_sst_draws_each_component_as_often_as_published() -> None:
    sigma, draws = torch.tensor([6.0, 3.0, 1.0, 0.0]), torch.tensor([5, 0])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[SST._draw(draws, sigma, 1)] += 1
    assert torch.allclose(counts / 4000, 0.5 * (0.25 + sigma / 10), atol=0.03) and draws[1] == 4000


def test_sst_belongs_to_no_weight_and_takes_no_alpha(tmp_path: Path) -> None:
    model = adapted("sst")
    svdkern.save_adapter(model, tmp_path / "a")
    other = net(seed=5)
    with torch.no_grad():
        other.up.bias.copy_(model.up.bias)
        other.down.bias.copy_(model.down.bias)
    svdkern.load_adapter(other, tmp_path / "a")
    assert torch.equal(other(batch()["x"]), model(batch()["x"]))
    assert all(parameter.numel() for name, parameter in other.named_parameters() if "residual" not in name)
    with pytest.raises(ValueError, match="scale is .*, expected 1"):
        layer_of("sst", 12, 9, 3, alpha=6.0)


# -------------------------------------------------------------------------------------------------------- CoDyRA


def test_codyra_threshold_ramps_after_the_dense_phase() -> None:
    config = CoDyRA(kappa=0.49, total_steps=200, dense_share=0.5)  # 100 steps, 50 levels of 2 steps
    assert [config.threshold(step) for step in (1, 100)] == [0.0, 0.0]
    assert config.threshold(102) == pytest.approx(0.01) and config.threshold(103) == pytest.approx(0.01)
    assert config.threshold(198) == pytest.approx(0.49) and config.threshold(10_000) == pytest.approx(0.49)


def test_codyra_reaches_the_last_threshold_in_few_steps_too() -> None:
    config = CoDyRA(kappa=0.49, total_steps=60, dense_share=0.5)
    assert config.threshold(31) == pytest.approx(0.01) and config.threshold(60) == pytest.approx(0.49)
    with pytest.raises(ValueError, match="scale is 2.0, expected 1"):
        adapted(CoDyRA(), alpha=6.0)


def test_soft_threshold_and_the_official_one() -> None:
    values = torch.tensor([-3.0, -1.5, -0.5, 0.0, 0.5, 1.0, 1.9, 2.5])
    assert soft_threshold_(values.clone(), 1.0).tolist() == [-2.0, -0.5, 0.0, 0.0, 0.0, 0.0, pytest.approx(0.9), 1.5]
    assert soft_threshold_(values.clone(), 1.0, twice=True).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.5]
    with pytest.raises(ValueError, match="kappa is -1"):
        soft_threshold_(values, -1.0)


def test_codyra_task_end_keeps_the_function_drops_ranks_and_starts_anew(tmp_path: Path) -> None:
    model = adapted("codyra")
    train(model)
    layer = model.up
    optimizer = stepped(model)
    with torch.no_grad():
        layer.sigma[1] = 0.0
    x = batch()["x"]
    before, product = model(x).detach(), dense(layer)
    hooks = svdkern.Hooks(model, optimizer)
    hooks.step = 7
    assert layer.u in optimizer.state
    hooks.on_round_end()
    assert hooks.step == 0 and not optimizer.state
    assert layer.past_u.shape == (12, 2) and layer.past_v.shape == (20, 2) and model.down.past_sigma.shape == (3,)
    assert layer.v.abs().max() == 0 and layer.u.abs().max() > 0
    assert torch.allclose(dense(layer), product, atol=1e-6) and torch.allclose(model(x), before, atol=1e-5)
    train(model, data=batch(3))
    hooks.on_round_end()
    assert layer.past_u.shape == (12, 5)
    y = model(x)
    svdkern.save_adapter(model, tmp_path / "a")
    fresh = net()
    svdkern.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), y) and not fresh.up.past_u.requires_grad
    again = adapted("codyra")
    again.load_state_dict(model.state_dict())  # of a model that has seen more tasks
    assert torch.equal(again(x), y)
    svdkern.merge(fresh)
    assert torch.allclose(fresh(x), y, atol=1e-5)


def test_codyra_prunes_while_training() -> None:
    model = adapted(CoDyRA(kappa=490.0, total_steps=4, dense_share=0.5))
    hooks = svdkern.Hooks(model)
    dense_phase = model.up.sigma.clone()
    hooks.on_step_end()
    hooks.on_step_end()
    assert torch.equal(model.up.sigma, dense_phase)
    hooks.on_step_end()  # half of the steps, half of kappa
    assert model.up.sigma.abs().max() == 0 == model.down.sigma.abs().max()
