"""What methods draw while training: its distribution, and that every replica of a model draws the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import adapted, net, train

import svdkern
from svdkern.methods import SST
from svdkern.methods.random_numbers import choose, normal


def test_two_of_four_are_drawn_one_after_the_other() -> None:
    """As ``torch.multinomial`` without replacement: the second one in proportion to what is left."""
    weights, draws, pairs = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([-3, 0]), torch.zeros(4, 4)
    for _ in range(4000):
        draws[1] += 1
        first, second = choose(draws, weights, 2).tolist()
        pairs[first, second] += 1
    wanted = weights.outer(weights) * (1 / (1 - weights) + (1 / (1 - weights)).unsqueeze(1))
    assert torch.allclose(pairs / 4000, wanted.triu(1), atol=0.03)


def test_normal_numbers() -> None:
    draws = torch.tensor([2**40 + 1, 3])
    numbers = normal(draws, 500, 21)
    assert abs(numbers.mean()) < 0.03 and abs(numbers.std() - 1) < 0.03 and abs((numbers**4).mean() - 3) < 0.2
    assert torch.equal(numbers, normal(draws, 500, 21)) and torch.equal(numbers[:7, :9], normal(draws, 7, 9))
    for other in (normal(draws + 1, 500, 21), normal(torch.tensor([1, 3]), 500, 21), normal(draws, 500, 21, stream=1)):
        assert abs((numbers * other).mean()) < 0.05


@pytest.mark.parametrize("method", [SST(interval=2), "codyra", "kind"], ids=["sst", "codyra", "kind"])
def test_every_replica_draws_the_same_and_a_loaded_one_goes_on(method: Any, tmp_path: Path) -> None:
    """The processes of a DistributedDataParallel have generators of their own."""
    first = adapted(method)
    train(first, 3)
    others = [copy.deepcopy(first), adapted(method, seed=0), net()]
    with torch.no_grad():
        for p in others[1].parameters():
            p.mul_(2.0)
    others[1].load_state_dict(first.state_dict())
    svdkern.save_adapter(first, tmp_path / "a")
    svdkern.load_adapter(others[2], tmp_path / "a")
    for seed, model in enumerate([first, *others]):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        hooks = svdkern.Hooks(model)
        hooks.step = 3
        hooks.on_step_end()
        hooks.on_round_end()
        assert torch.equal(torch.get_rng_state(), state)
        for name, tensor in first.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), (seed, name)
    drawn = {"sst": "active", "codyra": "sigma", "kind": "tailor_u"}[first.up.method]
    assert not torch.equal(getattr(first.up, drawn).flatten()[:3], getattr(first.down, drawn).flatten()[:3])
    before = getattr(first.up, drawn).clone()
    svdkern.Hooks(first).on_round_end()
    assert torch.equal(before, getattr(first.up, drawn)) == (first.up.method == "kind")
