"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import machine, results


def parser(bench: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of ``python -m svdkern bench <bench>`` that knows ``--device`` and ``--out``."""
    made = argparse.ArgumentParser(
        prog=f"python -m svdkern bench {bench}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path, help=f"add to this file instead of bench/results/<machine>/{bench}.jsonl")
    return made


def begin(options: argparse.Namespace) -> None:
    """Set ``options.provenance``, and say at once, not after the work, if its rows would not count as results."""
    import svdkern  # noqa: F401  its kernels say which instruction set is in force

    options.provenance = machine.provenance(options.device)
    results.say_if_refused(options.provenance, options.out)
