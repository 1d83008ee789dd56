"""How every kernel of this folder is launched: the one place that talks to Triton's launcher and to the device.

The emulated tests put their own function here, so that what is proved without a GPU is the code that runs on one.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """``kernel[grid](*arguments, **meta)`` on the device of the first argument; constants (``tl.constexpr``) are given by name.

    Raises:
        RuntimeError: a CUDA graph is being captured and the kernel has not been compiled for such arguments.
    """
    device = arguments[0].device
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, device, arguments, meta)
    else:
        _launch(kernel, grid, device, arguments, meta)


def _launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, arguments: tuple[Any, ...], meta: dict[str, Any]
) -> None:
    specialisation = None if kernel.pre_run_hooks else _specialisation(arguments)
    # Triton's own look-up of what it has compiled is most of the time of a launch of many arguments
    key = (kernel.fn, device, specialisation, *meta, *meta.values(), *_knobs())
    if specialisation is not None and (found := _compiled.get(key)) is not None:
        found.kernel[(*grid, 1, 1)](*arguments, *found.constants)
        return
    with _compiled_only(kernel) if capturing() else contextlib.nullcontext():
        compiled = kernel[grid](*arguments, **meta)
    if specialisation is None or not isinstance(compiled, CompiledKernel):
        return
    if (constants := _constants(kernel, len(arguments), meta)) is not None:
        _compiled[key] = Compiled(compiled, constants)


class Compiled(NamedTuple):
    """What a launch of one kind becomes: a compiled kernel takes all of its parameters by position, the constants too."""

    kernel: CompiledKernel
    constants: tuple[Any, ...]


_compiled: dict[tuple[Any, ...], Compiled] = {}


def _specialisation(arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A key at least as fine as Triton's own, or None for a kind of argument that is not known here.

    An integer counts by its class alone (1, a multiple of 16, too large for an int32), so there are few keys however many
    batch sizes there are. It is a part of every launch: hence one loop, with the commonest types first.
    """
    key: list[Any] = []
    add = key.append
    for value in arguments:
        kind = type(value)
        if kind is int:
            add(value & 15 == 0 if 1 < value < 1 << 31 else _unusual(value))
        elif kind is Tensor or kind is Parameter:
            add(value.dtype)
            add(value.data_ptr() & 15 == 0)
        elif kind in _PLAIN:
            add(kind)
        elif kind is TensorDescriptor:
            add((value.base.dtype, *value.block_shape))
        else:
            return None
    return tuple(key)


_PLAIN = frozenset((type(None), float, bool))  # told apart by nothing but their type


def _unusual(value: int) -> tuple[bool | str, ...]:
    """The class of an integer that is at most 1, or too large for an int32."""
    width = "i32" if -(1 << 31) <= value < 1 << 31 else "i64" if -(1 << 63) <= value < 1 << 63 else "u64"
    return width, value == 1, value & 15 == 0


def _knobs() -> tuple[Any, Any]:
    """What else decides what Triton compiles, and may be changed between two launches."""
    return triton.knobs.runtime.debug, triton.knobs.compilation.instrumentation_mode


def _constants(kernel: Any, given: int, meta: dict[str, Any]) -> tuple[Any, ...] | None:
    """The values of the constants in the kernel's order; None unless they are all that is not given by position, and by name."""
    names = kernel.arg_names[given:]
    if list(kernel.constexprs) != list(range(given, given + len(names))) or not meta.keys() >= set(names):
        return None
    return tuple(meta[name] for name in names)


@contextlib.contextmanager
def _compiled_only(kernel: Any) -> Iterator[None]:
    """Inside, a launch that would have to compile and load this kernel is an error: a capture cannot hold that."""

    def refuse(*, fn: Any, **rest: Any) -> bool | None:
        if fn.jit_function is kernel and capturing():
            raise RuntimeError(
                f"{fn.name} is not compiled for these sizes and dtypes, and cannot be while a CUDA graph is captured: call "
                "svdkern.warmup(model, rows), or run one step, before the capture"
            )
        return None if before is None else before(fn=fn, **rest)

    with _capture:  # Triton asks one hook for all threads
        before = triton.knobs.runtime.jit_cache_hook
        triton.knobs.runtime.jit_cache_hook = refuse
        try:
            yield
        finally:
            triton.knobs.runtime.jit_cache_hook = before


_capture = threading.Lock()


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream; False without a GPU."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device: persistent kernels run one CTA on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability as one number: 80, 90, 100."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def triton_version() -> tuple[int, ...]:
    """(3, 6), (3, 9), ..."""
    return tuple(int(n) for n in triton.__version__.split(".")[:2])


def wgmma(device: torch.device) -> dict[str, bool]:
    """What the kernels must do about wgmma (sm_90), as their constants ONE_STAGE and FENCE; both were found by running the PTX.

    ONE_STAGE: a loop whose left operand is in registers (a masked tile, or one that is summed as well) is not staged: Triton
    leaves up to three products in flight while it writes the registers and stages that they read.
    FENCE: a proxy fence stands between cp.async and the wgmma that reads what it brought. Before 3.7 Triton puts none there
    (mended by triton-lang/triton pull request 9610).
    """
    has_wgmma = architecture(device) == 90
    return {"ONE_STAGE": has_wgmma, "FENCE": has_wgmma and triton_version() < (3, 7)}


def on_host(scale: torch.Tensor) -> bool:
    """Whether a scale is a number of the launch; otherwise the kernels read it from memory."""
    return scale.is_cpu


def descriptor(matrix: Any, block: list[int]) -> Any:
    """A host-made tensor descriptor (TMA) of a row-major matrix; one made on the device would need an allocator."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
