"""Random numbers that methods draw while training: a function of the layer's own seed and of how many draws it has made.

Every replica of a layer draws the same, in whatever process, and so does one that goes on from a state_dict or an adapter file:
seed and number are in its ``draws``, an int64 tensor (2,). The first numbers, at the start, are torch's generator's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdkern.backends.philox import philox4x32

_LOW = 0xFFFFFFFF


def fresh_draws(device: torch.device) -> Tensor:
    """A seed of torch's generator, and 0 draws."""
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.cat([seed, torch.zeros_like(seed)])


def uniform(draws: Tensor, rows: int, columns: int, stream: int = 0) -> Tensor:
    """(rows, columns) float64 in (0, 1): one number for each seed, draw, stream, row and column.

    Does not count the draw: ``draws[1] += 1`` does.
    """
    device = draws.device
    row = torch.arange(rows, device=device).unsqueeze(1)
    group = torch.arange(-(-columns // 4), device=device)
    key = draws[0] & _LOW, (draws[0] >> 32) & _LOW
    words = philox4x32((row, group, draws[1] & _LOW, torch.full_like(draws[1], stream)), key, rounds=10)
    return (torch.stack(words, dim=-1).flatten(1)[:, :columns].double() + 0.5) / 2.0**32


def normal(draws: Tensor, rows: int, columns: int, stream: int = 0) -> Tensor:
    """(rows, columns) float64 of the standard normal distribution."""
    return math.sqrt(2.0) * torch.erfinv(2.0 * uniform(draws, rows, columns, stream) - 1.0)


def choose(draws: Tensor, weights: Tensor, count: int) -> Tensor:
    """``count`` different indices (sorted), drawn one after the other in proportion to weights > 0.

    The order of exponential times with these rates is that order: Efraimidis and Spirakis, "Weighted random sampling with a
    reservoir", 2006.
    """
    times = -uniform(draws, 1, len(weights))[0].log() / weights.double()
    return times.topk(count, largest=False).indices.sort().values
