"""The one-launch forward of the CUDA backend, from its PTX: right, the same bits whoever takes which tile, replayed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from cover import case_name, cover
from emulated_cuda import CudaEmulation, cuda_emulation, why_not
from operands import RNG, cast, fused, operands
from test_cuda_kernels import BF16, F16, F32, MODES, emulated, packed, same_bits, unset
from torch import Tensor

from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

FORWARD = {
    "dtype": [BF16, F16],
    "shape": [(120, 264, 250), (100, 136, 248), (260, 72, 250), (136, 200, 128), (128, 24, 248)],
    "r": [1, 16, 17, 64, 100, 200],
    "middle": ["sigma", "core", "none"],
    "gate": [False, True],
    "bias": [True, False],
    "layout": ["plain", "strided"],
    "out": ["plain", "odd"],
    "dropout": [0.0, 0.1],
    "processors": [1, 2],
    "mode": ["late", "race"],
}
QUICK = {"shape": [(120, 264, 250), (100, 136, 248), (136, 200, 128), (128, 24, 248)], "r": [1, 17, 100]}
ADVERSE = {
    "dtype": [BF16], "shape": [(250, 72, 120), (136, 264, 128)], "r": [3, 130], "middle": ["sigma"], "gate": [False],
    "bias": [True], "layout": ["plain"], "out": ["plain"], "dropout": [0.0], "processors": [1, 2],
    "mode": [mode for mode in MODES if mode.startswith("adversarial")],
}  # fmt: skip


def control(rows: int) -> Tensor:
    return torch.zeros(1 + -(-rows // 128), dtype=torch.int32)


def forward(case: dict, how: CudaEmulation) -> tuple[dict[str, Tensor], ...]:
    """What the kernel writes, what it should, the formula on absolute values, and the same computed in the dtype."""
    (m, k, n), r, dtype = case["shape"], case["r"], case["dtype"]
    middle = "none" if case["middle"] == "core" and r > 17 else case["middle"]  # r^2 steps an element
    apart = k if case["layout"] == "plain" else k + 8
    x, w = ((torch.randn(rows, apart) / k**0.5).to(dtype)[:, :k] for rows in (m, n))
    u, v = torch.randn(k, r), torch.randn(n, r)
    sigma = torch.randn(r, dtype=torch.float64) if middle == "sigma" else None
    core = torch.randn(r, r).to(dtype) if middle == "core" else None
    gate = torch.rand(m, r) if case["gate"] else None
    bias = torch.randn(n).to(dtype) if case["bias"] else None
    threshold = threshold_of(case["dropout"])
    columns, rows = packed(u, v, dtype, CudaEmulation())
    y = unset(m, n + 5, dtype=dtype)[:, :n] if case["out"] == "odd" else unset(m, n, dtype=dtype)
    h, z = unset(m, r), unset(m, columns.shape[0], dtype=dtype)
    done = how.call(
        "forward", x, columns, r, sigma, core, gate, None, 0.75, RNG if threshold else None, threshold, w.t(), rows,
        bias, h, z, control(m), y,
    )  # fmt: skip
    assert done and [launch.kernel for launch in how.launches] == ["forward_kernel"]

    def formula(to: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        masked = to(x)
        if threshold:
            masked = masked * keep_mask(m, k, RNG, threshold) * keep_scale(threshold)
        hidden = masked @ to(columns[:r, :k].t())
        product = hidden * to(sigma) if sigma is not None else hidden
        product = product @ to(core) if core is not None else product
        product = product * to(gate) if gate is not None else product
        out = to(x) @ to(w).t() + (product * 0.75) @ to(rows[:, :r]).t()
        return {"h": hidden, "y": out if bias is None else out + to(bias)}

    truth, size = formula(lambda t: t.double()), formula(lambda t: t.double().abs())
    return {"h": h, "y": y}, truth, size, formula(lambda t: t.to(dtype))


@pytest.mark.parametrize("case", cover(FORWARD | QUICK) + cover(FORWARD | ADVERSE), ids=case_name)
def test_forward_is_right_under_every_adversity(case: dict, record_property: Callable[[str, object], None]) -> None:
    got, *reference = forward(case, emulated(case["mode"], record_property, processors=case["processors"]))
    if case["mode"] != "race":  # that is the plain schedule, watched
        torch.manual_seed(0)
        plain, *_ = forward(case, CudaEmulation(processors=case["processors"]))
        for name in plain:
            assert torch.equal(plain[name], got[name]), f"{name} has other bits under {case['mode']}"
    for name in got:
        results = [[result[name]] for result in (got, *reference)]
        assert_accurate(*results, case["dtype"] if name == "y" else F32, (name,))


@pytest.mark.slow
@pytest.mark.parametrize("case", cover(FORWARD), ids=case_name)
def test_more_of_forward(case: dict) -> None:
    got, *reference = forward(case, CudaEmulation(processors=case["processors"]))
    for name in got:
        results = [[result[name]] for result in (got, *reference)]
        assert_accurate(*results, case["dtype"] if name == "y" else F32, (name,))


def small_call(m: int = 260, k: int = 72, n: int = 120, r: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(BF16)  # noqa: E731
    columns, rows = torch.zeros(16, k, dtype=BF16), torch.zeros(n, 16, dtype=BF16)
    columns[:r], rows[:, :r] = draw(r, k), draw(n, r)
    return {"x": draw(m, k), "columns": columns, "w": draw(n, k).t(), "rows": rows}


def ran(o: dict[str, Tensor], how: CudaEmulation, of_control: Tensor, r: int = 3) -> tuple[Tensor, Tensor]:
    m, n = o["x"].shape[0], o["rows"].shape[0]
    h, z, y = unset(m, r), unset(m, 16, dtype=BF16), unset(m, n, dtype=BF16)
    sigma = torch.arange(1.0, r + 1)
    assert how.call("forward", o["x"], o["columns"], r, sigma, None, None, None, 1.0, None, 0, o["w"], o["rows"], None,
                    h, z, of_control, y)  # fmt: skip
    return h, y


@pytest.mark.parametrize("seed", range(6))
def test_whoever_takes_which_tile_the_bits_are_the_same(seed: int) -> None:
    """Three row groups, of which every z-tile comes before its y-tiles; fewer CTAs resident than the grid has."""
    o = small_call()
    plain = ran(o, CudaEmulation(processors=3), control(260))
    again = ran(o, CudaEmulation(processors=3, mode="adversarial", seed=seed), control(260))
    assert all(same_bits(a, b) for a, b in zip(plain, again, strict=True))


def test_a_layer_is_packed_and_then_one_launch() -> None:
    """Replayed as a captured graph does, over the same workspace with another x: pack zeroes ticket and counters anew."""
    low = cast(operands(250, 64, 120, 5), BF16, (F32,) * 3)
    u, v = low["u"], low["v"]
    columns, rows = torch.empty(16, 64, dtype=BF16), torch.empty(120, 16, dtype=BF16)
    workspace = torch.full((3,), 9, dtype=torch.int32)
    for seed in (1, 3, 4):
        x = torch.randn(250, 64).to(BF16)
        how = CudaEmulation(mode="adversarial", seed=seed, processors=2)
        how.call("pack", u, columns, False, v, rows, True, workspace)
        o = {"x": x, "columns": columns, "w": low["weight"].t(), "rows": rows}
        replayed = ran(o, how, workspace, r=5)
        alone = ran(o, CudaEmulation(processors=2), control(250), r=5)
        assert all(same_bits(a, b) for a, b in zip(replayed, alone, strict=True))
    with cuda_emulation(processors=2) as how:
        fused(low, backend="cuda")
    assert [launch.kernel for launch in how.launches] == ["pack_kernel", "forward_kernel"]


def test_two_calls_share_no_workspace() -> None:
    """Two streams: ticket and counters are of one call, so that calls which run at once cannot count each other's tiles."""
    low, seen = cast(operands(250, 64, 120, 5), BF16, (F32,) * 3), []
    with cuda_emulation(processors=2) as how:
        call = how.call

        def watched(name: str, *arguments: object) -> object:
            if name == "layer_forward":
                seen.append(arguments[-1])
            return call(name, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("svdkern.backends.cuda.call", watched)
            for _ in range(2):
                fused(low, backend="cuda")
    assert len({t.data_ptr() for t in seen}) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": 32}, "few rows"),
        ({"dtype": F32}, "float32"),
        ({"down": True}, "a transposed W"),
        ({"k": 70}, "rows that are not of whole 16 bytes"),
        ({"processors": 132}, "small tiles, of which every processor has some"),
        ({"shared": 48 << 10}, "little shared memory"),
    ],
)
def test_where_it_does_not_serve_nothing_is_launched(change: dict, why: str) -> None:
    k, dtype = change.get("k", 72), change.get("dtype", BF16)
    how = CudaEmulation(processors=change.get("processors", 1), shared=change.get("shared", 227 << 10))
    o = {name: t.to(dtype) for name, t in small_call(change.get("rows", 128), k).items()}
    if k % 8:
        o["columns"] = torch.zeros(16, 72, dtype=dtype)
    if change.get("down"):
        o["w"] = o["w"].contiguous()
    m = o["x"].shape[0]
    h, z, y = unset(m, 3), unset(m, 16, dtype=dtype), unset(m, 120, dtype=dtype)
    done = how.call("forward", o["x"], o["columns"], 3, None, None, None, None, 1.0, None, 0, o["w"], o["rows"], None,
                    h, z, control(m), y)  # fmt: skip
    assert not done and not how.launches, why


def test_forward_refuses_a_control_that_is_too_small() -> None:
    how = CudaEmulation(processors=1)
    with pytest.raises(RuntimeError, match="control must be a contiguous int32 tensor of at least 4 elements"):
        ran(small_call(), how, torch.zeros(3, dtype=torch.int32))
    assert not how.launches
