"""The CUDA kernels for few rows, small_shrink and small_linear, from their PTX (test_cuda_kernels.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from cover import case_name, cover
from emulated_cuda import CudaEmulation, why_not
from operands import RNG
from test_cuda_kernels import BF16, F16, F32, MODES, emulated, padded, same_bits, unset
from torch import Tensor

from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

F64 = torch.float64
ADVERSARIAL = [mode for mode in MODES if mode.startswith("adversarial")]
Reference = tuple[dict[str, Tensor], ...]


def rows_of(m: int, k: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Contiguous rows, with a stride and a start that do or do not allow 16-byte accesses."""
    stride, start = {"plain": (k, 0), "odd": (k + 3, 0), "misaligned": (padded(k, 8), 1)}[layout]
    return torch.as_strided((torch.randn(m * stride + start) / k**0.5).to(dtype), (m, k), (stride, 1), start)


def factor_of(length: int, r: int, case: dict) -> Tensor:
    whole = torch.randn(2 * length, 2 * r, dtype=F64).to(case["from"])
    plain = whole[:length, :r].contiguous()
    return {"along": plain, "down": plain.t().contiguous().t(), "strided": whole[::2, ::2]}[case["factor"]]


def check(run: Callable[..., Reference], case: dict, record: Callable[[str, object], None] | None = None) -> None:
    """The plain schedule and the case's give the same bits; those are right by the accuracy rule."""
    got, *reference = run(case, emulated(case["mode"], record))
    if case["mode"] != "race":  # that is the plain schedule, watched
        torch.manual_seed(0)
        plain, *_ = run(case, CudaEmulation())
        for name in plain:
            assert same_bits(plain[name], got[name]), f"{name} has other bits under {case['mode']}"
    for name in got:
        results = [[result[name]] for result in (got, *reference)]
        assert_accurate(*results, F32 if name in ("h", "sums") else case["dtype"], (name,))


# -------------------------------------------------------------------------------------------------------- small_shrink

SHRINK = {
    "dtype": [BF16, F16, F32],
    "shape": [(1, 264), (3, 101), (8, 520), (9, 300), (32, 257), (17, 7)],
    "r": [1, 3, 16, 17, 40],
    "from": [F32, BF16, F64],
    "factor": ["along", "down", "strided"],
    "layout": ["plain", "odd", "misaligned"],
    "dropout": [0.0, 0.1],
    "slices": [1, 2, 3],
    "mode": ["late", "race"],
}
ADVERSE_SHRINK = {"shape": [(3, 300), (9, 40)], "r": [3, 17], "from": [F32], "slices": [2], "mode": ADVERSARIAL}


