"""topk_svd, the largest triplets: against float64 LAPACK, by values, residuals and projectors."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import MATRICES, check, indices, seeded, with_spectrum
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from svdkern.backends import extension
from svdkern.linalg import factors, krylov, topk_svd
from svdkern.linalg.krylov import leading
from svdkern.linalg.operand import Operand
from svdkern.linalg.topk import Preset


@pytest.mark.parametrize("method", ["krylov", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_every_kind_of_matrix(name: str, dtype: torch.dtype, method: str) -> None:
    make, k = MATRICES[name]
    a = make().to(dtype)
    found = topk_svd(a, k, method=method)
    assert found.info.method == method
    check(a, k, found, tol=found.info.tol)


@pytest.mark.parametrize("tol", ["fast", "accurate", 1e-4])
@pytest.mark.parametrize("name", ["power", "spiked", "flat", "one outlier row"])
def test_tolerances(name: str, tol: str | float) -> None:
    make, k = MATRICES[name]
    a = make().float()
    found = topk_svd(a, k, method="krylov", tol=tol)
    check(a, k, found, tol=found.info.tol)


def test_a_tighter_tolerance_takes_more_passes() -> None:
    a = MATRICES["flat"][0]()
    passes = [topk_svd(a, 4, method="krylov", tol=tol).info.passes for tol in ("fast", "balanced", "accurate")]
    assert passes == sorted(passes) and passes[0] < passes[2]


@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e-38, 1e34])
@pytest.mark.parametrize("method", ["krylov", "exact"])
def test_scale(scale: float, method: str) -> None:
    a = (MATRICES["power"][0]() * scale).float()
    check(a, 6, topk_svd(a, 6, method=method), tol=1e-4)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_scale_of_float64(scale: float) -> None:
    a = MATRICES["power"][0]() * scale
    check(a, 6, topk_svd(a, 6, method="krylov"), tol=1e-4)


def test_a_power_of_two_changes_no_bit() -> None:
    a = MATRICES["power"][0]().float()
    plain, scaled = topk_svd(a, 6, method="krylov"), topk_svd(a * 2.0**-30, 6, method="krylov")
    assert torch.equal(plain.U, scaled.U) and torch.equal(plain.V, scaled.V)
    assert torch.equal(plain.S * 2.0**-30, scaled.S)


@pytest.mark.parametrize("k", [1, 33, 100, 199, 200])
@pytest.mark.parametrize("method", ["auto", "krylov", "exact"])
def test_one_triplet_to_all(k: int, method: str) -> None:
    a = with_spectrum(210, 200, indices(200) ** -0.5).float()
    found = topk_svd(a, k, method=method)
    check(a, k, found, tol=found.info.tol)
    assert (found.info.next_value == 0) == (k == 200)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    data=st.data(),
    rank=st.integers(0, 90),
    decay=st.sampled_from([0.0, 0.5, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    method=st.sampled_from(["auto", "krylov", "exact"]),
    which=st.sampled_from(["largest", "smallest"]),
)
def test_any_shape(rows, columns, data, rank, decay, dtype, method, which) -> None:  # type: ignore[no-untyped-def]
    """Every shape, rank and k, both ends: what ``check`` holds a result to."""
    short = min(rows, columns)
    k = data.draw(st.integers(1, short), label="k")
    sigma = indices(short) ** -decay * (indices(short) <= rank)
    a = with_spectrum(rows, columns, sigma, seed=rank).to(dtype)
    found = topk_svd(a, k, method=method, which=which)
    check(a, k, found, tol=found.info.tol, smallest=which == "smallest")


def test_one_row_and_one_column() -> None:
    for shape in ((1, 30), (30, 1), (1, 1)):
        a = torch.randn(*shape, generator=seeded())
        for method in ("krylov", "exact"):
            found = topk_svd(a, 1, method=method)
            assert found.S.item() == pytest.approx(float(a.norm()), rel=1e-6)
            assert torch.allclose(found.U * found.S @ found.V.t(), a, atol=1e-6)


def test_u_is_the_output_side_of_a_square_weight() -> None:
    a = torch.zeros(60, 60)
    a[1, 3] = 2.0  # output 1, input 3
    for method in ("krylov", "exact"):
        u, s, v, _ = topk_svd(a, 1, method=method)
        assert s.item() == pytest.approx(2.0)
        assert u[:, 0].argmax() == 1 and v[:, 0].argmax() == 3 and v[3, 0] == pytest.approx(1.0)
    inner, sigma, outer = factors(a, 1)
    assert torch.allclose(outer, u, atol=1e-6) and torch.allclose(inner, v, atol=1e-6)


@pytest.mark.parametrize("method", ["krylov", "exact"])
def test_signs_follow_u(method: str) -> None:
    a = torch.randn(80, 60, generator=seeded(5))
    for matrix in (a, -a, a.t(), -a.t()):
        u = topk_svd(matrix, 6, method=method).U
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["krylov", "exact"])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype, method: str, transposed: bool) -> None:
    a = with_spectrum(330, 210, indices(210) ** -0.5).to(dtype)
    a = a.t() if transposed else a
    found = topk_svd(a, 8, method=method)
    assert found.S.dtype == torch.float32
    check(a, 8, found, tol=1e-4)


class _Largest(TorchDispatchMode):
    """The largest tensor of float32 or float64 that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.dtype in (torch.float32, torch.float64):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_is_never_copied_whole(transposed: bool) -> None:
    a = torch.randn(2400, 1300, generator=seeded()).bfloat16()
    a = a.t() if transposed else a
    with _Largest() as largest:
        topk_svd(a, 4, tol="fast", max_passes=8)
    assert 0 < largest.elements < a.numel() / 2
    for other in (torch.zeros(40, 60)[:, ::2], torch.zeros(1, 60).expand(40, 60), a):  # the BLAS would be given a copy
        assert not Operand(other, "A")._plain
    assert Operand(torch.zeros(40, 60).t(), "A")._plain and Operand(torch.zeros(40, 60)[:, :9], "A")._plain
    with _Largest() as largest:
        a.float()
    assert largest.elements == a.numel()  # the mode sees a copy where one is made


