"""The machine that a result is of, the other questions, and the front door. Nothing here is timed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench import accuracy, blocks, ceilings, init, linear, machine, memory, results, svd_kernels, svd_methods, topk  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.providers import DTYPES  # noqa: E402
from svdkern import bench_command, cli  # noqa: E402

CPU = torch.device("cpu")


def test_machine_id_is_a_folder_name_and_tells_a_forced_cpu() -> None:
    row = {"device": "cpu", "isa": "avx2", "machine": "Some CPU(R) @ 3 GHz, 2 cores"}
    assert machine.machine_id(row) == "some-cpu-3-ghz-2-cores-avx2"
    forced = machine.machine_id(row | {"machine": "Some CPU, 2 cores (ATEN_CPU_CAPABILITY=avx2)"})
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


def test_topk_has_the_error_of_every_way(tmp_path: Path) -> None:
    out = tmp_path / "topk.jsonl"
    arguments = ["--shapes", "60x50", "--ranks", "4", "--seconds", "0.01", "--rounds", "1", "--device", "cpu"]
    assert topk.main([*arguments, "--out", str(out)]) == 0
    rows = {(r["provider"], r["matrix"]): r for r in results.read_jsonl(out)}
    assert len(rows) == 2 * len(topk.PROVIDERS)
    for matrix in ("power", "head"):
        assert rows["svdkern, tol=accurate", matrix]["err_sigma"] < 1e-5
        assert rows["lapack", matrix]["err_sigma"] < 1e-5
        assert rows["svd_lowrank, niter=64", matrix]["err_sigma"] < rows["svd_lowrank, niter=2", matrix]["err_sigma"]
    assert topk.main([*arguments, "--which", "smallest", "--out", str(tmp_path / "smallest.jsonl")]) == 0
    rows = {(r["provider"], r["matrix"]): r for r in results.read_jsonl(tmp_path / "smallest.jsonl")}
    assert rows["svdkern, tol=accurate", "head"]["err_sigma"] < 1e-4
    assert rows["sklearn", "head"]["status"] == "skipped"


def test_svd_methods_compares_what_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "svd_methods.jsonl"
    arguments = ["--sides", "96", "--ranks", "8", "40", "--matrices", "power", "--seconds", "0.01", "--device", "cpu"]
    assert svd_methods.main([*arguments, "--out", str(out)]) == 0
    rows = results.read_jsonl(out)
    assert [(row["provider"], row["r"], row["status"]) for row in rows] == [
        ("exact", 8, "ok"), ("krylov", 8, "ok"), ("filter", 8, "ok"),
        ("exact", 40, "ok"), ("krylov", 40, "ok"), ("filter", 40, "skipped"),
    ]  # fmt: skip
    assert "exact* " in capsys.readouterr().err


def test_svd_kernels_has_both_ways_of_each(tmp_path: Path) -> None:
    out = tmp_path / "svd_kernels.jsonl"
    arguments = [
        "--shapes",
        "60x50",
        "--ranks",
        "4",
        "--seconds",
        "0.01",
        "--device",
        "cpu",
        "--dtypes",
        "bf16",
        "fp32",
    ]
    assert svd_kernels.main([*arguments, "--out", str(out)]) == 0
    rows = {(r["provider"], r["kernel"], r["dtype"]): r for r in results.read_jsonl(out)}
    assert len(rows) == 2 * 3 * 2
    for (provider, _, _), row in rows.items():
        assert row["status"] == ("ok" if provider == "torch" else "skipped")
        assert row["err"] == (0 if provider == "torch" else None)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_sees_what_a_layer_allocates() -> None:
    case = Case(4096, 256, 512, 8)  # y 8.4 MB, dx 4.2 MB; eager adds two of y's size
    peaks = {name: memory.in_a_process_of_its_own(name, case, "fp32", "cpu") for name in ("frozen", "eager")}
    assert 12e6 < peaks["frozen"] < 40e6 and peaks["eager"] > peaks["frozen"] + 6e6


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