def small_shrink(case: dict, how: CudaEmulation) -> Reference:
    (m, k), r, slices = case["shape"], case["r"], case["slices"]
    a, factor, threshold = (
        rows_of(m, k, case["dtype"], case["layout"]),
        factor_of(k, r, case),
        threshold_of(case["dropout"]),
    )
    sums, control = unset(slices, m, r), torch.full((300,), 7, dtype=torch.int32)
    how.call("small_shrink", a, factor, RNG if threshold else None, threshold, sums, control)
    assert not control.any()

    def formula(cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        masked = cast(a)
        if threshold:
            masked = masked * keep_mask(m, k, RNG, threshold) * keep_scale(threshold)
        each = -(-k // (128 * slices)) * 128
        parts = [masked[:, i * each : (i + 1) * each] @ cast(factor)[i * each : (i + 1) * each] for i in range(slices)]
        return {"sums": torch.stack(parts)}

    return (
        {"sums": sums},
        formula(lambda t: t.double()),
        formula(lambda t: t.double().abs()),
        formula(lambda t: t.float()),
    )


@pytest.mark.parametrize("case", cover(SHRINK) + cover(SHRINK | ADVERSE_SHRINK), ids=case_name)
def test_small_shrink_is_right_under_every_adversity(
    case: dict, record_property: Callable[[str, object], None]
) -> None:
    check(small_shrink, case, record_property)


# -------------------------------------------------------------------------------------------------------- small_linear

LINEAR = {
    "dtype": [BF16, F16, F32],
    "shape": [(1, 328, 65), (3, 101, 33), (8, 1352, 72), (9, 520, 130), (16, 1100, 7), (31, 712, 70)],
    "r": [None, 1, 3, 16, 17, 100, 150],
    "w": ["rows", "columns", "none", "rows odd", "columns odd"],
    "from": [F32, BF16, F64],
    "factor": ["along", "down", "strided"],
    "middle": ["sigma", "core", "core transposed", "none"],
    "gate": ["none", "last", "first"],
    "layout": ["plain", "odd", "misaligned"],
    "bias": [True, False],
    "dropout": [0.0, 0.1],
    "splits": [1, 2, 3],  # of K
    "slices": [1, 3],
    "mode": ["late", "race"],
}
QUICK = {"r": [None, 1, 16, 17, 150], "w": ["rows", "columns", "none", "rows odd"], "layout": ["plain", "misaligned"],
         "from": [F32, BF16], "splits": [1, 3]}  # fmt: skip
ADVERSE_LINEAR = {
    "dtype": [BF16, F32], "shape": [(3, 328, 65), (9, 264, 40)], "r": [None, 3, 17], "w": ["rows", "columns"],
    "from": [F32], "factor": ["along", "down"], "middle": ["sigma"], "gate": ["none"], "layout": ["plain", "odd"],
    "bias": [True], "splits": [2, 3], "slices": [2], "mode": ADVERSARIAL,
}  # fmt: skip


def small_linear(case: dict, how: CudaEmulation) -> Reference:
    (m, k, n), r, dtype = case["shape"], case["r"], case["dtype"]
    a, w, sums, factor, outs = rows_of(m, k, dtype, case["layout"]), None, None, None, {}
    if case["w"] != "none":
        odd = "odd" if "odd" in case["w"] else "plain"
        w = rows_of(k, n, dtype, odd) if "columns" in case["w"] else rows_of(n, k, dtype, odd).t()
    r = 5 if r is None and w is None else r
    sigma = core = gate = None
    if r is not None:
        sums, factor = torch.randn(case["slices"], m, r), factor_of(n, r, case)
        core = torch.randn(r, r).to(dtype) if case["middle"].startswith("core") and r <= 17 else None
        core = core.t() if core is not None and "transposed" in case["middle"] else core
        sigma = torch.randn(r, dtype=F64) if case["middle"] == "sigma" else None
        gate = torch.rand(m, r) if case["gate"] != "none" else None
        outs = {"h": unset(m, r), "z": unset(m, padded(r, 16), dtype=dtype)}
    bias = torch.randn(n).to(dtype) if case["bias"] else None
    threshold = threshold_of(case["dropout"]) if r is not None else 0
    whole = torch.full((m, n + 5), float("nan"), dtype=dtype)
    outs["out"] = whole[:, :n]
    splits = case["splits"] if w is not None else 1
    partial = unset(splits, m, n) if splits > 1 else None
    counters = torch.zeros(-(-n // 32), dtype=torch.int32) if splits > 1 else None
    how.call(
        "small_linear", a, w, sums, factor, sigma, core, gate, case["gate"] == "first", None, 0.75, bias,
        RNG if threshold else None, threshold, outs.get("h"), outs.get("z"), outs["out"], partial, counters,
    )  # fmt: skip
    assert whole[:, n:].isnan().all()

    def formula(cast: Callable[[Tensor], Tensor], small: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        y, found = a.new_zeros(m, n, dtype=cast(a).dtype), {}
        if w is not None:
            y = y + cast(a) @ cast(w)
        if sums is not None and factor is not None:
            z = found["h"] = small(sums).sum(0)
            z = z * small(gate) if gate is not None and case["gate"] == "first" else z
            z = z * small(sigma) if sigma is not None else z
            z = z @ small(core) if core is not None else z
            z = z * small(gate) if gate is not None and case["gate"] == "last" else z
            found["z"] = torch.nn.functional.pad(z * 0.75, (0, padded(r, 16) - r))
            branch = cast(z * 0.75) @ cast(factor).t()
            if threshold:
                branch = branch * keep_mask(m, n, RNG, threshold).to(branch.dtype) * keep_scale(threshold)
            y = y + branch
        return found | {"out": y if bias is None else y + cast(bias)}

    exact, size = (lambda t: t.double()), (lambda t: t.double().abs())
    return outs, formula(exact, exact), formula(size, size), formula(lambda t: t.to(dtype), lambda t: t.float())


@pytest.mark.parametrize("case", cover(LINEAR | QUICK) + cover(LINEAR | ADVERSE_LINEAR), ids=case_name)
def test_small_linear_is_right_under_every_adversity(
    case: dict, record_property: Callable[[str, object], None]
) -> None:
    check(small_linear, case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", cover(LINEAR), ids=case_name)
def test_more_of_small_linear(case: dict) -> None:
    check(small_linear, case)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("small_shrink", {"a": torch.ones(33, 64, dtype=BF16)}, "a has 33 rows, expected 1 to 32"),
        ("small_shrink", {"factor": torch.ones(63, 4)}, "the number of rows of factor is 63, expected 64"),
        ("small_shrink", {"sums": torch.ones(2, 8, 5)}, "sums is 5, expected 4"),
        ("small_shrink", {"threshold": 9}, "rng_state"),
        ("small_shrink", {"control": torch.ones(4)}, "control must be"),
        ("small_linear", {"w": torch.ones(64, 9, dtype=BF16)}, "the number of columns of w is 9, expected 24"),
        ("small_linear", {"factor": None}, "sums and factor come together"),
        ("small_linear", {"factor": torch.ones(23, 4)}, "the number of rows of factor is 23, expected 24"),
        ("small_linear", {"sums": torch.ones(2, 8, 5)}, "sums is 5, expected 4"),
        ("small_linear", {"h": torch.ones(8, 5)}, "h is 5, expected 4"),
        ("small_linear", {"z": torch.ones(8, 4, dtype=BF16)}, "z is 4, expected 16"),
        ("small_linear", {"sigma": torch.ones(3)}, "the size of sigma is 3, expected 4"),
        ("small_linear", {"partial": torch.empty(65536, 8, 24)}, "65536 splits, expected less than 65536"),
        ("small_linear", {"partial": torch.ones(2, 8, 25)}, "partial is 25, expected 24"),
        ("small_linear", {"counters": None}, "counters must be"),
        ("small_linear", {"out": torch.ones(24, 8, dtype=BF16).t()}, "the rows of out must be contiguous"),
    ],
)  # fmt: skip
def test_what_would_read_out_of_bounds_is_refused(name: str, change: dict, message: str) -> None:
    a, factor, sums = torch.ones(8, 64, dtype=BF16), torch.ones(64, 4), torch.ones(2, 8, 4)
    arguments: dict = {
        "small_shrink": {"a": a, "factor": factor, "rng_state": None, "threshold": 0, "sums": sums, "control": None},
        "small_linear": {
            "a": a, "w": torch.ones(64, 24, dtype=BF16), "sums": sums, "factor": torch.ones(24, 4), "sigma": None,
            "core": None, "gate": None, "gate_first": False, "scale": None, "scale_value": 1.0, "bias": None,
            "rng_state": None, "threshold": 0, "h": None, "z": None, "out": torch.ones(8, 24, dtype=BF16),
            "partial": torch.ones(2, 8, 24), "counters": torch.zeros(1, dtype=torch.int32),
        },
    }[name]  # fmt: skip
    how = CudaEmulation()
    with pytest.raises(RuntimeError, match=message):
        how.call(name, *(arguments | change).values())
    assert not how.launches
