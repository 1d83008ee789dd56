"""Tables and plots from made-up result files, and that those in the repository are what its result files say."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

matplotlib = pytest.importorskip("matplotlib")
from bench import measured, plots, report, results, tables  # noqa: E402
from bench.cases import SETS, Case  # noqa: E402

MACHINE = "Some CPU(R) @ 3 GHz, 2 cores"
FOLDER = "some-cpu-3-ghz-2-cores-avx2"
PLACE = {
    "device": "cpu",
    "machine": MACHINE,
    "isa": "avx2",
    "clock_mhz": 3000.0,
    "threads": 2,
    "commit": "0123abc",
    "dirty": False,
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "date": "2026-01-02",
    "status": "ok",
}
SQUARE = Case(2048, 2048, 2048, 16)


def row(bench: str, **values: Any) -> dict[str, Any]:
    """A row that measured nothing but `values`."""
    return results.make(bench, **{**dict.fromkeys(results.fields(bench)[1:]), **PLACE, **values})


def linear(case: Case, provider: str, seconds: float | None, dtype: str = "fp32", **values: Any) -> dict[str, Any]:
    """A row whose frozen layer takes a millisecond."""
    fields = {**vars(case), "mode": "fwd_bwd", "median_s": seconds, "status": "ok" if seconds else "failed"}
    fields["ratio_to_frozen"] = seconds and round(seconds * 1e3, 9)
    return row("linear", provider=provider, dtype=dtype, **{**fields, **values})


def group(case: Case, dtype: str = "fp32", ours: float = 1.04e-3, **values: Any) -> list[dict[str, Any]]:
    times = {"frozen": 1e-3, "eager": 1.25e-3, "addmm": 1.1e-3, "peft_default": 1.5e-3, "svdkern": ours}
    return [linear(case, provider, seconds, dtype, **values) for provider, seconds in times.items()]


def in_dtypes(name: str) -> list[dict[str, Any]]:
    """A set as it is measured, in fp32 and bf16."""
    return [found for case in SETS[name].cases for dtype in ("fp32", "bf16") for found in group(case, dtype)]


CEILINGS = [
    row("ceilings", provider="fma", dtype="fp32", value=2e13, unit="flop/s"),
    row("ceilings", provider="fma", dtype="bf16", value=4e13, unit="flop/s"),
    row("ceilings", provider="read", dtype=None, value=2e11, unit="bytes/s"),
]
MEMORY = [
    row("memory", provider=provider, dtype=dtype, M=m, K=64, N=128, r=4, peak_extra_mb=2.5, over_frozen_mb=over)
    for m in (8, 16)
    for dtype in ("fp32", "bf16")
    for provider, over in (("frozen", 0.0), ("eager", 4.25), ("svdkern", 0.5))
]
INIT = [
    row("init", provider=provider, dtype="fp32", matrix=matrix, N=4096, K=4096, r=r, median_s=seconds,
        err_vs_best=error, err_sigma=error, same_again=True)
    for matrix in ("decaying", "flat")
    for r in (16, 128)
    for provider, seconds, error in (("linalg.svd", 8.0, 0.0), ("svd_lowrank", 0.09, 1e-1), ("svdkern", 0.15, 1e-6))
]  # fmt: skip
WHOLE = row("init", provider="svdkern", dtype="bf16", matrix="Tiny", N=0, K=0, r=16, median_s=5.0)
TOPK = [
    row("topk", provider=provider, dtype="fp32", matrix="head", which=which, N=4096, K=4096, r=128, median_s=seconds,
        err_sigma=error)
    for which in ("largest", "smallest")
    for provider, seconds, error in (
        ("svdkern, tol=fast", 0.4, 1e-2), ("svdkern, tol=accurate", 0.7, 1e-7), ("svd_lowrank, niter=16", 1.9, 2e-2)
    )
]  # fmt: skip
MODEL = {"model": "Tiny", "tokens": 1024, "sequence": 256, "r": 16}
MODEL_STEP = [
    row(
        "model_step", **MODEL, provider="frozen", dtype="bf16", median_s=2.0, ratio_to_frozen=1.0, peak_memory_mb=1970.4
    ),
    row(
        "model_step",
        **MODEL,
        provider="svdkern",
        dtype="bf16",
        median_s=2.2,
        ratio_to_frozen=1.1,
        peak_memory_mb=2412.0,
    ),
    row("model_step", **MODEL, provider="peft_default", dtype="bf16", status="failed", reason="ImportError: peft"),
    row(
        "model_step", **MODEL, provider="frozen", dtype="fp32", median_s=4.0, ratio_to_frozen=1.0, peak_memory_mb=3000.0
    ),
    row("model_step", **MODEL, provider="svdkern_bf16", dtype="bf16", median_s=5.0, ratio_to_frozen=1.25),
]
DECODE = [
    row("decode", provider=provider, dtype="bf16", model="Tiny", batch=1, r=16, ratio_to_frozen=over, tokens_per_s=40 / over)
    for provider, over in (("frozen", 1.0), ("svdkern", 1.05), ("peft_default", 1.6))
]  # fmt: skip
ACCURACY = [
    row("accuracy", provider=provider, dtype="bf16", factor_dtype="fp32", data="normal", M=8, K=16, N=32, r=4,
        err_vs_fp64=error, worst_y=2 * error, err_limit=6e-3 if provider == "svdkern" else None)
    for provider, error in (("eager", 3e-3), ("svdkern", 1.5e-3))
]  # fmt: skip
EVERYTHING = [
    *CEILINGS, *MEMORY, *INIT, *TOPK, *MODEL_STEP, *DECODE, *ACCURACY,
    *(found for name in SETS for found in in_dtypes(name)),
]  # fmt: skip


def project(root: Path, rows: Sequence[dict[str, Any]], folder: str = FOLDER) -> list[measured.Machine]:
    """Files the rows; returns what is read back."""
    place = root / "bench" / "results"
    for found in rows:
        path = place / folder / f"{found['bench']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    return measured.machines(place)


def made(root: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    return report.generated(name, project(root, rows))


# ------------------------------------------------------------------------------------------------------ tables


def test_linear_shows_ratios_to_the_frozen_layer_in_the_order_of_the_set(tmp_path: Path) -> None:
    text = made(tmp_path, "linear", [*in_dtypes("readme")[::-1], *group(SQUARE, mode="fwd", ours=2e-3)])
    assert text.startswith(
        "Some CPU(R) @ 3 GHz, 2 cores · avx2, 2 threads · torch 2.13.0 · commit 0123abc\n\n| shape |"
    )
    lines = text.splitlines()
    assert lines[2] == "| shape | dtype | frozen | eager | addmm | PEFT default | svdkern |"
    assert lines[4] == "| M=2048, 2048→2048, r=16 | fp32 | 1 ms | 1.25 | 1.10 | 1.50 | **1.04** |"
    assert [line.split(" | ")[1] for line in lines[4:]] == ["fp32", "bf16"] * len(SETS["readme"].cases)


def test_linear_fwd_shows_the_other_mode(tmp_path: Path) -> None:
    text = made(tmp_path, "linear-fwd", [*group(SQUARE), *group(SQUARE, mode="fwd", ours=2e-3)])
    assert "| M=2048, 2048→2048, r=16 | fp32 | 1 ms | 1.25 | **1.10** | 1.50 | 2.00 |" in text
    assert made(tmp_path / "other", "linear-fwd", group(SQUARE)) == "No results yet.\n"


@pytest.mark.parametrize("name", [name for name in SETS if name != "readme"])
def test_every_set_of_cases_has_its_table(tmp_path: Path, name: str) -> None:
    lines = made(tmp_path, name, [*in_dtypes(name), *group(Case(3, 5, 7, 2))]).splitlines()[4:]
    assert len(lines) == 2 * len(SETS[name].cases)
    assert lines[0].startswith(f"| {tables.shape(SETS[name].cases[0])} | fp32 | 1 ms |")


def test_shapes_name_dropout_and_the_gradients_that_are_wanted() -> None:
    assert tables.shape(Case(1, 2, 3, 4, dropout=0.1)) == "M=1, 2→3, r=4, dropout 0.1"
    assert tables.shape(Case(1, 2, 3, 4, mask="uv")) == "M=1, 2→3, r=4, gradients of u, v"


@pytest.mark.parametrize("frozen", [[], [linear(SQUARE, "frozen", None, "bf16")]], ids=["absent", "failed"])
def test_the_frozen_layer_in_fp32_is_the_yardstick_where_the_dtypes_own_did_not_run(
    tmp_path: Path, frozen: list[dict[str, Any]]
) -> None:
    rows = [linear(SQUARE, "frozen_fp32", 2e-3, "bf16"), *frozen, linear(SQUARE, "eager", None, "bf16")]
    text = made(tmp_path, "linear", [*rows, linear(SQUARE, "svdkern", 1.1e-3, "bf16")])
    assert "| M=2048, 2048→2048, r=16 | bf16 | 2 ms (fp32) | – | **1.10** |" in text


def test_a_layer_without_an_adapter_is_never_the_fastest(tmp_path: Path) -> None:
    text = made(tmp_path, "linear", [*group(SQUARE), linear(SQUARE, "frozen_svdkern", 0.9e-3)])
    assert "| 1 ms | 0.90 | 1.25 | 1.10 | 1.50 | **1.04** |" in text


def test_model_step_compares_the_model_in_bf16_with_fp32(tmp_path: Path) -> None:
    bf16, fp32 = made(tmp_path, "model_step", MODEL_STEP).split("\n\n", 1)[1].split("| Tiny, fp32")
    assert bf16.startswith(
        "| Tiny, bf16, r=16, 1024 tokens a step in sequences of 256 | step | over frozen | peak memory |"
    )
    assert "| svdkern | 2.2 s | 1.10 | 2412 MB |" in bf16
    assert "| PEFT default (ImportError: peft) | – | – | – |" in bf16
    assert "| svdkern, the whole model in bf16 | 5 s | 1.25 | – |" in fp32


@pytest.mark.parametrize(
    ("name", "rows", "line"),
    [
        ("decode", DECODE, "| Tiny, batch 1, r=16 | bf16 | 40 | 1.60 | **1.05** |"),
        ("memory", MEMORY, "| M=8, 64→128, r=4 | fp32 | 2.5 | 4.2 | **0.5** |"),
        ("accuracy", ACCURACY, "| M=8, 16→32, r=4, normal | bf16 | 6.0e-03 | 3.0e-03 | **1.5e-03** |"),
        ("accuracy", ACCURACY, "| M=8, 16→32, r=4, normal | bf16 | 6.0e-03 | **3.0e-03** |"),
        ("init", [*INIT, WHOLE], "| Tiny, every linear layer, r=16 | bf16 | svdkern | 5 s | – | – | – |"),
        ("topk", TOPK, "| largest, head, 4096×4096, r=128 | svd_lowrank, niter=16 | 1.9 s | 2.0e-02 |"),
        ("init", INIT, "| flat, 4096×4096, r=128 | fp32 | svdkern | 150 ms | 1.0e-06 | 1.0e-06 | yes |"),
    ],
)
def test_other_benches_have_their_table(tmp_path: Path, name: str, rows: list[dict[str, Any]], line: str) -> None:
    text = made(tmp_path, name, rows)
    assert text.startswith(f"{MACHINE} · avx2") and line in text.splitlines()


def test_roofline_position_is_in_shares_of_the_measured_ceilings(tmp_path: Path) -> None:
    """By hand: two products of 2048³, three passes of the factors; six squares, a seventh for dU, three times the factors."""
    rows = group(SQUARE, ours=2e-3, floor_s=0.5e-3)
    lines = made(tmp_path, "roofline-position", [*CEILINGS, *rows]).splitlines()
    assert lines[2].startswith("Measured ceilings: fp32 2e+04 GFLOP/s, bf16 4e+04 GFLOP/s; 200 GB/s.")
    frozen_flops, frozen_bytes = 4 * 2048**3, 6 * 2048**2 * 4
    flops = frozen_flops + 3 * 2 * 2048 * 16 * 4096
    moved = frozen_bytes + 2048**2 * 4 + 3 * 4096 * 16 * 4
    expected = [
        f"{frozen_flops / 1e-3 / 1e9:.3g} ({frozen_flops / 1e-3 / 2e11:.0f} %)",
        f"{frozen_bytes / 1e-3 / 1e9:.3g} ({frozen_bytes / 1e-3 / 2e9:.0f} %)",
        "50 %",
        f"{flops / 2e-3 / 1e9:.3g} ({flops / 2e-3 / 2e11:.0f} %)",
        f"{moved / 2e-3 / 1e9:.3g} ({moved / 2e-3 / 2e9:.0f} %)",
        "25 %",
    ]
    assert lines[-1] == "| M=2048, 2048→2048, r=16 | fp32 | " + " | ".join(expected) + " |"
    assert made(tmp_path / "other", "roofline-position", rows) == "No results yet.\n"


def test_summary_names_the_worst_case_of_every_machine(tmp_path: Path) -> None:
    worst = Case(4, 64, 64, 4)
    project(tmp_path, [*group(SQUARE, isa="avx512"), *group(SQUARE, "bf16", isa="avx512")], "other")
    lines = made(
        tmp_path, "summary", [*group(SQUARE), *group(worst, ours=2.2e-3), *group(worst, mode="fwd")]
    ).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(f"| {MACHINE} · avx512 | 2 | 0.95 | 0.95 (")
    mean, over_frozen = (1.04 / 1.1 * 2.0) ** 0.5, (1.04 * 2.2) ** 0.5
    where = "M=4, 64→64, r=4, fp32"
    assert lines[3] == f"| {MACHINE} · avx2 | 2 | {mean:.2f} | 2.00 ({where}) | {over_frozen:.2f} | 2.20 ({where}) |"


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (2.5, "2.5 s"), (0.0386, "38.6 ms"), (1.91e-5, "19.1 µs")])
def test_times_are_written_in_the_unit_that_suits(value: float | None, text: str) -> None:
    assert tables.seconds(value) == text


def test_the_latest_row_of_a_case_counts(tmp_path: Path) -> None:
    text = made(tmp_path, "linear", [*group(SQUARE), *group(SQUARE, ours=1.01e-3, commit="4567def")])
    assert "| 1 ms | 1.25 | 1.10 | 1.50 | **1.01** |" in text and text.count("M=2048") == 1
    assert "commit 4567def\n" in text


def test_every_commit_of_a_table_is_named(tmp_path: Path) -> None:
    text = made(tmp_path, "linear", [*group(SQUARE), *group(Case(4, 64, 64, 4), commit="4567def", threads=1)])
    assert "avx2, 1, 2 threads · torch 2.13.0 · commit 0123abc, 4567def\n" in text


def test_a_machine_has_no_table_of_what_it_did_not_run(tmp_path: Path) -> None:
    project(tmp_path, DECODE, "other")
    found = project(tmp_path, group(SQUARE))
    assert all(len(re.findall(r"^\| --- ", report.generated(name, found), re.M)) == 1 for name in ("linear", "decode"))
    for name in set(report.TABLES) - {"linear", "decode", "summary"}:
        assert report.generated(name, found) == ("No results yet.\n")


# --------------------------------------------------------------------------------------------------- documents


def document(root: Path, text: str) -> Path:
    path = root / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_only_text_between_markers_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project(tmp_path, group(SQUARE))
    path = document(tmp_path, "# Title\n\n<!-- bench:linear -->\nold\n<!-- /bench -->\n\nThe end.\n")
    assert report.main(["--root", str(tmp_path), "--check"]) == 1
    assert "old" in path.read_text() and "-old" in capsys.readouterr().out
    assert not list(tmp_path.glob("**/plots"))
    assert report.main(["--root", str(tmp_path)]) == 0
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- bench:linear -->\n\nSome CPU") and "old" not in text
    assert text.endswith("|\n\n<!-- /bench -->\n\nThe end.\n")
    assert report.main(["--root", str(tmp_path), "--check"]) == 0


def test_documents_below_docs_are_written_too(tmp_path: Path) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    path = tmp_path / "docs" / "deep" / "page.md"
    path.write_text("<!-- bench:decode -->\n<!-- /bench -->\n")
    report.main(["--root", str(tmp_path)])
    assert path.read_text() == "<!-- bench:decode -->\n\nNo results yet.\n\n<!-- /bench -->\n"


def test_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    document(tmp_path, "<!-- bench:nothing -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="no table is called 'nothing'; there are linear, "):
        report.main(["--root", str(tmp_path)])


def test_results_are_filed_under_their_machine_once(tmp_path: Path) -> None:
    project(tmp_path, group(SQUARE))
    new = tmp_path / "new.jsonl"
    new.write_text(results.to_jsonl(group(SQUARE, ours=1.01e-3)), encoding="utf-8")
    for _ in range(2):
        report.main(["--root", str(tmp_path), "--add", str(new)])
    filed = results.read_jsonl(tmp_path / "bench" / "results" / FOLDER / "linear.jsonl")
    assert [found["ratio_to_frozen"] for found in filed if found["provider"] == "svdkern"] == [1.04, 1.01]


def test_what_is_no_result_is_not_filed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new.jsonl"
    new.write_text(results.to_jsonl(group(SQUARE, dirty=True)), encoding="utf-8")
    report.main(["--root", str(tmp_path), "--add", str(new)])
    assert "frozen: the tree has changes" in capsys.readouterr().out
    assert not (tmp_path / "bench").exists()
    new.write_text('{"bench": "linear", "provider": "frozen"}\n')
    with pytest.raises(ValueError, match="missing fields"):
        report.main(["--root", str(tmp_path), "--add", str(new)])


def test_tables_in_the_documents_match_the_results() -> None:
    assert report.main(["--check"]) == 0, "run `make report`"


# ------------------------------------------------------------------------------------------------------- plots


def test_everything_is_drawn_the_same_again(tmp_path: Path) -> None:
    [machine] = project(tmp_path, EVERYTHING)
    paths = plots.write(machine)
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in plots.PLOTS for kind in ("svg", "png")]
    again = plots.drawn(machine)
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".svg":
            assert content == again[path.name] and b"<dc:date>" not in content
        else:
            assert content.startswith(b"\x89PNG") and len(content) < 200_000


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("rows", in_dtypes("rows")),
        ("ranks", in_dtypes("ranks")),
        ("roofline", [*CEILINGS, *group(SQUARE)]),
        ("memory", MEMORY),
        ("init", [*INIT, WHOLE]),
        ("topk", TOPK),
        ("model_step", MODEL_STEP),
    ],
)
def test_a_plot_needs_its_own_bench_alone(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    [machine] = project(tmp_path, rows)
    assert set(plots.drawn(machine)) == {f"{name}.svg", f"{name}.png"}


def test_plots_show_what_was_measured(tmp_path: Path) -> None:
    """The lines' numbers, not their looks."""
    [machine] = project(tmp_path, [*CEILINGS, *in_dtypes("rows"), *linear_without_bf16()])
    figure = plots.PLOTS["rows"](machine)
    assert figure is not None
    fp32, bf16, fp16 = figure.axes
    lines = {line.get_label(): line for line in fp32.get_lines()}
    assert list(lines) == ["eager", "addmm", "PEFT default", "svdkern", "frozen"]
    assert list(lines["svdkern"].get_xdata()) == [case.M for case in SETS["rows"].cases]
    assert set(lines["svdkern"].get_ydata()) == {1.04}
    assert (fp32.get_title(), bf16.get_title()) == ("fp32", "bf16")
    assert fp16.get_title() == "fp16, over the frozen layer in fp32"
    assert MACHINE in figure.get_suptitle()


