"""Tile sizes for (architecture, dtype, R, rows): what each kernel is launched with.

BM, BN, BK: rows, columns and depth of a tile of the base product; RT: ranks of a tile with a factor; HEIGHT row groups of a
super-group; BF, BD: columns and depth of dU- and dV-tiles. They fit the parts: no accumulator spills, and what is staged has
room in shared memory (tests/test_triton_gates.py compiles them). Nothing here was measured on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DECODE_M = 16
"""Up to this many rows a layer is decoding: two small launches instead of one persistent one."""

LARGEST_R = 512


class Config(NamedTuple):
    BM: int
    BN: int
    BK: int
    RT: int
    HEIGHT: int
    BF: int
    BD: int
    num_warps: int
    num_stages: int


def training(arch: int, dtype: torch.dtype, R: int) -> Config:
    """Of the persistent forward and backward."""
    if dtype == torch.float32:
        return Config(32, 64, 32, min(R, 32), 16, 64, 32, 4, 2)
    if R >= 128:
        return Config(
            64, 128, 64, 128 if R == 128 and arch <= 90 else 64, 16, 64, 64, 8, 2 if arch < 90 and R > 128 else 3
        )
    if arch < 90:
        return Config(128, 128, 64, R, 8, 128, 64, 8, 3)
    return Config(128, 256 if arch == 90 and R <= 32 else 128, 64, R, 8, 64, 64 if arch == 90 else 32, 8, 3)


def decoding(arch: int, dtype: torch.dtype, R: int) -> Config:
    """Of shrink and linear at up to DECODE_M rows: narrow tiles, so that every SM streams a part of W."""
    if dtype == torch.float32:
        return Config(16, 32, 64, R, 1, 32, 32, 4, 3 if R <= 128 else 2)
    return Config(16, 32, 128 if R <= 128 else 64, R, 1, 64, 32, 4, 4 if R <= 128 else 2)
