"""The command line: ``python -m svdkern doctor``.

Layer: the top; imports what it shows and nothing imports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from svdkern import __version__
from svdkern.doctor import add_doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m svdkern",
        description="svdkern: linear layers with SVD adapters as one fused operation.",
        epilog="environment: SVDKERN_BACKEND=eager|cpu forces a backend; SVDKERN_STRICT=1 makes a fallback an error; "
        "SVDKERN_CPU_ISA=NAME forces an instruction set (doctor lists them).",
    )
    parser.add_argument("--version", action="version", version=f"svdkern {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_doctor(commands)
    options = parser.parse_args(arguments)
    return int(options.run(options))
