"""The one formula: an SVD-adapted linear, forward and backward, from three primitives.

    forward    h = (D*x) U      z = (h sigma | h R) g      y = x W + s z V^T + b
    backward   p = dy V         t = s p g                  q = t sigma | t R^T
               dx = dy W^T + D*(q U^T)                     dU = (D*x)^T q        dV = s dy^T z        db = sum_m dy
               dsigma = sum_m h t      dR = h^T t          dg = s p (h sigma | h R)                   ds = sum p z

(D: dropout mask, 1 without dropout; g: gate, 1 without gates; ``W`` is (in, out), that is ``weight.t()``.)

A backend is an object with ``forward`` and ``backward``, which take x (..., K) and dy (..., N) of any leading shape. It gets
both by implementing the primitives ``shrink``, ``linear`` and ``outer`` on matrices; it may override the two as a whole where
it can fuse more. Everything here runs outside autograd, on tensors that the public functions have checked; no argument is
ever written to.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdkern.backends.philox import DROPS_ALL


class Gradients(NamedTuple):
    """Which gradients are wanted (bools), or the gradients themselves (``None`` where not wanted)."""

    x: Any
    weight: Any
    u: Any
    sigma: Any
    v: Any
    bias: Any
    scale: Any
    core: Any
    gate: Any


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What our kernels keep sums in for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)`` without the call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def as_rows(x: Tensor) -> Tensor:
    """x (..., L) as a matrix (M, L)."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def as_shaped(y: Tensor, like: Tensor) -> Tensor:
    """y (M, L) with the leading shape of ``like``."""
    return y if like.dim() == 2 else y.view(*like.shape[:-1], y.shape[1])


def gate_rows(gate: Tensor, index: Tensor | None, rows: int, rank: int) -> Tensor:
    """The gate of every row: (M, r), or (1, r) where all rows share one.

    ``gate`` (G, r) with ``index`` (M,): a table; ``gate`` (M, k) with ``index`` (M, k): k values a row, 0 elsewhere.
    """
    if index is None:
        return gate
    if index.dim() == 1:
        return gate.index_select(0, index)
    return gate.new_zeros(rows, rank).scatter_add_(1, index, gate)


def gate_gradient(rows: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    """The gradient of ``gate`` from the gradient (M, r) of its rows, summed in a fixed order."""
    if index is None:
        return rows.sum(0, keepdim=True).to(gate.dtype)
    if index.dim() == 2:
        return rows.gather(1, index).to(gate.dtype)
    total = rows.new_zeros(gate.shape)
    if rows.is_cuda:  # index_add_ uses atomics there; this one sorts
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)
    return total.to(gate.dtype)


