"""The command line: ``python -m svdkern init``, ``doctor``, ``tune`` and ``bench``.

Layer: the top; imports what it shows and nothing imports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from svdkern import __version__
from svdkern.bench_command import add_bench
from svdkern.doctor import add_doctor
from svdkern.init_command import add_init
from svdkern.tune import add_tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m svdkern",
        description="svdkern: linear layers with SVD adapters as one fused operation.",
        epilog="environment: SVDKERN_BACKEND=eager|cpu forces a backend; SVDKERN_STRICT=1 makes a fallback an error; "
        "SVDKERN_CPU_ISA=NAME forces an instruction set (doctor lists them); SVDKERN_AUTOTUNE=1 measures a layer at its first "
        "call; SVDKERN_CACHE_DIR=DIR is where measurements are kept.",
    )
    parser.add_argument("--version", action="version", version=f"svdkern {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_init(commands)
    add_doctor(commands)
    add_tune(commands)
    add_bench(commands)
    options = parser.parse_args(arguments)
    return int(options.run(options))
