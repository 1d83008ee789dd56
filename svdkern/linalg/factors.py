"""The leading singular triplets of a weight, in this package's convention.

The short side decides. Up to 1024 the decomposition runs on one thread: LAPACK's small problems gain nothing from more, a model's
layers can then be decomposed side by side, and the bits do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.linalg.crossovers import takes_filter
from svdkern.linalg.exact import few_threads, with_signs
from svdkern.linalg.filtered import leading_triplets
from svdkern.linalg.precision import full_precision
from svdkern.linalg.topk import check_dense, topk_svd

_TOL = 1e-5
_ALIGNMENT = 64  # bytes, as PyTorch allocates


@torch.no_grad()
def factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading singular triplets of ``weight``: ``weight ~ v @ diag(sigma) @ u.T``.

    **Names**: this returns the package's convention, ``u`` on the *input* side, for a weight stored as ``nn.Linear``
    stores it. ``torch.linalg.svd(weight)`` calls the output side U; on square weights a swap would go unnoticed.

    Equivalent to (up to signs, rotations among equal singular values, and an error of sigma of the order of 1e-5)::

        p, s, qh = torch.linalg.svd(weight.float(), full_matrices=False)
        u, sigma, v = qh[:r].t(), s[:r], p[:, :r]

    Algorithm: Chebyshev-filtered subspace iteration on the Gram matrix (``filtered.py``) where that is the fastest; else, and
    where its float32 does not suffice, ``topk_svd`` with the same tolerance. Residuals are at most ``sqrt(1e-5)`` of the
    first singular value that is left out. ``topk_svd`` reports residuals and takes another tolerance.

    Args:
        weight: (N, K); float32, bfloat16, float16 or float64, any strides, any device.
        r: number of triplets, 1 <= r <= min(N, K).

    Returns:
        u (K, r), sigma (r,), v (N, r): float32, or float64 for a float64 weight. sigma is sorted and >= 0; u and v have
        orthonormal columns also where sigma is 0; the entry of largest magnitude of each column of u is positive. The same
        weight gives the same bits every time, and up to a short side of 1024 with any number of threads.

    Raises:
        TypeError: weight is not floating-point, or not dense.
        ValueError: weight is not a matrix, r is out of range, or weight has a NaN, an infinity or a singular value that
            float32 cannot hold.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected a matrix (N, K)")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}, expected float32, bfloat16, float16 or float64")
    check_dense(weight, "weight")
    if not 1 <= r <= min(weight.shape):
        raise ValueError(f"r is {r}, expected 1 <= r <= {min(weight.shape)} (weight is {tuple(weight.shape)})")
    if weight.device.type == "cpu" and weight.data_ptr() % _ALIGNMENT:
        weight = weight.clone()  # BLAS may add in another order where memory begins elsewhere, as in a file's mapping
    with few_threads(min(weight.shape), weight.device):
        found = _by_filter(weight, r)
        if found is None:
            v, sigma, u, _ = topk_svd(weight, r, tol=_TOL)
        else:
            u, sigma, v = found
    u, v = with_signs(u, v)
    return u, sigma, v


def _by_filter(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor] | None:
    tall = weight.shape[0] >= weight.shape[1]
    matrix = weight if tall else weight.t()
    if not takes_filter(matrix, r):
        return None
    with full_precision(weight.device):
        found = leading_triplets(matrix, r, _TOL, seed=0)
    if found is None:
        return None
    u, v = (found.right, found.left) if tall else (found.left, found.right)
    return u.float().contiguous(), found.sigma.float(), v.float().contiguous()
