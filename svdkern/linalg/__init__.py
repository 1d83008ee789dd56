"""The linear algebra behind initialisation, merging and the methods' penalties.

Layer: above the backends, below ``methods``. Everything here runs outside autograd and autocast, except
``orth_penalty``, which is differentiable.
"""

from svdkern.linalg.certificate import Certificate
from svdkern.linalg.factors import factors
from svdkern.linalg.implicit import LinearOperator
from svdkern.linalg.lowrank import randomized_svd, svd_lowrank
from svdkern.linalg.merged import merged_weight
from svdkern.linalg.orthogonality import orth_penalty
from svdkern.linalg.residual import exact_residual
from svdkern.linalg.topk import SVDInfo, TopkSVD, topk_svd

__all__ = [
    "Certificate",
    "LinearOperator",
    "SVDInfo",
    "TopkSVD",
    "exact_residual",
    "factors",
    "merged_weight",
    "orth_penalty",
    "randomized_svd",
    "svd_lowrank",
    "topk_svd",
]
