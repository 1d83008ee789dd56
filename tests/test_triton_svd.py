"""The Triton kernels behind the SVD, run from their PTX: bits of the sketch and the residual, accuracy of the products."""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from emulated import emulation, tritons
from ptx_emulator import compile as compiling
from ptx_emulator.errors import PtxError
from svdkern.triton_kernels import normal, residual, sketch
from test_triton_emulated import case_name, cover, of
from torch import Tensor

from svdkern.linalg import residual as residuals
from svdkern.linalg import sketch as sketches

CPU = torch.device("cpu")
GPUS = ["80", "90", "80 old", "90 old"]
MODES = [("late",), ("race",), *(tuple(f"adversarial {seed + i}" for i in range(3)) for seed in (0, 3))]
HALVES_AND_FLOAT = [torch.bfloat16, torch.float16, torch.float32]


def cases(factors: dict) -> list[dict]:
    """A pairwise cover in which the values of a group take turns."""
    chosen = cover(factors)
    for name in factors:
        turns: dict[tuple, int] = {}
        for case in chosen:
            group = case[name]
            if isinstance(group, tuple):
                turns[group] = turns.get(group, -1) + 1
                case[name] = group[turns[group] % len(group)]
    return chosen


def skip_without(gpu: str) -> None:
    if "old" in gpu and len(tritons()) < 2:
        pytest.skip("needs a second Triton: pip install --no-deps --target <environment>/triton-3.6.0 triton==3.6.0")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, NaNs where there are NaNs."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# ---------------------------------------------------------------------------------------------------------------- the sketch

SKETCHES = {
    "gpu": GPUS,
    "dtype": [torch.float32, torch.bfloat16, torch.float64],
    "rows": [(1, 31), (33, 100)],
    "columns": [(1, 3), (16, 32), (64, 130)],
    "first": [(0, 16), (5, 77), (127, 1000)],
    "seed": [(0, 1), (7 + (5 << 40), -1, 2**63 - 1)],
    "mode": MODES,
}


@pytest.mark.emulator
@pytest.mark.parametrize("case", cases(SKETCHES), ids=case_name)
def test_the_sketch_has_the_bits_of_torch(case: dict, record_property: Callable[[str, object], None]) -> None:
    skip_without(case["gpu"])
    size = (case["rows"], case["columns"])
    options = {"seed": case["seed"], "first": case["first"], "dtype": case["dtype"], "device": CPU}
    with emulation(**of(case, case["mode"]), record=record_property):
        found = sketch.sketch(*size, **options)
    assert torch.equal(found, sketches.sketch_in_torch(*size, **options))


@pytest.mark.emulator
@pytest.mark.parametrize("tiling", [(1, 1), (8, 4), (64, 1)])
def test_the_sketch_has_the_same_bits_by_any_tiling(monkeypatch: pytest.MonkeyPatch, tiling: tuple[int, int]) -> None:
    monkeypatch.setattr(sketch, "ROWS", tiling[0])
    monkeypatch.setattr(sketch, "WORDS", tiling[1])
    options = {"seed": 3, "first": 50, "dtype": torch.float32, "device": CPU}
    with emulation():
        found = sketch.sketch(20, 90, **options)
    assert torch.equal(found, sketches.sketch_in_torch(20, 90, **options))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_sketch_is_no_launch(shape: tuple[int, int]) -> None:
    with emulation() as how:
        assert sketch.sketch(*shape, seed=0, first=0, dtype=torch.float32, device=CPU).shape == shape
    assert how.launches == []


# -------------------------------------------------------------------------------------------------------------- the residual

RESIDUALS = {
    "gpu": GPUS,
    "dtype": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "shape": [((1, 1), (5, 130)), ((33, 65), (64, 128))],
    "r": [(1, 2), (5, 16)],
    "layout": ["rows", "columns", "part of wider rows"],
    "mode": MODES,
}


