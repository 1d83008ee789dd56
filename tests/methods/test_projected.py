"""The DCT's basis, the choice of its columns, and optimizers with states in r of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from recipes import batch, net
from torch import Tensor, nn

from svdkern import LowRankProjected
from svdkern.linalg import dct_basis, leading_columns


@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_the_basis_is_orthonormal_and_its_rows_are_the_dct(n: int) -> None:
    q = dct_basis(n, torch.float64)
    assert torch.allclose(q @ q.t(), torch.eye(n, dtype=torch.float64), atol=1e-12)
    i, j = torch.meshgrid(torch.arange(n).double(), torch.arange(n).double(), indexing="ij")
    expected = (2 / n) ** 0.5 * torch.cos(torch.pi * i * (2 * j + 1) / (2 * n))
    expected[0] /= 2**0.5
    assert torch.allclose(q, expected, atol=1e-9)
    assert dct_basis(n).dtype == torch.float32 and torch.equal(dct_basis(n), q.float())


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_what_the_projection_leaves_out_is_what_was_not_chosen(norm: str) -> None:
    g = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = dct_basis(12, torch.float64)
    for r in (1, 5, 12):
        low, index = leading_columns(g, q, r, norm)  # type: ignore[arg-type]
        assert torch.equal(index, index.sort().values) and len(set(index.tolist())) == r
        assert torch.allclose(low, (g @ q)[:, index])
        left = (g - low @ q[:, index].t()).square().sum()
        assert torch.allclose(left, g.square().sum() - low.square().sum(), atol=1e-9)
        if norm == "l2":  # the best of r columns is no worse than the average of all
            assert left <= (1 - r / 12) * g.square().sum() + 1e-9
            chosen, rest = (g @ q).norm(dim=0)[index], (g @ q).norm(dim=0)
            assert torch.equal(chosen.sort().values, rest.sort().values[-r:])


def test_columns_say_what_does_not_fit() -> None:
    g, q = torch.randn(5, 4), dct_basis(4)
    for call, what in (
        (lambda: dct_basis(0), "n is 0"),
        (lambda: leading_columns(g, dct_basis(5), 2), r"matrix is \(5, 4\) and basis \(5, 5\)"),
        (lambda: leading_columns(g, q, 5), "r is 5"),
        (lambda: leading_columns(g, q, 2, "max"), "norm is 'max'"),  # type: ignore[arg-type]
        (lambda: LowRankProjected([nn.Parameter(g)], torch.optim.SGD, 0), "rank is 0"),
        (lambda: LowRankProjected([nn.Parameter(g)], torch.optim.SGD, 2, "max"), "norm is 'max'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=what):
            call()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_a_step_of_sgd_is_the_projected_gradient(shape: tuple[int, int]) -> None:
    start, grad = torch.randn(shape), torch.randn(shape)
    parameter, bias = nn.Parameter(start.clone()), nn.Parameter(torch.zeros(3))
    parameter.grad, bias.grad = grad.clone(), torch.ones(3)
    LowRankProjected([parameter, bias], torch.optim.SGD, 2, "l2", lr=0.5).step()
    tall = grad if shape[0] > shape[1] else grad.t()
    low, index = leading_columns(tall, dct_basis(6), 2, "l2")
    part = low @ dct_basis(6)[:, index].t()
    expected = start - 0.5 * (part if shape[0] > shape[1] else part.t())
    assert torch.allclose(parameter, expected, atol=1e-6) and torch.equal(bias, torch.full((3,), -0.5))


def test_columns_that_stay_keep_their_state() -> None:
    q = dct_basis(4)
    parameter = nn.Parameter(torch.zeros(8, 4))
    optimizer = LowRankProjected([parameter], torch.optim.SGD, 2, lr=1.0, momentum=0.5)
    for columns in ([0, 1], [1, 3]):
        parameter.grad = torch.ones(8, 2) @ q[:, columns].t()
        optimizer.step()
    # along column 0: 1; along 1: 1, then 1 + 0.5; along 3, whose momentum starts anew: 1
    assert torch.allclose(parameter @ q, -torch.tensor([1.0, 2.5, 0.0, 1.0]).expand(8, 4), atol=1e-5)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(**batch())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _held(optimizer: torch.optim.Optimizer) -> int:
    states: list[Any] = [optimizer.state]
    if isinstance(optimizer, LowRankProjected):
        states.append(optimizer.inner.state)
    tensors = [t for state in states for entry in state.values() for t in entry.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_model_trains_with_smaller_states(norm: str) -> None:
    model, other = net(), net()
    optimizer: Any = LowRankProjected(model.parameters(), torch.optim.AdamW, 3, norm, lr=0.01)  # type: ignore[arg-type]
    full = torch.optim.AdamW(other.parameters(), lr=0.01)
    losses = _steps(model, optimizer, 20)
    _steps(other, full, 1)
    assert losses[-1] < 0.9 * losses[0]
    assert _held(optimizer) < 0.5 * _held(full)
    assert all(seen.numel() == 0 and seen.grad is None for seen in optimizer._coordinates.values())


def test_it_is_saved_continued_and_scheduled_as_any_optimizer() -> None:
    model = net()
    optimizer = LowRankProjected(model.parameters(), torch.optim.AdamW, 3, lr=0.01)
    _steps(model, optimizer, 4)
    again = copy.deepcopy(model)
    continued = LowRankProjected(again.parameters(), torch.optim.AdamW, 3, lr=0.5)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert continued.param_groups[0]["lr"] == 0.01
    assert _steps(model, optimizer, 3) == _steps(again, continued, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    _steps(model, optimizer, 1)
    schedule.step()
    before = [p.detach().clone() for p in model.parameters()]
    _steps(model, optimizer, 1)
    assert optimizer.inner.param_groups[0]["lr"] == 0.0
    assert all(torch.allclose(p, b, atol=1e-6) for p, b in zip(model.parameters(), before, strict=True))

    late = nn.Parameter(torch.ones(6, 5))
    optimizer.add_param_group({"params": [late], "lr": 0.1})
    late.grad = torch.ones(6, 5)
    assert optimizer.step(lambda: torch.tensor(3.0)).item() == 3.0
    assert not torch.equal(late, torch.ones(6, 5))
