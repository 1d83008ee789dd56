"""The linear algebra behind initialisation, merging and the methods' penalties.

Layer: above the backends, below ``methods``. Everything here runs outside autograd and autocast, except
``orth_penalty`` and ``orth_penalties``, which are differentiable.
"""

from svdkern.linalg.certificate import Certificate
from svdkern.linalg.dct import dct_basis, leading_columns
from svdkern.linalg.factors import factors
from svdkern.linalg.fwsvd import fwsvd
from svdkern.linalg.gradient import step_factors
from svdkern.linalg.implicit import LinearOperator
from svdkern.linalg.lowrank import randomized_svd, svd_lowrank
from svdkern.linalg.merged import merged_weight
from svdkern.linalg.orthogonality import orth_penalties, orth_penalty
from svdkern.linalg.polar import polar
from svdkern.linalg.product import refactor, resvd
from svdkern.linalg.projection import project_onto_, project_out_, soft_threshold_
from svdkern.linalg.residual import exact_residual
from svdkern.linalg.topk import SVDInfo, TopkSVD, topk_svd
from svdkern.linalg.weighted import weighted_factors

__all__ = [
    "Certificate",
    "LinearOperator",
    "SVDInfo",
    "TopkSVD",
    "dct_basis",
    "exact_residual",
    "factors",
    "fwsvd",
    "leading_columns",
    "merged_weight",
    "orth_penalties",
    "orth_penalty",
    "polar",
    "project_onto_",
    "project_out_",
    "randomized_svd",
    "refactor",
    "resvd",
    "soft_threshold_",
    "step_factors",
    "svd_lowrank",
    "topk_svd",
    "weighted_factors",
]
