"""The Triton kernels behind the SVD on a GPU: the CPU's bits, float64 truth, and that the public calls take them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_triton_svd import check_products, factors_of, hard_weight, in_layout, matrix_of, same

from svdkern.backends import dispatch, triton, triton_svd
from svdkern.linalg import exact_residual, topk_svd
from svdkern.linalg.residual import residual_in_torch
from svdkern.linalg.sketch import sketch, sketch_in_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(triton.why_missing() is not None, reason="needs triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SVDKERN_BACKEND", "triton")
    dispatch.read_environment()
    yield
    monkeypatch.undo()
    dispatch.read_environment()


def test_the_kernels_are_taken() -> None:
    assert triton_svd.has_same_bits(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns", "first"), [(1, 1, 0), (4096, 64, 128), (1000, 130, 77), (14336, 16, 5)])
def test_the_sketch_has_the_bits_of_the_cpu(rows: int, columns: int, first: int, dtype: torch.dtype) -> None:
    options = {"seed": (5 << 40) + 7, "first": first, "dtype": dtype}
    found = sketch(rows, columns, device=torch.device("cuda"), **options)
    assert found.is_cuda
    assert torch.equal(found.cpu(), sketch_in_torch(rows, columns, device=torch.device("cpu"), **options))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("layout", ["rows", "columns", "part of wider rows"])
@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (33, 65, 5), (1000, 1030, 64), (2048, 512, 16)])
def test_the_residual_has_the_bits_of_the_cpu(n: int, k: int, r: int, layout: str, dtype: torch.dtype) -> None:
    weight, (u, sigma, v) = in_layout(hard_weight(n, k, dtype), layout), factors_of(n, k, r)
    expected = residual_in_torch(weight, u, sigma, v, 0.7)
    on_gpu = in_layout(weight.cuda().contiguous(), layout)
    found = exact_residual(on_gpu, u.cuda(), sigma.cuda(), v.cuda(), 0.7)
    assert found.is_cuda and same(found.cpu(), expected)
    assert same(residual_in_torch(on_gpu, u.cuda(), sigma.cuda(), v.cuda(), 0.7).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "part of wider rows"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (130, 200), (4096, 4096), (11008, 2048)])
@pytest.mark.parametrize("b", [1, 16, 33, 64, 128])
def test_products(b: int, m: int, n: int, layout: str, dtype: torch.dtype) -> None:
    a, x = matrix_of(m, n, dtype, 2.0**-9).cuda(), torch.randn(n, b, device="cuda")
    a = in_layout(a, layout)
    first, *others = (triton_svd.both(a, x, 2.0**-9) for _ in range(4))
    for again in others:
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    check_products(first, a, x, 2.0**-9)
    one, again = (triton_svd.product(a, x, 2.0**-9) for _ in range(2))
    assert torch.equal(one, again)
    check_products((one, first[1]), a, x, 2.0**-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triplets_by_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = triton_svd.both
    monkeypatch.setattr(triton_svd, "both", lambda *arguments: calls.append(1) or kernel(*arguments))
    q1, q2 = (torch.linalg.qr(torch.randn(size, 1500, device="cuda"))[0] for size in (2000, 1500))
    matrix = ((q1 * torch.arange(1, 1501, device="cuda") ** -0.5) @ q2.t()).to(dtype)
    found = topk_svd(matrix, 16, tol="accurate")
    exact = torch.linalg.svdvals(matrix.double())[:16]
    assert calls and found.info.converged
    assert ((found.S.double() - exact).abs() <= 1e-5 * exact).all()
