"""Merging: TSV-M, aTLAS on low-rank task vectors; and FWSVD, which compresses a weight."""

from __future__ import annotations

import copy

import pytest
import torch
from recipes import adapted, batch, net, train
from torch import Tensor

import svdkern
from svdkern.calibration import fisher
from svdkern.linalg import fwsvd, polar
from svdkern.merging import ATLASLinear, combine, task_factors, tsvm, tsvm_state


def matrices(count: int, n: int = 14, k: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, k, dtype=torch.float64, generator=generator) for _ in range(count)]


# --------------------------------------------------------------------------------------------------------- TSV-M


@pytest.mark.parametrize(("n", "k"), [(14, 9), (9, 14), (8, 8)])
def test_tsvm_of_one_task_is_its_task_vector(n: int, k: int) -> None:
    (delta,) = matrices(1, n, k)
    assert torch.allclose(tsvm([delta]), delta, atol=1e-10)
    half = delta.bfloat16()
    assert tsvm([half]).dtype == torch.bfloat16 and torch.allclose(tsvm([half]), half, atol=1e-2)


@pytest.mark.parametrize("count", [2, 3])
def test_tsvm_is_its_definition(count: int) -> None:
    deltas = matrices(count)
    rank = 9 // count
    p, s, q = [], [], []
    for delta in deltas:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        p.append(left[:, :rank])
        s.append(values[:rank])
        q.append(right[:rank].t())
    sides = []
    for side in (torch.cat(p, 1), torch.cat(q, 1)):
        left, _, right = torch.linalg.svd(side, full_matrices=False)
        sides.append(left @ right)
    expected = sides[0] @ torch.diag(torch.cat(s)) @ sides[1].t()
    assert torch.allclose(tsvm(deltas), expected, atol=1e-9)
    found = torch.linalg.svdvals(tsvm(deltas))[: count * rank]  # the two sides are orthonormal, so these are its values
    assert torch.allclose(found, torch.cat(s).sort(descending=True).values, atol=1e-9)
    side = polar(torch.cat(p, 1))
    assert torch.allclose(side.t() @ side, torch.eye(count * rank, dtype=torch.float64), atol=1e-12)


def test_tsvm_keeps_tasks_that_do_not_meet() -> None:
    """Task vectors in orthogonal subspaces add up without interference."""
    p, _ = torch.linalg.qr(matrices(1, 14, 6)[0])
    q, _ = torch.linalg.qr(matrices(1, 9, 6)[0])
    deltas = [p[:, :3] @ q[:, :3].t(), 2 * p[:, 3:] @ q[:, 3:].t()]
    assert torch.allclose(tsvm(deltas), deltas[0] + deltas[1], atol=1e-9)
    zero = torch.zeros(14, 9, dtype=torch.float64)
    assert torch.equal(tsvm([zero, zero]), zero) and torch.allclose(tsvm([deltas[0], zero]), deltas[0], atol=1e-9)


def test_tsvm_of_state_dicts() -> None:
    base, tuned = net(0), [net(seed) for seed in (1, 2)]
    states = [model.state_dict() for model in tuned]
    merged = tsvm_state(base.state_dict(), states, scale=0.5, average=("down",))
    for name, weight in base.state_dict().items():
        deltas = [state[name] - weight for state in states]
        delta = tsvm(deltas) if name == "up.weight" else (deltas[0] + deltas[1]) / 2
        assert torch.allclose(merged[name], weight + 0.5 * delta, atol=1e-6)
    net(3).load_state_dict(merged)
    with pytest.raises(ValueError, match=r"up.weight is not in every tuned state_dict"):
        tsvm_state(base.state_dict(), [{}])
    with pytest.raises(ValueError, match="there are 10 deltas"):
        tsvm(matrices(10))
    with pytest.raises(ValueError, match="expected matrices of one shape"):
        tsvm([*matrices(1), *matrices(1, 9, 14)])
    for call in (lambda: tsvm([]), lambda: tsvm_state({}, [])):
        with pytest.raises(ValueError, match="there is no"):
            call()


# --------------------------------------------------------------------------------------------------------- aTLAS


@pytest.mark.parametrize("method", ["lora", "pissa", "kasa", "lora-xs", "osf", "salt"])
def test_a_task_vector_is_what_training_has_changed(method: str) -> None:
    model, base = adapted(method, alpha=6.0), net()
    train(model, 3)
    for name in ("up", "down"):
        u, v = task_factors(getattr(model, name))
        change = getattr(model, name).weight - getattr(base, name).weight
        assert torch.allclose(v @ u.t(), change, atol=2e-6)


def test_a_task_vector_needs_a_weight() -> None:
    with pytest.raises(RuntimeError, match="depends on the input"):
        task_factors(adapted("smora").up)
    with pytest.raises(ValueError, match="adds to no weight"):
        task_factors(adapted("sst").up)


