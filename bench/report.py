"""Tables for README and docs, from the result files. Nobody types a number.

    python -m bench.report                write the tables between their markers, in README.md, bench/ and docs/
    python -m bench.report --check        say what would change, and fail if anything would (a test runs this)
    python -m bench.report --add FILE …   file results under bench/results/<machine>/ first (runs/demo/model_step.jsonl)

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; NAME is one of linear, linear-fwd, model_step. One
table a machine, from bench/results/<machine>/.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import harness

Row = Mapping[str, Any]

MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /bench -->)", re.DOTALL)
LINEAR_COLUMNS = ("eager", "addmm", "compile", "peft_default", "peft_bf16", "svdkern-eager", "svdkern-cpu", "svdkern")
TITLES = {
    "frozen": "frozen",
    "frozen_fp32": "frozen, fp32",
    "compile": "torch.compile",
    "svdkern_bf16": "svdkern, the whole model in bf16",
    "peft_default": "PEFT default",
    "peft_bf16": "PEFT, adapters in the base's dtype",
}


def seconds(value: float | None) -> str:
    """Three significant digits in the unit that suits."""
    if value is None:
        return "–"
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e3, "ms")) if value * s >= 1.0), (1e6, "µs"))
    return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"


def ratio(row: Row | None) -> str:
    if row is None or row["ratio_to_frozen"] is None:
        return "–"
    return f"{row['ratio_to_frozen']:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column on the left, the others on the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def origin(rows: Sequence[Row]) -> str:
    """One line: machine, instruction set, threads, torch, commit."""
    first = rows[0]
    commits = sorted({str(row["commit"]) + ("+changes" if row["dirty"] else "") for row in rows})
    threads = f", {first['threads']} threads" if first["device"] == "cpu" else ""
    return f"{first['machine']} · {first['isa']}{threads} · torch {first['torch']} · commit {', '.join(commits)}\n\n"


def linear_table(rows: Sequence[Row], mode: str) -> str:
    """Time of the frozen layer, and every provider's ratio to it."""
    rows = [row for row in rows if row["mode"] == mode]
    if not rows:
        return ""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        # The fp32 yardstick of a half-precision group carries dtype fp32: it belongs to the group that it was timed in.
        key = (row["M"], row["K"], row["N"], row["r"])
        if row["provider"] == "frozen_fp32":
            pending = row
            continue
        group = groups.setdefault((*key, row["dtype"]), {})
        group[row["provider"]] = row
        if row["provider"] == "frozen" and row["median_s"] is None:
            group["frozen_fp32"] = pending
    columns = [name for name in LINEAR_COLUMNS if any(name in group for group in groups.values())]
    body = []
    for (m, k, n, r, dtype), group in groups.items():
        frozen = seconds(group["frozen"]["median_s"]) if "frozen" in group else "–"
        if "frozen_fp32" in group:
            frozen = f"{seconds(group['frozen_fp32']['median_s'])} (fp32)"
        cells = [ratio(group.get(name)) for name in columns]
        best = min((cell for cell in cells if cell != "–"), key=float, default=None)
        body.append([f"M={m}, {k}→{n}, r={r}", dtype, frozen, *(f"**{c}**" if c == best else c for c in cells)])
    header = ["shape", "dtype", "frozen", *(TITLES.get(name, name) for name in columns)]
    return origin(rows) + table(header, body)


def model_step_table(rows: Sequence[Row]) -> str:
    """Step time and peak memory of every provider."""
    first = rows[0]
    body = []
    for row in rows:
        memory = "–" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f} MB"
        note = "" if row["reason"] is None else f" ({row['reason']})"
        name = str(row["provider"])
        body.append([TITLES.get(name, name) + note, seconds(row["median_s"]), ratio(row), memory])
    what = f"{first['model']}, {first['dtype']}, r={first['r']}, {first['tokens']} tokens a step"
    return origin(rows) + table([what, "step", "over frozen", "peak memory"], body)


TABLES: Mapping[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "linear": ("linear.jsonl", lambda rows: linear_table(rows, "fwd_bwd")),
    "linear-fwd": ("linear.jsonl", lambda rows: linear_table(rows, "fwd")),
    "model_step": ("model_step.jsonl", model_step_table),
}


def generated(name: str, results: Path) -> str:
    """The tables called `name`, one a machine."""
    if name not in TABLES:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
    file, render = TABLES[name]
    parts = [render(harness.read_jsonl(path)) for path in sorted(results.glob(f"*/{file}"))]
    return "\n".join(part for part in parts if part) or "No results yet.\n"


def rewritten(text: str, results: Path) -> str:
    """The text with every marked table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{generated(found['name'], results)}\n{found[4]}", text)


def documents(root: Path) -> list[Path]:
    """Files that may hold tables."""
    candidates = [root / "README.md", root / "bench" / "README.md", *sorted((root / "docs").glob("**/*.md"))]
    return [path for path in candidates if path.exists()]


def add(path: Path, results: Path) -> Path:
    """Files a result file under its machine; returns the new place."""
    rows = harness.read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} holds no results")
    target = results / harness.machine_id(rows[0]) / f"{rows[0]['bench']}.jsonl"
    harness.write_atomically(target, harness.to_jsonl(rows))
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail with a diff if anything would change"
    )
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="FILE", help="result files to take in first")
    parser.add_argument("--root", type=Path, default=harness.ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    results = options.root / "bench" / "results"
    for path in options.add:
        print(f"filed as {add(path, results)}")
    stale = 0
    for path in documents(options.root):
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, results)
        if new == text:
            continue
        stale += 1
        name = str(path.relative_to(options.root))
        if options.check:
            lines = difflib.unified_diff(text.splitlines(True), new.splitlines(True), name, f"{name} from the results")
            sys.stdout.writelines(lines)
        else:
            harness.write_atomically(path, new)
            print(f"wrote the tables of {name}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
