"""Were the predictions right? What bench/roofline.py stored, beside what bench/linear.py measured later.

    python -m svdkern bench roofline --device bench/results/<machine>/ceilings.jsonl --store
    python -m svdkern bench confirm bench/results/<machine>/roofline.jsonl bench/results/<machine>/linear.jsonl

A line a measured row whose (case, dtype, mode) was predicted: p/m is predicted over measured. At the end, by design: the
geometric mean error, that is of max(p/m, m/p), and of p/m. A provider stands for the design that it should be like. On a GPU
predictions are of replayed CUDA graphs, and so are the rows that are taken (`bench linear --graph`).
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import results
from bench.cases import Case
from bench.results import Row
from bench.roofline import FEW_ROWS

DESIGNS = {  # of providers, by device
    "cuda": {
        "frozen": "frozen",
        "eager": "eager",
        "addmm": "unfused",
        "peft_default": "peft",
        "svdkern": "persistent",
        "svdkern-triton": "persistent",
        "svdkern-cuda": "split",
    },
    "cpu": {"frozen": "frozen", "eager": "eager", "addmm": "steps", "peft_default": "peft", "svdkern": "fused"},
}


def confirm(predictions: Iterable[Row], measured: Iterable[Row]) -> str:
    """The lines; of two predictions of the same the last counts."""
    predicted = {
        (*(row[field] for field in "MKNr"), row["dtype"], row["mode"], row["candidate"]): row["predicted_s"]
        for row in predictions
    }
    ratios = defaultdict[str, list[float]](list)
    form = "{:22}{:6}{:9}{:16}{:12}{:>14}{:>14}{:>8}"
    lines = [form.format("shape", "dtype", "mode", "provider", "design", "predicted ms", "measured ms", "p/m")]
    for row in results.latest(row for row in measured if row["bench"] == "linear"):
        design = DESIGNS[row["device"]].get(row["provider"])
        if row["provider"] == "svdkern-cuda" and row["M"] <= FEW_ROWS:
            design = "few"
        sizes = [row[field] for field in "MKNr"]
        mode, graph, _ = row["mode"].partition("_graph")
        if bool(graph) != (row["device"] == "cuda"):
            continue
        guess = predicted.get((*sizes, row["dtype"], mode, design))
        if guess is None or (row["status"], row["dropout"], row["mask"]) != ("ok", 0.0, "xuv"):
            continue
        ratios[str(design)].append(guess / row["median_s"])
        figures = (f"{guess * 1e3:.4f}", f"{row['median_s'] * 1e3:.4f}", f"{guess / row['median_s']:.2f}")
        lines.append(form.format(str(Case(*sizes)), row["dtype"], mode, row["provider"], str(design), *figures))
    if not ratios:
        raise ValueError("nothing that was predicted was measured")
    for name, those in {**ratios, "all": sum(ratios.values(), [])}.items():
        error, bias = map(results.geometric_mean, ([max(ratio, 1 / ratio) for ratio in those], those))
        lines.append(f"{name}: geometric mean error {error:.2f}, of p/m {bias:.2f}, {len(those)} rows")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m svdkern bench confirm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", type=Path, help="rows that `bench roofline --store` wrote")
    parser.add_argument("measured", type=Path, help="rows of `bench linear` (GPU: --graph)")
    options = parser.parse_args(arguments)
    try:
        print(confirm(results.read_jsonl(options.predictions), results.read_jsonl(options.measured)))
    except (OSError, ValueError, KeyError) as error:
        parser.error(results.why(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
