"""The smallest singular triplets of a weight, in this package's convention (``topk_svd`` has the usual one)."""

from __future__ import annotations

from torch import Tensor

from svdkern import linalg


def minor_triplets(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """u (K, r), sigma (r,), v (N, r): ``linalg.factors`` for the other end of the spectrum, sigma descending."""
    found = linalg.topk_svd(weight.detach(), r, which="smallest")
    return found.V, found.S, found.U
