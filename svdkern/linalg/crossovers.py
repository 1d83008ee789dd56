"""Which method finds k singular triplets first, by the short side of the matrix: a measured table.

`python -m svdkern bench svd_methods` measures what is in it.
"""

from __future__ import annotations

from torch import Tensor

from svdkern.linalg.filtered import by_bfloat16_units, fits

# From this short side on, and up to this part of it, the Krylov method is faster than the exact one.
_KRYLOV_SIDE = 1025
_KRYLOV_SHARE = 1 / 8
# Up to this short side the filter is at least as fast as the Krylov method; beyond it its Gram matrix takes as much memory as a
# matrix, too.
_FILTER = 2048
_FILTER_BFLOAT16 = 4096  # where units multiply it


def takes_krylov(side: int, k: int) -> bool:
    """Whether the Krylov method is expected to find k triplets of a matrix with this short side before the exact one."""
    return side >= _KRYLOV_SIDE and k <= side * _KRYLOV_SHARE


def takes_filter(matrix: Tensor, k: int) -> bool:
    """Whether the filter is expected to find k triplets before the Krylov method, to the tolerance of ``linalg.factors``."""
    return fits(matrix, k) and min(matrix.shape) <= (_FILTER_BFLOAT16 if by_bfloat16_units(matrix) else _FILTER)
