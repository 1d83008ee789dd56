"""The CUDA kernels one by one, from the PTX that nvcc makes of them, through their own operators and launchers, against float64.

Every case runs twice: by the plain schedule and under one adversity; the bits must be the same. A pairwise cover of what the
kernels take: shapes with tails, strides, dtypes, ranks on both sides of every bucket's edge.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from cover import case_name, cover
from emulated_cuda import CudaEmulation, why_not
from operands import RNG
from torch import Tensor

from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

MODES = ["late", "race", "adversarial 0", "adversarial 1", "adversarial 2", "adversarial 3", "adversarial 4"]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def emulated(mode: str, record: Callable[[str, object], None] | None = None, **device: int) -> CudaEmulation:
    name, _, seed = mode.partition(" ")
    return CudaEmulation(mode=name, seed=int(seed or 0), record=record, **device)


def unset(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """What a kernel must write all of."""
    return torch.full(shape, float("nan"), dtype=dtype)


def padded(n: int, to: int) -> int:
    return -(-n // to) * to


def packed(u: Tensor, v: Tensor, dtype: torch.dtype, how: CudaEmulation) -> tuple[Tensor, Tensor]:
    """u as columns (R, K), v as rows (N, R)."""
    R = padded(u.shape[1], 16)
    columns, rows = unset(R, padded(u.shape[0], 8), dtype=dtype), unset(v.shape[0], R, dtype=dtype)
    how.call("pack", u, columns, False, v, rows, True, None)
    return columns, rows


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---------------------------------------------------------------------------------------------------------------- pack

PACK = cover(
    {
        "dtype": [BF16, F16, F32],
        "from": [F32, BF16, F16, torch.float64],
        "lengths": [(64, 64), (1, 130), (200, 7)],
        "r": [1, 16, 17],
        "layout": ["row-major", "column-major", "strided"],
        "rows": [(False, True), (True, False)],
        "mode": MODES,
    }
)


@pytest.mark.parametrize("case", PACK, ids=case_name)
def test_pack_casts_pads_and_turns(case: dict, record_property: Callable[[str, object], None]) -> None:
    r, dtype = case["r"], case["dtype"]
    factors, outs, wanted = [], [], []
    for length, rows in zip(case["lengths"], case["rows"], strict=True):
        whole = torch.randn(2 * length, 2 * r, dtype=torch.float64).to(case["from"])
        factor = {"row-major": whole[:length, :r].contiguous(), "column-major": whole[:length, :r].t().contiguous().t(),
                  "strided": whole[::2, ::2]}[case["layout"]]  # fmt: skip
        factors.append(factor)
        R = padded(r, 16)
        want = torch.zeros((length, R) if rows else (R, padded(length, 8)), dtype=dtype)
        (want if rows else want.t())[:length, :r] = factor.to(torch.float32).to(dtype)
        outs.append(torch.full_like(want, float("nan")))
        wanted.append(want)
    control = torch.full((300,), 7, dtype=torch.int32)
    first, second = case["rows"]
    how = emulated(case["mode"], record_property)
    how.call("pack", factors[0], outs[0], first, factors[1], outs[1], second, control)
    assert all(same_bits(out, want) for out, want in zip(outs, wanted, strict=True))
    assert not control.any()


# -------------------------------------------------------------------------------------------------------------- shrink

SHRINK = {
    "dtype": [BF16, F16],
    "shape": [(136, 264), (40, 101), (64, 64), (7, 40), (1, 129), (70, 520)],
    "r": [1, 3, 16, 17, 64, 128, 200],
    "middle": ["sigma", "core", "core transposed", "none"],
    "gate": ["none", "last", "first"],
    "layout": ["plain", "strided", "odd", "misaligned"],
    "dropout": [0.0, 0.1],
    "splits": [1, 2, 5],
    "wanted": ["h", "z", "h z"],
    "mode": ["late", "race"],
}
QUICK = {"shape": [(136, 264), (40, 101), (1, 129)], "r": [1, 16, 17, 64], "layout": ["plain", "odd"], "splits": [1, 3]}
FLOAT = {  # many times the instructions: no tensor cores
    "dtype": [F32], "shape": [(40, 101), (7, 40)], "r": [1, 17], "middle": ["sigma", "none"], "gate": ["last"],
    "layout": ["plain", "misaligned"], "splits": [1, 2], "wanted": ["h z"],
}  # fmt: skip
ADVERSE = {  # one warp after another, unfairly: what stands between CTAs and between warps, on small tiles
    "shape": [(70, 200), (7, 136)], "r": [3, 17], "middle": ["sigma"], "gate": ["none"], "layout": ["plain", "odd"],
    "splits": [2, 3], "wanted": ["h z"], "mode": [mode for mode in MODES if mode.startswith("adversarial")],
}  # fmt: skip


def shrunk(case: dict, how: CudaEmulation) -> tuple[dict[str, Tensor], ...]:
    """What the kernel writes, what it should, the formula on absolute values, and the same computed in the dtype."""
    (m, k), r, dtype = case["shape"], case["r"], case["dtype"]
    middle = "none" if case["middle"].startswith("core") and r > 17 else case["middle"]  # r^2 steps an element
    stride, start = {
        "plain": (k, 0),
        "strided": (padded(k, 8) + 8, 0),
        "odd": (k + 3, 0),
        "misaligned": (padded(k, 8), 1),
    }[case["layout"]]
    memory = (torch.randn(m * stride + start) / k**0.5).to(dtype)
    x = torch.as_strided(memory, (m, k), (stride, 1), start)
    u, v = torch.randn(k, r), torch.randn(24, r)
    sigma = torch.randn(r, dtype=torch.float64) if middle == "sigma" else None
    core = torch.randn(r, r).to(dtype) if middle.startswith("core") else None
    gate = torch.rand(m, r) if case["gate"] != "none" else None
    threshold = threshold_of(case["dropout"])
    columns, _ = packed(u, v, dtype, CudaEmulation())
    R = columns.shape[0]
    outs = {"h": unset(m, r), "z": unset(m, R, dtype=dtype)}
    outs = {name: out for name, out in outs.items() if name in case["wanted"]}
    splits = case["splits"]
    partial = unset(splits, m, R) if splits > 1 else None
    counters = torch.zeros(-(-m // 64) * -(-r // 128), dtype=torch.int32) if splits > 1 else None
    used_core = core.t() if core is not None and "transposed" in middle else core
    how.call(
        "shrink", x, columns, r, sigma, used_core, gate, case["gate"] == "first", None, 0.75,
        RNG if threshold else None, threshold, outs.get("h"), outs.get("z"), partial, counters,
    )  # fmt: skip

    def formula(cast: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        masked = cast(x)
        if threshold:
            masked = masked * keep_mask(m, k, RNG, threshold) * keep_scale(threshold)
        h = masked @ cast(columns[:r, :k].t())
        z = h * cast(gate) if gate is not None and case["gate"] == "first" else h
        z = z * cast(sigma) if sigma is not None else z
        z = z @ cast(used_core) if used_core is not None else z
        z = z * cast(gate) if gate is not None and case["gate"] == "last" else z
        z = torch.cat([z * 0.75, z.new_zeros(m, R - r)], 1)
        return {name: value for name, value in (("h", h), ("z", z)) if name in outs}

    truth, size = formula(lambda t: t.double()), formula(lambda t: t.double().abs())
    return outs, truth, size, formula(lambda t: t.to(dtype))


def check_shrink(case: dict, record: Callable[[str, object], None] | None = None) -> None:
    got, *reference = shrunk(case, emulated(case["mode"], record))
    if case["mode"] != "race":  # that is the plain schedule, watched
        torch.manual_seed(0)
        plain, *_ = shrunk(case, CudaEmulation())
        for name in plain:
            assert same_bits(plain[name], got[name]), f"{name} has other bits under {case['mode']}"
    for name in got:
        results = [[result[name]] for result in (got, *reference)]
        assert_accurate(*results, case["dtype"] if name == "z" else F32, (name,))
    if "z" in got:
        assert not got["z"][:, case["r"] :].any()


@pytest.mark.parametrize("case", cover(SHRINK | QUICK) + cover(SHRINK | FLOAT) + cover(SHRINK | ADVERSE), ids=case_name)
def test_shrink_is_right_under_every_adversity(case: dict, record_property: Callable[[str, object], None]) -> None:
    check_shrink(case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", cover(SHRINK) + cover(SHRINK | {"dtype": [F32]}), ids=case_name)
def test_more_of_shrink(case: dict) -> None:
    check_shrink(case)


def test_dropout_takes_the_bits_of_every_other_backend() -> None:
    """The kernel's own mask, bit by bit: shrink of ones with the identity, columns 0 to 127 of a few rows."""
    for dtype in (BF16, F32):
        x, u = torch.ones(5, 128, dtype=dtype), torch.eye(128)
        columns, _ = packed(u, u, dtype, CudaEmulation())
        h, threshold = unset(5, 128), threshold_of(0.3)
        CudaEmulation().call(
            "shrink", x, columns, 128, None, None, None, False, None, 1.0, RNG, threshold, h, None, None, None
        )
        keep = keep_mask(5, 128, RNG, threshold)
        assert torch.equal(h != 0, keep)
        assert torch.equal(h[keep], torch.full((int(keep.sum()),), keep_scale(threshold)))


