"""Result files: JSON lines, only ever added to, one folder a machine. What may be called a result is decided here.

A row has the fields that name its case, those that its bench measures, and those that say where it comes from
(`machine.provenance`). For tables and plots the last row of a case counts (`latest`).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT, machine_id
from svdkern.timing import Timing

Row = Mapping[str, Any]

# BENCH_RESULTS=DIR: elsewhere, as on a machine whose results are carried away; what is refused lies beside it.
_asked = os.environ.get("BENCH_RESULTS")
RESULTS = Path(_asked) if _asked else ROOT / "bench" / "results"
SCRATCH = RESULTS.parent / "refused" if _asked else ROOT / "runs" / "bench"

WIDEST_SPREAD = 0.25
"""(p80 - p20) / median of a time that may be called a result."""

PROVENANCE = ("device", "machine", "isa", "clock_mhz", "threads", "commit", "dirty", "versions", "date")
TIMING = ("median_s", "p20_s", "p80_s", "n", "spread", "floor_s", "ratio_to_frozen")
OUTCOME = ("status", "reason")

CASE = {  # what names a case, bench by bench, provider included
    "linear": ("provider", "dtype", "factor_dtype", "M", "K", "N", "r", "dropout", "mask", "mode"),
    "model_step": ("provider", "dtype", "factor_dtype", "model", "tokens", "sequence", "r"),
    "methods": ("provider", "dtype", "factor_dtype", "model", "tokens", "sequence", "r"),
    "decode": ("provider", "dtype", "factor_dtype", "model", "batch", "r"),
    "memory": ("provider", "dtype", "M", "K", "N", "r"),
    "accuracy": ("provider", "dtype", "factor_dtype", "data", "M", "K", "N", "r"),
    "init": ("provider", "dtype", "matrix", "N", "K", "r"),
    "init_model": ("provider", "dtype", "model", "r"),
    "init_memory": ("provider", "dtype", "model", "blocks", "r"),
    "topk": ("provider", "dtype", "matrix", "which", "N", "K", "r"),
    "svd_methods": ("provider", "dtype", "matrix", "N", "K", "r"),
    "svd_kernels": ("provider", "dtype", "kernel", "N", "K", "r"),
    "ceilings": ("provider", "dtype"),
    "blocks": ("provider", "dtype", "value", "M", "K", "N", "r"),
}
MEASURED = {
    "linear": (*TIMING, "err_vs_fp64", "err_limit", "seed"),
    "model_step": (*TIMING, "peak_memory_mb", "seed"),
    "methods": (*TIMING, "peak_memory_mb", "trainable", "seed"),
    "decode": (*TIMING, "tokens_per_s", "seed"),
    "memory": ("peak_extra_mb", "over_frozen_mb", "seed"),
    "accuracy": ("err_y", "err_dx", "err_du", "err_dv", "worst_y", "err_vs_fp64", "err_limit", "seed"),
    "init": (*TIMING, "err_vs_best", "err_sigma", "same_again", "seed"),
    "init_model": ("layers", *TIMING, "err_sigma", "same_again", "seed"),
    "init_memory": (*TIMING, "extrapolated_s", "peak_memory_mb", "seed"),
    "topk": (*TIMING, "err_sigma", "seed"),
    "svd_methods": (*TIMING, "seed"),
    "svd_kernels": (*TIMING, "err", "seed"),
    "ceilings": ("value", "unit"),
    "blocks": ("what", "shipped", "ratio_to_shipped", *TIMING),
}


def fields(bench: str) -> tuple[str, ...]:
    """All fields of a row, in order."""
    return ("bench", *CASE[bench], *MEASURED[bench], *OUTCOME, *PROVENANCE)


def make(bench: str, **values: Any) -> dict[str, Any]:
    """A row with its fields in order; a missing or an unknown field is an error that names it."""
    wanted = fields(bench)
    row = {"bench": bench, **values}
    missing = [field for field in wanted if field not in row]
    unknown = [field for field in row if field not in wanted]
    if missing or unknown:
        raise ValueError(f"{bench} row has missing fields {missing} and unknown fields {unknown}")
    return {field: row[field] for field in wanted}


def timed(timing: Timing | None, floor: Timing | None, floor_s: float | None = None) -> dict[str, Any]:
    """The fields TIMING, of a call that ran or did not."""
    return {
        "median_s": timing.median_s if timing else None,
        "p20_s": timing.p20_s if timing else None,
        "p80_s": timing.p80_s if timing else None,
        "n": timing.n if timing else 0,
        "spread": round((timing.p80_s - timing.p20_s) / timing.median_s, 4) if timing else None,
        "floor_s": floor_s,
        "ratio_to_frozen": timing.median_s / floor.median_s if timing and floor else None,
    }


def outcome(measured: bool, reason: str | None) -> dict[str, Any]:
    """The fields OUTCOME; a reason may stand beside a figure."""
    skipped = (reason or "").startswith("skipped")
    return {"status": "ok" if measured else ("skipped" if skipped else "failed"), "reason": reason}


def why(error: BaseException) -> str:
    """One line of why a provider failed."""
    text = str(error)
    lines = (text if text.startswith("skipped") else f"{type(error).__name__}: {text}").strip().splitlines()
    return lines[0][:300]


def refusal(row: Row) -> str | None:
    """Why a row is no result; None if it is one. A failure, with its reason, is one too."""
    if row["dirty"]:
        return "the tree has changes outside bench/results (commit them, or set BENCH_COMMIT in a copy without git)"
    if row["status"] != "ok":
        return None
    limit, error = row.get("err_limit"), row.get("err_vs_fp64")
    if error is not None and limit is not None and not error <= limit:
        return f"its error against fp64 is {error:.2g}, beyond {limit:.2g}"
    if (row.get("spread") or 0.0) > WIDEST_SPREAD:
        return f"its spread is {row['spread']:.0%} of the median, beyond {WIDEST_SPREAD:.0%}: the machine was busy"
    return None


def is_yardstick(row: Row) -> bool:
    """Whether the ratios of its group are to this row."""
    return row["provider"] in ("frozen", "frozen_fp32") or row.get("shipped") is True


def say_if_refused(provenance: Mapping[str, Any], out: Path | None) -> None:
    """Before anything is measured for nothing."""
    if provenance["dirty"] and out is None:
        print(
            "the tree has changes outside bench/results: this run will file nothing (--out FILE keeps it)",
            file=sys.stderr,
        )


def record(rows: Sequence[Row], *, out: Path | None = None) -> None:
    """Add rows to their machine's file, or to `out`; say which were refused, and why, and keep those apart.

    Where the yardstick of a group is refused, so are the ratios to it: the caller hands over groups.
    """
    if not rows:
        return
    if out is not None:
        append(out, rows)
        return
    yardstick = next((reason for row in rows if is_yardstick(row) and (reason := refusal(row))), None)
    kept, refused = [], {}
    for row in rows:
        reason = refusal(row) or (f"what its ratio is to: {yardstick}" if yardstick else None)
        if reason is None:
            kept.append(row)
        else:
            refused.setdefault(reason, []).append(row)
    name = f"{rows[0]['bench']}.jsonl"
    if kept:
        append(RESULTS / machine_id(kept[0]) / name, kept)
    for reason, those in refused.items():
        append(SCRATCH / name, those)
        names = ", ".join(dict.fromkeys(str(row["provider"]) for row in those))
        print(f"not a result ({names}): {reason}; kept in {SCRATCH / name}", file=sys.stderr)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add lines to a file that appears whole or not at all."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    write_atomically(path, before + to_jsonl(rows))


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every case, in the order of the cases' first rows."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found[tuple(row[field] for field in (*CASE[row["bench"]], "machine", "threads"))] = row
    return list(found.values())


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file as one: a reader, or a killed run, never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_jsonl(rows: Iterable[Row]) -> str:
    """JSON lines; NaN and infinity are an error, since JSON has neither."""
    return "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a broken line is an error that names file and line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
    return rows


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))
