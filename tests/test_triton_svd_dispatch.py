"""When the Triton kernels behind the SVD are taken, and what the public calls make of them."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from emulated import emulation
from svdkern.triton_kernels import sketch as sketch_kernel
from test_triton_svd import CPU, check_products, factors_of

from svdkern.backends import dispatch, triton, triton_svd
from svdkern.linalg import exact_residual, topk_svd
from svdkern.linalg import operand as operands
from svdkern.linalg import residual as residuals
from svdkern.linalg import sketch as sketches


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(dispatch, "why_not", lambda name, device, dtype: None)
    monkeypatch.setattr("svdkern.backends.triton.why_not", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton, "compiles", lambda device: True)
    monkeypatch.delenv("SVDKERN_BACKEND", raising=False)
    yield monkeypatch
    monkeypatch.undo()
    dispatch.read_environment()


@pytest.mark.parametrize(
    ("asked", "device", "bits", "products"),
    [
        (None, "cuda", True, False),
        ("triton", "cuda", True, True),
        ("eager", "cuda", False, False),
        ("cpu", "cuda", False, False),
        ("cuda", "cuda", False, False),
        (None, "cpu", False, False),
        ("triton", "cpu", False, False),
    ],
)
def test_which_backend_takes_the_kernels(
    environment: pytest.MonkeyPatch, asked: str | None, device: str, bits: bool, products: bool
) -> None:
    if asked is not None:
        environment.setenv("SVDKERN_BACKEND", asked)
    dispatch.read_environment()
    assert triton_svd.has_same_bits(torch.device(device)) is bits
    assert triton_svd.takes_products(a_matrix(device)) is products
    assert triton_svd.takes_products(a_matrix(device, torch.float64)) is False


def a_matrix(device: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As much of one as the choice looks at."""
    like = types.SimpleNamespace(is_cuda=device == "cuda", device=torch.device(device), dtype=dtype)
    return like  # type: ignore[return-value]


def test_a_machine_that_cannot_compile_goes_on_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton, "_compiles", {})
    monkeypatch.setattr(sketch_kernel, "sketch", fail)
    for _ in range(2):
        assert triton.compiles(CPU) is False
    assert caplog.text.count("Failed to find C compiler") == 1
    monkeypatch.setattr(sketch_kernel, "sketch", lambda *arguments, **options: torch.ones(1, 1))
    assert triton.compiles(torch.device("cpu", 0)) is True  # as another device


def test_whether_kernels_compile_is_not_found_out_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_compiles", {})
    monkeypatch.setattr(sketch_kernel, "sketch", lambda *arguments, **options: torch.ones(1, 1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton.compiles(CPU) is False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert triton.compiles(CPU) is True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton.compiles(CPU) is True


@pytest.mark.emulator
def test_the_public_calls_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, (u, sigma, v) = torch.randn(40, 30), factors_of(40, 30, 3)
    expected = residuals.residual_in_torch(weight, u, sigma, v, 0.7)
    monkeypatch.setattr(triton_svd, "has_same_bits", lambda device: True)
    monkeypatch.setattr(residuals, "_has_kernel", lambda *arguments: False)
    with emulation() as how:
        assert torch.equal(exact_residual(weight, u, sigma, v, 0.7), expected)
        assert sketches.sketch(3, 4, seed=0, dtype=torch.float32, device=CPU).shape == (3, 4)
    assert how.launches == ["residual_kernel", "sketch_kernel"]


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
def test_an_operand_takes_the_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, turned: bool) -> None:
    monkeypatch.setattr(triton_svd, "takes_products", lambda matrix: True)
    monkeypatch.setattr(operands.extension, "why_missing", "not in this test")
    matrix = (1e5 * torch.randn(90, 60)).to(dtype)
    matrix = matrix.t() if turned else matrix
    x = torch.randn(matrix.shape[1], 5)
    with emulation() as how:
        operand = operands.Operand(matrix, "matrix")
        y, z = operand.both(x)
        assert torch.equal(operand.times(x), y)
        again = operand.transposed(y)
    assert operand.passes == 4
    assert how.launches == ["parts_kernel", "normal_kernel"] * 4
    exact = matrix.double() * operand.factor
    check_products((y, z), matrix, x, operand.factor)
    assert ((again.double() - exact.t() @ y.double()).abs() <= 2.0**-21 * (exact.abs().t() @ y.double().abs())).all()


@pytest.mark.emulator
@pytest.mark.slow
def test_triplets_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_svd, "takes_products", lambda matrix: True)
    monkeypatch.setattr(triton_svd, "has_same_bits", lambda device: True)
    monkeypatch.setattr(operands.extension, "why_missing", "not in this test")
    sigma = torch.arange(1, 201) ** -1.0
    q1, q2 = (torch.linalg.qr(torch.randn(size, 200))[0] for size in (300, 200))
    matrix = (q1 * sigma) @ q2.t()
    with emulation() as how:
        found = topk_svd(matrix, 4)
    assert {"sketch_kernel", "normal_kernel"} <= set(how.launches)
    assert (found.S - sigma[:4]).abs().max() <= 1e-5
