"""Which method finds k singular triplets first, by the short side of the matrix: a measured table.

`python -m svdkern bench svd_methods` measures it: square float32 matrices, on one CPU with AMX. The share of longer sides, the
smallest triplets and bfloat16's limit are older than that bench.
"""

from __future__ import annotations

from torch import Tensor

from svdkern.linalg.filtered import by_bfloat16_units, fits

# (short side, k): from this side on the Krylov method is faster for up to about k triplets, in the geometric mean of two spectra;
# k lies between the measured ranks where the two change places.
_KRYLOV = ((512, 32), (768, 64), (1024, 128), (1536, 192), (2048, 256))
_KRYLOV_SHARE = 8  # of longer sides: beyond an eighth the basis is as large as the matrix
_INVERSE_SIDE = 1024  # up to this one the exact method finds the smallest, too
# (short side, k): up to this side the filter is faster than the Krylov method for k triplets and more. Beyond, its Gram matrix
# takes as much memory as a matrix, too.
_FILTER = ((1024, 1), (2048, 33))
_FILTER_BFLOAT16 = 4096  # where units multiply bfloat16


def takes_krylov(side: int, k: int, which: str = "largest") -> bool:
    """Whether the Krylov method is expected to find k triplets of a matrix with this short side before the exact one."""
    if which == "smallest" and side <= _INVERSE_SIDE:
        return False
    if which == "smallest" or side > _KRYLOV[-1][0]:
        return k <= side // _KRYLOV_SHARE
    return k <= max((most for least, most in _KRYLOV if side >= least), default=0)


def takes_filter(matrix: Tensor, k: int) -> bool:
    """Whether the filter is expected to find k triplets before the Krylov method, to the tolerance of ``linalg.factors``."""
    side = min(matrix.shape)
    if by_bfloat16_units(matrix):
        return fits(matrix, k) and side <= _FILTER_BFLOAT16
    return fits(matrix, k) and any(side <= most and k >= least for most, least in _FILTER)
