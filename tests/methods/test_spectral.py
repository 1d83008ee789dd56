"""KaSA, SVFit, LoRA-XS, MiLoRA, SoMA: their identities."""

from __future__ import annotations

import math

import pytest
import torch
from recipes import ALL, adapted, batch, dense, layer_of, net, train
from torch import Tensor, nn

import svdkern
from svdkern.linalg import orth_penalties, orth_penalty
from svdkern.methods import SST, CoDyRA, KaSA, LoRAXS, SoMA
from svdkern.methods.svfit import rank_holding

SHAPES = [(12, 9), (9, 12), (10, 10)]


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(weight.double(), full_matrices=False)


# ---------------------------------------------------------------------------------------------------------- KaSA


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_kasa_drops_the_smallest_triplets(k: int, n: int, alpha: float | None) -> None:
    layer, weight = layer_of("kasa", k, n, 3, alpha=alpha)
    p, s, qh = svd(weight)
    kept = (p[:, :-3] * s[:-3]) @ qh[:-3]
    assert torch.allclose(dense(layer), kept, atol=1e-6)
    assert torch.linalg.matrix_rank(layer.residual.double(), atol=1e-5) == min(k, n) - 3
    assert layer.v.abs().max() == 0 and layer.sigma.abs().min() > 0


@pytest.mark.parametrize(("k", "n", "dropped"), [(12, 9, 0), (9, 12, 3), (10, 10, 3), (10, 9, 2)])
def test_kasa_official_keeps_in_features_minus_rank(k: int, n: int, dropped: int) -> None:
    layer, weight = layer_of(KaSA(compat="official"), k, n, 3)
    p, s, qh = svd(weight)
    keep = min(k - 3, min(k, n))  # svd_rank = in_features - r, as a slice
    assert torch.allclose(dense(layer), (p[:, :keep] * s[:keep]) @ qh[:keep], atol=1e-6)
    assert layer.u0.shape[1] == dropped == min(k, n) - keep
    assert torch.equal(layer.residual, weight) == (dropped == 0)


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_kasa_penalty_and_its_gradient_in_float64(compat: str) -> None:
    model = net(dtype=torch.float64)
    svdkern.adapt(model, KaSA(beta=0.2, gamma=0.3, compat=compat), rank=3, adapter_dtype=torch.float64)
    train(model, 2, data=batch(dtype=torch.float64))
    model.zero_grad()
    value = svdkern.regularization(model)
    reference = torch.zeros((), dtype=torch.float64)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    for name in ("up", "down"):
        a, b, sigma = leaves[f"{name}.u"].t(), leaves[f"{name}.v"], leaves[f"{name}.sigma"]
        if compat == "paper":
            l3 = (b.t() @ b - torch.eye(3)).norm() + (a @ a.t() - torch.eye(3)).norm()
        else:
            l3 = (b @ b.t() - torch.eye(b.shape[0])).norm() + (a.t() @ a - torch.eye(a.shape[1])).norm()
        reference = reference + 0.2 * sigma.square().sum() + 0.3 * l3
    if compat == "official":
        reference = reference / 2
    assert value.dtype == torch.float64 and value.item() == pytest.approx(reference.item(), rel=1e-12)
    value.backward()
    reference.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, leaves[name].grad, atol=1e-12), name


