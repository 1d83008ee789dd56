"""The leading singular triplets of a weight, in this package's convention.

Exact, not randomized (``exact.py``): a singular value of a half or float32 weight is within ``1e-8 sigma_1``, which
``topk_svd`` in float32 does not promise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdkern.autocast import without_autocast
from svdkern.linalg.exact import largest_triplets, with_signs


@torch.no_grad()
def factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading singular triplets of ``weight``: ``weight ~ v @ diag(sigma) @ u.T``.

    **Names**: this returns the package's convention, ``u`` on the *input* side, for a weight stored as ``nn.Linear``
    stores it. ``torch.linalg.svd(weight)`` calls the output side U; on square weights a swap would go unnoticed.

    Equivalent to (up to signs, and rotations among equal singular values)::

        p, s, qh = torch.linalg.svd(weight.float(), full_matrices=False)
        u, sigma, v = qh[:r].t(), s[:r], p[:, :r]

    Args:
        weight: (N, K); float32, bfloat16, float16 or float64, any strides, any device.
        r: number of triplets, 1 <= r <= min(N, K).

    Returns:
        u (K, r), sigma (r,), v (N, r): float32, or float64 for a float64 weight. sigma is sorted and >= 0; u and v have
        orthonormal columns also where sigma is 0; the entry of largest magnitude of each column of u is positive.

    Raises:
        TypeError: weight is not floating-point.
        ValueError: weight is not a matrix, r is out of range, or weight has a NaN or an infinity.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected a matrix (N, K)")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}, expected float32, bfloat16, float16 or float64")
    if not 1 <= r <= min(weight.shape):
        raise ValueError(f"r is {r}, expected 1 <= r <= {min(weight.shape)} (weight is {tuple(weight.shape)})")
    largest = max(abs(float(weight.amin())), abs(float(weight.amax())))
    if not math.isfinite(largest):
        raise ValueError("weight has a NaN or an infinity")
    # A power of two brings the largest entry near 1, so that neither squares overflow nor small matrices vanish.
    power = max(-1000, min(1000, math.frexp(largest)[1])) if largest else 0
    with without_autocast(weight.device):
        v, sigma, u, _ = largest_triplets(weight, r, math.ldexp(1.0, -power))
    u, v = with_signs(u, v)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return u.to(dtype).contiguous(), (sigma * math.ldexp(1.0, power)).to(dtype), v.to(dtype).contiguous()
