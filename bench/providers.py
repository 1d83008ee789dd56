"""The ways to compute one adapted linear layer that the benchmarks compare.

    y = x·Wᵀ + s·((D∘x)·U)·Vᵀ          x: (M, K)  weight: (N, K)  u: (K, r)  v: (N, r)  D: dropout mask

Every provider gets the same tensors and returns the same y, and its backward the same dx, dU, dV. They differ in how
they treat factors kept in fp32 beside activations in bf16 or fp16, and in how often they read x and write y.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases import Case

FROZEN = "frozen"
FROZEN_FP32 = "frozen_fp32"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Operands:
    """One set of tensors of the rotation; those whose gradient is wanted require it. dy is the gradient of y."""

    x: Tensor
    weight: Tensor
    u: Tensor
    v: Tensor
    dy: Tensor
    scale: float
    dropout: float = 0.0

    def first(self, rows: int) -> Operands:
        """The same layer on fewer rows."""
        x = self.x.detach()[:rows].clone().requires_grad_(self.x.requires_grad)
        return replace(self, x=x, dy=self.dy[:rows].clone())

    def wanted(self, **tensors: Tensor) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def make_operands(
    case: Case, dtype: torch.dtype, device: torch.device, copies: int = 1, seed: int = 0
) -> list[Operands]:
    """`copies` sets of equal numbers in memory of their own. Random, not zero: zeros run faster on GPUs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, size: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * size

    x, dy = normal(case.M, case.K, 1.0).to(dtype), normal(case.M, case.N, 1.0).to(dtype)
    weight = normal(case.N, case.K, case.K**-0.5).to(dtype)
    # Sized so that the adapter's share of y is as large as the base's: an error in it cannot hide.
    u, v = normal(case.K, case.r, case.K**-0.5), normal(case.N, case.r, case.r**-0.5)
    return [
        Operands(
            x=x.to(device, copy=True).requires_grad_("x" in case.mask),
            weight=weight.to(device, copy=True),
            u=u.to(device, copy=True).requires_grad_("u" in case.mask),
            v=v.to(device, copy=True).requires_grad_("v" in case.mask),
            dy=dy.to(device, copy=True),
            scale=0.5,
            dropout=case.dropout,
        )
        for _ in range(copies)
    ]


class Provider:
    """A layer over one set of operands: `forward()` gives y, `leaves` are what the backward differentiates, by name."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.leaves = operands.wanted(dx=operands.x, du=operands.u, dv=operands.v)

    def forward(self) -> Tensor:
        raise NotImplementedError

    def backward(self) -> tuple[Tensor, ...]:
        y = self.forward()
        return torch.autograd.grad(y, tuple(self.leaves.values()), self.operands.dy) if self.leaves else ()

    def named_gradients(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients by name and in this project's layout (u: (K, r), v: (N, r))."""
        return dict(zip(self.leaves, gradients, strict=True))

    def mask(self, seed: int) -> Tensor | None:
        """D of the next call after `torch.manual_seed(seed)`, in fp64; None without dropout."""
        if self.operands.dropout == 0.0:
            return None
        torch.manual_seed(seed)
        return (self.kept() != 0).double() / (1.0 - self.drop_probability())

    def kept(self) -> Tensor:
        """Nonzero where the next call keeps an element of x."""
        return self.drop(torch.ones_like(self.operands.x))

    def drop_probability(self) -> float:
        return self.operands.dropout

    def drop(self, x: Tensor) -> Tensor:
        """D∘x, drawn from torch's generator."""
        return F.dropout(x, self.operands.dropout) if self.operands.dropout else x


class Frozen(Provider):
    """x·Wᵀ and dx alone: the floor that everything is a ratio to."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self.leaves = operands.wanted(dx=operands.x)

    def forward(self) -> Tensor:
        return self.operands.x @ self.operands.weight.t()


class FrozenFp32(Frozen):
    """The frozen layer with everything in fp32: the yardstick where ATen's own bf16 or fp16 is unusable."""

    def __init__(self, operands: Operands) -> None:
        o = operands
        x = o.x.detach().float().requires_grad_(o.x.requires_grad)
        super().__init__(Operands(x, o.weight.float(), o.u, o.v, o.dy.float(), o.scale))


