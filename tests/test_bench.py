"""The benchmarks' own logic: statistics, rotation, result files, tables. Nothing here is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench import harness, linear, report  # noqa: E402
from bench.linear_providers import PROVIDERS, truth  # noqa: E402


def row(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = dict.fromkeys(harness.LINEAR_FIELDS)
    fields |= {
        "bench": "linear",
        "provider": "frozen",
        "device": "cpu",
        "isa": "avx2",
        "dtype": "fp32",
        "factor_dtype": "fp32",
        "M": 8,
        "K": 16,
        "N": 32,
        "r": 4,
        "mode": "fwd_bwd",
        "median_s": 1e-3,
        "n": 7,
        "ratio_to_frozen": 1.0,
        "commit": "0123abc",
        "dirty": False,
        "torch": "2.13.0",
        "machine": "Some CPU(R) @ 3 GHz, 2 cores",
        "threads": 2,
        "status": "ok",
    }
    return fields | changes


class FakeClock:
    """Calls last what the test says, so that nothing depends on the machine."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.order: list[tuple[str, int, int]] = []

    def __call__(self, call: Any, first: int, calls: int) -> float:
        name = call(first)
        self.order.append((name, first, calls))
        return self.seconds[name]


def test_timing_takes_median_and_percentiles() -> None:
    timing = harness.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.median_s, timing.p20_s, timing.p80_s, timing.n) == (3.5, 2.0, 5.0, 6)
    with pytest.raises(ValueError, match="no samples"):
        harness.Timing.of([])


def test_interleave_runs_everyone_in_every_round_and_rotates_the_order() -> None:
    clock = FakeClock({"a": 0.1, "b": 0.2, "c": 0.3})
    calls = {name: (lambda i, name=name: name) for name in "abc"}
    timings = harness.interleave(calls, seconds=1.9, min_rounds=2, warmup=1, clock=clock)
    assert {name: timing.n for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = [name for name, _, _ in clock.order][3:]
    assert rounds == list("abc" + "bca" + "cab")
    assert timings["b"].median_s == pytest.approx(0.2)
    # The running number never repeats: every call gets the next inputs of the rotation.
    assert [first for name, first, _ in clock.order if name == "a"] == [0, 1, 2, 3]


def test_interleave_lets_a_call_settle_before_its_samples() -> None:
    clock = FakeClock({"a": 0.1, "b": 0.1})
    calls = {name: (lambda i, name=name: name) for name in "ab"}
    timings = harness.interleave(calls, seconds=1.6, min_rounds=1, warmup=1, settle=1, in_a_row=3, clock=clock)
    assert [name for name, _, _ in clock.order][2:] == list("aaaabbbb" + "bbbbaaaa")
    assert [first for name, first, _ in clock.order if name == "a"] == list(range(9))
    assert {name: timing.n for name, timing in timings.items()} == {"a": 6, "b": 6}


def test_interleave_repeats_short_calls_within_a_sample() -> None:
    clock = FakeClock({"a": 1e-5})
    harness.interleave({"a": lambda i: "a"}, seconds=0.01, sample_seconds=1e-3, min_rounds=1, clock=clock)
    assert clock.order[-1][2] == 100


def test_interleave_keeps_within_its_rounds() -> None:
    clock = FakeClock({"a": 10.0})
    assert harness.interleave({"a": lambda i: "a"}, seconds=1, min_rounds=3, clock=clock)["a"].n == 3
    clock = FakeClock({"a": 0.01})
    assert harness.interleave({"a": lambda i: "a"}, seconds=100, max_rounds=8, clock=clock)["a"].n == 8


@pytest.mark.parametrize(
    ("seconds", "expected", "tries"),
    [([0.1], 0.1, 1), ([9.0, 0.1], 0.1, 2), ([9.0, 3.0, 5.0, 4.0], 3.0, 4)],
    ids=["fast", "first call slow", "slow"],
)
def test_the_least_of_a_few_calls_decides_what_is_too_slow(seconds: list[float], expected: float, tries: int) -> None:
    asked: list[int] = []

    def clock(call: Any, first: int, calls: int) -> float:
        asked.append(first)
        return seconds[first]

    assert harness.least_seconds(lambda i: None, 1.0, clock=clock) == expected
    assert len(asked) == tries


@pytest.mark.parametrize(("size", "expected"), [(1000, 1), (1 << 20, 96), (64 << 20, 8), (1 << 30, 2)])
def test_rotation_exceeds_the_cache_where_the_layer_does(size: int, expected: int) -> None:
    assert harness.rotation_length(size) == expected


def test_relative_error() -> None:
    assert harness.relative_error(torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0])) == pytest.approx(0.25)
    assert harness.relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == pytest.approx(0.5)


