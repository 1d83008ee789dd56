"""The weight ``W_res + s V diag(sigma) U^T`` that a layer is equal to: merged, rounded once; or differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.autocast import without_autocast

_PANEL_ELEMENTS = 1 << 21  # float64 elements of a row panel: 16 MB


@torch.no_grad()
def merged_weight(
    residual: Tensor,
    u: Tensor,
    sigma: Tensor | None,
    v: Tensor,
    scale: Tensor | float = 1.0,
    core: Tensor | None = None,
) -> Tensor:
    """``residual + scale * v (diag(sigma) | core^T) u^T`` in residual's dtype, summed in float64, row panel by row
    panel.

    Equivalent to::

        middle = torch.diag(sigma) if core is None else core.t()
        weight = (residual.double() + scale * v.double() @ middle.double() @ u.double().t()).to(residual.dtype)

    Args:
        residual: (N, K). u: (K, r). sigma: (r,), None means 1. v: (N, r). core: (r, r) instead of sigma.
        scale: s, a float or a 0-d tensor.

    Returns:
        (N, K), a new tensor; error against the real sum: one rounding to residual's dtype.
    """
    with without_autocast(residual.device):
        left = v.to(torch.float64) * (scale.to(torch.float64) if isinstance(scale, Tensor) else scale)  # (N, r)
        if core is not None:
            left = left @ core.to(torch.float64).t()
        elif sigma is not None:
            left = left * sigma.to(torch.float64)
        right = u.to(torch.float64).t()
        out = torch.empty_like(residual, requires_grad=False)
        height = max(1, _PANEL_ELEMENTS // max(1, residual.shape[1]))
        for start in range(0, residual.shape[0], height):
            rows = slice(start, start + height)
            out[rows] = torch.addmm(residual[rows].to(torch.float64), left[rows], right)
    return out


def effective_weight(
    residual: Tensor | None,
    u: Tensor,
    sigma: Tensor | None,
    v: Tensor,
    scale: Tensor,
    core: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The same sum in float32 (or wider), differentiable in residual and factors; in residual's dtype, or ``dtype`` without one."""
    dtype = dtype if residual is None else residual.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with without_autocast(u.device):
        left = v.to(wide) * scale
        if core is not None:
            left = left @ core.to(wide).t()
        elif sigma is not None:
            left = left * sigma.to(wide)
        right = u.to(wide).t()
        product = left @ right if residual is None else torch.addmm(residual.to(wide), left, right)
        return product.to(dtype)