class FrozenOurs(Frozen):
    """The frozen layer on svdkern's kernels, whatever is faster: how good their base product is."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        if operands.x.device.type != "cpu":
            raise ValueError("only the CPU has kernels of its own for a frozen layer")
        self.none_out = operands.weight.new_empty(operands.weight.shape[0], 0)
        self.none_in = operands.weight.new_empty(operands.weight.shape[1], 0)

    def forward(self) -> Tensor:
        o = self.operands
        return torch.ops.svdkern._cpu_linear(o.x.detach(), o.weight.t(), None, self.none_out, None, None, 0)

    def backward(self) -> tuple[Tensor, ...]:
        o = self.operands
        self.forward()
        if not self.leaves:
            return ()
        return (torch.ops.svdkern._cpu_linear(o.dy, o.weight, None, self.none_in, None, None, 0),)


class Eager(Provider):
    """The plain autograd expression, factors cast to x's dtype."""

    def forward(self) -> Tensor:
        o = self.operands
        h = self.drop(o.x) @ o.u.to(o.x.dtype)
        return o.x @ o.weight.t() + o.scale * (h @ o.v.to(o.x.dtype).t())


class _AddmmFunction(torch.autograd.Function):
    """What hand-written LoRA kernels in the field do: in-place addmm_ both ways, skinny products oriented by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, u: Tensor, v: Tensor, scale: float, p: float) -> Tensor:
        u_cast, v_cast = u.to(x.dtype), v.to(x.dtype)
        mask = F.dropout(torch.ones_like(x), p) if p else None
        dropped = x if mask is None else x * mask
        h = dropped @ u_cast
        y = x @ weight.t()
        y.addmm_(h, v_cast.t(), alpha=scale)
        ctx.save_for_backward(dropped, weight, u_cast, v_cast, h, mask)
        ctx.scale, ctx.factor_dtypes = scale, (u.dtype, v.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, v, h, mask = ctx.saved_tensors
        wants_x, _, wants_u, wants_v = ctx.needs_input_grad[:4]
        dx = du = dv = None
        q = dy @ v if wants_x or wants_u else None
        if wants_x:
            dx = dy @ weight
            if mask is None:
                dx.addmm_(q, u.t(), alpha=ctx.scale)
            else:
                dx.addcmul_(q @ u.t(), mask, value=ctx.scale)
        # qᵀ·x and hᵀ·dy (r rows) are faster on most CPUs than xᵀ·q (K rows of r numbers).
        if wants_u:
            du = (q.t() @ x).t().to(ctx.factor_dtypes[0]).mul_(ctx.scale)
        if wants_v:
            dv = (h.t() @ dy).t().to(ctx.factor_dtypes[1]).mul_(ctx.scale)
        return dx, None, du, dv, None, None


class Addmm(Provider):
    """The hand-written autograd Function above."""

    def forward(self) -> Tensor:
        o = self.operands
        return _AddmmFunction.apply(o.x, o.weight, o.u, o.v, o.scale, o.dropout)


class Materialised(Provider):
    """x·(W + s·V·Uᵀ)ᵀ, the sum formed in every call: a reference only, it costs a weight of memory and its gradient."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        if operands.dropout:
            raise ValueError("skipped: a sum of weights has no dropout on the adapter's input")

    def forward(self) -> Tensor:
        o = self.operands
        return o.x @ (o.weight + o.scale * (o.v @ o.u.t()).to(o.x.dtype)).t()


def _eager_expression(x: Tensor, weight: Tensor, u: Tensor, v: Tensor, scale: float, p: float) -> Tensor:
    h = (F.dropout(x, p) if p else x) @ u.to(x.dtype)
    return x @ weight.t() + scale * (h @ v.to(x.dtype).t())


class Compile(Provider):
    """torch.compile of the eager expression."""

    compiled: Callable[..., Tensor] | None = None

    @staticmethod
    def start_anew() -> None:
        """Forget what was compiled: beyond a few shapes of one function the compiler gives up, silently."""
        if Compile.compiled is not None:
            torch._dynamo.reset()
            Compile.compiled = None

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        if operands.dropout:
            raise ValueError("skipped: a compiled dropout draws other numbers, its result cannot be checked")

    def forward(self) -> Tensor:
        if Compile.compiled is None:
            Compile.compiled = torch.compile(_eager_expression, dynamic=False)
        o = self.operands
        return Compile.compiled(o.x, o.weight, o.u, o.v, o.scale, o.dropout)


