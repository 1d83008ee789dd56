"""OSF: what trains stays orthogonal to the large triplets, step by step and task by task; projections."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes import adapted, batch, dense, layer_of, net, train
from torch import nn

import svdkern
from svdkern.linalg import project_onto_, project_out_
from svdkern.methods import OSF

SHAPES = [(12, 9), (9, 12), (10, 10)]


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_osf_splits_the_spectrum(k: int, n: int, alpha: float | None) -> None:
    layer, weight = layer_of("osf", k, n, 4, alpha=alpha)
    p, s, qh = torch.linalg.svd(weight.double(), full_matrices=False)
    high = (p[:, :-4] * s[:-4]) @ qh[:-4]
    assert torch.allclose(layer.residual.double(), high, atol=1e-6)
    assert torch.allclose(dense(layer), weight.double(), atol=1e-6)
    others = {name for name in layer.adapter() if not name.startswith("past_")} - {"u", "sigma", "v"}
    assert others == ({"u_high"} if k > n else {"v_high"} if n > k else set())


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_osf_updates_stay_orthogonal_to_the_large_triplets(k: int, n: int) -> None:
    layer, weight = layer_of("osf", k, n, 4)
    p, _, qh = torch.linalg.svd(weight.double(), full_matrices=False)
    u_high, v_high = qh[:-4].t(), p[:, :-4]
    optimizer = torch.optim.AdamW([q for q in layer.parameters() if q.requires_grad], lr=0.05)
    model = nn.Sequential(layer)
    hooks = svdkern.Hooks(model, optimizer)
    x, target = torch.randn(20, k), torch.randn(20, n)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        raw = layer.u.grad.double().clone()
        hooks.on_backward_end()
        assert torch.allclose(layer.u.grad.double(), raw - u_high @ (u_high.t() @ raw), atol=1e-6)
        assert (v_high.t() @ layer.v.grad.double()).abs().max() < 1e-6
        optimizer.step()
        hooks.on_step_end()
        assert (u_high.t() @ layer.u.double()).abs().max() < 1e-5
        assert (v_high.t() @ layer.v.double()).abs().max() < 1e-5


def test_osf_under_a_bfloat16_weight_keeps_its_parameters_orthogonal() -> None:
    model = net(dtype=torch.bfloat16)
    svdkern.adapt(model, "osf", rank=4)
    p, _, qh = torch.linalg.svd(net(dtype=torch.bfloat16).up.weight.double(), full_matrices=False)
    train(model, 5, data=batch(dtype=torch.bfloat16))
    assert (qh[:-4] @ model.up.u.double()).abs().max() < 1e-5
    assert (p[:, :-4].t() @ model.up.v.double()).abs().max() < 1e-5
    grad = model.up.u.grad.double()  # as projected for the last step, up to its rounding
    assert 1e-9 < (qh[:-4] @ grad).norm() < 0.02 * grad.norm()


def test_osf_without_parameter_projection_leaks_under_adam() -> None:
    """Why the parameters are projected: Adam's elementwise scaling leaves the subspace."""
    leaks = {}
    for project in (True, False):
        model = adapted(OSF(project_parameters=project), rank=4)
        p, _, qh = torch.linalg.svd(net().up.weight.double(), full_matrices=False)
        train(model, 5)
        leaks[project] = (qh[:-4] @ model.up.u.double()).abs().max().item()
    assert leaks[True] < 1e-5 < 1e-3 < leaks[False]


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_osf_task_end_protects_the_larger_triplets_of_the_present_weight(k: int, n: int, tmp_path: Path) -> None:
    layer, weight = layer_of(OSF(grow=0.5), k, n, 6, alpha=12.0)
    model, short = nn.Sequential(layer), min(k, n)
    optimizer = torch.optim.AdamW([q for q in layer.parameters() if q.requires_grad], lr=1e-3, weight_decay=0.1)
    hooks = svdkern.Hooks(model, optimizer)

    def task(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, target = torch.randn(20, k, generator=generator), torch.randn(20, n, generator=generator)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            hooks.on_backward_end()
            optimizer.step()
            hooks.on_step_end()

    kept = short - 6
    for number, joined in enumerate((3, 4, 5)):  # half of 6, of 3, of 2: rounded down
        task(number)
        before = dense(layer)
        hooks.on_round_end()
        assert not optimizer.state and torch.allclose(dense(layer), before, atol=1e-6)
        assert layer.past_sigma.shape == (joined,) and not layer.past_u.requires_grad and layer.u.requires_grad
        p, s, qh = torch.linalg.svd(before)
        large = kept + joined
        past = 2.0 * (layer.past_v * layer.past_sigma).double() @ layer.past_u.double().t()
        assert torch.allclose(layer.residual + past, (p[:, :large] * s[:large]) @ qh[:large], atol=1e-5)
        task(number + 10)
        change = dense(layer) - before
        assert change.norm() > 1e-3
        assert (p[:, :large].t() @ change).norm() < 1e-5 and (change @ qh[:large].t()).norm() < 1e-5
        assert layer.sigma[6 - joined :].abs().max() == 0 == layer.u[:, 6 - joined :].abs().max()
    x = torch.randn(5, k)
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(layer.bias)
    fresh = nn.Sequential(linear)
    svdkern.save_adapter(model, tmp_path / "a")
    svdkern.load_adapter(fresh, tmp_path / "a")
    again = nn.Sequential(layer_of(OSF(grow=0.5), k, n, 6, alpha=12.0)[0])
    again.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x)) and torch.equal(again(x), model(x))