_MEASURE = """
import ctypes, re, torch
from svdkern.linalg import topk_svd

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

a = torch.empty({shape}, dtype=torch.bfloat16)
for i, row in enumerate(a.split(512)):  # no other large tensor was ever there
    row.copy_(torch.randn(row.shape, generator=torch.Generator().manual_seed(i)))
    row[:, :512] *= 4
topk_svd(a[:1200, :1100].contiguous(), 4)  # libraries, threads
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
found = topk_svd(a, 16)
print((status("VmHWM") - before) / (2 * a.numel()), found.info.converged)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336)])
def test_memory_beside_a_large_matrix(shape: tuple[int, int]) -> None:
    """No more than 15 % of the matrix's own bytes, its result included."""
    code = _MEASURE.replace("{shape}", str(shape))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    share, converged = done.stdout.split()
    assert 0 < float(share) < 0.15 and converged == "True"


@pytest.mark.parametrize("method", ["krylov", "exact"])
def test_strides(method: str) -> None:
    base = torch.randn(420, 660, generator=seeded(), dtype=torch.float64).float()
    base[:, ::2] += with_spectrum(420, 330, 40 * indices(6)).float()
    for a in (base[:, ::2], base[::2], base.t()[::3], base[:, :200].t(), base[0].expand(220, 660)):
        check(a, 5, topk_svd(a, 5, method=method), tol=1e-4)
        same = topk_svd(a.contiguous(), 5, method=method)
        assert torch.allclose(same.S, topk_svd(a, 5, method=method).S, rtol=1e-5, atol=1e-5 * float(same.S[0]))


def test_restarts_end_where_one_basis_would() -> None:
    a = torch.randn(900, 600, generator=seeded(8))
    found = topk_svd(a, 14, method="krylov", tol="accurate")
    assert found.info.restarts > 0
    check(a, 14, found, tol=1e-6)


