"""The dropout stream: Philox4x32 with 7 rounds, in PyTorch integer arithmetic.

The mask of a (M, K) matrix is never stored: any part of it can be made again from ``rng_state``.

    key      = (seed_lo, seed_hi)                         rng_state = int64 (seed, offset)
    counter  = (row, col // 8, offset_lo, offset_hi)
    bits     = half ``j % 2`` (low half first) of output word ``j // 2``,  j = col % 8
    keep     iff bits >= t,   t = floor(65536 p + 1/2)
    D        = keep / (1 - t / 65536)                     rescaled by the rate that is really dropped

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

DROPS_ALL = 65536
"""The threshold at which every element is dropped: backends then skip the adapter branch."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def threshold_of(p: float) -> int:
    """The 16-bit threshold ``t`` of a dropout rate: an element is dropped iff its bits are below it."""
    return int(65536.0 * p + 0.5)


def keep_scale(threshold: int) -> float:
    """What a kept element is multiplied with: ``1 / (1 - t / 65536)``."""
    return 1.0 / (1.0 - threshold / 65536.0)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int) -> tuple[Tensor, ...]:
    """Philox4x32 on int64 tensors that hold 32-bit words; four counter words in, four words out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(rounds):
        # A product of two 32-bit words wraps into the sign bit of int64; its 64-bit pattern is still exact.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        if step + 1 < rounds:
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(rows: int, cols: int, rng_state: Tensor, threshold: int, row0: int = 0) -> Tensor:
    """Boolean (rows, cols): which elements of rows ``row0 ...`` survive a dropout with this threshold."""
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    row = torch.arange(row0, row0 + rows, device=device).unsqueeze(1) & _LOW
    octet = torch.arange((cols + 7) // 8, device=device).unsqueeze(0)
    counter = (row, octet, offset & _LOW, (offset >> 32) & _LOW)
    words = torch.stack(philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW), rounds=7), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return halves.reshape(rows, 8 * octet.shape[1])[:, :cols] >= threshold


def dropped(a: Tensor, rng_state: Tensor, threshold: int, row0: int = 0) -> Tensor:
    """``D * a`` for a (M, K) matrix that starts at row ``row0`` of the stream; ``threshold < DROPS_ALL``."""
    keep = keep_mask(a.shape[0], a.shape[1], rng_state, threshold, row0)
    return torch.where(keep, a * keep_scale(threshold), torch.zeros((), dtype=a.dtype, device=a.device))
