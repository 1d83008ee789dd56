"""Orthonormal bases of blocks: CholeskyQR2 with the Gram matrix in float64, and block Gram-Schmidt against a basis.

A Gram matrix in float64 of a float32 block keeps condition numbers up to about 1e8, so one Cholesky seldom fails. Where it
does, the Gram matrix is shifted (Fukaya et al., "Shifted Cholesky QR", SISC 2020) and a third round follows; where that
fails too, Householder reflections in float64 end the matter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdkern.linalg.exact import small_svd

_PANEL_ELEMENTS, _DEVICE_ELEMENTS = 1 << 16, 1 << 22  # float64 elements upcast at a time: 512 KB, in the L2; a GPU's


def panel_height(x: Tensor) -> int:
    """Rows of x that are upcast at a time."""
    elements = _PANEL_ELEMENTS if x.device.type == "cpu" else _DEVICE_ELEMENTS
    return max(1, elements // max(1, x.shape[1]))


def gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``x^T y`` (``x^T x``) in float64, a panel of rows upcast at a time."""
    y = x if y is None else y
    out = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    step = panel_height(x)
    for start in range(0, x.shape[0], step):
        left = x[start : start + step].to(torch.float64)
        right = left if y is x else y[start : start + step].to(torch.float64)
        out.addmm_(left.t(), right)
    return out


def orthonormal(x: Tensor) -> tuple[Tensor, str | None]:
    """An orthonormal basis of x's columns, in x's dtype, and the fallback that was needed.

    Args:
        x: (n, b), n >= b. Columns that depend on the others become arbitrary orthonormal ones.
    """
    q, scale = x, torch.linalg.vector_norm(x)
    if not bool(scale > 0):
        return _householder(x), "householder"
    q = x / scale
    fallback = None
    rounds = 2
    while rounds:
        product = gram(q)
        triangle, failed = torch.linalg.cholesky_ex(product)
        if bool(failed) or not _well(triangle):
            if fallback:
                return _householder(x), "householder"
            fallback, rounds = "shifted", 3
            size = x.shape[0] * x.shape[1] + x.shape[1] * (x.shape[1] + 1)
            shift = 11 * size * torch.finfo(x.dtype).eps ** 2 * float(product.diagonal().sum())
            shift = max(shift, 1e-12 * float(product.diagonal().sum()))
            product.diagonal().add_(shift)
            triangle, failed = torch.linalg.cholesky_ex(product)
            if bool(failed):
                return _householder(x), "householder"
        q = torch.linalg.solve_triangular(triangle.t().to(x.dtype), q, upper=True, left=False)
        rounds -= 1
    return q, fallback


def _well(triangle: Tensor) -> bool:
    diagonal = triangle.diagonal()
    return bool(diagonal.min() > 1e-7 * diagonal.max())


def _householder(x: Tensor) -> Tensor:
    return torch.linalg.qr(x.to(torch.float64))[0].to(x.dtype)


def project_out(basis: Tensor, x: Tensor) -> Tensor:
    """Takes the basis out of x, in place, by one pass of block Gram-Schmidt; returns the coefficients ``basis^T x``."""
    coefficients = torch.mm(basis.t(), x)
    x.addmm_(basis, coefficients, alpha=-1)
    return coefficients


def new_directions(
    basis: Tensor, x: Tensor, noise: float, fresh: Callable[[int], Tensor]
) -> tuple[Tensor, int, str | None]:
    """An orthonormal block orthogonal to ``basis``: what x adds to it, and random directions where x adds nothing.

    Args:
        basis: (n, w), orthonormal.
        x: (n, b), with the basis taken out once (``project_out``); taken out again here, in place. A block with an
            ill-conditioned x is projected a third time: rounding errors in the basis' direction grew by its condition.
        noise: the norm below which a direction of x is rounding error.
        fresh: makes that many random columns (n, count), for a block of ``min(b, n - w)`` columns of which x fills fewer.

    Returns:
        the block, the number of its columns that are x's, and the fallback that was needed.
    """
    width = min(x.shape[1], basis.shape[0] - basis.shape[1])
    if width == 0:
        return x[:, :0], 0, None
    # What is left of a column that lies in the basis' span is rounding error in that span.
    before = float(torch.linalg.vector_norm(x, dim=0).max())
    project_out(basis, x)
    noise = max(noise, 16 * torch.finfo(x.dtype).eps * before)
    if width == x.shape[1]:
        block = _well_conditioned(x, noise)
        if block is not None:
            return block, width, None
    lengths, vectors = _principal(x)
    significant = min(int((lengths > noise).sum()), width)
    if significant == x.shape[1]:
        block, fallback = orthonormal(x)
        if fallback is None and bool(lengths[-1] > 0.03 * lengths[0]):
            return block, significant, None
        if fallback != "householder":
            project_out(basis, block)
            block, again = orthonormal(block)
            if again is None:
                return block, significant, fallback
    # A wanted direction can be short beside the others: each is brought to length 1 before the next projection.
    kept = torch.mm(x, vectors[:, :significant].to(x.dtype))
    kept = kept / torch.linalg.vector_norm(kept, dim=0).clamp(min=torch.finfo(x.dtype).tiny)
    block = kept
    if significant < width:
        block = torch.cat([kept, fresh(width - significant) / basis.shape[0] ** 0.5], dim=1)
    for _ in range(2):  # reflections put columns in place of dependent ones that are orthogonal to the block alone
        project_out(basis, block)
        block = _householder(block)
    how = "householder" if significant == x.shape[1] else "random directions"
    return block, significant, how


def _well_conditioned(x: Tensor, noise: float) -> Tensor | None:
    """CholeskyQR2 of an x whose columns are all well above ``noise`` and about as long as each other, else None."""
    triangle, failed = torch.linalg.cholesky_ex(gram(x))
    diagonal = triangle.diagonal()
    if bool(failed) or not bool(diagonal.min() > max(0.03 * float(diagonal.max()), 8 * noise)):
        return None
    block = torch.linalg.solve_triangular(triangle.t().to(x.dtype), x, upper=True, left=False)
    excess = torch.mm(block.t(), block)
    excess.diagonal().sub_(1)
    if not bool(excess.abs().max() < 1e-3):
        return None
    return block - torch.mm(block, excess / 2)  # (I + excess)^-1/2 to second order: no second triangle needed


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of x, descending, and its right singular vectors."""
    if x.dtype == torch.float64:
        _, values, vectors = small_svd(torch.linalg.qr(x, mode="r")[1])
        return values, vectors
    squares, vectors = torch.linalg.eigh(gram(x))
    return squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
