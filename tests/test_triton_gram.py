"""The Gram matrix of a factor by the Triton kernel, run from its PTX: accuracy, bits, strides; and when the penalty takes it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator

import pytest
import torch
from accuracy import assert_accurate
from emulated import emulation, tritons
from svdkern.triton_kernels import gram
from test_triton_emulated import case_name, cover, of
from torch import Tensor

from svdkern.backends import dispatch, triton_gram
from svdkern.linalg import orth_penalty

FACTORS = {
    "gpu": ["80", "90", "80 old", "90 old"],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "L": [(1, 31), (129,), (1000,)],
    "r": [(1, 3, 8), (16, 17), (64,), (100, 128)],
    "layout": ["rows", "columns", "part of wider rows"],
    "mode": [("late",), ("race",), tuple(f"adversarial {seed}" for seed in range(5))],
}


def cases() -> list[dict]:
    """A pairwise cover of the groups above; the values within a group take turns. And copies of 16 bytes that end late."""
    chosen = cover(FACTORS)
    for name in ("L", "r", "mode"):
        turns: dict[tuple, int] = {}
        for case in chosen:
            group = case[name]
            turns[group] = turns.get(group, -1) + 1
            case[name] = group[turns[group] % len(group)]
    staged = {"dtype": torch.bfloat16, "L": 1000, "r": 128, "layout": "rows", "mode": "late"}
    return chosen + [{"gpu": gpu} | staged for gpu in ("80", "90", "90 old")]


CASES = cases()


def factor_of(L: int, r: int, dtype: torch.dtype, layout: str = "rows") -> Tensor:
    """Columns of length near one, as a penalty sees them."""
    wide = (torch.randn(L, r + 3) / max(L, 1) ** 0.5).to(dtype)
    part = wide[:, 1 : r + 1]  # begins at no multiple of 16 bytes
    if layout == "columns":
        return part.t().contiguous().t()
    return part if layout == "part of wider rows" else part.contiguous()


def check(got: Tensor, factor: Tensor) -> None:
    """By the accuracy rule; the products of half-precision numbers are exact in float32, so all sums are held to that."""
    assert got.dtype == torch.float32
    exact, wide = factor.double(), factor.float()
    assert_accurate([got], [exact.t() @ exact], [exact.abs().t() @ exact.abs()], [wide.t() @ wide], torch.float32)
    assert torch.equal(got, got.t())


@pytest.mark.emulator
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_right_and_the_same_bits_under_every_adversity(
    case: dict, record_property: Callable[[str, object], None]
) -> None:
    if "old" in case["gpu"] and len(tritons()) < 2:
        pytest.skip("needs a second Triton: pip install --no-deps --target <environment>/triton-3.6.0 triton==3.6.0")
    factor = factor_of(case["L"], case["r"], case["dtype"], case["layout"])
    found = []
    for mode in ("convergent", case["mode"]):
        with emulation(**of(case, mode), record=record_property):
            found.append(gram.gram(factor))
    assert torch.equal(*found), f"other bits under {case['mode']}"
    check(found[0], factor)


def test_every_value_has_a_case() -> None:
    assert len(CASES) <= 22
    for name, groups in FACTORS.items():
        values = [value for group in groups for value in (group if isinstance(group, tuple) else [group])]
        assert {case[name] for case in CASES} == set(values)


@pytest.mark.emulator
def test_many_tiles() -> None:
    factor = factor_of(70, 300, torch.bfloat16)
    with emulation() as how:
        check(gram.gram(factor), factor)
    assert how.launches == ["gram_kernel"]


@pytest.mark.emulator
def test_one_part_is_one_launch_and_several_are_two() -> None:
    for L, launches in ((511, ["gram_kernel"]), (512, ["gram_kernel", "reduce_kernel"])):
        with emulation() as how:
            gram.gram(factor_of(L, 4, torch.bfloat16))
        assert how.launches == launches


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_is_launched_for_nothing(shape: tuple[int, int]) -> None:
    with emulation() as how:
        assert torch.equal(gram.gram(torch.ones(shape)), torch.zeros(shape[1], shape[1]))
    assert how.launches == []


@pytest.mark.emulator
@pytest.mark.parametrize("arch", [80, 90])
def test_float32_is_not_multiplied_as_tf32(arch: int) -> None:
    factor = torch.tensor([[1 + 2**-12, 1.0]])
    with emulation(arch=arch):
        assert torch.equal(gram.gram(factor), factor.t() @ factor)


def test_parts_cover_all_rows_and_the_workspace_is_bounded() -> None:
    for L in (1, 63, 64, 65, 1000, 4096, 70_000, 10**6):
        for r in (1, 16, 64, 65, 128, 300, 512):
            for dtype in (torch.bfloat16, torch.float32):
                BT, BD, _ = gram.tile(dtype, r)
                side = -(-r // BT)
                tiles = side * (side + 1) // 2
                rows = gram.part_rows(L, tiles, BD)
                parts = -(-L // rows)
                assert rows % BD == 0 and (parts - 1) * rows < L <= parts * rows
                assert parts * tiles <= max(gram.PROGRAMS, tiles)
                assert parts == 1 or rows >= gram.STEPS * BD


# --------------------------------------------------------------------------------------------------------- the penalty


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_penalty_and_its_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    factor = factor_of(600, 5, dtype).requires_grad_()

    def results(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = orth_penalty(factor)
            (first,) = torch.autograd.grad(value, factor, create_graph=True)
        (second,) = torch.autograd.grad(first.float().square().sum(), factor)
        return [value.detach(), first.detach(), second]

    expected = results(autocast=False)
    monkeypatch.setattr(triton_gram, "is_asked_for", lambda factor: True)
    with emulation() as how:
        got = results(autocast=True)
    assert how.launches == ["gram_kernel", "reduce_kernel"]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-6) * b.abs().max()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(dispatch, "why_not", lambda name, device, dtype: None)
    yield monkeypatch
    monkeypatch.undo()
    dispatch.read_environment()


@pytest.mark.parametrize(
    ("asked", "is_cuda", "dtype", "taken"),
    [
        ("triton", True, torch.bfloat16, True),
        ("triton", True, torch.float64, False),
        ("triton", False, torch.float32, False),
        ("eager", True, torch.float32, False),
        (None, True, torch.float32, False),
    ],
)
def test_only_where_it_is_named(
    environment: pytest.MonkeyPatch, asked: str | None, is_cuda: bool, dtype: torch.dtype, taken: bool
) -> None:
    environment.delenv("SVDKERN_BACKEND", raising=False)
    if asked is not None:
        environment.setenv("SVDKERN_BACKEND", asked)
    dispatch.read_environment()
    factor = types.SimpleNamespace(is_cuda=is_cuda, device=torch.device("cuda" if is_cuda else "cpu"), dtype=dtype)
    assert triton_gram.is_asked_for(factor) is taken  # type: ignore[arg-type]


def test_a_transform_sees_pytorchs_product(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SVDKERN_BACKEND", "triton")
    dispatch.read_environment()
    factor = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32)
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(triton_gram.is_asked_for(factor))  # type: ignore[arg-type]
        return x

    function(torch.ones(1))
    torch.func.vmap(function)(torch.ones(1))
    assert seen == [True, False]