class Backend:
    """The formula over ``shrink``, ``linear`` and ``outer``."""

    name: str

    def wins_without_adapter(self, rows: int, width: int, out: int, dtype: torch.dtype) -> bool:
        """Whether a linear layer of this size, without an adapter, is faster here than ``torch.nn.functional.linear``."""
        return False

    def shrink(self, a: Tensor, factor: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        """``(D*a) factor``: (M, L) x (L, r) -> (M, r), in a's dtype or in the accumulator dtype."""
        raise NotImplementedError

    def linear(
        self,
        a: Tensor,
        w: Tensor | None,
        z: Tensor | None,
        factor: Tensor,
        bias: Tensor | None,
        rng_state: Tensor | None,
        threshold: int,
    ) -> Tensor:
        """``a w + D*(z factor^T) + bias`` in a's dtype; w (in, out) or None, z (M, r) or None (no adapter branch)."""
        raise NotImplementedError

    def outer(self, a: Tensor, q: Tensor, like: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        """``(D*a)^T q``: the gradient (L, r) of the factor ``like``, in its dtype."""
        raise NotImplementedError

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """``dy^T x`` in weight's dtype: correct, not fast; the weight of an adapter is frozen as a rule."""
        return cast(torch.mm(dy.t(), x), weight.dtype)

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        u: Tensor,
        sigma: Tensor | None,
        v: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        core: Tensor | None,
        gate: Tensor | None,
        index: Tensor | None,
        rng_state: Tensor | None,
        threshold: int,
    ) -> tuple[Tensor, Tensor]:
        """(y, h): y (..., N) in x's dtype; h (M, r), kept for the backward, in shrink's dtype."""
        a, w = as_rows(x), None if weight is None else weight.t()
        if threshold == DROPS_ALL:
            h = a.new_zeros(a.shape[0], u.shape[1], dtype=accumulator_dtype(a.dtype))
            return as_shaped(self.linear(a, w, None, v, bias, None, 0), x), h
        h = self.shrink(a, u, rng_state, threshold)
        z = _scaled(_modulated(h, sigma, core, gate, index), scale)
        return as_shaped(self.linear(a, w, z, v, bias, None, 0), x), h

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor | None,
        u: Tensor,
        sigma: Tensor | None,
        v: Tensor,
        scale: Tensor,
        core: Tensor | None,
        gate: Tensor | None,
        index: Tensor | None,
        h: Tensor | None,
        rng_state: Tensor | None,
        threshold: int,
        want: Gradients,
    ) -> Gradients:
        """The wanted gradients; x may be None unless u or weight is wanted, h unless v, sigma, scale, core or gate is."""
        dx = dweight = du = dsigma = dv = dbias = dscale = dcore = dgate = None
        p: Tensor | None = None
        t: Tensor | None = None
        q: Tensor | None = None
        branch_q: Tensor | None = None  # what reaches dx: nothing where everything is dropped
        like, dy, x = dy, as_rows(dy), None if x is None else as_rows(x)
        if threshold == DROPS_ALL:
            p = t = q = dy.new_zeros(dy.shape[0], u.shape[1], dtype=accumulator_dtype(dy.dtype))
            rng_state, threshold = None, 0
        else:
            if want.x or want.u or want.sigma or want.scale or want.core or want.gate:
                p = self.shrink(dy, v, None, 0)
                t = _scaled(p, scale)
                if gate is not None:
                    t = t * gate_rows(gate.to(p.dtype), index, dy.shape[0], v.shape[1])
                q = branch_q = _transposed_modulation(t, sigma, core)
        if want.x:
            dx = as_shaped(self.linear(dy, weight, branch_q, u, None, rng_state, threshold), like)
        if want.weight:
            assert x is not None and weight is not None
            dweight = self.weight_gradient(dy, x, weight)
        if want.u:
            assert x is not None and q is not None
            du = self.outer(x, q, u, rng_state, threshold)
        if want.bias:
            dbias = dy.sum(0, dtype=accumulator_dtype(dy.dtype)).to(dy.dtype)
        if want.v or want.sigma or want.scale or want.core or want.gate:
            assert h is not None
            h = h if p is None else cast(h, p.dtype)
            wide = accumulator_dtype(h.dtype)  # products are summed over all rows: not in half precision
            modulated = _modulated(h, sigma, core, None, None)
            z = modulated if gate is None else modulated * gate_rows(gate.to(h.dtype), index, h.shape[0], h.shape[1])
            if want.v:
                dv = self.outer(dy, _scaled(z, scale), v, None, 0)
            if want.sigma:
                assert sigma is not None and t is not None
                dsigma = cast((cast(h, wide) * t).sum(0), sigma.dtype)
            if want.core:
                assert core is not None and t is not None
                dcore = torch.mm(h.to(wide).t(), t.to(wide)).to(core.dtype)
            if want.scale:
                assert p is not None
                dscale = (p.to(wide) * z).sum().to(scale.dtype)
            if want.gate:
                assert gate is not None and p is not None
                dgate = gate_gradient(_scaled(p, scale).to(wide) * modulated, gate, index)
        return Gradients(dx, dweight, du, dsigma, dv, dbias, dscale, dcore, dgate)


def _modulated(
    h: Tensor, sigma: Tensor | None, core: Tensor | None, gate: Tensor | None, index: Tensor | None
) -> Tensor:
    z = h
    if core is not None:
        z = torch.mm(h, cast(core, h.dtype))
    elif sigma is not None:
        z = h * cast(sigma, h.dtype)
    if gate is not None:
        z = z * gate_rows(gate.to(h.dtype), index, h.shape[0], h.shape[1])
    return z


def _scaled(t: Tensor, scale: Tensor) -> Tensor:
    """``s t``; nothing to do for s = 1, which a scale on the host can tell without waiting for a device."""
    if scale.is_cpu and scale.item() == 1.0:
        return t
    return t * cast(scale, t.dtype)


def _transposed_modulation(t: Tensor, sigma: Tensor | None, core: Tensor | None) -> Tensor:
    if core is not None:
        return torch.mm(t, cast(core, t.dtype).t())
    return t if sigma is None else t * cast(sigma, t.dtype)
