"""The Triton backend against float64, its kernels executed from their own PTX (docs/emulator.md).

A pairwise cover: every two values of any two columns of FACTORS meet in some case. Each case is a whole svd_linear, forward and
backward, under one of the emulator's adversities; its bits are those of the plain schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from cover import case_name, cover
from emulated import emulation, tritons
from operands import RNG, cast, fused, operands, run
from svdkern.triton_kernels import configs

from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

pytestmark = pytest.mark.emulator

MASKS = {
    "all": ("x", "u", "sigma", "v", "bias", "scale", "core", "gate"),
    "factors": ("u", "sigma", "v", "core"),
    "sigma": ("sigma", "core", "scale", "gate"),
    "v": ("v",),
    "x": ("x",),
    "u": ("u",),
}
FACTORS = {
    "gpu": ["80", "90", "90 pointers", "80 old", "90 old", "90 pointers old"],
    "dtype": [torch.bfloat16, torch.float16],
    "shape": [(136, 64, 72), (129, 100, 130), (40, 264, 33), (300, 72, 136), (7, 96, 80), (1, 200, 129)],
    "r": [1, 3, 8, 16, 17, 64, 100, 128, 256],
    "form": ["sigma", "core", "none"],
    "factors": [torch.float32, None],
    "gate": ["none", "table", "top-k"],
    "dropout": [0.0, 0.1],
    "bias": [True, False],
    "wanted": list(MASKS),
    "layout": ["plain", "strided x", "transposed factors", "3-d"],
    "super-groups": ["wide", "narrow"],
    "mode": [
        "late",
        "race",
        "adversarial 0",
        "adversarial 1",
        "adversarial 2",
        "adversarial 3",
        "adversarial 4",
        "adversarial 5",
    ],
}


CASES = cover(FACTORS)


def of(case: dict, mode: str) -> dict:
    """Options of the emulation."""
    arch = int(case["gpu"][:2])
    version = tritons()[1] if "old" in case["gpu"] else None
    name, _, seed = mode.partition(" ")
    return {"arch": arch, "version": version, "mode": name, "seed": int(seed or 0)}


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_layer_is_right_under_every_adversity(
    case: dict, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    check_case(case, monkeypatch, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_other_covers(seed: int, record_property: Callable[[str, object], None]) -> None:
    """The whole product has millions of cases; these are other few of them, in which every pair of values meets again."""
    for case in cover(FACTORS, seed):
        with pytest.MonkeyPatch.context() as patch:
            torch.manual_seed(seed)
            try:
                check_case(case, patch, record_property)
            except Exception as error:
                raise AssertionError(f"case {case_name(case)}: {error}") from error


def check_case(case: dict, monkeypatch: pytest.MonkeyPatch, record: Callable[[str, object], None]) -> None:
    """One layer, forward and backward: the same bits under the case's adversity as without, and right."""
    if "old" in case["gpu"] and len(tritons()) < 2:
        pytest.skip("needs a second Triton: pip install --no-deps --target <environment>/triton-3.6.0 triton==3.6.0")
    if "pointers" in case["gpu"]:
        monkeypatch.setattr("svdkern.backends.triton._tma", lambda arch, a, weight: False)
    (m, k, n), r, dtype = case["shape"], case["r"], case["dtype"]
    o = operands(m, k, n, r, form=case["form"], bias=case["bias"])
    o["x"], o["weight"] = o["x"] / k**0.5, o["weight"] / k**0.5
    dy = torch.randn(m, n).double()
    if case["layout"] == "3-d":
        o["x"], dy = o["x"].view(1, m, k), dy.view(1, m, n)
    if case["super-groups"] == "narrow":  # one row group each: sums over rows have many parts
        wide = configs.training
        monkeypatch.setattr(configs, "training", lambda *size: wide(*size)._replace(HEIGHT=1))
    options: dict = {}
    mask = None
    if case["dropout"]:
        options |= {"dropout_p": case["dropout"], "rng_state": RNG}
        threshold = threshold_of(case["dropout"])
        mask = (keep_mask(m, k, RNG, threshold).double() * keep_scale(threshold)).view(o["x"].shape)
    rows_of = None
    if case["gate"] != "none":
        o["gate"], by_gate, rows_of = gates(case["gate"], o["x"].shape[:-1], r)
    wanted = tuple(name for name in MASKS[case["wanted"]] if o.get(name) is not None)

    def expected(leaves):  # type: ignore[no-untyped-def]
        x, of_x = leaves["x"], lambda t: t.to(leaves["x"].dtype)
        h = (x if mask is None else x * of_x(mask)) @ of_x(leaves["u"])
        z = h if leaves["sigma"] is None else h * of_x(leaves["sigma"])
        z = z if leaves["core"] is None else h @ of_x(leaves["core"])
        z = z if rows_of is None else z * of_x(rows_of(leaves["gate"])).view(z.shape)
        y = x @ leaves["weight"].t() + of_x(leaves["scale"]) * (z @ of_x(leaves["v"]).t())
        return y if leaves["bias"] is None else y + leaves["bias"]

    def fused_call(leaves):  # type: ignore[no-untyped-def]
        more = {} if rows_of is None else by_gate(leaves["gate"])
        return fused(leaves, backend="triton", **options, **more)

    low = cast(o, dtype, (case["factors"] or dtype,) * 3)
    if case["layout"] == "strided x":
        low["x"] = torch.cat([low["x"], low["x"]], 1)[:, :k]
    elif case["layout"] == "transposed factors":
        low["u"], low["v"] = low["u"].t().contiguous().t(), low["v"].t().contiguous().t()
    exact = {name: None if t is None else t.double() for name, t in low.items()}
    results = []
    for mode in ("convergent", case["mode"]):
        with emulation(**of(case, mode), record=record) as how:
            results.append(run(fused_call, low, dy.to(dtype), wanted))
    assert how.launches or (case["form"] == "core" and r > 128)  # that one is PyTorch's
    for name, plain, again in zip(("y", *wanted), *results, strict=True):
        assert torch.equal(plain, again), f"{name} has other bits under {case['mode']}"
    truth = run(expected, exact, dy.to(dtype), wanted)
    size = run(
        expected, {name: None if t is None else t.abs() for name, t in exact.items()}, dy.to(dtype).abs(), wanted
    )
    assert_accurate(results[0], truth, size, run(expected, low, dy.to(dtype), wanted), dtype, ("y", *wanted))


def gates(kind: str, lead: torch.Size, r: int):  # type: ignore[no-untyped-def]
    """(values, the arguments of svd_linear they make, the gate of every row)."""
    if kind == "table":
        group = torch.randint(0, 3, lead)
        return (
            torch.rand(3, r).double(),
            lambda gate: {"gate": gate, "group": group},
            lambda gate: gate[group.reshape(-1)],
        )
    index = torch.rand(*lead, r).argsort(-1)[..., : max(1, r // 2)].contiguous()

    def rows(values):  # type: ignore[no-untyped-def]
        flat = values.reshape(-1, values.shape[-1])
        return flat.new_zeros(flat.shape[0], r).scatter(1, index.reshape(flat.shape), flat)

    return torch.rand(index.shape).double(), lambda values: {"gate": (index, values)}, rows
