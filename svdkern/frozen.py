"""A frozen linear layer on svdkern's kernels: the function ``linear`` and the module ``Linear``.

An SVD adapter of rank 0: the same operation, kernels and rules as ``svd_linear``, taken only where they are faster than
PyTorch's.

Layer: above ``functional``, below ``initialisation`` and ``nn``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from svdkern.autocast import autocast_is_on
from svdkern.backends.dispatch import choose
from svdkern.functional import svd_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``y = x W^T + b``: ``torch.nn.functional.linear``, by our kernels where those are faster.

    That is on CPUs for which PyTorch has no real bfloat16 or float16 product (AVX2: ours run at about float32 speed,
    PyTorch's take up to a hundred times as long), for bfloat16 on AMX, and for 2 to 32 rows of a large weight (not in a
    compiled graph, which is for any number of them). Elsewhere PyTorch's own is called, and under ``torch.func`` transforms
    and forward-mode differentiation, which go through it. **Differentiable once** where our kernels run; who needs second
    derivatives calls PyTorch's own.

    Args:
        x: activations (..., K).
        weight: (N, K) in x's dtype; frozen as a rule (its gradient is correct, not fast).
        bias: (N,) or None.

    Returns:
        y (..., N) in x's dtype (under autocast in autocast's).

    Raises:
        RuntimeError, ValueError, TypeError: as ``torch.nn.functional.linear`` and ``svd_linear``, for shapes, dtypes or
            devices that do not fit.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if x.dim() and weight.dim() == 2 and x.dtype.is_floating_point and not transformed:
        dtype, same = x.dtype, weight.dtype == x.dtype
        if autocast_is_on(x.device) and dtype != torch.float64:
            dtype, same = torch.get_autocast_dtype(x.device.type), True
        out, width = weight.shape
        rows = 0 if torch.compiler.is_compiling() else math.prod(x.shape[:-1])
        if same and choose(x, None).wins_without_adapter(rows, width, out, dtype):
            return svd_linear(x, weight, weight.new_empty(width, 0), None, weight.new_empty(out, 0), bias)
    return torch.nn.functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` by ``svdkern.linear``. A frozen layer becomes one in place: ``layer.__class__ = svdkern.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_kernels(model: nn.Module) -> None:
    """Make every plain ``nn.Linear`` of the model a ``Linear``: the same objects, parameters, hooks and state_dict.

    One with a forward of its own, or a weight that is no plain tensor (quantised, sharded), stays what it is.
    """
    for module in model.modules():
        plain = type(module) is nn.Linear and "forward" not in vars(module)
        if plain and type(module.weight) in (nn.Parameter, Tensor):
            module.__class__ = Linear