def hard_weight(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Cancellation, ties, subnormals and infinities of every dtype, NaN."""
    weight = torch.randn(n, k, dtype=torch.float64)
    flat = weight.view(-1)
    flat[::7] *= 1e-4
    flat[1::11] *= 2.0**-24
    flat[2::13] *= 2.0**-133
    flat[3::17] = 1 + 2.0**-8
    flat[4::29] = torch.inf
    flat[5::31] = torch.nan
    flat[6::37] = torch.finfo(dtype).max
    return weight.to(dtype)


def in_layout(matrix: Tensor, layout: str) -> Tensor:
    if layout == "columns":
        return matrix.t().contiguous().t()
    if layout == "rows":
        return matrix
    wide = matrix.new_zeros(matrix.shape[0], matrix.shape[1] + 3)
    wide[:, 1:-2] = matrix
    return wide[:, 1:-2]


def factors_of(n: int, k: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, sigma, v; a column of products that are near the subnormals of half formats, one that is zero."""
    u, v = torch.randn(k, r), torch.randn(n, r)
    u[:, r // 2] *= 2.0**-20
    u[::3] = 0
    return u, torch.rand(r), v


@pytest.mark.emulator
@pytest.mark.parametrize("case", cases(RESIDUALS), ids=case_name)
def test_the_residual_has_the_bits_of_torch(case: dict, record_property: Callable[[str, object], None]) -> None:
    skip_without(case["gpu"])
    weight = in_layout(hard_weight(*case["shape"], case["dtype"]), case["layout"])
    u, sigma, v = factors_of(*case["shape"], case["r"])
    rows, columns = residuals.float64_factors(u, sigma, v, 0.7)
    with emulation(**of(case, case["mode"]), record=record_property):
        found = residual.residual(weight, columns, rows)
    assert found.is_contiguous()
    assert same(found, residuals.residual_in_torch(weight, u, sigma, v, 0.7))


def rounds_once(module: Any) -> bool:
    """1 + 2^-8 + 2^-40 is above a tie of bfloat16, which float32 in between hides."""
    weight = torch.full((1, 2), 1 + 2.0**-7, dtype=torch.bfloat16)
    v, a = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[2.0**-8, 0], [-(2.0**-40), 0]], dtype=torch.float64)
    return module.residual(weight, v, a).tolist() == [[1 + 2**-7, 1 + 2**-7]]


@pytest.mark.emulator
def test_the_residual_rounds_once() -> None:
    with emulation():
        assert rounds_once(residual)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_residual_is_no_launch(shape: tuple[int, int]) -> None:
    v, a = (torch.ones(2, size, dtype=torch.float64) for size in shape)
    with emulation() as how:
        assert residual.residual(torch.ones(shape), v, a).shape == shape
    assert how.launches == []


@pytest.mark.emulator
def test_a_residual_without_ranks_is_the_weight() -> None:
    weight = torch.randn(3, 5).bfloat16()
    nothing = [torch.empty(0, size, dtype=torch.float64) for size in (3, 5)]
    with emulation():
        assert torch.equal(residual.residual(weight, *nothing), weight)


# -------------------------------------------------------------------------------------------------------------- the products

PRODUCTS = {
    "gpu": GPUS,
    "dtype": HALVES_AND_FLOAT,
    "shape": [((1, 1), (3, 70)), ((130, 80),), ((70, 520),)],
    "b": [(1, 3, 8), (16, 17), (33, 64, 70)],
    "layout": ["rows", "columns", "part of wider rows"],
    "scale": [1.0, 2.0**-9, 2.0**60],
    "mode": MODES,
}


def check_products(got: tuple[Tensor, Tensor], a: Tensor, x: Tensor, scale: float) -> None:
    """By the accuracy rule, held to float32; z against the y that was found."""
    y, z = got
    assert y.dtype == z.dtype == torch.float32
    wide, single = a.double(), a.float()
    pairs = (y, wide, single, x), (z, wide.t(), single.t(), y)
    for found, exact, plain, right in pairs:
        truth, size = scale * (exact @ right.double()), scale * (exact.abs() @ right.double().abs())
        assert_accurate([found], [truth], [size], [scale * (plain @ right)], torch.float32)
        assert ((found.double() - truth).abs() <= 2.0**-21 * size).all()  # every element, as no TF32 gives it


