"""KIND: gates by class group, and its two stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes import adapted, batch, dense, layer_of, net, stepped, train
from torch import nn

import svdkern
from svdkern.methods import KIND
from svdkern.methods.kind import classes, renew_tailors

SHAPES = [(12, 9), (9, 12), (10, 10)]


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_all_triplets_and_one_group_start_as_the_weight(k: int, n: int) -> None:
    layer, weight = layer_of("kind", k, n, min(k, n))
    assert layer.residual is None and layer.rank == min(k, n)
    assert torch.allclose(dense(layer), weight.double(), atol=1e-6)
    fewer, _ = layer_of("kind", k, n, 5)
    p, s, qh = torch.linalg.svd(weight.double(), full_matrices=False)
    assert torch.allclose(dense(fewer), (p[:, :5] * s[:5]) @ qh[:5], atol=1e-6)
    assert fewer.u.shape == (k, 3) and fewer.tailor_u.shape == (k, 2)


def test_a_sample_sees_the_learngenes_and_the_tailors_of_its_group() -> None:
    layer, _ = layer_of(KIND(groups=2, tailor_share=0.5), 12, 9, 8)
    x = torch.randn(3, 5, 12)
    groups = torch.tensor([1, 0, 1])
    with classes(groups):
        y = layer(x)
        flat = layer(x[:, 0])
    table = torch.tensor([[1.0] * 4 + [1, 1, 0, 0], [1.0] * 4 + [0, 0, 1, 1]])
    u, sigma = torch.cat([layer.u, layer.tailor_u], 1), torch.cat([layer.sigma, layer.tailor_sigma])
    z = (x @ u) * sigma * table[groups].unsqueeze(1)
    wanted = z @ torch.cat([layer.v, layer.tailor_v], 1).t() + layer.bias
    assert torch.allclose(y, wanted, atol=1e-5) and torch.allclose(flat, wanted[:, 0], atol=1e-5)
    layer.zero_grad()
    with classes(torch.zeros(3, dtype=torch.int64)):
        layer(x).square().sum().backward()
    assert layer.tailor_sigma.grad[:2].abs().min() > 0 and layer.tailor_sigma.grad[2:].abs().max() == 0
    assert layer.tailor_u.grad[:, 2:].abs().max() == 0 and layer.tailor_v.grad[:, 2:].abs().max() == 0


def test_tailors_are_shared_out_also_where_groups_do_not_divide_them() -> None:
    table = KIND(groups=3).table(1, 5, torch.zeros(()))
    assert table.shape == (3, 6) and table[:, 0].tolist() == [1.0] * 3
    assert torch.equal(table[:, 1:].sum(0), torch.ones(5)) and table[:, 1:].sum(1).tolist() == [2.0, 2.0, 1.0]


def test_groups_have_to_be_given_and_to_fit() -> None:
    layer, _ = layer_of(KIND(groups=2), 12, 9, 8)
    x = torch.randn(3, 5, 12)
    with pytest.raises(RuntimeError, match="within svdkern.methods.kind.classes"):
        layer(x)
    with (
        classes(torch.tensor([0, 1])),
        pytest.raises(ValueError, match="there are 2 class groups, expected one for each"),
    ):
        layer(x)
    with classes(torch.tensor([0, 1, 2])), pytest.raises(ValueError, match="group has values from 0 to 2"):
        layer(x)
    with pytest.raises(ValueError, match="groups is torch.float32"), classes(torch.ones(3)):
        pass
    with pytest.raises(RuntimeError, match="kind's branch depends on the input"):
        layer.merge()
    for arguments, name in (
        ({"groups": 0}, "groups"),
        ({"tailor_share": 1.5}, "tailor_share"),
        ({"stage": "x"}, "stage"),
    ):
        with pytest.raises(ValueError, match=name):
            KIND(**arguments)  # type: ignore[arg-type]


def test_the_second_stage_trains_fresh_tailors_alone_and_is_saved_as_such(tmp_path: Path) -> None:
    model = adapted("kind", rank=6)
    train(model)
    optimizer = stepped(model)
    genes = [model.up.u.clone(), model.up.sigma.clone(), model.up.v.clone()]
    hooks = svdkern.Hooks(model, optimizer)
    model(**batch()).backward()
    hooks.on_round_end()
    assert all(p.grad is None for p in model.parameters())  # weight decay would move what has one
    assert {p for p in optimizer.state if p.requires_grad} <= {model.up.bias, model.down.bias}
    assert {name for name, p in model.up.named_parameters() if p.requires_grad} == {
        "tailor_u",
        "tailor_sigma",
        "tailor_v",
    }
    assert torch.allclose(dense(model.up), ((genes[2] * genes[1]) @ genes[0].t()).double(), atol=1e-6)
    assert torch.allclose(model.up.tailor_u.norm(dim=0), torch.ones(3), atol=1e-6)
    losses = train(model)
    assert losses[-1] < losses[0]
    trained, first = model.up.tailor_sigma.clone(), model.up.tailor_u.clone()
    hooks.on_round_end()  # as the loop of the documentation ends
    assert torch.equal(model.up.tailor_sigma, trained) and trained.abs().min() > 0
    assert all(torch.equal(a, b) for a, b in zip(genes, (model.up.u, model.up.sigma, model.up.v), strict=True))
    svdkern.save_adapter(model, tmp_path / "a")
    fresh = net()
    svdkern.load_adapter(fresh, tmp_path / "a")
    assert fresh.up.config.stage == "tailors" and not fresh.up.u.requires_grad and fresh.up.tailor_u.requires_grad
    x = batch()["x"]
    assert torch.equal(fresh(x), model(x))
    assert isinstance(fresh.up.bias, nn.Parameter)
    loaded = adapted("kind", rank=6)
    loaded.load_state_dict(model.state_dict())
    assert loaded.up.config == model.up.config and [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    loaded.load_state_dict(adapted("kind", rank=6).state_dict())  # and back
    assert loaded.up.config.stage == "together" and all(
        p.requires_grad for n, p in loaded.named_parameters() if "bias" not in n
    )
    renew_tailors([model.up], optimizer)
    assert model.up.tailor_sigma.abs().max() == 0 and not torch.allclose(model.up.tailor_u, first, atol=0.5)
    assert model.down.tailor_sigma.abs().max() > 0
