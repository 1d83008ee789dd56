"""Tile sizes by architecture, dtype, R and the size of the layer: what each kernel is launched with.

BM, BN, BK: rows, columns and depth of a tile of the base product; RT: ranks of a tile with a factor; HEIGHT row groups of a
super-group; BF, BD: columns and depth of dU- and dV-tiles. They fit the parts: no accumulator spills, and what is staged has
room in shared memory (tests/test_triton_gates.py compiles them). Nothing here was measured on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

DECODE_M = 16
"""Up to this many rows a layer is decoding: two small launches instead of one persistent one."""


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


def core_ranks(dtype: torch.dtype) -> int:
    """The largest R of a layer with a core, which needs all ranks in one tile."""
    return 32 if dtype == torch.float32 else 128


def training(arch: int, dtype: torch.dtype, R: int, core: bool, rows: int, out: int, processors: int) -> Config:
    """Of the persistent kernels, for an output (rows, out) on so many processors."""
    if dtype == torch.float32:
        return Config(32, 64, 32, min(R, 32), 16, 64, 16, 4, 2)
    if core and R > 64:
        return Config(64, 128, 64, R, 16, 64, 32, 8, 3)
    if -(-rows // 128) * -(-out // 128) < processors:  # too few large tiles to keep every processor busy
        return Config(64, 64, 64, min(R, 64), 8, 64, 64 if arch < 100 else 32, 4, 3)
    if arch < 90:
        return Config(128, 128, 64, min(R, 64), 8, 128, 64, 8, 3)
    if arch == 90 and (R <= 32 or not core):
        return Config(128, 256, 64, min(R, 32), 8, 64, 64, 8, 3)
    return Config(128, 128, 64, min(R, 64), 8, 64, 64 if arch == 90 else 32, 8, 3)


def decoding(dtype: torch.dtype, R: int) -> Config:
    """Of shrink and linear at up to DECODE_M rows: narrow tiles, so that many SMs stream a part of W."""
    if dtype == torch.float32:
        return Config(16, 32, 64 if R <= 128 else 32, R, 1, 32, 32, 4, 2)
    return Config(16, 32, 128 if R <= 64 else 64, R, 1, 64, 32, 4, 4 if R <= 64 else 2)
