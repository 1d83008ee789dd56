"""One layer's benchmark: cases, providers, errors. Nothing here is timed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench import cases, ceilings, linear, results  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.providers import DTYPES, PROVIDERS, adapted, make_operands, relative_error, truth  # noqa: E402
from svdkern import cli  # noqa: E402

CPU = torch.device("cpu")


def test_shapes_parse_and_say_what_is_expected() -> None:
    assert Case.parse("1024x576x1536x16") == Case(1024, 576, 1536, 16)
    for wrong in ("12", "1x2x3", "axbxcxd", "0x1x1x1"):
        with pytest.raises(Exception, match="expected MxKxNxr|at least 1"):
            Case.parse(wrong)


def test_work_and_traffic_of_a_case() -> None:
    case = Case(8, 16, 32, 4)
    base, skinny = 2 * 8 * 16 * 32, 2 * 8 * 4 * 48
    assert case.flops("fwd") == base + skinny and case.flops("fwd_bwd") == 2 * base + 3 * skinny
    assert Case(8, 16, 32, 4, mask="x").flops("fwd_bwd") == 2 * base + 2 * skinny
    assert Case(8, 16, 32, 4, mask="uv").flops("fwd_bwd") == base + 3 * skinny
    assert case.traffic("fwd", 2) == 2 * (16 * 32 + 8 * 48) + 4 * 48 * 4
    assert case.traffic("fwd_bwd", 2) > Case(8, 16, 32, 4, mask="x").traffic("fwd_bwd", 2) > case.traffic("fwd", 2)


def test_every_set_is_listed_once() -> None:
    everything = list(cases.groups(tuple(cases.SETS)))
    assert len(everything) == len(set(everything)) > 60
    assert {mode for _, _, mode in everything} == set(cases.MODES)


RIVALS = sorted(
    set(PROVIDERS)
    - {"compile", "svdkern", "svdkern-eager", "svdkern-cpu", "svdkern-triton", "svdkern-cuda", "frozen_svdkern"}
)
OURS = ["svdkern", "svdkern-cpu", "svdkern-eager", "frozen_svdkern"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mask", cases.MASKS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", RIVALS + OURS)
def test_every_provider_computes_the_layer(name: str, dtype: str, mask: str, dropout: float) -> None:
    if dropout and (name == "materialised" or not adapted(name)):
        pytest.skip("has no dropout")
    if name in ("frozen_svdkern", "svdkern-cpu") and not hasattr(torch.ops.svdkern, "_cpu_linear"):
        pytest.skip("needs the compiled extension")
    operands = make_operands(Case(7, 24, 40, 3, dropout, mask), DTYPES[dtype], CPU)[0]
    layer = PROVIDERS[name](operands)
    exact = truth(operands, adapter=adapted(name), mask=layer.mask(3))
    assert linear.call_error(layer, "fwd_bwd", exact, 3) < (1e-6 if dtype == "fp32" else 2e-2)
    wanted = {"x": {"dx"}, "uv": {"du", "dv"}, "xuv": {"dx", "du", "dv"}}[mask]
    assert set(layer.leaves) == (wanted if adapted(name) else wanted & {"dx"})


def test_truth_is_what_autograd_says_in_fp64() -> None:
    o = make_operands(Case(5, 6, 7, 2, 0.5), torch.float64, CPU)[0]
    d = torch.rand(5, 6, dtype=torch.float64).round() * 2
    x, u, v = (t.detach().double().requires_grad_() for t in (o.x, o.u, o.v))
    y = x @ o.weight.t() + o.scale * ((d * x) @ u) @ v.t()
    gradients = torch.autograd.grad(y, (x, u, v), o.dy)
    for name, value in truth(o, adapter=True, mask=d).items():
        expected = dict(zip(("y", "dx", "du", "dv"), (y, *gradients), strict=True))[name]
        torch.testing.assert_close(value, expected.detach())


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0])) == pytest.approx(0.25)
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == pytest.approx(0.5)


LINEAR = ["--shapes", "4x16x8x2", "--dtypes", "fp32", "--modes", "fwd", "--providers", "frozen", "eager",
          "--quick", "--seconds", "0.01", "--device", "cpu", "--json", "-"]  # fmt: skip


@pytest.fixture
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {("fma", dtype): 1e11 for dtype in DTYPES} | {("read", None): 1e10}
    monkeypatch.setattr(ceilings, "measure", lambda device: values)


@pytest.mark.usefixtures("no_ceilings")
def test_linear_writes_complete_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "linear", *LINEAR]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["provider"] for r in rows] == ["frozen", "eager"]
    assert all(tuple(r) == results.fields("linear") and r["status"] == "ok" for r in rows)
    assert rows[0]["ratio_to_frozen"] == 1.0 and 0 < rows[0]["floor_s"] < rows[1]["floor_s"]
    assert rows[1]["err_vs_fp64"] <= rows[1]["err_limit"]


class Graphs:
    """In torch.cuda's place: a graph holds the calls that were made while it was captured."""

    CUDAGraph = list
    now: list[int] | None = None

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self) -> Graphs.Stream:
        return self.Stream()

    def stream(self, stream: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: list[int], pool: str) -> Iterator[None]:
        assert pool == "pool"
        self.now = graph
        yield
        self.now = None


