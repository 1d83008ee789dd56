"""Tables and plots for README and docs, from the result files. Nobody types a number.

    python -m svdkern bench report                write the tables between their markers in README.md, bench/, docs/, and all plots
    python -m svdkern bench report --plots        write the plots alone, bench/results/<machine>/plots/
    python -m svdkern bench report --check        say what would change in the documents, and fail if anything would
    python -m svdkern bench report --add FILE …   file results under bench/results/<machine>/ first (runs/demo/model_step.jsonl)

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; NAME is one of TABLES. One table a machine that has
results for it.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plots, results
from bench.machine import ROOT, machine_id
from bench.measured import Machine, machines
from bench.tables import TABLES

MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /bench -->)", re.DOTALL)


def generated(name: str, found: Sequence[Machine]) -> str:
    """The tables called `name`."""
    if name not in TABLES:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
    return TABLES[name](found) or "No results yet.\n"


def rewritten(text: str, found: Sequence[Machine]) -> str:
    """The text with every marked table made anew."""
    return MARKED.sub(lambda match: f"{match[1]}\n{generated(match['name'], found)}\n{match[4]}", text)


def documents(root: Path) -> list[Path]:
    """Files that may hold tables."""
    candidates = [root / "README.md", root / "bench" / "README.md", *sorted((root / "docs").glob("**/*.md"))]
    return [path for path in candidates if path.exists()]


def add(path: Path, folder: Path) -> str:
    """Adds the rows of a result file to those of their machine, once; says where they are, or why they are no results."""
    rows = [results.make(**row) for row in results.read_jsonl(path)]
    if not rows:
        raise ValueError(f"{path} holds no results")
    for row in rows:
        if reason := results.refusal(row):
            return f"did not file {path}: {row['provider']}: {reason}"
    targets: dict[Path, list[dict[str, Any]]] = {}
    for row in rows:
        targets.setdefault(folder / machine_id(row) / f"{row['bench']}.jsonl", []).append(row)
    for target, those in targets.items():
        before = results.read_jsonl(target) if target.exists() else []
        results.append(target, [row for row in those if row not in before])
    return f"filed {path} in {', '.join(map(str, targets))}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m svdkern bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="change nothing; fail with a diff if a table would change")
    only.add_argument("--plots", action="store_true", help="write the plots alone")
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="FILE", help="result files to take in first")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    root, folder = ROOT, results.RESULTS
    if options.root is not None:
        root, folder = options.root, options.root / "bench" / "results"
    for path in options.add:
        print(add(path, folder))
    found = machines(folder)
    stale = 0
    for path in [] if options.plots else documents(root):
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, found)
        if new == text:
            continue
        stale += 1
        name = str(path.relative_to(root))
        if options.check:
            lines = difflib.unified_diff(text.splitlines(True), new.splitlines(True), name, f"{name} from the results")
            sys.stdout.writelines(lines)
        else:
            results.write_atomically(path, new)
            print(f"wrote the tables of {name}")
    if not options.check:
        for machine in found:
            for path in plots.write(machine):
                print(f"drew {path}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