def test_atlas_is_the_sum_with_coefficients() -> None:
    tasks = [adapted("lora", rank=2), adapted("pissa", rank=3)]
    for task, seed in zip(tasks, (1, 2), strict=True):
        train(task, 4, data=batch(seed))
    base, model = net(), net()
    layers = combine(model, tasks)
    assert set(layers) == {"up", "down"} and model.up is layers["up"]
    data = batch(3)
    assert torch.allclose(model(data["x"]), base(data["x"]), atol=1e-6)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["up.coefficients", "down.coefficients"]

    layer = model.up
    with torch.no_grad():
        layer.coefficients.copy_(torch.tensor([0.3, -0.7]))
    weight = base.up.weight + sum(
        c * (task.up.weight - base.up.weight) for c, task in zip((0.3, -0.7), tasks, strict=True)
    )
    assert torch.allclose(layer(data["x"]), torch.nn.functional.linear(data["x"], weight, base.up.bias), atol=1e-5)
    assert torch.allclose(layer.merged()(data["x"]), layer(data["x"]), atol=1e-5)

    # the gradient of a coefficient: the sum of sigma's over its task's columns
    sigma = layer.sigma().detach().requires_grad_()
    svdkern.svd_linear(data["x"], layer.weight, layer.u, sigma, layer.v, layer.bias).square().sum().backward()
    layer(data["x"]).square().sum().backward()
    assert layer.blocks.sum(1).tolist() == [2, 6]
    assert torch.allclose(layer.coefficients.grad, torch.stack([sigma.grad[:2].sum(), sigma.grad[2:].sum()]), rtol=1e-5)
    assert torch.equal(copy.deepcopy(model)(data["x"]), model(data["x"]))


def test_atlas_keeps_no_activation_of_full_width_and_learns() -> None:
    tasks = [adapted("lora"), adapted("lora", rank=2)]
    for task in tasks:
        train(task, 6)
    model = net()
    combine(model, tasks)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (saved.append(s), s)[1], lambda s: s):
        model.up(torch.randn(6, 12))
    known = {t.untyped_storage().data_ptr() for t in (*model.up.parameters(), *model.up.buffers())}
    own = [tuple(s.shape) for s in saved if s.untyped_storage().data_ptr() not in known and s.dim() == 2]
    assert own == [(6, 5)]  # h
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_combine_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no task with an adapted layer"):
        combine(net(), [net()])
    with pytest.raises(ValueError, match="task 1 and task 0 differ in what is adapted: up"):
        combine(net(), [adapted("lora"), adapted("lora", target_modules=["down"])])
    with pytest.raises(TypeError, match="is a SVDLinear, expected nn.Linear"):
        combine(adapted("lora"), [adapted("lora")])
    with pytest.raises(ValueError, match="there is no task"):
        ATLASLinear(net().up, [])
    with pytest.raises(ValueError, match=r"\(20, 9\), expected \(12, 20\)"):
        ATLASLinear(net().up, [adapted("lora").down])


# --------------------------------------------------------------------------------------------------------- FWSVD


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fwsvd_is_its_definition_and_nearest_in_the_weighted_norm(axis: str, dtype: torch.dtype) -> None:
    weight = matrices(1, 20, 15)[0].to(dtype)
    information = torch.rand(20, 15, generator=torch.Generator().manual_seed(1)) ** 4
    u, v = fwsvd(weight, information, 4, axis)  # type: ignore[arg-type]
    assert u.shape == (15, 4) and v.shape == (20, 4) and u.dtype == v.dtype == dtype
    wide, d = weight.double(), information.double().sum(1 if axis == "out" else 0).sqrt()
    d = d.unsqueeze(1) if axis == "out" else d
    p, s, qh = torch.linalg.svd(d * wide, full_matrices=False)
    product = ((p[:, :4] * s[:4]) @ qh[:4]) / d
    assert torch.allclose(v.double() @ u.double().t(), product, atol=1e-4)
    p, s, qh = torch.linalg.svd(wide, full_matrices=False)
    plain = (p[:, :4] * s[:4]) @ qh[:4]

    def error(approximation: Tensor) -> float:
        return float((d * (approximation - wide)).norm())

    assert error(v.double() @ u.double().t()) < 0.99 * error(plain)


def test_fwsvd_of_a_model_by_its_fisher_information() -> None:
    model = net()
    information = fisher(model, [batch(seed) for seed in (1, 2)])
    u, v = fwsvd(model.up.weight, information["up"], 12)
    assert torch.allclose(v @ u.t(), model.up.weight, atol=1e-5)  # all ranks: the weight itself
    x = batch()["x"]
    assert torch.allclose(svdkern.svd_linear(x, None, u, None, v, model.up.bias), model.up(x), atol=1e-5)
    silent = information["up"].clone()
    silent[3] = 0
    assert all(bool(factor.isfinite().all()) for factor in fwsvd(model.up.weight, silent, 3))
    for bad, what in ((-silent, "negative"), (0 * silent, "only zeros"), (silent[:3], r"fisher is \(3, 12\)")):
        with pytest.raises(ValueError, match=what):
            fwsvd(model.up.weight, bad, 3)
    with pytest.raises(ValueError, match="axis is 'rows'"):
        fwsvd(model.up.weight, silent, 3, "rows")  # type: ignore[arg-type]