@pytest.mark.parametrize("gram", ["inner", "outer"])
def test_orthonormality_gradient(gram: str) -> None:
    factor = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: orth_penalty(f, gram), factor)
    zero = torch.zeros(11, 4, requires_grad=True)
    orth_penalty(zero, gram).backward()
    assert zero.grad.abs().max() == 0
    with pytest.raises(ValueError, match="gram is 'both'"):
        orth_penalty(zero, "both")  # type: ignore[arg-type]


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("gram", ["inner", "outer"])
def test_penalties_of_many_factors_are_those_of_each(gram: str, squared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [((7, 3), torch.float32), ((7, 3), torch.float32), ((12, 5), torch.bfloat16), ((4, 4), torch.float32)]
    many = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape, dtype in shapes]
    many += [torch.eye(6)[:, :6].clone().requires_grad_(), torch.zeros(5, 2, requires_grad=True)]
    each = [factor.detach().clone().requires_grad_() for factor in many]
    many[1].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = orth_penalties(many, gram, squared)
    expected = torch.stack([orth_penalty(factor, gram, squared) for factor in each])
    assert torch.allclose(found, expected, rtol=1e-6) and found.dtype == torch.float32
    towards = torch.randn(len(many), generator=generator)
    found.backward(towards)
    expected.backward(towards)
    assert many[1].grad is None
    for factor, other in zip(many, each, strict=True):
        if factor.requires_grad:
            assert factor.grad.dtype == factor.dtype and bool(factor.grad.isfinite().all())
            bound = 0.02 if factor.dtype == torch.bfloat16 else 1e-5
            assert (factor.grad - other.grad).norm() <= bound * other.grad.norm()


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("gram", ["inner", "outer"])
def test_penalties_of_many_factors_have_their_gradients(gram: str, squared: bool) -> None:
    many = [torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (5, 8)]
    assert torch.autograd.gradcheck(lambda *factors: orth_penalties(factors, gram, squared), many)
    assert torch.autograd.gradcheck(lambda factor: orth_penalty(factor, gram, squared), many[0])
    value = torch.func.grad(lambda factor: orth_penalties([factor, many[1].detach()], gram, squared).sum())(many[0])
    assert torch.allclose(value, torch.autograd.grad(orth_penalty(many[0], gram, squared), many[0])[0])
    total = orth_penalties(many).sum()
    (first,) = torch.autograd.grad(total, many[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()
    with pytest.raises(ValueError, match="there is no factor"):
        orth_penalties([])


def test_kasa_refuses_to_drop_everything() -> None:
    with pytest.raises(ValueError, match="rank is 9, expected 1 <= rank < 9"):
        layer_of("kasa", 12, 9, 9)


# --------------------------------------------------------------------------------------------------------- SVFit


def test_svfit_trains_singular_values_alone_and_saves_no_activation() -> None:
    layer, weight = layer_of("svfit", 64, 48, 4)
    assert torch.allclose(layer.sigma.double(), svd(weight)[1][:4], rtol=1e-6)
    kept: list[int] = []
    x = torch.randn(7, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    y.sum().backward()
    assert layer.sigma.grad is not None and layer.u.grad is None and layer.v.grad is None
    assert x.numel() not in kept and y.numel() not in kept


def test_rank_holding() -> None:
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    weight = q @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)) @ q.t()
    assert [rank_holding(weight, share, "values") for share in (0.49, 0.74, 0.76, 0.99)] == [1, 2, 3, 4]
    assert [rank_holding(weight, share, "squares") for share in (0.7, 0.73, 0.92, 0.99)] == [1, 2, 3, 4]
    for arguments in ({"share": 0.0}, {"share": 1.1}, {"measure": "sum"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            rank_holding(weight, **arguments)


# ------------------------------------------------------------------------------------------------------- LoRA-XS


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("which", ["top", "bottom"])
def test_lora_xs_core_stands_between_the_singular_vectors(k: int, n: int, which: str) -> None:
    """MohammadrezaBanaei/LoRA-XS#1: a core that is not symmetric, on layers that are not square."""
    layer, weight = layer_of(LoRAXS(which=which), k, n, 3, alpha=6.0)
    assert torch.equal(layer.residual, weight) and 0 < layer.core.abs().max() < 1e-4
    p, s, qh = svd(weight)
    chosen = slice(0, 3) if which == "top" else slice(min(k, n) - 3, None)
    left, right = p[:, chosen], qh[chosen] * s[chosen, None]
    assert torch.allclose(layer.v.double() @ layer.u.double().t(), left @ right, atol=1e-6)
    assert torch.allclose(layer.v.t() @ layer.v, torch.eye(3), atol=1e-5)
    core = torch.randn(3, 3)
    with torch.no_grad():
        layer.core.copy_(core)
    x = torch.randn(5, k)
    lora_a, latent, lora_b = layer.u.t(), core.t(), layer.v  # nn.Linear layouts of the authors' three modules
    linear = nn.functional.linear
    y = linear(x, weight, layer.bias) + 2.0 * linear(linear(linear(x, lora_a), latent), lora_b)
    assert torch.allclose(layer(x), y, atol=1e-5)
    layer(x).sum().backward()
    assert layer.core.grad is not None and layer.u.grad is None and layer.v.grad is None


# ---------------------------------------------------------------------------------------------- MiLoRA and SoMA


@pytest.mark.parametrize("method", ["milora", "soma"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_minor_triplets_train(method: str, k: int, n: int) -> None:
    layer, weight = layer_of(method, k, n, 3, alpha=6.0)
    p, s, qh = svd(weight)
    minor = (p[:, -3:] * s[-3:]) @ qh[-3:]
    assert torch.allclose(2.0 * layer.v.double() @ layer.u.double().t(), minor, atol=1e-6)
    assert torch.allclose(layer.u.double().square().sum(0), s[-3:] / 2, rtol=1e-4)
    assert torch.allclose(layer.v.double().square().sum(0), s[-3:] / 2, rtol=1e-4)
    assert torch.allclose(dense(layer), weight.double(), atol=1e-6)


def test_minor_triplets_of_a_singular_weight() -> None:
    """pytorch/pytorch#181641: zero singular values, where directions are arbitrary, start as the weight all the same."""
    linear = nn.Linear(9, 6, bias=False)
    with torch.no_grad():
        linear.weight[3:] = linear.weight[:3]
    for method in ("milora", "kasa"):
        layer = svdkern.SVDLinear.from_linear(linear, 2, method)
        assert torch.allclose(dense(layer), linear.weight.double(), atol=1e-6)


def test_soma_anneals_the_weight_decay_of_groups_that_have_one() -> None:
    model = adapted(SoMA(weight_decay=0.05, final_weight_decay=1e-5, total_steps=4))
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.up.u], "weight_decay": 0.05},
            {"params": [model.up.v], "weight_decay": 0.0},
            {"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.3},
        ]
    )
    hooks = svdkern.Hooks(model, optimizer)
    seen = []
    for _ in range(6):
        hooks.on_step_end()
        seen.append(optimizer.param_groups[0]["weight_decay"])
    cosine = [1e-5 + (0.05 - 1e-5) * (1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3, 4, 4, 4)]
    assert seen == pytest.approx(cosine) and optimizer.param_groups[1]["weight_decay"] == 0.0
    assert optimizer.param_groups[2]["weight_decay"] == 0.3
    again = svdkern.Hooks(model, optimizer)
    again.load_state_dict({"step": 1, "earlier": 0})
    again.on_step_end()
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(cosine[1])
    again.on_round_end()  # of another method
    hooks.load_state_dict(again.state_dict())
    hooks.on_step_end()
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(cosine[2])


def test_hooks_need_an_adapted_model() -> None:
    with pytest.raises(ValueError, match="Net has no adapted layer"):
        svdkern.Hooks(net())


@pytest.mark.parametrize("method", ["kasa", "codyra"])
def test_hooks_and_penalty_refuse_a_merged_layer_by_name(method: str) -> None:
    model = adapted(method)
    hooks = svdkern.Hooks(model)
    model.down.merge()
    for call in (hooks.on_backward_end, hooks.on_step_end, hooks.on_round_end, lambda: svdkern.Hooks(model)):
        with pytest.raises(RuntimeError, match="down is merged: unmerge the model"):
            call()
    assert hooks.step == 0
    if method == "kasa":
        with pytest.raises(RuntimeError, match="down is merged: unmerge the model"):
            svdkern.regularization(model)
    model.down.unmerge()
    hooks.on_step_end()
    assert hooks.step == 1


@pytest.mark.parametrize("method", ALL)
def test_hooks_leave_a_frozen_layer_alone(method: str) -> None:
    config = (
        SST(interval=1) if method == "sst" else CoDyRA(kappa=9.0, dense_share=0.0) if method == "codyra" else method
    )
    model = adapted(config)
    train(model, 1)
    model.up.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.up.state_dict().items()}
    hooks = svdkern.Hooks(model)
    model(**batch()).backward()
    hooks.on_backward_end()
    for _ in range(2 if method == "sst" else 60):
        hooks.on_step_end()
    hooks.on_round_end()
    for name, tensor in model.up.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_step_that_was_skipped_is_not_counted() -> None:
    """A GradScaler that finds an infinity leaves the parameters as they are."""
    model = adapted(SoMA(total_steps=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    scaler, hooks = torch.amp.GradScaler("cpu", init_scale=2.0), svdkern.Hooks(model, optimizer)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(**batch()) * factor).backward()
        scaler.unscale_(optimizer)
        hooks.on_backward_end()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() >= scale:  # as the documentation says
            hooks.on_step_end()
    assert hooks.step == 2


@pytest.mark.parametrize("method", ["svfit", "lora-xs", "lora-sb", "fedsvd"])
def test_what_trains_alone_keeps_no_activation_of_full_width(method: str) -> None:
    """Of the activations only h (M, r), where the input wants no gradient: sigma, core or V is all that trains."""
    layer = adapted(method).up
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (saved.append(s), s)[1], lambda s: s):
        y = layer(torch.randn(6, 12))
    held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    own = [tuple(s.shape) for s in saved if s.dim() and s.untyped_storage().data_ptr() not in held]
    assert own == [(6, 3)]
    y.sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == set(layer.config.trains)