def test_graphs_are_captured_after_a_call_and_replayed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph a layer of the rotation, each with that layer's call alone."""
    cuda, eager, replayed = Graphs(), [], []

    class Graph(list):
        def replay(self) -> None:
            replayed.extend(self)

    cuda.CUDAGraph = Graph
    monkeypatch.setattr(linear.torch, "cuda", cuda)
    monkeypatch.setattr(linear.torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    class Layer:
        def __init__(self, number: int) -> None:
            self.number = number

        def backward(self) -> None:
            (eager if cuda.now is None else cuda.now).append(self.number)

    call = linear.captured([Layer(i) for i in range(3)], "fwd_bwd")
    assert eager == [0, 1, 2] and replayed == []
    for i in range(5):
        call(i)
    assert replayed == [0, 1, 2, 0, 1] and eager == [0, 1, 2]


def test_graphs_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        linear.main([*LINEAR, "--graph"])
    assert "--graph needs --device cuda, not cpu" in capsys.readouterr().err


@pytest.mark.usefixtures("no_ceilings")
def test_a_provider_that_fails_is_a_row_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(PROVIDERS["eager"], "forward", broken)
    linear.main(LINEAR)
    frozen, eager = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert frozen["status"] == "ok"
    assert (eager["status"], eager["median_s"], eager["reason"]) == ("failed", None, "RuntimeError: no such kernel")


@pytest.mark.usefixtures("no_ceilings")
@pytest.mark.parametrize("how", ["raises", "wrong", "beyond"])
def test_svdkern_failing_is_a_failure_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    forward = PROVIDERS["svdkern-eager"].forward

    def broken(self: Any) -> torch.Tensor:
        if how == "raises":
            raise RuntimeError("no such kernel")
        return forward(self) * (2.0 if how == "wrong" else 1 + 1e-5)

    monkeypatch.setattr(PROVIDERS["svdkern-eager"], "forward", broken)
    assert linear.main([*(a if a != "eager" else "svdkern-eager" for a in LINEAR)]) == 1
    assert "1 results of svdkern are wrong or missing" in capsys.readouterr().err


@pytest.mark.usefixtures("no_ceilings")
def test_slow_half_precision_is_skipped_and_compared_with_fp32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = {"frozen": 50.0, "eager": 0.0}
    monkeypatch.setattr(linear, "estimated_seconds", lambda name, *_: slow[name])
    linear.main(["8x16x8x2" if a == "4x16x8x2" else "bf16" if a == "fp32" else a for a in LINEAR])
    rows = {r["provider"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["frozen"]["status"] == "skipped" and "50 s" in rows["frozen"]["reason"]
    assert rows["frozen_fp32"]["dtype"] == "bf16" and rows["frozen_fp32"]["ratio_to_frozen"] == 1.0
    assert rows["eager"]["ratio_to_frozen"] is not None and "fp32" in rows["eager"]["reason"]


def test_one_slow_call_leaves_no_provider_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the frozen layer at 2048x2048x2048 was left out, and every ratio was to fp32."""
    seconds = iter([0.2, 0.2, 0.004])
    monkeypatch.setattr(linear.timing, "least_seconds", lambda call, enough: min(next(seconds) for _ in range(3)))
    operands = make_operands(Case(40, 16, 8, 2), torch.bfloat16, CPU)[0]  # estimated from 4 rows, a tenth
    assert linear.estimated_seconds("frozen", operands, "fwd", 0.5) == pytest.approx(0.04)


def test_what_a_call_costs_without_rows_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that works on the weight in every call takes as long for four rows as for one."""
    seconds = iter([0.5, 0.5])
    monkeypatch.setattr(linear.timing, "least_seconds", lambda call, enough: next(seconds))
    operands = make_operands(Case(4000, 16, 8, 2), torch.bfloat16, CPU)[0]
    assert linear.estimated_seconds("materialised", operands, "fwd", 5.0) == pytest.approx(0.5)
