"""One measured row of tiles, the rule's beside it, and what a layer is given."""

from __future__ import annotations

import torch
from svdkern.triton_kernels.configs import Config

from svdkern.backends import triton_tiles
from svdkern.backends.table import Shape
from svdkern.backends.triton_tiles import Row

GPU = "Some GPU"
SHAPE = Shape(8192, 4096, 4096, 16)
RULE = Config(128, 128, 64, 16, 8, 128, 64, 8, 3)
OTHER = Config(64, 128, 64, 16, 8, 64, 64, 4, 3)
ROW = Row(80, "bfloat16", "forward", SHAPE, OTHER, 1e-3, 1.2e-3, GPU, "3.9.0")


def chosen(family: str = "forward", shape: Shape = SHAPE, arch: int = 80, dtype: str = "bfloat16") -> Config | None:
    found = triton_tiles._find(GPU, arch, getattr(torch, dtype), family, shape)
    return None if found is None else found.config
