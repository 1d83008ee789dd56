"""outer and linear, the CUDA kernels of the backward and of the base product, from their PTX (test_cuda_kernels.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from cover import case_name, cover
from emulated_cuda import CudaEmulation, why_not
from operands import RNG
from test_cuda_kernels import BF16, F16, F32, emulated, padded, unset
from torch import Tensor

from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

ADVERSARIAL = ["adversarial 0", "adversarial 2", "adversarial 4"]


def strided(m: int, k: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Rows that are contiguous, with a stride and a start that do or do not allow 16-byte accesses."""
    stride, start = {
        "plain": (k, 0),
        "strided": (padded(k, 8) + 8, 0),
        "odd": (k + 3, 0),
        "misaligned": (padded(k, 8), 1),
    }[layout]
    return torch.as_strided((torch.randn(m * stride + start) / m**0.5).to(dtype), (m, k), (stride, 1), start)


# --------------------------------------------------------------------------------------------------------------- outer

OUTER = {
    "dtype": [BF16, F16],
    "shape": [(264, 136), (101, 40), (64, 64), (40, 7), (1, 129), (330, 70)],
    "r": [1, 3, 16, 17, 64, 128, 200],
    "out": [F32, BF16, torch.float64],
    "turned": [False, True],
    "layout": ["plain", "strided", "odd", "misaligned"],
    "dropout": [0.0, 0.1],
    "splits": [1, 2, 5],
    "mode": ["late", "race"],
}
QUICK = {"shape": [(264, 136), (101, 40), (1, 129)], "r": [1, 16, 17, 64], "layout": ["plain", "odd"], "splits": [1, 3]}
FLOAT = {
    "dtype": [F32],
    "shape": [(101, 70), (40, 7)],
    "r": [1, 17],
    "layout": ["plain", "misaligned"],
    "splits": [1, 2],
}
ADVERSE = {"dtype": [BF16], "shape": [(200, 70), (136, 7)], "r": [3, 17], "out": [F32], "turned": [False],
           "layout": ["plain", "odd"],
                      "splits": [2, 3], "mode": ADVERSARIAL}  # fmt: skip


