"""Singular triplets, the exact residual, the merged weight and the orthogonality penalty."""

from __future__ import annotations

import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdkern.backends import extension
from svdkern.linalg import exact_residual, factors, merged_weight, orth_penalty
from svdkern.linalg.residual import _round_once, residual_in_torch

_PRIMES = torch.tensor([2.0, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41])


def _slow_decay(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    q1, _ = torch.linalg.qr(torch.randn(n, min(n, k), generator=generator, dtype=torch.float64))
    q2, _ = torch.linalg.qr(torch.randn(k, min(n, k), generator=generator, dtype=torch.float64))
    return ((q1 / torch.arange(1, min(n, k) + 1).sqrt()) @ q2.t()).float()


DEGENERATE = {
    "zeros": torch.zeros(64, 64),
    "eye": torch.eye(64),
    "ones": torch.ones(64, 40),
    "rank one": torch.outer(torch.linspace(1, 2, 40), torch.linspace(-1, 3, 64)),
    "powers": (0.3 * _PRIMES / 41).pow(torch.arange(1, 17).unsqueeze(1)),
    "huge range": torch.diag(torch.logspace(0, -38, 40)),
    "equal rows": torch.randn(1, 48, generator=torch.Generator().manual_seed(0)).repeat(32, 1),
    "tiny": 1e-38 * torch.randn(32, 24, generator=torch.Generator().manual_seed(1)),
    "large": 1e36 * torch.randn(24, 32, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_matrices(name: str, dtype: torch.dtype) -> None:
    """pytorch/pytorch#181641: an SVD that does not converge, or gives NaN, on degenerate but finite input."""
    a = DEGENERATE[name].to(dtype)
    u, sigma, v = factors(a, 8)
    exact = torch.linalg.svdvals(a.double() / a.abs().max().double().clamp(min=1e-300))[:8] * a.abs().max().double()
    assert all(bool(t.isfinite().all()) and t.dtype == dtype for t in (u, sigma, v))
    assert bool((sigma >= 0).all()) and bool((sigma.diff() <= 0).all())
    for factor in (u, v):
        gram = factor.double().t() @ factor.double()
        assert (gram - torch.eye(8)).abs().max() < 2e-6
    tolerance = 1e-6 * float(exact[0])
    assert (sigma.double() - exact).abs().max() <= tolerance
    product = (v.double() * sigma.double()) @ u.double().t()
    tail = torch.linalg.svdvals((a.double() - product) / max(float(exact[0]), 1e-300))[0] * float(exact[0])
    ninth = torch.linalg.svdvals(a.double() / max(float(exact[0]), 1e-300))[8] * float(exact[0])
    assert tail <= ninth + tolerance


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (128, 128)])
def test_slowly_decaying_spectrum(shape: tuple[int, int]) -> None:
    """huggingface/peft#3049: singular values are off on real spectra."""
    a = _slow_decay(*shape)
    u, sigma, v = factors(a, 16)
    p, s, qh = torch.linalg.svd(a.double(), full_matrices=False)
    assert ((sigma.double() - s[:16]) / s[:16]).abs().max() < 2e-5
    for factor, reference in ((u, qh[:16].t()), (v, p[:, :16])):
        projector = factor.double() @ factor.double().t()
        assert (projector - reference @ reference.t()).norm() < 2 * 1e-5**0.5 * s[16] / (s[15] - s[16])
    optimum = s[16:].norm()
    assert (a.double() - (v.double() * sigma.double()) @ u.double().t()).norm() <= 1.0001 * optimum


def test_u_is_the_input_side_on_a_square_matrix() -> None:
    a = torch.zeros(5, 5)
    a[1, 3] = 2.0  # output 1, input 3
    u, sigma, v = factors(a, 1)
    assert sigma.item() == pytest.approx(2.0)
    assert u[:, 0].tolist() == pytest.approx([0, 0, 0, 1, 0])
    assert v[:, 0].tolist() == pytest.approx([0, 1, 0, 0, 0])


def test_signs_are_deterministic() -> None:
    a = torch.randn(40, 30, generator=torch.Generator().manual_seed(5))
    for matrix in (a, -a):
        u, _, _ = factors(matrix, 6)
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_equals_its_float32_copy(dtype: torch.dtype) -> None:
    """huggingface/peft#1052: the SVD is not implemented for bf16 and fp16 weights."""
    a = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for half, single in zip(factors(a, 8), factors(a.float(), 8), strict=True):
        assert half.dtype == torch.float32 and torch.equal(half, single)


def test_autocast_does_not_reach_the_decomposition() -> None:
    a = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = factors(a, 4)
    for x, y in zip(inside, factors(a, 4), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shape", [(6, 700_000), (700_000, 6)])
def test_short_and_very_wide(shape: tuple[int, int]) -> None:
    """pytorch/pytorch#42062: a short, very wide matrix makes the SVD allocate a square of the long side."""
    a = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, sigma, _ = factors(a, 4)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    short = a if shape[0] < shape[1] else a.t()
    exact = torch.linalg.eigvalsh(short.double() @ short.double().t()).flip(0)[:4].sqrt()
    assert (sigma.double() / exact - 1).abs().max() < 1e-6
    assert grown < 16 * a.numel() * 4


@pytest.mark.parametrize(
    ("weight", "r", "error", "message"),
    [
        (torch.zeros(4, 5), 5, ValueError, "r is 5, expected 1 <= r <= 4"),
        (torch.zeros(4, 5), 0, ValueError, "r is 0"),
        (torch.zeros(4), 1, ValueError, r"weight is \(4,\), expected a matrix"),
        (torch.zeros(4, 5, dtype=torch.int32), 1, TypeError, "int32"),
        (torch.full((4, 5), float("nan")), 1, ValueError, "NaN or an infinity"),
        (torch.full((4, 5), float("inf")), 1, ValueError, "NaN or an infinity"),
    ],
)
def test_factors_refuses(weight: Tensor, r: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        factors(weight, r)


# -------------------------------------------------------------------------------------------------------- residual


def _residual_of_the_definition(weight: Tensor, u: Tensor, sigma: Tensor | None, v: Tensor, scale: float) -> Tensor:
    """Scalar by scalar in Python floats, which are float64 and never fused."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    for n in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            acc = float(weight[n, k])
            for i in range(u.shape[1]):
                s = scale * (1.0 if sigma is None else float(sigma[i]))
                acc = acc - float(v[n, i]) * (s * float(u[k, i]))
            out[n, k] = acc
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_sigma", [False, True])
def test_residual_is_the_definition_bit_for_bit(
    dtype: torch.dtype, factor_dtype: torch.dtype, with_sigma: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 9, generator=generator, dtype=torch.float64).to(dtype)
    u, v = (torch.randn(size, 3, generator=generator).to(factor_dtype) for size in (9, 7))
    sigma = torch.randn(3, generator=generator) if with_sigma else None
    expected = _round_once(_residual_of_the_definition(weight, u, sigma, v, 0.3), dtype)
    untouched = weight.clone()
    for found in (exact_residual(weight, u, sigma, v, 0.3), residual_in_torch(weight, u, sigma, v, 0.3)):
        assert found.dtype == dtype and torch.equal(found, expected)
    assert torch.equal(weight, untouched)


@pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 5), (130, 70, 16), (5, 4099, 3)])
def test_compiled_residual_has_the_bits_of_torch(
    dtype: torch.dtype, factor_dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    n, k, r = shape
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    weight.view(-1)[::7] *= 1e-4  # cancellation, and values near the subnormals of float16
    u, v = (torch.randn(size, r, generator=generator).to(factor_dtype) for size in (k, n))
    sigma = torch.randn(r, generator=generator).to(factor_dtype)
    for s in (None, sigma):
        expected = residual_in_torch(weight, u, s, v, 0.7)
        assert torch.equal(torch.ops.svdkern._cpu_residual(weight, u, s, v, 0.7), expected)
    strided = residual_in_torch(weight.t().contiguous().t(), u.t().contiguous().t(), sigma, v, 0.7)
    again = exact_residual(weight.t().contiguous().t(), u.t().contiguous().t(), sigma, v, 0.7)
    assert torch.equal(strided, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_residual_rounds_values_of_any_size_as_torch_does(dtype: torch.dtype) -> None:
    """Subnormals, ties, the way to infinity, and what is not finite."""
    generator = torch.Generator().manual_seed(0)
    u, v = ((1 + torch.randint(0, 64, (size, 1), generator=generator) / 64) for size in (300, 301))
    u *= torch.ldexp(torch.ones(300, 1), torch.arange(-150, 150).unsqueeze(1) // 2)
    v *= torch.ldexp(torch.ones(301, 1), torch.arange(-150, 151).unsqueeze(1) // 2)
    u[7], v[9], v[11] = float("inf"), float("nan"), 0.0
    weight = torch.zeros(301, 300, dtype=dtype)
    found, expected = exact_residual(weight, u, None, v), residual_in_torch(weight, u, None, v, 1.0)
    assert torch.equal(found.isnan(), expected.isnan()) and bool(found.isinf().any())
    numbers = ~expected.isnan()  # their zeros' signs, too
    assert torch.equal(found[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@settings(deadline=None, max_examples=200)
@given(st.floats(allow_nan=False, width=64))
def test_one_rounding_to_half_formats(value: float) -> None:
    """Against integer arithmetic on the candidate neighbours: nearest, ties to even."""
    from fractions import Fraction

    x = torch.tensor([value], dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        found = _round_once(x, dtype)
        largest = torch.finfo(dtype).max
        if abs(value) > largest:
            continue
        bits = int(found.view(torch.int16)) & 0xFFFF
        magnitude = bits & 0x7FFF
        candidates = [m for m in (magnitude - 1, magnitude, magnitude + 1) if m >= 0]
        values = torch.tensor(candidates, dtype=torch.int32).to(torch.int16).view(dtype).double().tolist()
        distances = [
            (abs(Fraction(v) - abs(Fraction(value))), m & 1)
            for v, m in zip(values, candidates, strict=True)
            if v < 1e300
        ]
        finite = [m for v, m in zip(values, candidates, strict=True) if v < 1e300]
        assert finite[distances.index(min(distances))] == magnitude


def test_rounding_twice_would_differ() -> None:
    """1 + 2^-8 + 2^-40 is above a tie of bfloat16, which float32 in between hides."""
    x = torch.tensor([1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40)], dtype=torch.float64)
    assert _round_once(x, torch.bfloat16).tolist() == [1 + 2**-7, -(1 + 2**-7)]
    assert x.float().bfloat16().tolist() == [1.0, -1.0]


def test_residual_does_not_depend_on_threads_or_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, u, v = (torch.randn(*s, generator=generator) for s in ((200, 300), (300, 4), (200, 4)))
    expected = residual_in_torch(weight, u, None, v, 0.9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(exact_residual(weight, u, None, v, 0.9), expected)
            assert torch.equal(residual_in_torch(weight, u, None, v, 0.9), expected)
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_merged_weight_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(70, 90, generator=generator).to(dtype)
    u, v, sigma = (torch.randn(*s, generator=generator) for s in ((90, 5), (70, 5), (5,)))
    core = torch.randn(5, 5, generator=generator)
    for middle, arguments in ((torch.diag(sigma), {"sigma": sigma}), (core.t(), {"sigma": None, "core": core})):
        exact = residual.double() + 0.5 * v.double() @ middle.double() @ u.double().t()
        with torch.autocast("cpu", torch.bfloat16):
            found = merged_weight(residual, u, v=v, scale=torch.tensor(0.5), **arguments)
        assert found.dtype == dtype
        assert bool(((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-7).all())


# --------------------------------------------------------------------------------------------------------- penalty


def test_orth_penalty_is_the_norm_with_its_gradient() -> None:
    factor = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    reference = torch.linalg.matrix_norm(factor.t() @ factor - torch.eye(4, dtype=torch.float64))
    assert torch.allclose(orth_penalty(factor), reference)
    assert torch.autograd.gradcheck(orth_penalty, (factor,))


def test_orth_penalty_is_safe_at_zero() -> None:
    factor = torch.eye(6)[:, :3].clone().requires_grad_()
    value = orth_penalty(factor)
    value.backward()
    assert value.item() == 0.0 and factor.grad is not None and factor.grad.abs().max() == 0


def test_orth_penalty_of_bfloat16_under_autocast_is_float32() -> None:
    factor = torch.randn(64, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = orth_penalty(factor)
    assert value.dtype == torch.float32 and torch.equal(value, orth_penalty(factor.float()))
