"""The Triton kernels behind the SVD (``triton_kernels/sketch.py``, ``residual.py``, ``normal.py``), and when a call takes them.

Sketch and residual have the bits of PyTorch's operations, of which they save hundreds of launches: they are taken wherever
Triton can serve, unless ``SVDKERN_BACKEND`` names another backend. The products of a Krylov step have other bits, and their own
launches cost what they save of a small matrix: they are taken where ``SVDKERN_BACKEND`` names triton.

Layer: above ``dispatch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.backends import dispatch, triton


def has_same_bits(device: torch.device) -> bool:
    """Whether ``sketch`` and ``residual`` are to be taken on this device."""
    if device.type != "cuda" or dispatch.named() not in (None, "triton") or _is_traced():
        return False
    if triton.why_not(device, torch.float32) is not None or torch.cuda.is_current_stream_capturing():
        return False
    return triton.compiles(device)


def takes_products(matrix: Tensor) -> bool:
    """Whether ``product`` and ``both`` are to be taken for this matrix.

    Raises:
        RuntimeError: ``SVDKERN_STRICT=1`` and the backend that ``SVDKERN_BACKEND`` names cannot serve the matrix's device.
    """
    if not matrix.is_cuda or matrix.dtype not in triton.DTYPES or _is_traced():
        return False
    return dispatch.named() == "triton" and dispatch.choose(matrix, None) is dispatch.BACKENDS["triton"]


def _is_traced() -> bool:
    """By what does not see into a kernel."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def sketch(rows: int, columns: int, *, seed: int, first: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) of +-1, the bits of ``svdkern.linalg.sketch``."""
    from svdkern.triton_kernels import sketch

    return sketch.sketch(rows, columns, seed=seed, first=first, dtype=dtype, device=device)


def residual(weight: Tensor, v: Tensor, a: Tensor) -> Tensor:
    """``weight - sum of v_i a_i`` of weight (N, K), in the order of ``svdkern.linalg.residual``; v (r, N), a (r, K) float64."""
    from svdkern.triton_kernels import residual

    return residual.residual(weight, v, a)


def product(matrix: Tensor, x: Tensor, scale: float) -> Tensor:
    """``scale matrix x`` in float32, x (columns, b) float32; scale is a power of two."""
    from svdkern.triton_kernels import normal

    return normal.product(matrix, x, scale)


def both(matrix: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``y = scale matrix x`` and ``scale matrix^T y``."""
    from svdkern.triton_kernels import normal

    return normal.both(matrix, x, scale)
