"""Are the block sizes of the CPU kernels the right ones for this CPU?

    python -m svdkern bench blocks                     the instruction set in force, all block sizes
    python -m svdkern bench blocks --only block_depth --dtypes bf16

Each block size of csrc/cpu is tried with other values, one at a time: the kernels are built anew for every value (some
seconds each), and forward and backward of a few layers are timed with all values of one block size in turn. Adds to
bench/results/<machine>/blocks.jsonl one line a (block size, value, layer): seconds, and the ratio to the value in the
sources. A value that is faster for every layer by more than the spread belongs into the sources.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import machine, results
from bench.cases import Case
from bench.providers import DTYPES, make_operands
from svdkern import timing

CSRC = machine.ROOT / "csrc"
CASES = (Case(2048, 2048, 2048, 16), Case(1024, 576, 1536, 16), Case(256, 4096, 4096, 16), Case(1024, 2048, 2048, 128))
CODES = {"fp32": 0, "bf16": 1, "fp16": 2}


@dataclass(frozen=True)
class Block:
    """A constant of the sources: where it stands, what it is for, the values to try."""

    file: str
    before: str  # what stands before the value, a regular expression
    what: str
    values: tuple[str, ...]


def engine(isa: str, dtype: str) -> tuple[str, tuple[str, ...]]:
    """Where engine.h has the depth of what multiplies `dtype` on `isa`, and the depths to try."""
    if dtype == "bf16" and isa == "amx_bf16":
        return r"struct Tiles\b.*?\bblock_depth = ", ("160", "256", "320", "416", "640")
    if dtype == "bf16" and isa == "avx512_bf16":
        return r"struct Pairs\b.*?\bblock_depth = ", ("256", "384", "512", "768")
    wide = r"W == 16 \? " if isa.startswith(("avx512", "amx")) else r"W == 16 \? \d+ : "
    return r"struct Fma\b.*?\bblock_depth = " + wide, ("64", "96", "128", "192", "256", "384")


def blocks(isa: str, dtype: str) -> dict[str, Block]:
    """All that matter for many rows."""
    depth, depths = engine(isa, dtype)
    gemm = "cpu/gemm.h"
    return {
        "block_depth": Block("cpu/engine.h", depth, "k of a panel: it stays in L1", depths),
        "group_columns": Block(gemm, r"group_columns = ", "outputs whose sums a thread holds", ("128", "256", "512")),
        "most_rows": Block(gemm, r"\bmost_rows = ", "rows in a block: packed rows and sums stay in L2", ("128", "256", "512")),
        "panel_bytes": Block(gemm, r"panel_bytes = ", "of the weight, packed at once", ("4 << 20", "16 << 20", "64 << 20")),
        "block_bytes": Block(gemm, r"block_bytes = ", "of packed rows", ("1 << 20", "2 << 20", "4 << 20", "8 << 20")),
        "most_rows_by_columns": Block(gemm, r"most_rows_by_columns = ", "rows packed at once", ("128", "512", "1024", "2048")),
        "outer_depth": Block("cpu/outer.h", r"outer_depth = ", "rows summed at a time for dU, dV", ("64", "128", "256")),
        "outer_columns": Block("cpu/outer.h", r"outer_columns = ", "columns of x or dy packed at a time", ("512", "1024", "2048")),
    }  # fmt: skip


def value_in(text: str, block: Block) -> str:
    """What the sources have."""
    found = re.search(block.before + r"(?P<value>[^,;:]+)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"{block.file} has no {block.before!r} any more: bring bench/blocks.py up to date")
    return found["value"].strip()


def flags_of(isa: str) -> str:
    """What setup.py compiles that instruction set with, beyond what all sources have."""
    spec = importlib.util.spec_from_file_location("svdkern_setup", machine.ROOT / "setup.py")
    assert spec and spec.loader
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return str(setup.kernel_sources()[f"csrc/cpu/isa_{isa}.cpp"])


def build(isa: str, block: Block, value: str | None, folder: Path) -> Any:
    """The kernels with that value (None: as they are), loaded."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    path = copy / block.file
    text = path.read_text()
    if value is not None:
        text, changed = re.subn(
            "(" + block.before + r")[^,;:]+", lambda m: m[1] + value + " ", text, count=1, flags=re.DOTALL
        )
        assert changed == 1
        path.write_text(text)
    library = folder / "layer.so"
    command = ["g++", "-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC", f"-I{copy}", *flags_of(isa).split()]
    subprocess.run([*command, "-o", library, machine.ROOT / "bench" / "blocks.cpp"], check=True, capture_output=True)
    return ctypes.CDLL(str(library)).layer


