"""Stored predictions beside measured rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench import confirm, results  # noqa: E402

PROVENANCE = dict.fromkeys(results.PROVENANCE) | {"machine": "M", "threads": 1, "dirty": False}


def measured(provider: str, median_s: float | None, **changes: Any) -> dict[str, Any]:
    timing = {**dict.fromkeys(results.TIMING), "median_s": median_s}
    values = {"dtype": "bf16", "factor_dtype": "fp32", "M": 8, "K": 16, "N": 32, "r": 4, "dropout": 0.0, "mask": "xuv",
              "mode": "fwd_bwd_graph", "err_vs_fp64": None, "err_limit": None, "seed": 0, "device": "cuda"}  # fmt: skip
    outcome = results.outcome(median_s is not None, None)
    return results.make("linear", **({"provider": provider} | PROVENANCE | timing | values | outcome | changes))


def predicted(candidate: str, seconds: float, **changes: Any) -> dict[str, Any]:
    case = {"M": 8, "K": 16, "N": 32, "r": 4, "dtype": "bf16", "mode": "fwd_bwd"}
    return {"bench": "roofline", "candidate": candidate, "predicted_s": seconds} | case | changes


PREDICTIONS = [predicted("frozen", 9.0), predicted("frozen", 1.0), predicted("unfused", 2.0), predicted("persistent", 1.2),
               predicted("eager", 1.0), predicted("fused", 3.0), predicted("steps", 4.0)]  # fmt: skip


def test_predictions_beside_measured_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        measured("frozen", 9.0),  # the later row of a case counts, and the later prediction
        measured("frozen", 1.0),
        measured("addmm", 4.0),
        measured("svdkern", 0.3),
        measured("svdkern", 1.0, dropout=0.1),
        measured("svdkern", 1.0, mask="x"),
        measured("svdkern", 1.0, r=64),
        measured("peft_default", None),
        measured("eager", 1.0, mode="fwd_bwd"),  # the host's time is in it
        measured("compile", 1.0),
    ]
    files = tmp_path / "roofline.jsonl", tmp_path / "linear.jsonl"
    for path, those in zip(files, (PREDICTIONS, rows), strict=True):
        path.write_text(results.to_jsonl(those))
    assert confirm.main([str(path) for path in files]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[3:5] for line in table[1:4]] == [
        ["frozen"] * 2,
        ["addmm", "unfused"],
        ["svdkern", "persistent"],
    ]
    assert [line.split()[-1] for line in table[1:4]] == ["1.00", "0.50", "4.00"]
    assert table[4:] == [
        "frozen: geometric mean error 1.00, of p/m 1.00, 1 rows",
        "unfused: geometric mean error 2.00, of p/m 0.50, 1 rows",
        "persistent: geometric mean error 4.00, of p/m 4.00, 1 rows",
        "all: geometric mean error 2.00, of p/m 1.26, 3 rows",
    ]


def test_a_cpu_s_rows_stand_for_its_own_designs() -> None:
    text = confirm.confirm(
        PREDICTIONS,
        [measured(name, seconds, device="cpu", mode="fwd_bwd") for name, seconds in (("svdkern", 3.0), ("addmm", 4.0))],
    )
    assert [line.split()[4] for line in text.splitlines()[1:3]] == ["fused", "steps"]


def test_the_gpu_backends_stand_for_their_own_designs() -> None:
    names = [predicted(name, 1.0, M=m) for name in ("split", "few", "persistent") for m in (8, 64)]
    rows = [measured(f"svdkern-{backend}", 1.0, M=m) for backend in ("cuda", "triton") for m in (8, 64)]
    designs = [line.split()[4] for line in confirm.confirm(names, rows).splitlines()[1:5]]
    assert designs == ["few", "split", "persistent", "persistent"]


def test_nothing_in_common_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nothing that was predicted was measured"):
        confirm.confirm(PREDICTIONS, [measured("frozen", 1.0, M=9)])
    with pytest.raises(SystemExit):
        confirm.main([str(tmp_path / "absent.jsonl"), str(tmp_path / "absent.jsonl")])
    assert "No such file" in capsys.readouterr().err
