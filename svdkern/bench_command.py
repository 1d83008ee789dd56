"""``python -m svdkern bench NAME …``: the front door of the benchmarks, which lie beside the package in its sources.

Layer: below ``cli``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent.parent


def add_bench(commands: Any) -> None:
    """Add the command to the command line's sub-parsers."""
    parser = commands.add_parser(
        "bench",
        help="measure speed, memory or accuracy (needs the sources)",
        description="Measure, side by side with everything else that computes the same, and file the result.\n\n"
        + _listed(),
        epilog="python -m svdkern bench NAME --help tells what each one measures and where it writes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="which benchmark")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own options")
    parser.set_defaults(run=bench)


def bench(options: argparse.Namespace) -> int:
    """Run one benchmark and return its exit status."""
    known = _known()
    if known is None:
        print(
            "the benchmarks are not installed with svdkern; run this where its sources are: a checkout of the repository, "
            "with svdkern built there (make build)",
            file=sys.stderr,
        )
        return 2
    if options.name not in known:
        print(f"no benchmark is called {options.name!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"bench.{options.name}").main(options.arguments))


def _known() -> dict[str, str] | None:
    if not (SOURCES / "bench" / "results.py").exists():
        return None
    if str(SOURCES) not in sys.path:
        sys.path.insert(0, str(SOURCES))
    return dict(importlib.import_module("bench").BENCHES)


def _listed() -> str:
    known = _known()
    if known is None:
        return "The benchmarks come with the sources, not with an installed package."
    return "\n".join(f"  {name:11} {what}" for name, what in known.items())
