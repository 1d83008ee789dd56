"""The polar factor of a matrix: the nearest one with orthonormal columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdkern.linalg.exact import householder, small_svd


@torch.no_grad()
def polar(a: Tensor) -> Tensor:
    """``P Q^T`` of the thin SVD ``a = P S Q^T``: of all matrices with orthonormal columns (rows, if a is wide) the one
    nearest to a, in every unitarily invariant norm.

    Merging task vectors (Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081) makes concatenated
    singular vectors orthonormal so. Computed in float64 by a QR and an SVD of the short side's size.

    Reference: Higham, "Computing the polar decomposition, with applications", SIAM J. Sci. Stat. Comput. 1986.

    Equivalent to::

        p, _, qh = torch.linalg.svd(a.double(), full_matrices=False)
        polar = (p @ qh).to(a.dtype)

    Args:
        a: (m, n); float32, bfloat16, float16 or float64, any strides. Of lower rank than min(m, n), the factor is not
            unique; one with orthonormal columns comes all the same.

    Returns:
        (m, n), in a's dtype (half precision rounds orthonormal columns to it).

    Raises:
        TypeError: a is not floating-point.
        ValueError: a is not a matrix, is empty, or has a NaN or an infinity.
    """
    if not a.is_floating_point():
        raise TypeError(f"a is {a.dtype}, expected float32, bfloat16, float16 or float64")
    if a.dim() != 2 or a.numel() == 0:
        raise ValueError(f"a is {tuple(a.shape)}, expected a matrix (m, n) that is not empty")
    largest = max(abs(float(a.amin())), abs(float(a.amax())))
    if not math.isfinite(largest):
        raise ValueError("a has a NaN or an infinity")
    tall = a.shape[0] >= a.shape[1]
    power = max(-1000, min(1000, math.frexp(largest)[1])) if largest else 0
    reflections, triangle = householder(a if tall else a.t(), math.ldexp(1.0, -power))
    left, _, right = small_svd(triangle)
    factor = reflections.times(left @ right.t())
    return (factor if tall else factor.t()).to(a.dtype).contiguous()
