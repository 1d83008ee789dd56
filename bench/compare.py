"""Do two runs agree? Medians of the same cases side by side, and whether they differ by more than their spreads.

    python -m svdkern bench compare before.jsonl after.jsonl

For a repeated run, or for a change: run with --out before.jsonl, change, run with --out after.jsonl. Compared are the
ratios to the frozen layer of the same run where there are any (they move less than seconds on a busy machine), else the
seconds. A case whose two values differ by more than both spreads together, and by more than 3 %, is marked.
Exit status 1 if a case of --provider (default: svdkern) became slower so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import results
from bench.results import CASE, Row

LEAST = 0.03


def value_of(row: Row, by_ratio: bool) -> float:
    """The ratio to the frozen layer, or seconds."""
    return float(row["ratio_to_frozen"] if by_ratio else row["median_s"])


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[str, str, float, float, float, bool]]:
    """(case, provider, before, after, allowed change, whether it is beyond that), for cases measured in both."""
    known = {tuple(row[f] for f in CASE[row["bench"]]): row for row in results.latest(before)}
    found = []
    for row in results.latest(after):
        first = known.get(tuple(row[f] for f in CASE[row["bench"]]))
        if first is None or not (first.get("median_s") and row.get("median_s")):
            continue
        by_ratio = bool(first["ratio_to_frozen"] and row["ratio_to_frozen"]) and row["ratio_to_frozen"] != 1.0
        a, b = value_of(first, by_ratio), value_of(row, by_ratio)
        allowed = max(LEAST, first["spread"] + row["spread"])
        name = " ".join(str(row[f]) for f in CASE[row["bench"]] if f not in ("provider", "factor_dtype"))
        found.append((name, str(row["provider"]), a, b, allowed, abs(b / a - 1) > allowed))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m svdkern bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--provider", default="svdkern", help="whose slower cases make the exit status 1")
    options = parser.parse_args(arguments)
    for path in (options.before, options.after):
        if not path.exists():
            parser.error(f"{path} does not exist; a benchmark's --out makes such a file")
    found = compare(results.read_jsonl(options.before), results.read_jsonl(options.after))
    if not found:
        parser.error(f"{options.before} and {options.after} have no measured case in common")
    slower = 0
    for case, provider, a, b, allowed, beyond in found:
        slower += beyond and b > a and provider == options.provider
        mark = "  <-- beyond the spread" if beyond else ""
        print(f"{case:44} {provider:14} {a:10.4g} {b:10.4g} {b / a - 1:+7.1%} (spread {allowed:.1%}){mark}")
    agree = sum(not beyond for *_, beyond in found)
    print(f"{agree} of {len(found)} agree within the spreads that they were printed with")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