def test_checked_names_missing_and_unknown_fields() -> None:
    assert list(harness.checked(row(), harness.LINEAR_FIELDS)) == list(harness.LINEAR_FIELDS)
    incomplete = row(extra=1)
    del incomplete["isa"]
    with pytest.raises(ValueError, match=r"missing fields \['isa'\] and unknown fields \['extra'\]"):
        harness.checked(incomplete, harness.LINEAR_FIELDS)


def test_result_files_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    harness.write_atomically(path, harness.to_jsonl([row(), row(provider="eager")]))
    assert [r["provider"] for r in harness.read_jsonl(path)] == ["frozen", "eager"]
    assert [p.name for p in path.parent.iterdir()] == ["results.jsonl"]
    with pytest.raises(ValueError, match="JSON compliant"):
        harness.to_jsonl([row(median_s=float("nan"))])
    path.write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(ValueError, match=r"results\.jsonl:2"):
        harness.read_jsonl(path)


def test_machine_id_is_a_folder_name_and_tells_a_forced_cpu() -> None:
    assert harness.machine_id(row()) == "some-cpu-3-ghz-2-cores-avx2"
    forced = harness.machine_id(row(machine="Some CPU, 2 cores (ATEN_CPU_CAPABILITY=avx2)"))
    assert forced == "some-cpu-2-cores-avx2-forced"


def test_machine_names_the_variables_that_force_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in harness.FORCED_ISA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "=" not in harness.machine("cpu")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "ATEN_CPU_CAPABILITY=avx2" in harness.machine("cpu")


def test_shapes_parse_and_say_what_is_expected() -> None:
    assert linear.Shape.parse("1024x576x1536x16") == linear.Shape(1024, 576, 1536, 16)
    for wrong in ("12", "1x2x3", "axbxcxd", "0x1x1x1"):
        with pytest.raises(Exception, match="expected MxKxNxr|at least 1"):
            linear.Shape.parse(wrong)