def matrix_of(m: int, n: int, dtype: torch.dtype, scale: float, layout: str = "rows") -> Tensor:
    return in_layout((torch.randn(m, n) / (scale if dtype != torch.float16 else 1.0)).to(dtype), layout)


@pytest.mark.emulator
@pytest.mark.parametrize("case", cases(PRODUCTS), ids=case_name)
def test_products_are_right_and_the_same_bits_under_every_adversity(
    case: dict, record_property: Callable[[str, object], None]
) -> None:
    skip_without(case["gpu"])
    scale = case["scale"] if case["dtype"] != torch.float16 else min(case["scale"], 1.0)  # it has no small numbers
    a = matrix_of(*case["shape"], case["dtype"], scale, case["layout"])
    x = torch.randn(a.shape[1], case["b"])
    found = []
    for mode in ("convergent", case["mode"]):
        with emulation(**of(case, mode), record=record_property):
            found.append(normal.both(a, x, scale))
    for first, again in zip(*found, strict=True):
        assert torch.equal(first, again), f"other bits under {case['mode']}"
    check_products(found[0], a, x, scale)


def test_every_value_has_a_case() -> None:
    for factors in (SKETCHES, RESIDUALS, PRODUCTS):
        chosen = cases(factors)
        assert len(chosen) <= 24
        for name, groups in factors.items():
            seen = {case[name] for case in chosen}
            assert seen == {value for group in groups for value in (group if isinstance(group, tuple) else [group])}


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_one_product_has_the_bits_of_the_first_of_both(dtype: torch.dtype) -> None:
    a, x = torch.randn(100, 300).to(dtype), torch.randn(300, 20).t().contiguous().t()
    with emulation():
        assert torch.equal(normal.product(a, x, 0.5), normal.both(a, x, 0.5)[0])


@pytest.mark.emulator
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_products_keep_all_digits_of_float32(arch: int, dtype: torch.dtype) -> None:
    """One term is all of the sum: the last of its 24 bits is there."""
    a = torch.zeros(1, 3).to(dtype)
    a[0, 1] = 1 + 2.0**-23 if dtype == torch.float32 else 1 + 2.0**-7
    x = torch.tensor([[1.0], [1 + 2.0**-23], [2.0**-30]]) if dtype != torch.float32 else torch.ones(3, 1)
    with emulation(arch=arch):
        found = normal.product(a, x, 1.0)
    assert torch.equal(found, (a.double() @ x.double()).float())


@pytest.mark.parametrize("shape", [(0, 5, 2), (5, 0, 2), (5, 4, 0)])
def test_empty_products_are_no_launch(shape: tuple[int, int, int]) -> None:
    m, n, b = shape
    with emulation() as how:
        y, z = normal.both(torch.ones(m, n), torch.ones(n, b), 1.0)
    assert torch.equal(y, torch.zeros(m, b)) and torch.equal(z, torch.zeros(n, b))
    assert how.launches == []


