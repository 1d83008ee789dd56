"""Operands of the layer, the layer as a plain expression, and the check of a call against it, for every file that needs them."""

from __future__ import annotations

import torch
from accuracy import assert_accurate
from torch import Tensor

from svdkern import svd_linear

NAMES = ("x", "weight", "u", "sigma", "v", "bias", "scale", "core")
RNG = torch.tensor([0x0123456789ABCDEF, -2], dtype=torch.int64)


def operands(
    m: int, k: int, n: int, r: int, *, form: str = "sigma", weight: bool = True, bias: bool = True
) -> dict[str, Tensor | None]:
    """Float64 operands; `form` is what stands in the middle: "sigma", "core" or "none"."""
    draw = {
        "x": torch.randn(m, k),
        "weight": torch.randn(n, k) if weight else None,
        "u": torch.randn(k, r),
        "sigma": torch.randn(r) if form == "sigma" else None,
        "v": torch.randn(n, r),
        "bias": torch.randn(n) if bias else None,
        "scale": torch.tensor(0.75),
        "core": torch.randn(r, r) if form == "core" else None,
    }
    return {name: None if tensor is None else tensor.double() for name, tensor in draw.items()}


def plain(o: dict[str, Tensor | None], mask: Tensor | None = None) -> Tensor:
    """The layer as a plain expression, in the dtype of x."""
    x, u, v = o["x"], o["u"], o["v"]
    h = (x if mask is None else x * mask.to(x.dtype)) @ u.to(x.dtype)
    z = h if o["sigma"] is None else h * o["sigma"].to(x.dtype)
    z = z if o["core"] is None else h @ o["core"].to(x.dtype)
    y = o["scale"].to(x.dtype) * (z @ v.to(x.dtype).t())
    if o["weight"] is not None:
        y = y + x @ o["weight"].to(x.dtype).t()
    return y if o["bias"] is None else y + o["bias"].to(x.dtype)


def fused(o: dict[str, Tensor | None], **options: object) -> Tensor:
    return svd_linear(
        o["x"], o["weight"], o["u"], o["sigma"], o["v"], o["bias"], scale=o["scale"], core=o["core"], **options
    )


def run(function, o, dy, wanted):  # type: ignore[no-untyped-def]
    leaves = {name: None if t is None else t.detach().requires_grad_(name in wanted) for name, t in o.items()}
    y = function(leaves)
    inputs = [leaves[name] for name in wanted]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def cast(o, dtype, factor_dtypes):  # type: ignore[no-untyped-def]
    u, sigma, v = factor_dtypes
    own = {"u": u, "sigma": sigma, "core": sigma, "v": v, "scale": torch.float32}
    return {name: None if t is None else t.to(own.get(name, dtype)) for name, t in o.items()}


def check(o, dy, backend, dtype, factor_dtypes, wanted, *, mask=None, **options):  # type: ignore[no-untyped-def]
    low = cast(o, dtype, factor_dtypes)
    dy = dy.to(dtype)
    exact = {name: None if t is None else t.double() for name, t in low.items()}
    sizes = {name: None if t is None else t.abs() for name, t in exact.items()}
    got = run(lambda leaves: fused(leaves, backend=backend, **options), low, dy, wanted)
    truth = run(lambda leaves: plain(leaves, mask), exact, dy, wanted)
    size = run(lambda leaves: plain(leaves, mask), sizes, dy.abs(), wanted)
    eager = run(lambda leaves: plain(leaves, mask), low, dy, wanted)
    for name, gradient in zip(wanted, got[1:], strict=True):
        assert gradient.dtype == low[name].dtype
    assert got[0].dtype == dtype
    assert_accurate(got, truth, size, eager, dtype, ("y", *wanted))


def present(o: dict[str, Tensor | None]) -> tuple[str, ...]:
    return tuple(name for name in NAMES if o[name] is not None)