def make_call(layer: Any, case: Case, dtype: str, sets: Sequence[tuple[Tensor, ...]]) -> Callable[[int], object]:
    def pointer(tensor: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(tensor.data_ptr())

    sizes = [ctypes.c_int64(size) for size in (torch.get_num_threads(), case.M, case.K, case.N, case.r)]
    calls = [[ctypes.c_int32(CODES[dtype]), *sizes, *map(pointer, tensors)] for tensors in sets]
    return lambda i: layer(*calls[i % len(calls)])


def operand_sets(case: Case, dtype: str) -> list[tuple[Tensor, ...]]:
    """(x, weight, u, v, dy, y, h, dx, du, dv) of every turn."""
    kind = DTYPES[dtype]
    copies = timing.rotation_length(case.bytes(kind.itemsize), cap_bytes=256 << 20)
    sets = []
    for o in make_operands(case, kind, torch.device("cpu"), copies):
        out = [
            torch.empty(case.M, case.N, dtype=kind),
            torch.empty(case.M, case.r),
            torch.empty(case.M, case.K, dtype=kind),
        ]
        out += [torch.empty(case.K, case.r), torch.empty(case.N, case.r)]
        sets.append((o.x.detach(), o.weight, o.u.detach(), o.v.detach(), o.dy, *out))
    return sets


def measure(isa: str, dtype: str, name: str, block: Block, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one block size in one dtype: all values in turn, layer by layer."""
    shipped = value_in((CSRC / block.file).read_text(), block)
    with tempfile.TemporaryDirectory(prefix="svdkern-blocks-") as folder:
        layers = {}
        for i, value in enumerate([None, *(value for value in block.values if value != shipped)]):
            layers[value or shipped] = build(isa, block, value, Path(folder) / str(i))
    rows = []
    for case in options.shapes:
        sets = operand_sets(case, dtype)
        calls = {value: make_call(layer, case, dtype, sets) for value, layer in layers.items()}
        timings = timing.interleave(calls, seconds=options.seconds, settle=1)
        for value, measured in timings.items():
            row = results.make(
                "blocks", provider=name, dtype=dtype, value=value, shipped=value == shipped, what=block.what,
                M=case.M, K=case.K, N=case.N, r=case.r, **results.timed(measured, None),
                ratio_to_shipped=measured.median_s / timings[shipped].median_s,
                **results.outcome(True, None), **options.provenance,
            )  # fmt: skip
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m svdkern bench blocks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=Case.parse, nargs="+", default=list(CASES), metavar="MxKxNxr")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--only", nargs="+", choices=blocks("", ""), help="block sizes (default: all)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for one block size and layer")
    parser.add_argument("--out", type=Path, help="add to this file instead of bench/results/<machine>/blocks.jsonl")
    options = parser.parse_args(arguments)
    if shutil.which("g++") is None:
        parser.error("g++ is not there: every value is compiled")
    import svdkern  # noqa: F401  its kernels say which instruction set is in force

    isa = str(torch.ops.svdkern._cpu_isa())
    options.provenance = machine.provenance()
    results.say_if_refused(options.provenance, options.out)
    groups = [
        (dtype, name, block)
        for dtype in options.dtypes
        for name, block in blocks(isa, dtype).items()
        if name in (options.only or blocks(isa, dtype))
    ]
    for dtype, name, block in tqdm(groups, desc="blocks", unit="size", file=sys.stderr):
        rows = measure(isa, dtype, name, block, options)
        for case in options.shapes:
            mine = [row for row in rows if (row["M"], row["K"], row["N"]) == (case.M, case.K, case.N)]
            text = " · ".join(
                f"{row['value']}{'*' if row['shipped'] else ''} {row['ratio_to_shipped']:.3f}" for row in mine
            )
            tqdm.write(f"{isa} {dtype} {name} {case}: {text}", file=sys.stderr)
            results.record(mine, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
