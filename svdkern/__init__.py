"""svdkern: linear layers with SVD adapters, ``y = x W^T + s ((x U) * sigma) V^T + b``, as one operation.

svd_linear                    the function
SVDLinear                     the module, a drop-in for ``nn.Linear``
linear, Linear                the same kernels for a layer without an adapter
adapt                         puts SVDLinear into a model, by method and rank
warmup                        compiles a model's GPU kernels before a CUDA graph captures it
merge, unmerge                folds the adapters into the weights, and back to the same bits
save_adapter, load_adapter    the adapter as a directory; loading rebuilds the same bits, without an SVD
regularization, Hooks         the method's own penalty, and what it does around a step of training
methods                       the published methods, one configuration each
merging                       several fine-tuned models as one
LowRankProjected              an optimizer with its states in a few directions of each matrix
linalg                        factors of a weight, exact residuals
"""

import sys
from pathlib import Path
from types import ModuleType

# A source checkout keeps the Triton kernels beside this package; installed they lie inside it.
if (_kernels := Path(__file__).resolve().parent.parent / "triton_kernels").joinpath("tiles.py").is_file():
    sys.modules["svdkern.triton_kernels"] = triton_kernels = ModuleType("svdkern.triton_kernels")
    triton_kernels.__path__ = [str(_kernels)]

from svdkern import linalg, merging, methods
from svdkern.checkpoint import load_adapter, save_adapter
from svdkern.frozen import Linear, linear
from svdkern.functional import svd_linear
from svdkern.graphs import warmup
from svdkern.hooks import Hooks
from svdkern.model import adapt, merge, regularization, unmerge
from svdkern.nn import SVDLinear
from svdkern.projected import LowRankProjected

__version__ = "0.1.0"

__all__ = [
    "Hooks",
    "Linear",
    "LowRankProjected",
    "SVDLinear",
    "__version__",
    "adapt",
    "linalg",
    "linear",
    "load_adapter",
    "merge",
    "merging",
    "methods",
    "regularization",
    "save_adapter",
    "svd_linear",
    "unmerge",
    "warmup",
]
