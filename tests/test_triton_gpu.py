"""What the Triton backend alone has, on a GPU: cores with partial gradients, torch.compile, memory, the Gram matrix."""

from __future__ import annotations

import pytest
import torch
from operands import cast, check
from svdkern.triton_kernels import launching
from test_gpu_backends import DTYPES, scaled
from torch import Tensor

from svdkern import svd_linear
from svdkern.backends import dispatch, triton_gram
from svdkern.backends import triton as backend
from svdkern.linalg import orth_penalty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(backend.why_missing() is not None, reason="needs triton"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [("x",), ("u",), ("v",), ("core",), ("u", "v", "core", "x")])
def test_a_core_and_masks(wanted: tuple[str, ...], dtype: torch.dtype) -> None:
    o = scaled(300, 128, 200, 32, form="core")
    check(o, torch.randn(300, 200).cuda(), "triton", dtype, (torch.float32,) * 3, wanted)


def test_compile_takes_it_whole() -> None:
    o = cast(scaled(300, 256, 256, 16), torch.bfloat16, (torch.float32,) * 3)
    rest = (o["weight"], o["u"], o["sigma"], o["v"], o["bias"])

    def layer(x: Tensor) -> Tensor:
        return svd_linear(x, *rest, scale=o["scale"], backend="triton")

    dy = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    for mode in (None, "reduce-overhead"):
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for _ in range(3):  # the first calls record what later ones replay
            x = torch.randn_like(o["x"]).requires_grad_()
            y = compiled(x)
            assert torch.equal(y, layer(x))
            (dx,) = torch.autograd.grad(y, x, dy)
            assert torch.equal(dx, torch.autograd.grad(layer(x), x, dy)[0])


def test_memory_is_that_of_the_results() -> None:
    """Nothing of the size (M, N), (M, K) or (K, N) but y and dx."""
    m, k, n, r = 4096, 2048, 2048, 16
    o = cast(scaled(m, k, n, r), torch.bfloat16, (torch.float32,) * 3)
    leaves = {
        name: t.clone().requires_grad_(name in ("x", "u", "v"))
        for name, t in o.items()
        if t is not None and name != "core"
    }
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        y = svd_linear(leaves["x"], leaves["weight"], leaves["u"], leaves["sigma"], leaves["v"], backend="triton")
        torch.autograd.grad(y, (leaves["x"], leaves["u"], leaves["v"]), dy)

    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what is kept for large blocks may be larger than what is asked for
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    results = 2 * (m * n + m * k) + 4 * r * (k + n)
    between = 4 * m * r + 2 * 2 * m * r + 4 * r * (k + n) + 2 * 2 * r * (k + n)
    assert peak <= results + between + (4 << 20), f"{peak} bytes, results {results}, between {between}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "r"), [(1, 1), (31, 17), (1000, 16), (4096, 64), (5000, 100), (4096, 512)])
@pytest.mark.parametrize("layout", ["rows", "columns", "part of wider rows"])
def test_the_gram_matrix(layout: str, rows: int, r: int, dtype: torch.dtype) -> None:
    """Symmetric, the same bits every time, and right: to the rounding of sums that tensor cores may truncate at every step."""
    factor = (torch.randn(rows, r + 3, device="cuda") / rows**0.5).to(dtype)[:, 1 : r + 1]
    if layout == "columns":
        factor = factor.t().contiguous().t()
    elif layout == "rows":
        factor = factor.contiguous()
    first, *others = (triton_gram.gram(factor) for _ in range(5))
    assert all(torch.equal(first, again) for again in others)
    assert torch.equal(first, first.t())
    exact, size = factor.double().t() @ factor.double(), factor.double().abs().t() @ factor.double().abs()
    assert first.dtype == torch.float32
    assert ((first.double() - exact).abs() <= 2**-17 * size + 1e-30).all()


def test_the_penalty_takes_the_kernel_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.linalg.qr(torch.randn(1000, 16, device="cuda"))[0] * 1.1
    leaves = [factor.clone().requires_grad_() for _ in range(2)]
    expected = orth_penalty(leaves[0])
    expected.backward()
    calls = []
    kernel = triton_gram.gram
    monkeypatch.setattr(triton_gram, "gram", lambda factor: calls.append(1) or kernel(factor))
    monkeypatch.setenv("SVDKERN_BACKEND", "triton")
    dispatch.read_environment()
    try:
        got = orth_penalty(leaves[1])
    finally:
        monkeypatch.undo()
        dispatch.read_environment()
    got.backward()
    assert calls == [1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 300])
def test_a_remembered_kernel_gives_what_a_new_launch_does(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    def step() -> list[Tensor]:
        x, u, v = (o[name].clone().requires_grad_() for name in ("x", "u", "v"))
        y = svd_linear(x, o["weight"], u, o["sigma"], v, o["bias"], scale=o["scale"], backend="triton")
        return [y, *torch.autograd.grad(y, (x, u, v), dy)]

    monkeypatch.setattr(launching, "_compiled", {})
    counts = []
    for _ in range(2):
        o = cast(scaled(rows, 256, 384, 16), dtype, (torch.float32,) * 3)
        dy = torch.randn(rows, 384, device="cuda", dtype=dtype)
        remembered = step()
        counts.append(len(launching._compiled))
    assert 0 < counts[0] == counts[1]  # the second step took what the first one left
    monkeypatch.setattr(launching, "_compiled", {})
    assert all(torch.equal(a, b) for a, b in zip(remembered, step(), strict=True))
