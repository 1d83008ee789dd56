"""Tile sizes by architecture, dtype, R and the size of the layer: what each kernel is launched with.

BM, BN, BK: rows, columns and depth of a tile of the base product; RT: ranks of a tile with a factor; HEIGHT row groups of a
super-group; BF, BD: columns and depth of dU- and dV-tiles. ``training`` and ``decoding`` are the rule, for what nobody has
measured (svdkern/backends/triton_tiles.py has the table); ``candidates`` is what a tuner tries beside it. The large tiles of
sm_90 ran on an H100, the others on no GPU yet; tests/test_triton_gates.py and test_triton_tiles.py compile them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FAMILIES = ("forward", "backward", "decode")
"""The persistent forward, the persistent backward, the two launches of a forward of up to ``DECODE_M`` rows."""

DECODE_M = 16
"""Up to this many rows a layer is decoding: two small launches instead of one persistent one."""


def ceil_div(a: int, b: int) -> int:
    """Of sizes on the host, where ``triton.cdiv`` costs several microseconds a call."""
    return -(-a // b)


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
        return Config(32, 64, 32, min(R, 32), 16, 64, 32, 4, 2)
    if core and R > 64:
        return Config(64, 128, 64, R, 16, 64, 32, 8, 3)
    if ceil_div(rows, 128) * ceil_div(out, 128) < processors:  # too few large tiles to keep every processor busy
        return Config(64, 64, 64, min(R, 64), 8, 64, 64 if arch < 100 else 32, 4, 3)
    if arch < 90:
        return Config(128, 128, 64, min(R, 64), 8, 128, 64, 8, 3)
    if arch == 90 and (R <= 32 or not core):
        return Config(128, 256, 64, min(R, 32), 8, 128, 64, 8, 3)
    return Config(128, 128, 64, min(R, 64), 8, 64, 64 if arch == 90 else 32, 8, 3)


def decoding(dtype: torch.dtype, R: int) -> Config:
    """Of shrink and linear at up to DECODE_M rows: narrow tiles, so that many SMs stream a part of W."""
    if dtype == torch.float32:
        return Config(16, 32, 64 if R <= 128 else 32, R, 1, 32, 32, 4, 2)
    return Config(16, 32, 128 if R <= 64 else 64, R, 1, 64, 32, 4, 4 if R <= 64 else 2)


SMALL_SHARED = (86, 89, 120, 121)
"""Parts with 99 KiB of shared memory for a CTA, where 8.0 has 163 and 9.0 and 10.0 have 227."""


def shared_memory(arch: int) -> int:
    """Bytes of shared memory that a CTA may have."""
    if arch in SMALL_SHARED:
        return 99 << 10
    return (227 if arch >= 90 else 163) << 10


def staged(config: Config, dtype: torch.dtype) -> int:
    """Bytes that the main loop's stages take in shared memory."""
    return config.num_stages * (config.BM + config.BN) * config.BK * dtype.itemsize


def candidates(family: str, arch: int, dtype: torch.dtype, R: int) -> list[Config]:
    """What a tuner tries beside the rule, for a layer without a core; the main loop's stages of each have room."""
    RT = min(R, 32 if dtype == torch.float32 else 64)
    if family == "decode":
        found = _decoding_candidates(dtype, R)
    elif dtype == torch.float32:
        sizes = [(32, 32, 32, 4, 2), (32, 64, 16, 4, 3), (64, 32, 32, 4, 2), (64, 64, 16, 8, 2)]
        found = [Config(BM, BN, BK, RT, 16, 64, 16, warps, stages) for BM, BN, BK, warps, stages in sizes]
    else:
        sizes = [(64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (128, 64, 64, 8, 3), (128, 128, 32, 8, 4)]
        sizes += [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3)]
        BD = 32 if arch >= 100 else 64
        found = [
            Config(BM, BN, BK, min(RT, 32) if BN == 256 else RT, 8, 128 if BN == 256 else 64, BD, warps, stages)
            for BM, BN, BK, warps, stages in sizes
            if BN < 256 or arch >= 90  # sums of 128 x 256 in the registers of 8 warps: with wgmma alone
        ]
        if family == "forward":
            found += [Config(128, 128, 64, RT, 16, 64, BD, 8, 3)]
        else:
            found += [Config(64, 64, 64, RT, 8, 128, 32, 4, 3), Config(128, 128, 64, RT, 8, 128, 32, 8, 3)]
    return [config for config in found if staged(config, dtype) <= shared_memory(arch)]


def _decoding_candidates(dtype: torch.dtype, R: int) -> list[Config]:
    if dtype == torch.float32:
        return [Config(16, BN, 32, R, 1, 32, 32, 4, 2) for BN in (16, 32, 64)]
    if R > 64:
        return [Config(16, BN, 64, R, 1, 64, 32, 4, 2) for BN in (16, 64)]
    sizes = [(16, 128, 4), (64, 128, 4), (32, 64, 4), (32, 256, 3), (64, 64, 6)]
    return [Config(16, BN, BK, R, 1, 64, 32, 4, stages) for BN, BK, stages in sizes]
