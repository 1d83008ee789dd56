"""How far the columns of factors are from orthonormal, as a penalty to train with.

    E = F^T F - I          penalty ||E||_F or ||E||_F^2          gradient 2 F E / ||E||_F or 4 F E
    outer: ||F F^T - I||_F^2 = ||E||_F^2 + L - r for F (L, r), so its gradient needs no (L, L) matrix either

E is (r, r): two products with F (L, r) give value and gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from svdkern.autocast import without_autocast
from svdkern.backends import triton_gram
from svdkern.backends.formula import cast

Gram = Literal["inner", "outer"]
_ONCE = "orth_penalties is differentiable once: for second derivatives sum orth_penalty over the factors"


def orth_penalty(factor: Tensor, gram: Gram = "inner", squared: bool = False) -> Tensor:
    """``||F^T F - I||_F`` of a factor (L, r), differentiable, computed in float32 (float64 for float64).

    Equivalent to, where that has a gradient::

        torch.linalg.matrix_norm(factor.t() @ factor - torch.eye(factor.shape[1]))

    Args:
        factor: (L, r), floating-point.
        gram: "outer" is ``||F F^T - I||_F``, from the same (r, r) matrix: its square is larger by L - r.
        squared: give the square of the norm.

    The norm has a kink at 0: there the gradient is 0, not NaN. Next to it, where only rounding separates F from
    orthonormal, the gradient already has the full length of a subgradient.

    F^T F is PyTorch's product, or under ``SVDKERN_BACKEND=triton`` on a GPU the kernel of ``triton_kernels/gram.py``.

    Raises:
        ValueError: gram is neither.
    """
    _check(gram)
    with without_autocast(factor.device):
        inner = _gram(factor)
    square = (inner - torch.eye(inner.shape[0], dtype=inner.dtype, device=inner.device)).square().sum()
    if gram == "outer":
        square = square + (factor.shape[0] - factor.shape[1])
    if squared:
        return square
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def orth_penalties(factors: Sequence[Tensor], gram: Gram = "inner", squared: bool = False) -> Tensor:
    """``orth_penalty`` of each of many factors, (len(factors),) on the first one's device.

    One node of the autograd graph, once differentiable, with the gradients from the saved (r, r) matrices: for the 420 factors of a
    small model a fifth of the time that as many calls of ``orth_penalty`` take. Those are what a compiler, a ``torch.func``
    transform and factors on several devices get.

    Raises:
        ValueError: gram is neither, or there is no factor.
    """
    _check(gram)
    if not factors:
        raise ValueError("there is no factor, expected at least one")
    device = factors[0].device
    plain = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    if not plain or any(factor.device != device for factor in factors):
        return torch.stack([orth_penalty(factor, gram, squared).to(device) for factor in factors])
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, factor in enumerate(factors):
        groups.setdefault((factor.shape[1], factor.dtype == torch.float64), []).append(i)
    found = [_Penalties.apply(gram, squared, *(factors[i] for i in group)) for group in groups.values()]
    if len(found) == 1:
        return found[0]
    order = torch.tensor([i for group in groups.values() for i in group], device=device).argsort()
    return torch.cat(found)[order]


class _Penalties(torch.autograd.Function):
    """apply(gram, squared, *factors): of factors of one rank, in one dtype of sums."""

    @staticmethod
    def forward(ctx, gram, squared, *factors):
        with without_autocast(factors[0].device):
            excess = torch.stack([_gram(factor) for factor in factors])
        excess.diagonal(dim1=1, dim2=2).sub_(1)
        values = excess.square().sum((1, 2))
        if gram == "outer":
            values += values.new_tensor([factor.shape[0] - factor.shape[1] for factor in factors])
        if not squared:
            values.sqrt_()
        ctx.squared = squared
        ctx.save_for_backward(values, excess, *factors)
        return values

    @staticmethod
    def backward(ctx, gradient):
        values, excess, *factors = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        with torch.no_grad(), without_autocast(values.device):
            lengths = 4 * gradient if ctx.squared else torch.where(values > 0, 2 * gradient / values, 0.0)
            scaled = (excess * lengths[:, None, None]).unbind()
            wanted = ctx.needs_input_grad[2:]
            grads = [
                cast(torch.mm(_wide(factor), each), factor.dtype) if want else None
                for factor, each, want in zip(factors, scaled, wanted, strict=True)
            ]
        if twice:  # an error as their derivative, which would be missing silently
            refuse = torch._C._functions.DelayedError(_ONCE, 1)
            grads = [None if grad is None else refuse(grad.requires_grad_()) for grad in grads]
        return None, None, *grads


def _check(gram: str) -> None:
    if gram not in ("inner", "outer"):
        raise ValueError(f"gram is {gram!r}, expected 'inner' or 'outer'")


def _wide(factor: Tensor) -> Tensor:
    return factor if factor.dtype in (torch.float32, torch.float64) else factor.to(torch.float32)


def _gram(factor: Tensor) -> Tensor:
    """``F^T F``; autocast is off."""
    if triton_gram.is_asked_for(factor):
        return triton_gram.gram(factor)
    wide = _wide(factor)
    return torch.mm(wide.t(), wide)
