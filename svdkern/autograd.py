"""The autograd functions: what is saved for the backward, and which gradients are computed.

``SVDLinearFunction`` is the hot path: a ctx-style ``torch.autograd.Function`` that calls the chosen backend directly.
``OperatorFunction`` does the same through the two public operators, where a compiler traces or a ``torch.func`` transform is
active (those need ``setup_context``, which makes every call slower).

Saved: x only if the gradient of u or weight is wanted; h (M, r) only if one of v, sigma, scale, core, gate is; the weight only
if x's or its own gradient is. All by reference but h. The factors, scale and gate are saved for every mask: they are inputs that
live on anyway, a reference to them costs no memory, and the backends read off them what shape and dtype their gradients have.

Under autocast what is saved of a float32 x and weight is their copies in autocast's dtype, as in ``torch.nn.functional.linear``.
To cast the weight again in the backward would save N K numbers a layer between forward and backward, and cost a read of the
weight each time: little beside a product with thousands of rows, as much as the product itself with a hundred. Who wants neither
loads the frozen weights in bfloat16; the factors may stay float32. Outside autocast a weight of another dtype than x's is saved
as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern import ops
from svdkern.autocast import autocast_is_on, without_autocast
from svdkern.backends.formula import Gradients, as_rows

_ONCE = (
    "svd_linear is differentiable once: its backward is one fused operation that has no derivative of its own. "
    "For second derivatives write the layer as a plain expression (the 'Equivalent to' of svd_linear's docstring)."
)


def _saved(
    want: Gradients, x: Tensor, weight: Tensor | None, h: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    keeps_x = want.u or want.weight
    keeps_weight = want.x or want.weight
    keeps_h = want.v or want.sigma or want.scale or want.core or want.gate
    return (x if keeps_x else None), (weight if keeps_weight else None), (h if keeps_h else None)


class SVDLinearFunction(torch.autograd.Function):
    """apply(backend, index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate) -> y. Autocast is off."""

    @staticmethod
    def forward(ctx, backend, index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate):
        y, h = backend.forward(x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold)
        want = Gradients._make(ctx.needs_input_grad[4:])
        kept_x, kept_weight, kept_h = _saved(want, x, weight, h)
        ctx.save_for_backward(kept_x, kept_weight, u, sigma, v, scale, core, gate, index, kept_h, rng_state)
        ctx.rest = backend, threshold, want
        return y

    @staticmethod
    def backward(ctx, dy):
        backend, threshold, want = ctx.rest
        x, weight, u, sigma, v, scale, core, gate, index, h, rng_state = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        if twice or autocast_is_on(dy.device):
            with torch.no_grad(), without_autocast(dy.device):
                found = backend.backward(
                    dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want
                )
        else:
            found = backend.backward(
                dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng_state, threshold, want
            )
        return None, None, None, None, *(_not_twice(found) if twice else found)


class ColumnsFunction(torch.autograd.Function):
    """apply(backend, y, x, u, sigma, v, scale) -> y, with the gradients of some columns of a branch that was computed without them.

    y (..., N) of a call in which the columns u (K, r), v (N, r) with their sigma (r,) took part as constants. Saved are x and
    these; their h (M, r) is made again. The gradients of x and sigma are that call's own.
    """

    @staticmethod
    def forward(ctx, backend, y, x, u, sigma, v, scale):
        ctx.backend = backend
        ctx.save_for_backward(x, u, sigma, v, scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        x, u, sigma, v, scale = ctx.saved_tensors
        want = Gradients._make(name in ("u", "v") for name in Gradients._fields)
        twice = torch.is_grad_enabled()
        with torch.no_grad(), without_autocast(dy.device):
            h = ctx.backend.shrink(as_rows(x), u, None, 0)
            found = ctx.backend.backward(dy, x, None, u, sigma, v, scale, None, None, None, h, None, 0, want)
        _, _, du, _, dv, *_ = _not_twice(found) if twice else found
        return None, dy, None, du, None, dv, None


def _not_twice(gradients: Gradients) -> tuple[Tensor | None, ...]:
    """The same gradients, with an error as their derivative."""
    present = [g.detach().requires_grad_() for g in gradients if isinstance(g, Tensor)]
    refused = torch._C._functions.DelayedError(_ONCE, len(present))(*present) if present else ()
    each = iter((refused,) if isinstance(refused, Tensor) else refused)  # one alone comes without a tuple
    return tuple(next(each) if isinstance(g, Tensor) else None for g in gradients)


class OperatorFunction(torch.autograd.Function):
    """apply(backend name, index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate) -> (y, h)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backend, index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate):
        return ops.svd_linear_forward(
            x, weight, u, sigma, v, bias, scale, core, gate, index, rng_state, threshold, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        backend, index, rng_state, threshold, x, weight, u, sigma, v, bias, scale, core, gate = inputs
        _, h = output
        ctx.mark_non_differentiable(h)
        want = Gradients._make(ctx.needs_input_grad[4:])
        kept_x, kept_weight, kept_h = _saved(want, x, weight, h)
        ctx.save_for_backward(kept_x, kept_weight, u, sigma, v, scale, core, gate, index, kept_h, rng_state)
        ctx.rest = backend, threshold, want

    @staticmethod
    def backward(ctx, dy, _dh):
        backend, threshold, want = ctx.rest
        arguments = dy, *ctx.saved_tensors, threshold, backend, list(want)
        if torch.compiler.is_compiling():
            found = iter(ops.svd_linear_backward(*arguments))
        else:
            found = iter(_OperatorBackward.apply(*arguments))
        return None, None, None, None, *(next(found) if wanted else None for wanted in want)


class _OperatorBackward(torch.autograd.Function):
    """The backward operator, with an error as its derivative (a raw operator's would be zero, silently)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return tuple(ops.svd_linear_backward(*arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_ONCE)