RIVALS = sorted(set(PROVIDERS) - {"compile", "svdkern", "svdkern-eager", "svdkern-cpu"})
OURS = ["svdkern", "svdkern-eager"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", RIVALS + OURS)
def test_every_provider_computes_the_layer(name: str, dtype: str) -> None:
    operands = linear.make_operands(linear.Shape(7, 24, 40, 3), linear.DTYPES[dtype], torch.device("cpu"), 1)[0]
    exact = truth(operands, adapted=not name.startswith("frozen"))
    error = linear.call_error(PROVIDERS[name](operands), "fwd_bwd", exact)
    assert error < (1e-6 if dtype == "fp32" else 2e-2)


def test_truth_is_what_autograd_says_in_fp64() -> None:
    o = linear.make_operands(linear.Shape(5, 6, 7, 2), torch.float64, torch.device("cpu"), 1)[0]
    x, u, v = (t.detach().double().requires_grad_() for t in (o.x, o.u, o.v))
    y = x @ o.weight.t() + o.scale * (x @ u) @ v.t()
    gradients = torch.autograd.grad(y, (x, u, v), o.dy)
    for name, value in truth(o, adapted=True).items():
        expected = dict(zip(("y", "dx", "du", "dv"), (y, *gradients), strict=True))[name]
        torch.testing.assert_close(value, expected.detach())


def test_linear_writes_complete_rows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "4x16x8x2", "--dtypes", "fp32", "--modes", "fwd", "--providers", "frozen", "eager"]
    assert linear.main([*arguments, "--quick", "--seconds", "0.01", "--device", "cpu", "--json", "-"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["provider"] for r in rows] == ["frozen", "eager"]
    assert all(tuple(r) == harness.LINEAR_FIELDS and r["status"] == "ok" for r in rows)
    assert rows[0]["ratio_to_frozen"] == 1.0


def test_a_provider_that_fails_is_a_row_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(PROVIDERS["eager"], "forward", broken)
    arguments = ["--shapes", "4x16x8x2", "--dtypes", "fp32", "--modes", "fwd", "--providers", "frozen", "eager"]
    linear.main([*arguments, "--quick", "--seconds", "0.01", "--device", "cpu", "--json", "-"])
    frozen, eager = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert frozen["status"] == "ok"
    assert (eager["status"], eager["median_s"], eager["reason"]) == ("failed", None, "RuntimeError: no such kernel")


def test_slow_half_precision_is_skipped_and_compared_with_fp32(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = {"frozen": 50.0, "eager": 0.0}
    monkeypatch.setattr(linear, "estimated_seconds", lambda name, *_: slow[name])
    arguments = ["--shapes", "8x16x8x2", "--dtypes", "bf16", "--modes", "fwd", "--providers", "frozen", "eager"]
    linear.main([*arguments, "--quick", "--seconds", "0.01", "--device", "cpu", "--json", "-"])
    rows = {r["provider"]: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["frozen"]["status"] == "skipped" and "50 s" in rows["frozen"]["reason"]
    assert rows["frozen_fp32"]["dtype"] == "fp32" and rows["frozen_fp32"]["ratio_to_frozen"] == 1.0
    assert rows["eager"]["ratio_to_frozen"] is not None and "fp32" in rows["eager"]["reason"]
    assert "(fp32)" in report.linear_table(list(rows.values()), "fwd")


def test_one_slow_call_leaves_no_provider_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the frozen layer at 2048x2048x2048 was left out, and every ratio was to fp32."""
    seconds = iter([0.2, 0.2, 0.004])
    monkeypatch.setattr(harness, "cpu_clock", lambda call, first, calls: next(seconds))
    shape = linear.Shape(40, 16, 8, 2)  # estimated from 4 rows, a tenth
    assert linear.estimated_seconds("frozen", shape, torch.bfloat16, "fwd", 0.5) == pytest.approx(0.04)


# ----------------------------------------------------------------------------------------------------- tables


def project(tmp_path: Path) -> Path:
    rows = [row(), row(provider="eager", ratio_to_frozen=1.25), row(provider="svdkern", ratio_to_frozen=1.04)]
    harness.write_atomically(tmp_path / "bench/results/cpu/linear.jsonl", harness.to_jsonl(rows))
    text = "# Title\n\n<!-- bench:linear -->\nold\n<!-- /bench -->\n\nThe end.\n"
    (tmp_path / "README.md").write_text(text)
    return tmp_path


def test_report_writes_tables_between_markers_only(tmp_path: Path) -> None:
    root = project(tmp_path)
    assert report.main(["--root", str(root), "--check"]) == 1
    assert "old" in (root / "README.md").read_text()
    assert report.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n") and text.endswith("\n\nThe end.\n") and "old" not in text
    assert "| M=8, 16→32, r=4 | fp32 | 1 ms | 1.25 | **1.04** |" in text
    assert "Some CPU(R) @ 3 GHz, 2 cores · avx2, 2 threads · torch 2.13.0 · commit 0123abc" in text
    assert report.main(["--root", str(root), "--check"]) == 0


def test_report_files_a_result_under_its_machine(tmp_path: Path) -> None:
    root = project(tmp_path)
    new = tmp_path / "new.jsonl"
    new.write_text(harness.to_jsonl([row(isa="avx512")]))
    report.main(["--root", str(root), "--add", str(new)])
    assert (root / "bench/results/some-cpu-3-ghz-2-cores-avx512/linear.jsonl").exists()


def test_report_refuses_an_unknown_table(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- bench:nothing -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="no table is called 'nothing'"):
        report.main(["--root", str(tmp_path)])


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (2.5, "2.5 s"), (0.0386, "38.6 ms"), (1.91e-5, "19.1 µs")])
def test_report_writes_times_in_the_unit_that_suits(value: float | None, text: str) -> None:
    assert report.seconds(value) == text


def test_tables_in_the_documents_match_the_results() -> None:
    assert report.main(["--check"]) == 0, "run `make report`"