def test_what_is_dropped_does_not_count_whatever_it_is() -> None:
    threshold = threshold_of(0.5)
    keep = keep_mask(8, 64, RNG, threshold)
    x = torch.where(keep, 1.0, float("inf")).to(BF16)
    columns, _ = packed(torch.ones(64, 1), torch.ones(8, 1), BF16, CudaEmulation())
    h = unset(8, 1)
    CudaEmulation().call(
        "shrink", x, columns, 1, None, None, None, False, None, 1.0, RNG, threshold, h, None, None, None
    )
    assert torch.equal(h[:, 0], keep.sum(1) * 2.0)


def test_rows_lie_where_their_64_bit_strides_say() -> None:
    """Rows 2^31 elements apart, of which memory has three: an offset in 32 bits would land elsewhere."""
    import mmap

    stride = 1 << 31
    with mmap.mmap(-1, 2 * (2 * stride + 64)) as memory:  # pages come as they are touched
        whole = torch.frombuffer(memory, dtype=BF16)
        x = torch.as_strided(whole, (3, 64), (stride, 1))
        x.copy_(torch.randn(3, 64))
        columns, _ = packed(torch.randn(64, 4), torch.ones(8, 4), BF16, CudaEmulation())
        h, near = unset(3, 4), unset(3, 4)
        for rows, out in ((x, h), (x.contiguous(), near)):
            CudaEmulation().call(
                "shrink", rows, columns, 4, None, None, None, False, None, 1.0, None, 0, out, None, None, None
            )
        assert torch.equal(h, near)
        del whole, x, rows


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, "the rank|the size of sigma"),
        ({"sigma": torch.ones(3)}, "the size of sigma is 3, expected 4"),
        ({"gate": torch.ones(2, 4)}, "gate is 2, expected 8"),
        ({"gate": torch.ones(4, 8).t()}, "gate is not contiguous"),
        ({"h": torch.ones(8, 5)}, "h is 5, expected 4"),
        ({"z": torch.ones(8, 16)}, "z must have the dtype"),
        ({"threshold": 65536}, "threshold is 65536"),
        ({"threshold": 9}, "rng_state"),
        ({"partial": torch.ones(2, 8, 16)}, "counters must be"),
        ({"partial": torch.ones(2, 8, 16), "counters": torch.zeros(1)}, "counters must be a contiguous int32"),
        ({"factor": torch.ones(16, 32, dtype=BF16)}, "factor is not as pack makes it"),
        ({"factor": torch.ones(32, 64, dtype=BF16)}, "the number of rows of factor is 32, expected 16"),
        ({"factor": torch.ones(16, 64, dtype=F16)}, "factor must have the dtype of a"),
        ({"a": torch.ones(64, 8, dtype=BF16).t()}, "the rows of a must be contiguous"),
        ({"a": torch.ones(8, 64, dtype=torch.int32)}, "a has a dtype without kernels"),
        ({"core": torch.ones(200, 200), "r": 200, "sigma": None, "factor": torch.ones(208, 64, dtype=BF16)},
         "expected at most 128"),
    ],
)  # fmt: skip
def test_shrink_refuses_what_would_read_out_of_bounds(change: dict, message: str) -> None:
    arguments: dict = {
        "a": torch.ones(8, 64, dtype=BF16), "factor": torch.ones(16, 64, dtype=BF16), "r": 4, "sigma": torch.ones(4),
        "core": None, "gate": None, "gate_first": False, "scale": None, "scale_value": 1.0, "rng_state": None,
        "threshold": 0, "h": None, "z": None, "partial": None, "counters": None,
    }  # fmt: skip
    how = CudaEmulation()
    with pytest.raises(RuntimeError, match=message):
        how.call("shrink", *(arguments | change).values())
    assert not how.launches
