"""A PTX emulator: runs the code that Triton and nvcc emit, on CPU tensors, in numpy. docs/emulator.md explains it."""

from .bulk import TensorMap
from .jit import emulate
from .launch import MODES, run_ptx
from .statistics import Statistics

__all__ = ["MODES", "Statistics", "TensorMap", "emulate", "run_ptx"]
