"""The eager backend: the three primitives in plain PyTorch, on every device and dtype that PyTorch has.

It is the reference that the other backends are tested against, and what runs where none of them can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.backends.formula import Backend, cast
from svdkern.backends.philox import drop_, dropped

_HALF = (torch.bfloat16, torch.float16)


class EagerBackend(Backend):
    """Primitives as PyTorch expressions; factors are cast to the activations' dtype, activations never."""

    name = "eager"

    def shrink(self, a: Tensor, factor: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        if threshold:
            assert rng_state is not None
            a = dropped(a, rng_state, threshold)
        return torch.mm(a, cast(factor, a.dtype))

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
        if z is not None and w is not None and bias is None and not threshold and _adds_cheaply(a, w):
            return torch.mm(cast(z, a.dtype), cast(factor, a.dtype).t()).addmm_(a, w)
        if w is None:
            y = a.new_zeros(a.shape[0], factor.shape[0])
            if bias is not None:
                y += bias
        elif bias is None:
            y = torch.mm(a, cast(w, a.dtype))
        else:
            y = torch.addmm(cast(bias, a.dtype), a, cast(w, a.dtype))
        if z is None:
            return y
        z, transposed = cast(z, a.dtype), cast(factor, a.dtype).t()
        if not threshold:
            return y.addmm_(z, transposed)
        assert rng_state is not None
        return y.add_(drop_(torch.mm(z, transposed), rng_state, threshold))

    def outer(self, a: Tensor, q: Tensor, like: Tensor, rng_state: Tensor | None, threshold: int) -> Tensor:
        if threshold:
            assert rng_state is not None
            a = dropped(a, rng_state, threshold)
        # q^T a, not a^T q: the short matrix first is up to twice as fast in the BLAS libraries of CPUs
        if a.is_cuda and a.dtype in _HALF and like.dtype == torch.float32:
            return torch.mm(q.to(a.dtype).t(), a, out_dtype=torch.float32).t()
        return cast(torch.mm(cast(q, a.dtype).t(), a).t(), like.dtype)


def _adds_cheaply(a: Tensor, w: Tensor) -> bool:
    """Whether cuBLAS adds ``a w`` to the branch at less cost than the branch to ``a w``: so an H100 has it
    for a row-major w, which is dx's; for y's the other way round is better."""
    return a.is_cuda and a.dtype in _HALF and w.dtype == a.dtype and w.stride(1) == 1