def linear_without_bf16() -> list[dict[str, Any]]:
    case = SETS["rows"].cases[0]
    return [linear(case, "frozen_fp32", 1e-3, "fp16"), linear(case, "svdkern", 1.2e-3, "fp16")]


def test_plots_of_benches_that_are_gone_are_removed(tmp_path: Path) -> None:
    [machine] = project(tmp_path, [*MEMORY, *MODEL_STEP])
    plots.write(machine)
    (machine.folder / "memory.jsonl").unlink()
    (tmp_path / "README.md").write_text("<!-- bench:model_step -->\n<!-- /bench -->\n")
    assert report.main(["--root", str(tmp_path), "--plots"]) == 0
    assert sorted(path.name for path in (machine.folder / "plots").iterdir()) == ["model_step.png", "model_step.svg"]
    assert (tmp_path / "README.md").read_text() == "<!-- bench:model_step -->\n<!-- /bench -->\n"


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in results.RESULTS.glob("*/*.jsonl")}), ids=lambda p: p.name
)
def test_plots_in_the_repository_match_the_results(folder: Path) -> None:
    made = plots.drawn(measured.Machine.read(folder))
    assert sorted(made) == sorted(path.name for path in folder.glob("plots/*")), "run `make report`"
    for path in sorted(folder.glob("plots/*.svg")):
        content = path.read_bytes()
        drawn_by = re.search(rb"Matplotlib v([\w.]+)", content)
        if drawn_by is None or drawn_by[1].decode() != matplotlib.__version__:
            pytest.skip(f"{path.name} was drawn by another matplotlib than {matplotlib.__version__}")
        assert content == made[path.name], f"{path}: run `make report`"
