"""The ways to compute one adapted linear layer that bench/linear.py compares.

    y = x·Wᵀ + s·(x·U)·Vᵀ          x: (M, K)  weight: (N, K)  u: (K, r)  v: (N, r)

Every provider gets the same tensors and returns the same y, and its backward the same dx, dU, dV. They differ in how
they treat factors kept in fp32 beside activations in bf16 or fp16, and in how often they read x and write y.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FROZEN = "frozen"
FROZEN_FP32 = "frozen_fp32"


@dataclass(frozen=True)
class Operands:
    """One set of tensors of the rotation. x, u and v require gradients; dy is the incoming gradient of y."""

    x: Tensor
    weight: Tensor
    u: Tensor
    v: Tensor
    dy: Tensor
    scale: float


class Provider:
    """A layer over one set of operands: `forward()` gives y, `leaves` are what backward differentiates, in order."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.leaves: tuple[Tensor, ...] = (operands.x, operands.u, operands.v)

    def forward(self) -> Tensor:
        raise NotImplementedError

    def backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.operands.dy)

    def named_gradients(self, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Gradients by name and in this project's layout (u: (K, r), v: (N, r))."""
        return dict(zip(("dx", "du", "dv"), gradients, strict=True))


class Frozen(Provider):
    """x·Wᵀ and dx alone: the floor that everything is a ratio to."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self.leaves = (operands.x,)

    def forward(self) -> Tensor:
        return self.operands.x @ self.operands.weight.t()

    def named_gradients(self, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"dx": gradients[0]}


class FrozenFp32(Frozen):
    """The frozen layer with everything in fp32: the yardstick where ATen's own bf16 or fp16 is unusable."""

    def __init__(self, operands: Operands) -> None:
        wide = Operands(
            x=operands.x.detach().float().requires_grad_(),
            weight=operands.weight.float(),
            u=operands.u,
            v=operands.v,
            dy=operands.dy.float(),
            scale=operands.scale,
        )
        super().__init__(wide)


class Eager(Provider):
    """The plain autograd expression, factors cast to x's dtype."""

    def forward(self) -> Tensor:
        o = self.operands
        return o.x @ o.weight.t() + o.scale * ((o.x @ o.u.to(o.x.dtype)) @ o.v.to(o.x.dtype).t())


class _AddmmFunction(torch.autograd.Function):
    """What hand-written LoRA kernels in the field do: in-place addmm_ both ways, skinny products oriented by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
        u_cast, v_cast = u.to(x.dtype), v.to(x.dtype)
        h = x @ u_cast
        y = x @ weight.t()
        y.addmm_(h, v_cast.t(), alpha=scale)
        ctx.save_for_backward(x, weight, u_cast, v_cast, h)
        ctx.scale, ctx.factor_dtypes = scale, (u.dtype, v.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, weight, u, v, h = ctx.saved_tensors
        q = dy @ v
        dx = dy @ weight
        dx.addmm_(q, u.t(), alpha=ctx.scale)
        # qᵀ·x and hᵀ·dy (r rows) are faster on most CPUs than xᵀ·q (K rows of r numbers).
        du = (q.t() @ x).t().to(ctx.factor_dtypes[0]).mul_(ctx.scale)
        dv = (h.t() @ dy).t().to(ctx.factor_dtypes[1]).mul_(ctx.scale)
        return dx, None, du, dv, None


class Addmm(Provider):
    """The hand-written autograd Function above."""

    def forward(self) -> Tensor:
        o = self.operands
        return _AddmmFunction.apply(o.x, o.weight, o.u, o.v, o.scale)


def _eager_expression(x: Tensor, weight: Tensor, u: Tensor, v: Tensor, scale: float) -> Tensor:
    return x @ weight.t() + scale * ((x @ u.to(x.dtype)) @ v.to(x.dtype).t())


class Compile(Provider):
    """torch.compile of the eager expression."""

    compiled: Callable[..., Tensor] | None = None

    def forward(self) -> Tensor:
        if Compile.compiled is None:
            Compile.compiled = torch.compile(_eager_expression, dynamic=False)
        o = self.operands
        return Compile.compiled(o.x, o.weight, o.u, o.v, o.scale)


class Peft(Provider):
    """The layer as PEFT computes it: x cast to the adapter's dtype, two nn.Linear, add, cast back."""

    adapter_dtype: torch.dtype | None = torch.float32

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        (k, r), n = operands.u.shape, operands.v.shape[0]
        place = {"device": operands.x.device, "dtype": self.adapter_dtype or operands.x.dtype}
        self.lora_a = nn.Linear(k, r, bias=False, **place)
        self.lora_b = nn.Linear(r, n, bias=False, **place)
        with torch.no_grad():
            self.lora_a.weight.copy_(operands.u.t())
            self.lora_b.weight.copy_(operands.v)
        self.leaves = (operands.x, self.lora_a.weight, self.lora_b.weight)

    def forward(self) -> Tensor:
        o = self.operands
        base = nn.functional.linear(o.x, o.weight)
        adapter = self.lora_b(self.lora_a(o.x.to(self.lora_a.weight.dtype))) * o.scale
        return (base + adapter).to(base.dtype)

    def named_gradients(self, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {"dx": gradients[0], "du": gradients[1].t(), "dv": gradients[2]}


class PeftLow(Peft):
    """PEFT with adapters in the base's dtype (`autocast_adapter_dtype=False`)."""

    adapter_dtype = None


class Svdkern(Provider):
    """svdkern.svd_linear, the backend chosen by the package."""

    backend: str | None = None

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        import svdkern

        self.svd_linear = svdkern.svd_linear

    def forward(self) -> Tensor:
        o = self.operands
        return self.svd_linear(o.x, o.weight, o.u, None, o.v, scale=o.scale, backend=self.backend)


class SvdkernEager(Svdkern):
    """svdkern.svd_linear on its reference backend."""

    backend = "eager"


class SvdkernCpu(Svdkern):
    """svdkern.svd_linear on its C++ CPU backend."""

    backend = "cpu"


PROVIDERS: Mapping[str, type[Provider]] = {
    FROZEN: Frozen,
    FROZEN_FP32: FrozenFp32,
    "eager": Eager,
    "addmm": Addmm,
    "compile": Compile,
    "peft_default": Peft,
    "peft_bf16": PeftLow,
    "svdkern-eager": SvdkernEager,
    "svdkern-cpu": SvdkernCpu,
    "svdkern": Svdkern,
}


def truth(operands: Operands, *, adapted: bool) -> dict[str, Tensor]:
    """y, dx, du, dv of the same numbers in fp64 (y and dx of the frozen layer alone where not `adapted`)."""
    x, weight, dy = (t.detach().double() for t in (operands.x, operands.weight, operands.dy))
    if not adapted:
        return {"y": x @ weight.t(), "dx": dy @ weight}
    u, v, s = operands.u.detach().double(), operands.v.detach().double(), operands.scale
    h, t = x @ u, s * (dy @ v)
    return {
        "y": (x @ weight.t()).addmm_(h, v.t(), alpha=s),
        "dx": (dy @ weight).addmm_(t, u.t()),
        "du": x.t() @ t,
        "dv": s * (dy.t() @ h),
    }
