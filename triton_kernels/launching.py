"""How every kernel of this folder is launched: the one place that talks to Triton's launcher and to the device.

The emulated tests put their own function here, so that what is proved without a GPU is the code that runs on one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """``kernel[grid](*arguments, **meta)`` on the device of the first argument."""
    device = arguments[0].device
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **meta)
    else:
        kernel[grid](*arguments, **meta)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device: persistent kernels run one CTA on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability as one number: 80, 90, 100."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def triton_version() -> tuple[int, ...]:
    """(3, 6), (3, 9), ..."""
    return tuple(int(n) for n in triton.__version__.split(".")[:2])


def wgmma(device: torch.device) -> int:
    """What the kernels must do about wgmma (sm_90): 0 nothing; 1 and 2 no staged loop with a left operand in registers; 2 fences.

    Both were found by running the PTX. Where the left operand of a staged loop is in registers (a masked tile, or one that is
    summed as well), Triton leaves up to three products in flight while it writes the registers and stages that they read.
    Before 3.7 it puts no proxy fence between cp.async and the wgmma that reads what it brought (mended by triton-lang/triton
    pull request 9610).
    """
    if architecture(device) != 90:
        return 0
    return 1 if triton_version() >= (3, 7) else 2


def on_host(scale: torch.Tensor) -> bool:
    """Whether a scale is a number of the launch; otherwise the kernels read it from memory."""
    return scale.is_cpu


def descriptor(matrix: Any, block: list[int]) -> Any:
    """A host-made tensor descriptor (TMA) of a row-major matrix; one made on the device would need an allocator."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
