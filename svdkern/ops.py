"""The two public operators, for ``torch.compile``, ``torch.export`` and ``torch.func``.

    svdkern::svd_linear_forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold, backend)
        -> (y, h)
    svdkern::svd_linear_backward(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, backend, want)
        -> gradients

They call the same backend objects as the eager path and exist because a compiler needs an opaque call with a schema and a
shape rule. **A raw operator is not differentiable**: ``svdkern.svd_linear`` is. ``x`` is (..., K); ``h`` is (M, r) in the
accumulator dtype; ``backend`` is a name or "" for the automatic choice; ``want`` has the nine flags of
``svdkern.backends.formula.Gradients`` and the result has the gradients asked for, in that order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdkern.backends.dispatch import choose_path
from svdkern.backends.extension import why_missing
from svdkern.backends.formula import Gradients, accumulator_dtype
from svdkern.backends.tracing import one_call_an_example, register

_library = torch.library.Library("svdkern", "FRAGMENT")
_library.define(
    "svd_linear_forward(Tensor x, Tensor? weight, Tensor u, Tensor? sigma, Tensor v, Tensor? bias, Tensor scale, Tensor? core,"
    " Tensor? gate, Tensor? index, Tensor? rng_state, int threshold, str backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "svd_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor u, Tensor? sigma, Tensor v, Tensor scale, Tensor? core,"
    " Tensor? gate, Tensor? index, Tensor? h, Tensor? rng_state, int threshold, str backend, bool[] want) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold, backend):
    y, h = choose_path(x, v, backend, threshold).forward(
        x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold
    )
    # one dtype, whichever backend is chosen when it runs, or for the backward
    return y, h.to(accumulator_dtype(x.dtype))


def _backward(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, backend, want):
    gradients = choose_path(dy, u, backend, threshold, backward=True).backward(
        dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, Gradients(*want)
    )
    laid_out = (gradients.x, weight, u, sigma, v, gradients.bias, scale, core, gate)
    return [_like(found, like) for found, like in zip(gradients, laid_out, strict=True) if found is not None]


def _like(found: Tensor, like: Tensor) -> Tensor:
    """``found`` with the strides that the fake kernel promises: those of ``empty_like``."""
    promised = torch.empty_like(like, device="meta").stride()
    return found if found.stride() == promised else torch.empty_like(like, dtype=found.dtype).copy_(found)


def _forward_fake(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold, backend):
    h = x.new_empty(math.prod(x.shape[:-1]), u.shape[1], dtype=accumulator_dtype(x.dtype))
    return x.new_empty(*x.shape[:-1], v.shape[0]), h


def _backward_fake(dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, backend, want):
    dx_and_bias = (dy.new_empty(*dy.shape[:-1], u.shape[0]), dy.new_empty(v.shape[0]))
    like = Gradients(dx_and_bias[0], weight, u, sigma, v, dx_and_bias[1], scale, core, gate)
    return [torch.empty_like(tensor) for tensor, wanted in zip(like, want, strict=True) if wanted]


svd_linear_forward = torch.ops.svdkern.svd_linear_forward.default
svd_linear_backward = torch.ops.svdkern.svd_linear_backward.default

for _name, _implementation, _fake in (
    ("svd_linear_forward", _forward, _forward_fake),
    ("svd_linear_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"svdkern::{_name}", _fake, lib=_library)
torch.library.register_vmap(svd_linear_forward, one_call_an_example(svd_linear_forward), lib=_library)
torch.library.register_vmap(svd_linear_backward, one_call_an_example(svd_linear_backward), lib=_library)
if why_missing is None:
    register()