class Peft(Provider):
    """The layer as PEFT computes it: x cast to the adapter's dtype, two nn.Linear, add, cast back."""

    adapter_dtype: torch.dtype | None = torch.float32

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        (k, r), n = operands.u.shape, operands.v.shape[0]
        place = {"device": operands.x.device, "dtype": self.adapter_dtype or operands.x.dtype}
        self.lora_a = nn.Linear(k, r, bias=False, **place).requires_grad_(operands.u.requires_grad)
        self.lora_b = nn.Linear(r, n, bias=False, **place).requires_grad_(operands.v.requires_grad)
        with torch.no_grad():
            self.lora_a.weight.copy_(operands.u.t())
            self.lora_b.weight.copy_(operands.v)
        self.leaves = operands.wanted(dx=operands.x, du=self.lora_a.weight, dv=self.lora_b.weight)

    def forward(self) -> Tensor:
        o = self.operands
        base = F.linear(o.x, o.weight)
        adapter = self.lora_b(self.lora_a(self.drop(o.x.to(self.lora_a.weight.dtype)))) * o.scale
        return (base + adapter).to(base.dtype)

    def named_gradients(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        found = super().named_gradients(gradients)
        return {name: value.t() if name == "du" else value for name, value in found.items()}

    def kept(self) -> Tensor:
        return self.drop(torch.ones_like(self.operands.x, dtype=self.lora_a.weight.dtype))


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
        return self.svd_linear(o.x, o.weight, o.u, None, o.v, scale=o.scale, dropout_p=o.dropout, backend=self.backend)

    def kept(self) -> Tensor:
        o = self.operands
        ones, eye = torch.ones_like(o.x, requires_grad=False), torch.eye(o.x.shape[1], device=o.x.device)
        return self.svd_linear(ones, None, eye, None, eye, dropout_p=o.dropout, backend=self.backend)

    def drop_probability(self) -> float:
        from svdkern.backends.philox import threshold_of

        return threshold_of(self.operands.dropout) / 65536


class SvdkernEager(Svdkern):
    """svdkern.svd_linear on its reference backend."""

    backend = "eager"


class SvdkernCpu(Svdkern):
    """svdkern.svd_linear on its C++ CPU backend."""

    backend = "cpu"


class SvdkernOnGpu(Svdkern):
    """svdkern.svd_linear on a backend that would fall back where it cannot run: another's time is no result of this one."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        from svdkern.backends import dispatch

        if dispatch.choose(operands.x, self.backend).name != self.backend:
            raise ValueError(f"skipped: {dispatch.why_not(self.backend, operands.x.device, operands.x.dtype)}")


class SvdkernTriton(SvdkernOnGpu):
    """svdkern.svd_linear on its Triton backend."""

    backend = "triton"


class SvdkernCuda(SvdkernOnGpu):
    """svdkern.svd_linear on its CUDA backend."""

    backend = "cuda"


PROVIDERS: Mapping[str, type[Provider]] = {
    FROZEN: Frozen,
    FROZEN_FP32: FrozenFp32,
    "frozen_svdkern": FrozenOurs,
    "eager": Eager,
    "addmm": Addmm,
    "materialised": Materialised,
    "compile": Compile,
    "peft_default": Peft,
    "peft_bf16": PeftLow,
    "svdkern-eager": SvdkernEager,
    "svdkern-cpu": SvdkernCpu,
    "svdkern-triton": SvdkernTriton,
    "svdkern-cuda": SvdkernCuda,
    "svdkern": Svdkern,
}


def adapted(name: str) -> bool:
    """Whether a provider computes the adapter as well."""
    return not name.startswith(FROZEN)


def factor_dtype(name: str, dtype: str) -> str | None:
    """What the provider keeps the factors in."""
    return None if not adapted(name) else dtype if name == "peft_bf16" else "fp32"


def truth(operands: Operands, *, adapter: bool, mask: Tensor | None = None) -> dict[str, Tensor]:
    """y, dx, du, dv of the same numbers in fp64 (y and dx of the frozen layer alone without `adapter`)."""
    x, weight, dy = (t.detach().double() for t in (operands.x, operands.weight, operands.dy))
    if not adapter:
        return {"y": x @ weight.t(), "dx": dy @ weight}
    u, v, s = operands.u.detach().double(), operands.v.detach().double(), operands.scale
    d = 1.0 if mask is None else mask
    h, t = (d * x) @ u, s * (dy @ v)
    return {
        "y": (x @ weight.t()).addmm_(h, v.t(), alpha=s),
        "dx": dy @ weight + d * (t @ u.t()),
        "du": (d * x).t() @ t,
        "dv": s * (dy.t() @ h),
    }


def relative_error(value: Tensor, exact: Tensor) -> float:
    """‖value - exact‖ / ‖exact‖ in fp64 (the absolute norm where exact is zero)."""
    exact = exact.double()
    distance = torch.linalg.vector_norm(value.double() - exact).item()
    size = torch.linalg.vector_norm(exact).item()
    return distance / size if size > 0 else distance
