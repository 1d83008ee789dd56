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
_CACHE_ELEMENTS = 1 << 18  # of the mask, made at a time on the CPU: the int64 words stay in the caches of one core
_DEVICE_ELEMENTS = 1 << 23  # elsewhere: enough to fill the device


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
    """Boolean (rows, cols): which elements of rows ``row0 ...`` survive a dropout with this threshold.

    Made a block of rows at a time: the int64 words take twenty times the memory of the mask.
    """
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    key = seed & _LOW, (seed >> 32) & _LOW
    octet = torch.arange((cols + 7) // 8, device=device)
    keep = torch.empty(rows, octet.shape[0], 8, dtype=torch.bool, device=device)
    height = max(1, (_CACHE_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS) // max(cols, 1))
    for start in range(0, rows, height):
        block = keep[start : start + height]
        row = torch.arange(row0 + start, row0 + start + block.shape[0], device=device).unsqueeze(1) & _LOW
        words = philox4x32((row, octet, offset & _LOW, (offset >> 32) & _LOW), key, rounds=7)
        for position, word in enumerate(words):
            block[:, :, 2 * position] = (word & 0xFFFF) >= threshold
            block[:, :, 2 * position + 1] = (word >> 16) >= threshold
    return keep.view(rows, 8 * octet.shape[0])[:, :cols]


def dropped(a: Tensor, rng_state: Tensor, threshold: int, row0: int = 0) -> Tensor:
    """``D * a`` for a (M, K) matrix that starts at row ``row0`` of the stream; ``threshold < DROPS_ALL``."""
    return drop_(a.clone(), rng_state, threshold, row0)


def drop_(a: Tensor, rng_state: Tensor, threshold: int, row0: int = 0) -> Tensor:
    """``dropped``, in a's own memory."""
    keep = keep_mask(a.shape[0], a.shape[1], rng_state, threshold, row0)
    return a.mul_(keep_scale(threshold)).masked_fill_(keep.logical_not_(), 0.0)  # 0 also where a is infinite
