"""Projections onto a subspace and its complement, and the soft threshold: what methods do to factors in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdkern.linalg.precision import full_precision


@torch.no_grad()
def project_out_(tensor: Tensor, basis: Tensor, products: torch.dtype | None = None) -> Tensor:
    """``tensor -= basis (basis^T tensor)`` in place: (L, r) without its part in the span of orthonormal columns (L, h).

    Args:
        products: dtype of the products' operands; None is float32, or wider if tensor or basis is. Half precision leaves its
            rounding of the part (2^-9 in bfloat16), for a gradient that has such an error already.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(tensor, basis)
    return tensor.copy_(_without_part(tensor, basis, products)) if basis.shape[1] else tensor


@torch.no_grad()
def project_onto_(tensor: Tensor, basis: Tensor, products: Sequence[torch.dtype | None] | None = None) -> Tensor:
    """``tensor <- basis (basis^T tensor)`` in place: the part of (L, r) in the span of orthonormal columns (L, h).

    Columns that are orthonormal to the rounding of their dtype are enough: what is in their span stays, to float32's rounding,
    however often it is projected.

    Args:
        products: as for ``project_out_``, for each pass: a pass takes out of what is left outside the basis the inside that
            rounding has put there, so that half precision in a later one errs by its rounding of the outside, and within the span.
            None is two passes in float32, or three for a basis in half precision.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check(tensor, basis)
    outside = tensor
    for dtype in products or (None,) * (2 if basis.dtype.itemsize >= 4 else 3):
        outside = _without_part(outside, basis, dtype)
    return tensor.copy_(tensor - outside)


def _check(tensor: Tensor, basis: Tensor) -> None:
    if tensor.dim() != 2 or basis.dim() != 2 or tensor.shape[0] != basis.shape[0]:
        raise ValueError(f"tensor is {tuple(tensor.shape)} and basis {tuple(basis.shape)}, expected (L, r) and (L, h)")


def _without_part(tensor: Tensor, basis: Tensor, products: torch.dtype | None) -> Tensor:
    """``tensor - basis (basis^T tensor)``, a new tensor in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(tensor.dtype, basis.dtype), torch.float32)
    tensor, factor = tensor.to(wide), basis.to(products or wide)
    with full_precision(tensor.device):
        coefficients = factor.t() @ tensor.to(factor.dtype)
        if factor.dtype == wide:
            return torch.addmm(tensor, factor, coefficients, alpha=-1)
        return tensor - factor @ coefficients


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