def test_splits_cover_the_depth_and_the_workspace_is_bounded() -> None:
    for dtype in HALVES_AND_FLOAT:
        for rows in (1, 100, 4096, 50_000):
            for depth in (1, 63, 300, 4096, 14336):
                for b in (1, 16, 33, 64, 128, 300):
                    shape = normal.tile(dtype, b)
                    each = normal.per_split(rows, depth, b, shape)
                    splits = -(-depth // each)
                    tiles = -(-rows // shape.BM) * -(-b // shape.B)
                    assert each % shape.BL == 0 and (splits - 1) * each < depth <= splits * each
                    assert tiles * splits <= max(normal.PROGRAMS, tiles)
                    assert splits == 1 or each >= normal.STEPS * shape.BL


# ------------------------------------------------------------------------------------------------------------ planted damage

MUTANTS = {
    "sketch, mask": ("sketch", "(column >= 0) & ", ""),
    "sketch, word": ("sketch", "which = zero + (word % 4)", "which = zero + (word % 2)"),
    "residual, fused": (
        "residual",
        re.compile(r"    product = tl\.inline_asm_elementwise.*?is_pure=True, pack=1\n    \)\n(?=\n\n@)", re.S),
        "    return acc - x * y\n",
    ),
    "residual, rounded twice": ("residual", "single = bits.to(tl.float32, bitcast=True)", "single = x.to(tl.float32)"),
    "residual, rows": ("residual", "v_at += N", "v_at += K"),
    "residual, mask": ("residual", "(rows < N)[:, None] & (columns < K)[None, :]", "(rows < N)[:, None]"),
    "normal, mask of a": ("normal", "mask=(rows < M)[:, None] & (at < last)[None, :]", "mask=(rows < M)[:, None]"),
    "normal, mask of x": ("normal", "inside = (at < last)[:, None]", "inside = (at < L + BL)[:, None]"),
    "normal, mask of y": ("normal", "acc, mask=(rows < M)[:, None] & (columns < b)[None, :]", "acc, mask=(rows < M)[:, None]"),
    "normal, backwards": ("normal", "tl.num_programs(1) - 1 - row_tile", "tl.num_programs(1) - 2 - row_tile"),
    "normal, third part": ("normal", "tl.dot(a, x1, tl.dot(a, x2))", "tl.dot(a, x1)"),
    "normal, range": ("normal", "last = tl.minimum(first + per_split, L)", "last = L"),
    "normal, scale": ("normal", "PARTS) * scale", "PARTS)"),
    "normal, splits": ("normal", "for i in range(1, splits)", "for i in range(2, splits)"),
    "normal, fence": ("normal", "if FENCE:", "if FENCE and BM == 0:"),
}  # fmt: skip


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """A kernel's file with the damage, as a module that the compiler's process finds too."""
    folder = tmp_path_factory.mktemp("mutants")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", str(folder), prepend=":")
    patch.setattr(compiling, "_worker", functools.cache(compiling._worker.__wrapped__))

    def make(name: str) -> Any:
        file, sound, damaged = MUTANTS[name]
        text = Path(sys.modules[f"svdkern.triton_kernels.{file}"].__file__ or "").read_text()
        pattern = re.compile(re.escape(sound)) if isinstance(sound, str) else sound
        text, count = pattern.subn(lambda _: damaged, text)
        assert count == 1, f"{name}: {count} places"
        text = text.replace("from . import", "from svdkern.triton_kernels import")
        text = re.sub(r"from \.(\w+)", r"from svdkern.triton_kernels.\1", text)
        module = f"mutant_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        (folder / f"{module}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(module)

    yield make
    patch.undo()


def sound(module: Any, name: str) -> bool:
    """Whether what the tests above check holds of this module, at sizes where each damage would show."""
    file = MUTANTS[name][0]
    if file == "sketch":
        options = {"seed": 3, "first": 50, "dtype": torch.float32, "device": CPU}
        return torch.equal(module.sketch(20, 90, **options), sketches.sketch_in_torch(20, 90, **options))
    if file == "residual":
        weight, (u, sigma, v) = hard_weight(33, 70, torch.bfloat16), factors_of(33, 70, 5)
        rows, columns = residuals.float64_factors(u, sigma, v, 0.7)
        wide = hard_weight(33, 70, torch.float64)
        return rounds_once(module) and all(
            same(module.residual(w, columns, rows), residuals.residual_in_torch(w, u, sigma, v, 0.7))
            for w in (weight, wide)
        )
    torch.manual_seed(0)
    a, x = torch.randn(150, 528).bfloat16(), torch.randn(528, 20)
    try:
        check_products(module.both(a, x, 0.5), a, x, 0.5)
    except AssertionError:
        return False
    return True


@pytest.mark.emulator
@pytest.mark.parametrize("name", MUTANTS)
def test_planted_damage_is_found(mutants: Callable[[str], Any], name: str) -> None:
    fence = name == "normal, fence"
    if fence:
        skip_without("90 old")
    how = of({"gpu": "90 old" if fence else "80"}, "late" if fence else "convergent")
    with emulation(**how):
        assert sound(sys.modules[f"svdkern.triton_kernels.{MUTANTS[name][0]}"], name)
        try:
            found = sound(mutants(name), name)
        except PtxError:
            return
    assert not found, f"{name} is not seen"
