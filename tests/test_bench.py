"""The benchmarks' own logic: cases, providers, errors, result files. Nothing here is timed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench import accuracy, blocks, cases, ceilings, compare, init, linear, machine, memory, results  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.providers import DTYPES, PROVIDERS, adapted, make_operands, relative_error, truth  # noqa: E402
from svdkern import bench_command, cli  # noqa: E402
from svdkern.timing import Timing  # noqa: E402

CPU = torch.device("cpu")


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


# -------------------------------------------------------------------------------------------------- result files


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


# ------------------------------------------------------------------------------------------------------ machine


def test_machine_id_is_a_folder_name_and_tells_a_forced_cpu() -> None:
    assert machine.machine_id(row()) == "some-cpu-3-ghz-2-cores-avx2"
    forced = machine.machine_id(row(machine="Some CPU, 2 cores (ATEN_CPU_CAPABILITY=avx2)"))
    assert forced == "some-cpu-2-cores-avx2-forced"


def test_machine_names_the_variables_that_force_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.FORCED_ISA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "=" not in machine.machine("cpu")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "ATEN_CPU_CAPABILITY=avx2" in machine.machine("cpu")


def test_a_copy_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_output", lambda *_: None)
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert machine.commit() == ("unknown", True)
    monkeypatch.setenv("BENCH_COMMIT", "0123abc")
    assert machine.commit() == ("0123abc", False)


def test_a_changed_file_makes_the_tree_dirty_and_a_result_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("code.py", "bench/results/x.jsonl"):
        (tmp_path / name).write_text("1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit()[1] is False
    (tmp_path / "bench" / "results" / "x.jsonl").write_text("2\n")
    assert machine.commit()[1] is False
    (tmp_path / "code.py").write_text("2\n")
    assert machine.commit()[1] is True


def test_ceilings_are_of_this_machine() -> None:
    found = ceilings.cpu_ceilings(machine.isa(), tries=1)
    assert {name for name, _ in found} == {"fma", "read", "matmul"} and {d for _, d in found} == {*DTYPES, None}
    assert all(1e8 < value < 1e15 for value in found.values())
    floor = ceilings.floor_seconds(1e9, 0.0, "fp32", {("fma", "fp32"): 1e10, ("read", None): 1e9})
    assert floor == pytest.approx(0.1)
    assert ceilings.floor_seconds(1e9, 1e9, "fp32", {("fma", "fp32"): 1e10, ("read", None): 1e9}) == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------- cases and layers


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
    set(PROVIDERS) - {"compile", "svdkern", "svdkern-eager", "svdkern-cpu", "svdkern-triton", "frozen_svdkern"}
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


# -------------------------------------------------------------------------------------------- the other questions


def test_accuracy_checks_what_is_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "accuracy.jsonl"
    arguments = ["--shapes", "6x200x24x3", "--providers", "eager", "svdkern", "--device", "cpu", "--out", str(out)]
    assert accuracy.main(arguments) == 0
    rows = results.read_jsonl(out)
    assert len(rows) == 3 * 3 * 2 and all(r["status"] == "ok" and r["err_y"] > 0 for r in rows)
    assert all((r["err_limit"] is not None) == (r["provider"] == "svdkern") for r in rows)


def test_accuracy_fails_where_ours_is_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exact = accuracy.truth

    def off(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: value * (1.5 if name == "du" else 1.0) for name, value in exact(*args, **kwargs).items()}

    monkeypatch.setattr(accuracy, "truth", off)
    out = tmp_path / "accuracy.jsonl"
    arguments = [
        "--shapes",
        "6x200x24x3",
        "--dtypes",
        "fp32",
        "--data",
        "cancelling",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    assert accuracy.main([*arguments, "--providers", "svdkern"]) == 1
    (found,) = results.read_jsonl(out)
    assert found["status"] == "failed" and "beyond its limits" in found["reason"]


@pytest.mark.skipif(not hasattr(torch.ops.svdkern, "_cpu_isa"), reason="needs the compiled extension")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_block_sizes_are_found_in_the_sources(isa: str, dtype: str) -> None:
    for name, block in blocks.blocks(isa, dtype).items():
        shipped = blocks.value_in((blocks.CSRC / block.file).read_text(), block)
        assert re.fullmatch(r"\d+( << \d+)?", shipped), f"{name}: {shipped!r}"
        assert len(block.values) >= 3


def test_init_knows_the_best_and_who_repeats_himself(tmp_path: Path) -> None:
    out = tmp_path / "init.jsonl"
    arguments = ["--shapes", "40x64", "--rank", "4", "--seconds", "0.01", "--device", "cpu", "--out", str(out)]
    assert init.main(arguments) == 0
    rows = {(r["provider"], r["matrix"]): r for r in results.read_jsonl(out)}
    assert len(rows) == 4 * 3
    for matrix in init.MATRICES:
        assert rows["svdkern", matrix]["err_vs_best"] < 1e-5 and rows["svdkern", matrix]["same_again"] is True
        assert rows["lapack", matrix]["err_sigma"] < 1e-5
    assert rows["svd_lowrank", "flat"]["same_again"] is False
    assert rows["svd_lowrank", "flat"]["err_vs_best"] > 1e-3 > rows["svd_lowrank_16", "gap"]["err_vs_best"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_sees_what_a_layer_allocates() -> None:
    case = Case(4096, 256, 512, 8)  # y 8.4 MB, dx 4.2 MB; eager adds two of y's size
    peaks = {name: memory.in_a_process_of_its_own(name, case, "fp32", "cpu") for name in ("frozen", "eager")}
    assert 12e6 < peaks["frozen"] < 40e6 and peaks["eager"] > peaks["frozen"] + 6e6


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


def test_the_front_door(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "lineer"]) == 2
    assert "no benchmark is called 'lineer'; there are linear, " in capsys.readouterr().err
    monkeypatch.setattr(bench_command, "SOURCES", tmp_path)
    assert cli.main(["bench", "linear"]) == 2
    assert "a checkout of the repository" in capsys.readouterr().err


def test_pytest_benchmark_runs_the_same_cases() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-v", "bench/test_linear.py", "--benchmark-disable", "-k", "4x64x64x4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and f"{2 * len(linear.QUICK_PROVIDERS)} passed" in done.stdout, done.stdout


def test_every_bench_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    import bench

    for name in bench.BENCHES:
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", name, "--help"])
        assert stop.value.code == 0 and len(capsys.readouterr().out) > 400
