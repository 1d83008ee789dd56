"""Projections onto a subspace and its complement, and the soft threshold: what methods do to factors in place."""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.linalg.precision import full_precision


@torch.no_grad()
def project_out_(tensor: Tensor, basis: Tensor) -> Tensor:
    """``tensor -= basis (basis^T tensor)`` in place: (L, r) without its part in the span of orthonormal columns (L, h).

    Computed in float32, or wider if tensor or basis is.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(tensor, basis)
    return tensor.sub_(_part(tensor, basis).to(tensor.dtype))


@torch.no_grad()
def project_onto_(tensor: Tensor, basis: Tensor) -> Tensor:
    """``tensor <- basis (basis^T tensor)`` in place: the part of (L, r) in the span of orthonormal columns (L, h).

    Columns that are orthonormal to the rounding of their dtype are enough: what is in their span stays, to float32's rounding,
    however often it is projected.
    """
    _check(tensor, basis)
    outside = tensor
    passes = 2 if basis.dtype.itemsize >= 4 else 3  # each leaves that rounding's share of the inside
    for _ in range(passes):
        outside = outside - _part(outside, basis)
    return tensor.copy_(tensor - outside)


def _check(tensor: Tensor, basis: Tensor) -> None:
    if tensor.dim() != 2 or basis.dim() != 2 or tensor.shape[0] != basis.shape[0]:
        raise ValueError(f"tensor is {tuple(tensor.shape)} and basis {tuple(basis.shape)}, expected (L, r) and (L, h)")


def _part(tensor: Tensor, basis: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(tensor.dtype, basis.dtype), torch.float32)
    basis = basis.to(wide)
    with full_precision(tensor.device):
        return basis @ (basis.t() @ tensor.to(wide))


@torch.no_grad()
def soft_threshold_(values: Tensor, kappa: float, *, twice: bool = False) -> Tensor:
    """``sign(values) max(|values| - kappa, 0)`` in place; NaN stays NaN.

    Args:
        values: any floating-point tensor.
        kappa: >= 0.
        twice: set to 0 what is within kappa after the shrinking, too.

    Raises:
        ValueError: kappa is negative or NaN.
    """
    if not kappa >= 0:
        raise ValueError(f"kappa is {kappa}, expected >= 0")
    shrunk = torch.nn.functional.softshrink(values, kappa)
    if twice:
        shrunk = torch.where(shrunk.abs() <= kappa, 0.0 * shrunk, shrunk)
    return values.copy_(shrunk)
