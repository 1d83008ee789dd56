"""SALT, RandLoRA, SMoRA, DiffoRA: methods that make the factors or the gate of their one call."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from recipes import adapted, batch, dense, layer_of, net, stepped, train
from torch import Tensor, nn

import svdkern
from svdkern import graphs
from svdkern.methods import SALT, DiffoRA, RandLoRA, SMoRA
from svdkern.methods.randlora import random_basis

SHAPES = [(12, 9), (9, 12), (10, 10)]


def perturb(layer: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))


# ---------------------------------------------------------------------------------------------------------- SALT


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("compat", ["paper", "official"])
def test_salt_is_its_whole_matrix_of_singular_values(k: int, n: int, compat: str) -> None:
    layer, weight = layer_of(SALT(lora_rank=2, compat=compat), k, n, 3)
    perturb(layer)
    p, s, qh = torch.linalg.svd(weight.double(), full_matrices=False)
    # the layer's own vectors: signs are free, and X Y sees them
    p, qh = layer.v.double(), layer.u.double().t()
    scaled = torch.diag(layer.alpha.double() * s[:3] + layer.beta.double())
    whole = torch.block_diag(scaled, torch.diag(s[3:]) + layer.x.double() @ layer.y.double())
    if compat == "official":
        assert whole.min() < 0  # so that relu has something to cut
        whole = whole.relu()
    assert torch.allclose(dense(layer), p @ whole @ qh, atol=2e-6)


def test_salt_starts_with_y_at_zero_and_trains_through_it() -> None:
    layer, _ = layer_of(SALT(lora_rank=4), 12, 9, 3)
    assert layer.y.abs().max() == 0 and layer.x.abs().max() <= math.sqrt(6 / (21 * 4))  # kaiming_uniform, a = sqrt 20
    layer(torch.randn(5, 12)).square().sum().backward()
    assert layer.y.grad.abs().max() > 0 and layer.alpha.grad.abs().max() > 0 and layer.beta.grad.abs().max() > 0
    assert layer.x.grad.abs().max() == 0 and layer.u.grad is None and layer.v.grad is None


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_salt_official_first_step_moves_only_the_diagonal_of_the_low_rank_part(compat: str) -> None:
    """relu has derivative 0 at the zeros that X Y starts with."""
    layer, weight = layer_of(SALT(lora_rank=4, compat=compat), 9, 9, 3)
    core = layer.v.t() @ layer.weight @ layer.u  # Sigma', as the layer has it
    (reached,) = torch.autograd.grad(core[3:, 3:].sum(), [layer.y])
    moved = torch.eye(6) if compat == "official" else torch.ones(6, 6)
    assert torch.allclose(reached, layer.x.t() @ moved, atol=1e-5)


def test_salt_penalty_in_float64() -> None:
    model = net(dtype=torch.float64)
    config = SALT(lora_rank=2, penalty_weight=0.01)
    svdkern.adapt(model, config, rank=3, adapter_dtype=torch.float64)
    value = svdkern.regularization(model)
    value.backward()
    assert value.item() == 0.0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    perturb(model)
    expected = 0.0
    for layer in (model.up, model.down):
        shifted = layer.alpha * layer.values[:3] + layer.beta
        expected = expected + torch.diag(shifted - layer.values[:3]).norm() + (layer.x @ layer.y).norm()
    value = svdkern.regularization(model)
    assert value.item() == pytest.approx(0.01 * expected.item(), rel=1e-12)
    wanted = torch.autograd.grad(0.01 * expected, [model.up.x, model.up.alpha, model.down.y])
    found = torch.autograd.grad(value, [model.up.x, model.up.alpha, model.down.y])
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(wanted, found, strict=True))


def test_salt_is_composed_and_punished_in_float32_under_autocast() -> None:
    model = adapted(SALT(lora_rank=4, penalty_weight=0.1))
    perturb(model)
    wanted, penalty = dense(model.up), svdkern.regularization(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(svdkern.regularization(model), penalty)
        svdkern.merge(model)
    assert torch.allclose(model.up.weight.double(), wanted, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ RandLoRA


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("compat", ["paper", "official"])
def test_randlora_is_the_sum_over_its_bases(k: int, n: int, compat: str) -> None:
    layer, weight = layer_of(RandLoRA(compat=compat), k, n, 4, alpha=8.0)
    perturb(layer)
    short, tall = min(k, n), max(k, n)
    bases = -(-short // 4)
    a = (layer.u if k <= n else layer.v).double().t()  # (r, min)
    b = (layer.v if k <= n else layer.u).double()  # (max, n r)
    gamma, sigma = layer.gamma.double(), layer.sigma.double()
    assert a.shape == (4, short) and b.shape == (tall, 4 * bases) and gamma.shape == (bases, short)
    update = torch.zeros(tall, short, dtype=torch.float64)
    if compat == "paper":
        for i in range(bases):
            block = slice(4 * i, 4 * i + 4)
            update += b[:, block] @ torch.diag(sigma[block]) @ a @ torch.diag(gamma[i])
    else:  # PEFT: (r, n, min) flattened over its first two, (max, n, r) over its last two
        scaled = sigma.view(4, bases)[:, :, None] * a[:, None, :] * gamma[None]
        update = b @ scaled.flatten(end_dim=1)
    update = 2.0 * (update if k <= n else update.t())
    assert torch.allclose(dense(layer), weight.double() + update, atol=1e-5)
    assert torch.linalg.matrix_rank(update) == short


def test_randlora_bases_are_shared_within_a_model_and_survive_casts_and_copies() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    svdkern.adapt(model, "randlora", rank=4)
    other = nn.Sequential(nn.Linear(8, 8))
    svdkern.adapt(other, "randlora", rank=4)
    assert model[0].v is model[2].v and model[0].u is model[2].u
    assert other[0].v is not model[0].v and torch.equal(other[0].v, model[0].v)
    before = model[0].v.clone()
    model.to(torch.bfloat16)
    assert model[0].v is model[1].v and torch.equal(model[0].v, before) and model[0].sigma.dtype == torch.bfloat16
    copied = copy.deepcopy(model)
    assert copied[0].v is copied[1].v and copied[0].v is not model[0].v


@pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])
def test_random_bases(kind: str) -> None:
    made = random_basis(200, 301, kind, 0.2, 7, 1, torch.device("cpu"))
    assert abs(made.mean()) < 0.03 and made.var().item() == pytest.approx(1.0, abs=0.03)
    part = random_basis(20, 30, kind, 0.2, 7, 1, torch.device("cpu"))
    assert torch.equal(part, made[:20, :30])  # an element depends on its place, seed and stream alone
    for seed, stream in ((8, 1), (7, 0)):
        assert not torch.equal(random_basis(20, 30, kind, 0.2, seed, stream, torch.device("cpu")), part)
    if kind != "dense":
        assert set(made.unique().tolist()) == {-made.max().item(), 0.0, made.max().item()}
        assert (made != 0).float().mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("compat", ["paper", "official"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_randlora_under_bfloat16_keeps_rounded_copies_and_the_same_gradients(
    k: int, n: int, compat: str, autocast: bool
) -> None:
    layer, _ = layer_of(RandLoRA(compat=compat), k, n, 4)
    perturb(layer)
    x, dy = torch.randn(6, k), torch.randn(6, n)
    leaves = [layer.sigma, layer.gamma]
    factors = layer.config.product(layer)
    branch = (x.bfloat16().float() @ factors.u * factors.sigma) @ factors.v.t()
    expected = torch.autograd.grad(branch, leaves, dy.bfloat16().float())
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda s: (saved.append(s), s)[1], lambda s: s),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        y = layer(x if autocast else x.bfloat16())
    assert y.dtype == torch.bfloat16
    held = [p for p in layer.parameters()]
    wide = [s for s in saved if s.dim() == 2 and s.shape[0] in (k, n) and s.shape[1] == 12 and s.dtype == torch.float32]
    assert all(any(s.data_ptr() == p.data_ptr() for p in held) for s in wide)  # no copy in float32
    for found, grad in zip(torch.autograd.grad(y, leaves, dy.bfloat16()), expected, strict=True):
        assert found.dtype == torch.float32 and (found - grad).norm() <= 0.03 * grad.norm()
    assert layer.u.dtype == layer.v.dtype == torch.float32


def test_randlora_rounds_its_bases_once_and_anew_where_they_change() -> None:
    from svdkern.methods.randlora import _rounded

    basis = torch.randn(5, 4)
    first = _rounded(basis, torch.bfloat16)
    assert _rounded(basis, torch.bfloat16) is first and torch.equal(first, basis.bfloat16())
    assert _rounded(basis, torch.float32) is basis
    basis.mul_(2)
    assert torch.equal(_rounded(basis, torch.bfloat16), basis.bfloat16())


def test_randlora_saves_no_basis(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = adapted("randlora")
    svdkern.save_adapter(model, tmp_path / "a")
    import safetensors.torch

    stored = safetensors.torch.load_file(tmp_path / "a" / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"sigma", "gamma", "origin"}


# --------------------------------------------------------------------------------------------------------- SMoRA


@pytest.mark.parametrize("compat", ["paper", "official"])
@pytest.mark.parametrize("partition", [1, 2])
def test_smora_gates_the_largest_logits_of_each_token(partition: int, compat: str) -> None:
    config = SMoRA(active=4, partition=partition, balance_rate=0.0, compat=compat)
    layer, weight = layer_of(config, 12, 9, 8, alpha=8.0)
    perturb(layer)
    with torch.no_grad():
        layer.balance.copy_(0.3 * torch.randn(8 // partition))
    assert layer.scale.item() == 2.0  # alpha / active
    x = torch.randn(2, 5, 12)
    logits = (x @ layer.router).sigmoid().repeat_interleave(partition, dim=-1)
    biased = logits + layer.balance.repeat_interleave(partition)
    chosen = torch.zeros_like(logits)
    for row, order in zip(chosen.view(-1, 8), biased.view(-1, 8).argsort(dim=-1, descending=True), strict=True):
        row[order[:4]] = 1.0
    value = chosen * (biased if compat == "official" else logits)
    gate = 4 * value / value.sum(-1, keepdim=True)
    y = nn.functional.linear(x, weight, layer.bias) + 2.0 * ((x @ layer.u) * gate) @ layer.v.t()
    assert torch.allclose(layer(x), y, atol=1e-5)
    for found, wanted in zip(
        torch.autograd.grad(layer(x).square().sum(), [layer.router, layer.u, layer.v]),
        torch.autograd.grad(y.square().sum(), [layer.router, layer.u, layer.v]),
        strict=True,
    ):
        assert torch.allclose(found, wanted, atol=1e-3, rtol=1e-4)


def test_smora_balances_the_load_while_training_only() -> None:
    layer, _ = layer_of(SMoRA(active=2, balance_rate=0.5), 12, 9, 4)
    x = torch.randn(50, 12)
    before = layer.balance.clone()
    hooks = svdkern.Hooks(nn.Sequential(layer))
    layer.eval()
    layer(x)
    hooks.on_step_end()
    layer.train()
    with torch.no_grad():
        layer(x)
    hooks.on_step_end()
    graphs._run(layer, x.clone())  # what ``warmup`` does
    hooks.on_step_end()
    layer.router.requires_grad_(False)  # as while a model's statistics are collected
    layer(x)
    layer.router.requires_grad_(True)
    hooks.on_step_end()
    assert torch.equal(layer.balance, before)
    chosen = (x @ layer.router).sigmoid().topk(2, dim=-1).indices
    counts = torch.bincount(chosen.flatten(), minlength=4).float()
    layer(x[:20])
    layer(x[20:])  # accumulated
    assert torch.equal(layer.balance, before)
    hooks.on_step_end()
    moved = 0.5 * (counts.mean() - counts).sign()
    assert torch.equal(layer.balance, moved)
    hooks.on_step_end()
    assert torch.equal(layer.balance, moved)


def test_smora_balance_is_that_of_all_processes_and_moves_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layer_of(SMoRA(active=2), 12, 9, 4, adapter_dtype=torch.bfloat16)
    layer.to(torch.bfloat16)
    others = torch.tensor([1000, 0, 0, 0])
    with torch.no_grad():
        layer.balance.fill_(0.01)
    layer(torch.randn(50, 12, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.add_(others))
    svdkern.Hooks(nn.Sequential(layer)).on_step_end()
    assert layer.balance.dtype == torch.float32
    assert torch.allclose(layer.balance, 0.01 + 1e-5 * torch.tensor([-1.0, 1, 1, 1]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("arguments", [{"active": 0}, {"partition": 0}, {"active": 3, "partition": 2}])
def test_smora_refuses_settings(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="active is .*, partition is"):
        SMoRA(**arguments)
    with pytest.raises(ValueError, match="rank is 3, expected a multiple of partition=1 that is >= active=8"):
        layer_of(SMoRA(), 12, 9, 3)


def test_smora_is_finite_where_all_sigmoids_underflow() -> None:
    layer, _ = layer_of("smora", 12, 9, 4)
    with torch.no_grad():
        layer.router.fill_(-100.0)
        layer.v.normal_()
    x = torch.ones(3, 12)
    assert layer(x).isfinite().all()


def test_smora_keeps_its_router_out_of_merging() -> None:
    layer, _ = layer_of("smora", 12, 9, 4)
    for call in (layer.merge, lambda: layer.weight):
        with pytest.raises(RuntimeError, match="smora's branch depends on the input"):
            call()
    assert not layer.merged


# ------------------------------------------------------------------------------------------------------- DiffoRA


def test_diffora_gate_of_zero_is_the_base_layer_without_gradients() -> None:
    layer, weight = layer_of("diffora", 12, 9, 3)
    perturb(layer, size=0.3)
    x = torch.randn(5, 12)

    def output(gamma: float) -> Tensor:
        with torch.no_grad():
            layer.gamma.fill_(gamma)
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        return y.detach()

    plain = nn.functional.linear(x, weight, layer.bias)
    one = output(1.0)
    assert torch.allclose(one, plain + (x @ layer.u) @ layer.v.t(), atol=1e-5)
    branch = (x @ layer.u) @ layer.v.t()
    assert layer.gamma.grad.item() == pytest.approx((2 * one * branch).sum().item(), rel=1e-4)
    assert torch.allclose(output(0.0), plain, atol=1e-6)
    assert layer.u.grad.abs().max() == 0 and layer.v.grad.abs().max() == 0 and layer.gamma.grad.abs().max() > 0


def test_diffora_keeps_the_layers_with_the_largest_gates() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    svdkern.adapt(model, DiffoRA(keep=0.5), rank=2)
    hooks = svdkern.Hooks(model)
    for layer, gamma in zip(model, (0.2, 1.7, -0.5, 0.6), strict=True):
        layer.gamma.data.fill_(gamma)
    hooks.on_step_end()
    assert [layer.gamma.item() for layer in model] == pytest.approx([0.2, 1.0, 0.0, 0.6])
    hooks.on_round_end()
    assert [layer.gamma.item() for layer in model] == [0.0, 1.0, 0.0, 1.0]
    for layer in model:
        layer.gamma.data.add_(0.4)
    hooks.on_step_end()  # the decision stands
    assert [layer.gamma.item() for layer in model] == [0.0, 1.0, 0.0, 1.0]


def test_diffora_says_when_the_gates_do_not_decide() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    svdkern.adapt(model, DiffoRA(keep=0.5), rank=2)
    model[0].gamma.data.fill_(0.5)
    with pytest.warns(UserWarning, match="3 layers have the gate 1, and not all of them can be among the 2"):
        svdkern.Hooks(model).on_round_end()
    assert [layer.gamma.item() for layer in model] == [0.0, 1.0, 1.0, 0.0]


def test_diffora_forgets_the_optimizer_state_of_the_gates() -> None:
    model = adapted(DiffoRA(keep=1.0))
    optimizer = stepped(model)
    assert model.up.gamma in optimizer.state
    svdkern.Hooks(model, optimizer).on_round_end()
    assert model.up.gamma not in optimizer.state and model.up.u in optimizer.state


def test_batch_and_train_are_what_the_tests_think() -> None:
    """A frozen model does not learn: the falling losses of the suite are the methods'."""
    model = adapted("lora")
    for p in model.parameters():
        p.requires_grad_(False)
    model.up.u.requires_grad_(True)  # V = 0: no gradient reaches U
    losses = train(model, 3)
    assert len(set(losses)) == 1 and losses[0] == model(**batch()).item()
