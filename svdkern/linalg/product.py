"""The SVD of a product of thin factors, without the product: two QRs and an SVD of the rank's size.

    V diag(sigma) U^T = (Q_v R_v) diag(sigma) (Q_u R_u)^T = Q_v (R_v diag(sigma) R_u^T) Q_u^T

O((N + K) r^2) operations instead of the O(N K min(N, K)) of a dense SVD, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.linalg.exact import small_svd, with_signs


@torch.no_grad()
def resvd(u: Tensor, sigma: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of ``v @ diag(sigma) @ u.T``: trained factors made orthonormal again (SST's rounds: Zhao et al., "Sparse
    Spectral Training", arXiv 2405.15481).

    Equivalent to (up to signs, and rotations among equal singular values)::

        p, s, qh = torch.linalg.svd(v.double() @ torch.diag(sigma.double()) @ u.double().t(), full_matrices=False)
        u, sigma, v = qh[:r].t(), s[:r], p[:, :r]

    Args:
        u: (K, r), the input side. sigma: (r,), signed; None means 1. v: (N, r), the output side. r <= min(N, K). Any
            floating dtypes, each its own.

    Returns:
        u (K, r), sigma (r,) descending and >= 0, v (N, r), with orthonormal columns also where sigma is 0: float32, or
        float64 if a factor is. The entry of largest magnitude of each column of u is positive.

    Raises:
        TypeError: a factor is not floating-point.
        ValueError: shapes that do not go together, r > min(N, K), a NaN or an infinity.
    """
    given = {"u": u, "v": v} | ({} if sigma is None else {"sigma": sigma})
    for name, factor in given.items():
        if not factor.is_floating_point():
            raise TypeError(f"{name} is {factor.dtype}, expected a floating dtype")
        if not bool(factor.isfinite().all()):
            raise ValueError(f"{name} has a NaN or an infinity")
    r = u.shape[-1] if u.dim() else 0
    if u.dim() != 2 or v.dim() != 2 or v.shape[1] != r or (sigma is not None and sigma.shape != (r,)):
        shapes = ", ".join(f"{name} {tuple(factor.shape)}" for name, factor in given.items())
        raise ValueError(f"{shapes}: expected u (K, r), sigma (r,), v (N, r)")
    if not 1 <= r <= min(u.shape[0], v.shape[0]):
        raise ValueError(f"r is {r}, expected 1 <= r <= {min(u.shape[0], v.shape[0])}")
    dtype = torch.float64 if torch.float64 in {factor.dtype for factor in given.values()} else torch.float32
    (q_u, r_u), (q_v, r_v) = (torch.linalg.qr(factor.to(torch.float64)) for factor in (u, v))
    if sigma is not None:
        r_v = r_v * sigma.to(torch.float64)
    left, values, right = small_svd(r_v @ r_u.t())
    new_u, new_v = with_signs(q_u @ right, q_v @ left)
    return new_u.to(dtype), values.to(dtype), new_v.to(dtype)


def refactor(lora_b: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product ``B A`` with orthonormal rows of A: ``B A = P S Q^T``, ``A' = Q^T``, ``B' = P S``.

    What FedSVD's server does after it has averaged B (Lee et al., "FedSVD: Adaptive Orthogonalization for Private
    Federated Learning with LoRA", arXiv 2505.12805), without a dense SVD. With B = 0 the rows of A' are an
    orthonormal basis of A's.

    Equivalent to (up to signs)::

        p, s, qh = torch.linalg.svd(lora_b.double() @ lora_a.double(), full_matrices=False)
        lora_b, lora_a = p[:, :r] * s[:r], qh[:r]

    Args:
        lora_b: (N, r). lora_a: (r, K). r <= min(N, K). Any floating dtypes.

    Returns:
        B' (N, r) and A' (r, K): float32, or float64 if one of them is.

    Raises:
        TypeError, ValueError: as ``resvd`` (where u is A^T and v is B).
    """
    u, sigma, v = resvd(lora_a.mT, None, lora_b)
    return v * sigma, u.t().contiguous()
