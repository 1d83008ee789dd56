"""The Gram matrix F^T F of a factor by the Triton kernel (``triton_kernels/gram.py``), and when a call takes it.

Only where the triton backend is asked for by name (``SVDKERN_BACKEND=triton``), as for the linear: nobody has measured it.

Layer: above ``dispatch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.autocast import without_autocast
from svdkern.backends import dispatch, triton


def is_asked_for(factor: Tensor) -> bool:
    """Whether ``gram`` is to be taken for this factor.

    Raises:
        RuntimeError: ``SVDKERN_STRICT=1`` and the backend that ``SVDKERN_BACKEND`` names cannot serve the factor's device.
    """
    if not factor.is_cuda or factor.dtype not in triton.DTYPES:
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False  # neither sees into the kernel
    return dispatch.choose(factor, None) is dispatch.BACKENDS["triton"]


def gram(factor: Tensor) -> Tensor:
    """``F^T F`` (r, r) in float32 of F (L, r) in float32, bfloat16 or float16, differentiable; the same bits every time."""
    found: Tensor = _Gram.apply(factor)
    return found


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factor):
        from svdkern.triton_kernels import gram

        ctx.save_for_backward(factor)
        return gram.gram(factor)

    @staticmethod
    def backward(ctx, gradient):
        (factor,) = ctx.saved_tensors
        with without_autocast(factor.device):
            return (factor.to(torch.float32) @ (gradient + gradient.t())).to(factor.dtype)
