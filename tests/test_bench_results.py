"""Result files: what a row must have, what is refused, and what two files agree on. Nothing here is timed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench import compare, machine, results  # noqa: E402
from svdkern.timing import Timing  # noqa: E402


def provenance(**changes: Any) -> dict[str, Any]:
    return {
        "device": "cpu", "machine": "Some CPU(R) @ 3 GHz, 2 cores", "isa": "avx2", "clock_mhz": None, "threads": 2,
        "commit": "0123abc", "dirty": False, "versions": {"torch": "2.13.0"}, "date": "2026-01-01",
    } | changes  # fmt: skip


def row(provider: str = "frozen", median: float = 1e-3, spread: float = 0.02, **changes: Any) -> dict[str, Any]:
    values = {
        "provider": provider, "dtype": "fp32", "factor_dtype": None, "M": 8, "K": 16, "N": 32, "r": 4, "dropout": 0.0,
        "mask": "xuv", "mode": "fwd_bwd", "err_vs_fp64": 1e-7, "err_limit": 1e-6, "seed": 0,
        **results.timed(Timing(median, median, median * (1 + spread), 7), Timing(1e-3, 1e-3, 1e-3, 7), 1e-4),
        **results.outcome(True, None), **provenance(),
    }  # fmt: skip
    return results.make("linear", **(values | changes))


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "SCRATCH", tmp_path / "scratch")
    return tmp_path


def test_a_row_names_missing_and_unknown_fields() -> None:
    assert tuple(row()) == results.fields("linear")
    incomplete = row()
    del incomplete["isa"], incomplete["bench"]
    with pytest.raises(ValueError, match=r"linear row has missing fields \['isa'\] and unknown fields \['extra'\]"):
        results.make("linear", **incomplete, extra=1)


def test_files_are_whole_and_only_added_to(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    results.append(path, [row(), row("eager")])
    results.append(path, [row("eager", 2e-3)])
    assert [r["provider"] for r in results.read_jsonl(path)] == ["frozen", "eager", "eager"]
    assert [p.name for p in path.parent.iterdir()] == ["results.jsonl"]
    last = results.latest(results.read_jsonl(path))
    assert [(r["provider"], r["median_s"]) for r in last] == [("frozen", 1e-3), ("eager", 2e-3)]
    with pytest.raises(ValueError, match="JSON compliant"):
        results.append(path, [row(median_s=float("nan"))])
    assert len(results.read_jsonl(path)) == 3
    path.write_text('{"a": 1}\n{"b": \n')
    with pytest.raises(ValueError, match=r"results\.jsonl:2"):
        results.read_jsonl(path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dirty": True}, "changes outside bench/results"),
        ({"err_vs_fp64": 2e-6}, "error against fp64 is 2e-06, beyond 1e-06"),
        ({"err_vs_fp64": float("nan")}, "error against fp64 is nan"),
        ({"spread": 0.4}, "spread is 40% of the median"),
    ],
)
def test_what_is_no_result_is_kept_apart(
    folders: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], why: str
) -> None:
    assert results.refusal(row()) is None
    if changes.get("err_vs_fp64") == changes.get("err_vs_fp64"):  # JSON has no NaN: such a row is a failure before
        results.record([row(), row("eager", **changes)])
        filed = results.read_jsonl(folders / "results" / "some-cpu-3-ghz-2-cores-avx2" / "linear.jsonl")
        assert [r["provider"] for r in filed] == ["frozen"]
        assert [r["provider"] for r in results.read_jsonl(folders / "scratch" / "linear.jsonl")] == ["eager"]
        assert "not a result (eager)" in (said := capsys.readouterr().err) and why in said
    assert why in (results.refusal(row("eager", **changes)) or "")


def test_without_a_yardstick_there_is_no_result(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.record([row(spread=0.5), row("eager")])
    assert not (folders / "results").exists() and "what its ratio is to: its spread" in capsys.readouterr().err


def test_only_what_ratios_are_to_takes_the_group_with_it(folders: Path) -> None:
    results.record([row(), row("frozen_svdkern", spread=0.5), row("eager")])
    filed = results.read_jsonl(folders / "results" / "some-cpu-3-ghz-2-cores-avx2" / "linear.jsonl")
    assert [r["provider"] for r in filed] == ["frozen", "eager"]


def test_what_is_set_here_alone_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDKERN_BACKEND", "eager")
    with pytest.raises(SystemExit, match="SVDKERN_BACKEND is set"):
        machine.provenance()


def test_a_failure_is_a_result_and_an_asked_file_takes_all(folders: Path) -> None:
    failed = row("eager") | results.timed(None, None) | results.outcome(False, "RuntimeError: no")
    assert results.refusal(failed) is None
    results.record([row(dirty=True), failed], out=folders / "mine.jsonl")
    assert len(results.read_jsonl(folders / "mine.jsonl")) == 2


def test_geometric_mean() -> None:
    assert results.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def test_compare_marks_what_the_spread_does_not_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    results.append(before, [row(), row("eager", 1.2e-3), row("svdkern", 1.1e-3)])
    results.append(after, [row(), row("eager", 1.22e-3), row("svdkern", 1.3e-3)])
    assert compare.main([str(before), str(after)]) == 1
    said = capsys.readouterr().out
    (marked,) = [line for line in said.splitlines() if "<--" in line]
    assert "2 of 3 agree" in said and " svdkern " in marked
    assert compare.main([str(after), str(before)]) == 0  # faster is no failure
    with pytest.raises(SystemExit):
        compare.main([str(before), str(tmp_path / "none.jsonl")])