@pytest.mark.parametrize("capacity", [36, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("top", [0.7, 0.95])
def test_more_equal_values_than_a_block_has_columns(capacity: int, dtype: torch.dtype, top: float) -> None:
    """A Krylov space of 4 columns holds 4 copies of a value; the next ones it shows are smaller ones, with residual 0."""
    sigma = torch.cat([torch.ones(13), torch.linspace(top, 0.1, 187)]).double()
    a = with_spectrum(210, 200, sigma).to(dtype)
    options = {"block": 4, "capacity": capacity, "tol": 1e-5, "max_passes": 2000, "seed": 0}
    found = leading(Operand(a, "A"), 13, **options)
    assert found.converged and (found.restarts > 0) == (capacity < 200)
    values = found.sigma / found.sigma[0]
    assert (values - 1).abs().max() < 1e-5
    assert "another random block" in found.fallbacks
    equal = topk_svd(with_spectrum(400, 380, torch.ones(380).double()), 70, method="krylov")
    assert equal.info.converged and (equal.S - 1).abs().max() < 1e-12


@pytest.mark.parametrize("spread", [0.0, 2e-4, 1e-3, 3e-3, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("second", [0.97, 0.9])
def test_more_nearly_equal_values_than_a_block_has_columns(second: float, dtype: torch.dtype, spread: float) -> None:
    """Values closer to each other than the residuals that are accepted are one value to a Krylov space, and what follows
    them, a second cluster here, has small residuals, too."""
    i = indices(210)
    sigma = torch.where(i <= 20, 1 + spread * (10 - i) / 20, torch.where(i <= 70, second, second / 3)).double()
    operand = Operand(with_spectrum(240, 210, sigma).to(dtype), "A")
    found = leading(operand, 25, block=16, capacity=210, tol=1e-4, max_passes=200, seed=0)
    assert found.converged
    assert (found.sigma * 2.0**operand.power - sigma[:25]).abs().max() < 1e-5


@pytest.mark.parametrize("tol", ["fast", 1e-4])
def test_ordinary_spectra_are_not_searched_for_what_was_missed(
    tol: float | Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(krylov, "missed_directions", lambda *_: pytest.fail("searched"))
    for a in (torch.randn(1100, 700, generator=seeded(3)), with_spectrum(720, 700, indices(700) ** -0.5).float()):
        found = topk_svd(a, 80, method="krylov", tol=tol)
        assert found.info.converged and found.info.block == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_steps_of_rough_products_end_in_the_same_triplets(decay: float, dtype: torch.dtype) -> None:
    """Where the CPU has AMX; elsewhere both are made in float32. The steepest spectrum needs the images of its basis."""
    a = with_spectrum(1150, 1030, indices(1030) ** -decay).to(dtype)
    found = topk_svd(a, 40)
    assert found.info.method == "krylov" and not topk_svd(a, 40, tol=9e-6, max_passes=6).info.rough
    assert found.info.rough == (extension.why_missing is None and torch.ops.svdkern._cpu_isa() == "amx_bf16")
    check(a, 40, found, tol=1e-4)
    again = topk_svd(a, 40)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], again[:3], strict=True))


# ---------------------------------------------------------------------------------------------- same bits, no side effects


def test_same_seed_same_bits_whatever_the_global_generator() -> None:
    a = torch.randn(300, 260, generator=seeded())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = topk_svd(a, 5, method="krylov", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = topk_svd(a, 5, method="krylov", seed=3), topk_svd(a, 5, method="krylov", seed=4)
    assert all(torch.equal(x, y) for x, y in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.V, other.V)
    assert torch.allclose(first.S, other.S, rtol=1e-3)
    assert first.info.seed == 3


def test_a_matrix_that_requires_grad() -> None:
    a = torch.randn(100, 80, generator=seeded()).requires_grad_()
    for method in ("krylov", "exact"):
        assert not any(t.requires_grad for t in topk_svd(a, 3, method=method)[:3])


# ------------------------------------------------------------------------------------------------------ limits and arguments


def test_what_has_not_converged_says_so() -> None:
    a = torch.randn(500, 400, generator=seeded())
    found = topk_svd(a, 5, method="krylov", tol="accurate", max_passes=6)
    assert not found.info.converged and found.info.passes <= 7
    exact = torch.linalg.svdvals(a.double())[:5]
    error = exact - found.S.double()
    assert bool((error > -1e-4).all()) and float(error.max()) > 0.1
    wide = a.double()
    residual = torch.linalg.vector_norm(wide.t() @ found.U.double() - found.V.double() * found.S.double(), dim=0)
    assert torch.allclose(found.info.residuals, residual, rtol=1e-3)


@pytest.mark.parametrize("shape", [(600, 500), (500, 600)])
def test_a_warm_start_takes_fewer_passes(shape: tuple[int, int]) -> None:
    a = torch.randn(*shape, generator=seeded())
    cold = topk_svd(a, 5, method="krylov", tol=1e-4)
    warm = topk_svd(a, 5, method="krylov", tol=1e-4, v0=cold.V)
    assert warm.info.passes < cold.info.passes
    check(a, 5, warm, tol=1e-4)


def test_a_warm_starts_length_does_not_matter() -> None:
    a = torch.randn(300, 260, generator=seeded())
    start = topk_svd(a, 5, method="krylov").V
    plain = topk_svd(a, 5, method="krylov", v0=start)
    for length in (1e-30, 1e30):
        scaled = topk_svd(a, 5, method="krylov", v0=start * length)
        assert scaled.info.passes == plain.info.passes and torch.allclose(scaled.S, plain.S, rtol=1e-5)


def test_integers_of_other_types() -> None:
    class Integer:
        def __index__(self) -> int:
            return 3

    a = torch.randn(40, 30, generator=seeded())
    found = topk_svd(a, Integer(), seed=Integer(), max_passes=Integer(), method="krylov")  # type: ignore[arg-type]
    assert found.S.shape == (3,) and found.info.seed == 3


def test_a_warm_start_that_leads_nowhere_is_overcome() -> None:
    a = with_spectrum(300, 260, indices(260) ** -0.5).float()
    worst = torch.linalg.svd(a)[2][-20:].t()
    check(a, 5, topk_svd(a, 5, method="krylov", v0=worst), tol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["auto", "krylov", "exact"])
def test_not_finite(value: float, dtype: torch.dtype, method: str) -> None:
    a = torch.randn(50, 40, generator=seeded()).to(dtype)
    a[13, 7] = value
    with pytest.raises(ValueError, match="A has a NaN or an infinity"):
        topk_svd(a, 3, method=method)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, r"k is 0, expected 1 <= k <= 4"),
        ({"k": 5}, ValueError, r"k is 5, expected 1 <= k <= 4 \(A is \(6, 4\)\)"),
        ({"k": 2.0}, TypeError, "k is 2.0, expected an integer"),
        ({"k": True}, TypeError, "k is True, expected an integer"),
        ({"A": torch.zeros(3)}, ValueError, r"A is \(3,\), expected a matrix"),
        ({"A": torch.zeros(2, 3, 4)}, ValueError, r"A is \(2, 3, 4\), expected a matrix"),
        ({"A": torch.zeros(3, 3, dtype=torch.int32)}, TypeError, "A is torch.int32, expected float32"),
        ({"A": torch.zeros(3, 3, dtype=torch.complex64)}, TypeError, "A is torch.complex64, expected float32"),
        ({"A": [[1.0]]}, TypeError, "A is a list, expected a tensor"),
        ({"which": "bottom"}, ValueError, "which is 'bottom', expected one of largest, smallest"),
        ({"method": "lanczos"}, ValueError, "method is 'lanczos', expected one of auto, krylov, exact"),
        ({"tol": "best"}, ValueError, "tol is 'best', expected a number or one of fast, balanced, accurate"),
        ({"tol": 0.0}, ValueError, "tol is 0.0, expected 0 < tol < 1"),
        ({"tol": math.nan}, ValueError, "tol is nan, expected 0 < tol < 1"),
        ({"seed": 0.5}, TypeError, "seed is 0.5, expected an integer"),
        ({"max_passes": 0}, ValueError, "max_passes is 0, expected at least 1"),
        ({"v0": torch.zeros(6, 2)}, ValueError, r"v0 is \(6, 2\), expected \(4, p\) with 1 <= p <= 4"),
        ({"v0": torch.full((4, 1), math.nan)}, ValueError, "v0 has a NaN or an infinity"),
        ({"v0": torch.zeros(4, 1), "method": "krylov"}, ValueError, "v0 has no column"),
        ({"v0": [[1.0]] * 4}, TypeError, "v0 is a list, expected a tensor of floating-point numbers"),
        ({"v0": torch.ones(4, 1, dtype=torch.complex64)}, TypeError, "v0 is torch.complex64, expected a tensor"),
        ({"tol": None}, TypeError, "tol is None, expected a number or one of fast"),
        (
            {"A": torch.ones(6, 4, device="meta")},
            ValueError,
            "A is on the meta device, expected a tensor that has values",
        ),
        ({"A": torch.ones(6, 4).to_sparse()}, TypeError, "A is torch.sparse_coo, expected a dense tensor"),
        ({"A": torch.full((40, 30), 3e38)}, ValueError, r"A has the singular value 1.03923e\+40, beyond torch.float32"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topk_svd(**({"A": torch.ones(6, 4), "k": 2} | arguments))  # type: ignore[arg-type]
