"""A fixed orthonormal basis, the discrete cosine transform's, and the part of a matrix along its r most significant columns.

Low-rank optimizers project gradients onto a subspace that an SVD finds; choosing among fixed columns needs one product and keeps
r indices in place of a basis (Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large
Language Models", arXiv 2505.17967).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from svdkern.linalg.precision import full_precision


def dct_basis(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The orthonormal matrix of the discrete cosine transform, (n, n).

    Equivalent to::

        Q[i, j] = sqrt(2 / n) * cos(pi * i * (2 j + 1) / (2 n)),  the row i = 0 divided by sqrt(2)

    Its rows are the vectors of the DCT-II, its columns those of the DCT-III. Computed in float64; ``Q^T Q = I`` to the rounding of
    dtype.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}, expected >= 1")
    i = torch.arange(n, dtype=torch.int64, device=device)
    # the angle is a multiple of pi / 2n: reduced as an integer it is exact for any n
    turns = (i.unsqueeze(1) * (2 * i + 1)) % (4 * n)
    q = torch.cos(turns.to(torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    q[0] /= math.sqrt(2)
    return q.to(dtype)


@torch.no_grad()
def leading_columns(matrix: Tensor, basis: Tensor, r: int, norm: Literal["l1", "l2"] = "l1") -> tuple[Tensor, Tensor]:
    """(low, index): the r columns of ``matrix @ basis`` that are the largest, (L, r), and which they are, ascending (r,).

    With an orthonormal basis ``low @ basis[:, index].T`` is the part of matrix in the span of these columns; with "l2" it is the
    nearest to matrix that r columns of this basis allow::

        |matrix - low @ basis[:, index].T|_F^2 = |matrix|_F^2 - |low|_F^2

    Args:
        matrix: (L, n). basis: (n, n). r: 1 <= r <= n.
        norm: of a column; "l1" is the authors' default.

    Returns:
        low in the wider of matrix's dtype and float32; of equal columns those with the smaller index come first.

    Raises:
        ValueError: shapes that do not fit, r out of range, an unknown norm.
    """
    if matrix.dim() != 2 or basis.shape != (matrix.shape[-1], matrix.shape[-1]):
        raise ValueError(f"matrix is {tuple(matrix.shape)} and basis {tuple(basis.shape)}, expected (L, n) and (n, n)")
    if not 1 <= r <= basis.shape[1]:
        raise ValueError(f"r is {r}, expected 1 <= r <= {basis.shape[1]}")
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm is {norm!r}, expected 'l1' or 'l2'")
    wide = torch.promote_types(matrix.dtype, torch.float32)
    with full_precision(matrix.device):
        products = matrix.to(wide) @ basis.to(wide)
    sizes = torch.linalg.vector_norm(products, ord=1 if norm == "l1" else 2, dim=0)
    index = sizes.sort(descending=True, stable=True).indices[:r].sort().values
    return products[:, index], index