def outer(case: dict, how: CudaEmulation) -> tuple[Tensor, ...]:
    """What the kernel writes, what it should, the formula on absolute values, and the same computed in the dtype."""
    (m, width), r, dtype = case["shape"], case["r"], case["dtype"]
    a, R = strided(m, width, dtype, case["layout"]), padded(r, 16)
    q = torch.zeros(m, R, dtype=dtype)
    q[:, :r] = torch.randn(m, r).to(dtype)
    q[:, r:] = float("nan")  # what is past r must not count
    threshold = threshold_of(case["dropout"])
    out = unset(r, width, dtype=case["out"]).t() if case["turned"] else unset(width, r, dtype=case["out"])
    splits = case["splits"]
    partial = unset(splits, width, R) if splits > 1 else None
    counters = torch.zeros(-(-width // 64) * -(-r // 128), dtype=torch.int32) if splits > 1 else None
    how.call("outer", a, q, r, RNG if threshold else None, threshold, out, partial, counters)

    def formula(cast: Callable[[Tensor], Tensor]) -> Tensor:
        masked = cast(a)
        if threshold:
            masked = masked * keep_mask(m, width, RNG, threshold) * keep_scale(threshold)
        return masked.t() @ cast(q[:, :r])

    return out, formula(lambda t: t.double()), formula(lambda t: t.double().abs()), formula(lambda t: t.to(dtype))


def check(
    run: Callable[..., tuple[Tensor, ...]], case: dict, dtype: torch.dtype, record: object = None, **device: int
) -> None:
    got, *reference = run(case, emulated(case["mode"], record, **device))  # type: ignore[arg-type]
    if case["mode"] != "race":  # that is the plain schedule, watched
        torch.manual_seed(0)
        plain, *_ = run(case, CudaEmulation(**device))
        assert torch.equal(plain.double().nan_to_num(1e300), got.double().nan_to_num(1e300)), (
            f"other bits under {case['mode']}"
        )
    assert_accurate([got], *([t] for t in reference), dtype, ("out",))


@pytest.mark.parametrize("case", cover(OUTER | QUICK) + cover(OUTER | FLOAT) + cover(OUTER | ADVERSE), ids=case_name)
def test_outer_is_right_under_every_adversity(case: dict, record_property: Callable[[str, object], None]) -> None:
    check(outer, case, BF16 if case["out"] == BF16 else F32, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", cover(OUTER) + cover(OUTER | {"dtype": [F32]}), ids=case_name)
def test_more_of_outer(case: dict) -> None:
    check(outer, case, BF16 if case["out"] == BF16 else F32)


# -------------------------------------------------------------------------------------------------------------- linear

LINEAR = {
    "dtype": [BF16, F16],
    "shape": [(70, 136, 72), (40, 101, 33), (64, 64, 64), (7, 40, 130), (1, 328, 65), (130, 72, 7)],
    "r": [None, 1, 3, 16, 17, 64, 100],
    "w": ["rows", "columns", "none", "rows odd", "columns odd"],
    "layout": ["plain", "strided", "odd", "misaligned"],
    "out": ["plain", "strided", "odd"],
    "bias": [True, False],
    "dropout": [0.0, 0.1],
    "mode": ["late", "race"],
}
QUICK_LINEAR = {
    "shape": [(70, 136, 72), (40, 101, 33), (1, 328, 65)],
    "r": [None, 1, 17, 100],
    "layout": ["plain", "odd"],
}
FLOAT_LINEAR = {
    "dtype": [F32],
    "shape": [(70, 40, 33)],
    "r": [None, 3, 40],
    "w": ["rows", "columns"],
    "layout": ["plain", "odd"],
}
ADVERSE_LINEAR = {"dtype": [BF16], "shape": [(70, 264, 33)], "r": [3, 17], "w": ["rows", "columns"],
                  "layout": ["plain", "odd"], "bias": [True],
                                    "out": ["plain"], "mode": ADVERSARIAL}  # fmt: skip


def linear(case: dict, how: CudaEmulation) -> tuple[Tensor, ...]:
    (m, k, n), r, dtype = case["shape"], case["r"], case["dtype"]
    r = 5 if r is None and case["w"] == "none" else r
    a, w, z, factor = strided(m, k, dtype, case["layout"]), None, None, None
    if case["w"] != "none":
        odd = "odd" if "odd" in case["w"] else "plain"
        w = strided(k, n, dtype, odd) if "columns" in case["w"] else strided(n, k, dtype, odd).t()
    if r is not None:
        R = padded(r, 16)
        z, factor = torch.randn(m, R).to(dtype), torch.randn(n, R).to(dtype)
        z[:, r:], factor[:, r:] = 0, 0  # as shrink and pack leave them
    bias = torch.randn(n).to(dtype) if case["bias"] else None
    threshold = threshold_of(case["dropout"]) if r is not None else 0
    out = torch.full_like(strided(m, n, dtype, case["out"]), float("nan"))
    whole = torch.full((m, n + 5), float("nan"), dtype=dtype)
    out = {"plain": out, "strided": torch.as_strided(unset(m * padded(n, 8), dtype=dtype), (m, n), (padded(n, 8), 1)),
           "odd": whole[:, :n]}[case["out"]]  # fmt: skip
    how.call("linear", a, w, z, factor, r or 0, bias, RNG if threshold else None, threshold, out)

    def formula(cast: Callable[[Tensor], Tensor]) -> Tensor:
        y = a.new_zeros(m, n, dtype=cast(a).dtype)
        if w is not None:
            y = y + cast(a) @ cast(w)
        if r is not None:
            branch = cast(z) @ cast(factor).t()
            if threshold:
                branch = branch * keep_mask(m, n, RNG, threshold).to(branch.dtype) * keep_scale(threshold)
            y = y + branch
        return y if bias is None else y + cast(bias)

    assert whole[:, n:].isnan().all()
    return out, formula(lambda t: t.double()), formula(lambda t: t.double().abs()), formula(lambda t: t.to(dtype))


@pytest.mark.parametrize(
    "case", cover(LINEAR | QUICK_LINEAR) + cover(LINEAR | FLOAT_LINEAR) + cover(LINEAR | ADVERSE_LINEAR), ids=case_name
)
def test_linear_is_right_under_every_adversity(case: dict, record_property: Callable[[str, object], None]) -> None:
    check(linear, case, case["dtype"], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", cover(LINEAR) + cover(LINEAR | {"dtype": [F32]}), ids=case_name)
def test_more_of_linear(case: dict) -> None:
    check(linear, case, case["dtype"])


LARGE_LINEAR = {"dtype": [BF16, F16], "shape": [(120, 456, 250), (100, 328, 120), (130, 72, 256)],
                "r": [None, 17, 100], "w": ["rows", "columns"], "layout": ["plain", "strided"], "out": ["plain", "odd"],
                "bias": [True], "dropout": [0.0, 0.1], "mode": ["late", "race", "adversarial 3"]}  # fmt: skip


@pytest.mark.parametrize("case", cover(LARGE_LINEAR), ids=case_name)
def test_large_tiles_of_linear_are_right(case: dict, record_property: Callable[[str, object], None]) -> None:
    check(linear, case, case["dtype"], record_property, processors=1)


@pytest.mark.parametrize("w", ["rows", "columns"])
@pytest.mark.parametrize(
    ("shape", "processors", "shared", "threads"),
    [
        ((33, 40, 40), 1, 227, 128),
        ((128, 40, 256), 1, 227, 256),
        ((128, 40, 256), 1, 163, 256),
        ((128, 40, 256), 1, 99, 128),
        ((128, 40, 256), 4, 227, 128),
    ],
)
def test_tiles_of_linear(shape: tuple[int, int, int], processors: int, shared: int, threads: int, w: str) -> None:
    """Those by which all processors are through first, of what shared memory allows."""
    case = {
        "dtype": BF16, "shape": shape, "r": 3, "w": w, "layout": "plain", "out": "plain", "bias": True, "dropout": 0.1,
    }  # fmt: skip
    how = CudaEmulation(mode="late", processors=processors, shared=shared << 10)
    got, *reference = linear(case, how)
    assert how.launches[0].threads == threads
    assert_accurate([got], *([t] for t in reference), BF16, ("out",))


@pytest.mark.parametrize("change", ["a", "w", "z"])
def test_large_tiles_take_whole_chunks_alone(change: str) -> None:
    """Rows that do not begin at multiples of 16 bytes go to the small tiles, which copy what they can."""
    a, w, z, factor = (torch.randn(size, dtype=BF16) for size in ((128, 40), (256, 40), (128, 16), (256, 16)))
    odd = {"a": a, "w": w, "z": z}[change]
    memory = torch.empty(odd.numel() + 1, dtype=BF16)
    shifted = memory[1:].view(odd.shape).copy_(odd)
    a, w, z = (shifted if t is odd else t for t in (a, w, z))
    how, out = CudaEmulation(processors=1), unset(128, 256, dtype=BF16)
    how.call("linear", a, w.t(), z, factor, 16, None, None, 0, out)
    assert how.launches[0].shared == 64 << 10
    assert torch.allclose(out.float(), a.float() @ w.float().t() + z.float() @ factor.float().t(), atol=0.2)


def test_a_tile_is_taken_once() -> None:
    """The order of tiles (tile_place in params.h) covers the output; group heights that do not divide the rows included."""
    for row_tiles, column_tiles in [(1, 1), (3, 5), (9, 2), (17, 2)]:
        case = {"dtype": BF16, "shape": (64 * row_tiles, 8, 64 * column_tiles), "r": None, "w": "rows", "layout": "plain",
                "out": "plain", "bias": False, "dropout": 0.0}  # fmt: skip
        got, *reference = linear(case, CudaEmulation())
        assert_accurate([got], *([t] for t in reference), case["dtype"], ("out",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(64, 9, dtype=BF16)}, "the number of columns of w is 9, expected 24"),
        ({"w": torch.ones(60, 24, dtype=BF16)}, "the number of rows of w is 60, expected 64"),
        ({"w": torch.ones(128, 48, dtype=BF16)[::2, ::2]}, "one of w's strides must be 1"),
        ({"w": torch.ones(64, 24)}, "w must have the dtype of a"),
        ({"z": None}, "z and factor come together"),
        ({"z": torch.ones(8, 32, dtype=BF16)}, "z is 32, expected 16"),
        ({"factor": torch.ones(24, 48, dtype=BF16)[:, :16]}, "factor is not contiguous"),
        ({"bias": torch.ones(25, dtype=BF16)}, "bias is 25, expected 24"),
        ({"out": torch.ones(9, 24, dtype=BF16)}, "the number of rows of out is 9, expected 8"),
        ({"out": torch.ones(24, 8, dtype=BF16).t()}, "the rows of out must be contiguous"),
        ({"threshold": -1}, "threshold is -1"),
        ({"threshold": 1, "rng_state": torch.ones(2)}, "rng_state must be"),
    ],
)
def test_linear_refuses_what_would_read_out_of_bounds(change: dict, message: str) -> None:
    arguments: dict = {
        "a": torch.ones(8, 64, dtype=BF16), "w": torch.ones(64, 24, dtype=BF16), "z": torch.ones(8, 16, dtype=BF16),
        "factor": torch.ones(24, 16, dtype=BF16), "r": 4, "bias": None, "rng_state": None, "threshold": 0,
        "out": torch.ones(8, 24, dtype=BF16),
    }  # fmt: skip
    how = CudaEmulation()
    with pytest.raises(RuntimeError, match=message):
        how.call("linear", *(arguments | change).values())
    assert not how.launches
