"""FWSVD: a weight as a product of two thin matrices, nearest to it where its Fisher information is large."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from svdkern.linalg.weighted import weighted_factors

_LEAST = 1e-6


@torch.no_grad()
def fwsvd(weight: Tensor, fisher: Tensor, r: int, axis: Literal["out", "in"] = "out") -> tuple[Tensor, Tensor]:
    """u (K, r) and v (N, r): ``v @ u.T`` of rank r nearest to weight, each row's error weighted by its Fisher information.

    Minimises ``sum_i d_i^2 |weight_i - (v u^T)_i|^2`` over rows i, ``d_i = sqrt(sum_j fisher_ij)``. Equivalent to (up to signs)::

        d = fisher.sum(1).sqrt()
        p, s, qh = torch.linalg.svd(torch.diag(d) @ weight.float(), full_matrices=False)
        u, v = qh[:r].t(), p[:, :r] * s[:r] / d.unsqueeze(1)

    ``svdkern.svd_linear(x, None, u, None, v, bias)`` is the layer then; it has r (K + N) numbers instead of K N.

    Reference: Hsu, Hua, Chang, Lou, Shen, Jin: "Language model compression with weighted low-rank factorization", ICLR 2022,
    arXiv 2207.00112.

    Args:
        weight: (N, K), floating-point.
        fisher: (N, K), >= 0: ``svdkern.calibration.fisher`` of this weight. Its unit does not matter.
        r: 1 <= r <= min(N, K).
        axis: what has a weight of its own: "out", the rows of the stored weight, or "in", its columns (then v is orthonormal
            and u is not).

    Rows without any information count as if they had 1e-12 of the largest one's, so that the division is defined.

    Returns:
        float32, or float64 for a float64 weight.

    Raises:
        ValueError: fisher has another shape, a negative value, a NaN, an infinity or only zeros; axis is neither; r out of range.
        TypeError: weight is not floating-point.
    """
    if axis not in ("out", "in"):
        raise ValueError(f"axis is {axis!r}, expected 'out' or 'in'")
    if fisher.shape != weight.shape:
        raise ValueError(f"fisher is {tuple(fisher.shape)}, expected weight's shape {tuple(weight.shape)}")
    if not bool((fisher.isfinite() & (fisher >= 0)).all()) or not bool(fisher.any()):
        raise ValueError("fisher has a negative value, a NaN, an infinity or only zeros, expected finite numbers >= 0")
    d = fisher.to(torch.float64).sum(1 if axis == "out" else 0).sqrt()
    d = d.clamp_min(_LEAST * float(d.max()))
    if axis == "out":
        u, sigma, v = weighted_factors(weight, r, row_scale=d)
        return u, v * sigma
    u, sigma, v = weighted_factors(weight, r, col_scale=d)
    return u * sigma, v