def test_osf_may_keep_its_large_triplets_as_they_are() -> None:
    model = adapted(OSF(grow=0.0))
    train(model, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    svdkern.Hooks(model).on_round_end()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="grow is 1.5"):
        OSF(grow=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "n"), [(48, 48), (48, 36)])
def test_osf_steps_without_a_gradient_change_nothing(k: int, n: int, dtype: torch.dtype) -> None:
    """Rounded bases are not orthonormal: a plain B B^T at every step lets the factors grow or shrink without end."""
    layer, _ = layer_of("osf", k, n, 12, adapter_dtype=dtype)
    before = layer.config.product(layer).v.detach().clone() * layer.sigma.detach() @ layer.u.detach().t()
    hooks = svdkern.Hooks(nn.Sequential(layer))
    for _ in range(300):
        hooks.on_step_end()
    after = layer.v * layer.sigma @ layer.u.t()
    bound = 1e-6 if k == n or dtype == torch.float32 else 4 * torch.finfo(dtype).eps  # u_high and u are rounded apart
    assert (after.double() - before.double()).norm() <= bound * before.double().norm()


def test_projections() -> None:
    basis, _ = torch.linalg.qr(torch.randn(9, 4))
    tensor = torch.randn(9, 3)
    inside, outside = project_onto_(tensor.clone(), basis), project_out_(tensor.clone(), basis)
    assert torch.allclose(inside + outside, tensor, atol=1e-6)
    assert (basis.t() @ outside).abs().max() < 1e-6
    half = tensor.bfloat16()
    assert project_out_(half, basis).dtype == torch.bfloat16 and (basis.t() @ half.float()).abs().max() < 0.05
    for rough, exact in (
        (project_onto_(tensor.clone(), basis, [torch.bfloat16]), inside),
        (project_out_(tensor.clone(), basis, torch.bfloat16), outside),
    ):
        assert rough.dtype == torch.float32 and 0 < (rough - exact).norm() < 0.01 * tensor.norm()
    corrected = project_onto_(tensor.clone(), basis, [None, torch.bfloat16])
    within = basis @ (basis.t() @ corrected)
    assert (corrected - within).norm() < 2**-16 * outside.norm()  # both of its roundings
    assert (corrected - inside).norm() < 0.01 * outside.norm()
    with pytest.raises(ValueError, match=r"tensor is \(8, 3\) and basis \(9, 4\)"):
        project_out_(tensor[:8], basis)
