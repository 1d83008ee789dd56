"""Several fine-tuned models as one: task singular vectors, and low-rank task vectors with coefficients that train.

Layer: above ``nn`` and ``linalg``; nothing here is needed to adapt or train a model.
"""

from svdkern.merging.atlas import ATLASLinear, combine, task_factors
from svdkern.merging.tsvm import tsvm, tsvm_state

__all__ = ["ATLASLinear", "combine", "task_factors", "tsvm", "tsvm_state"]
