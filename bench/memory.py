"""How much memory does one adapted linear layer need beyond its operands, forward and backward?

    python -m svdkern bench memory

The peak that a call adds to the memory of the tensors it is given, gradients it returns included, and how much of that is
beyond the frozen layer's. On a CPU one process a provider, whose resident memory is read before the call and at
its peak (VmHWM), after a call with few rows that brings library code and threads; on a GPU torch's own counters.
Adds to bench/results/<machine>/memory.jsonl one line a (case, dtype, provider).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import command, machine, results
from bench.cases import Case
from bench.providers import DTYPES, FROZEN, PROVIDERS, adapted, make_operands

CASES = (Case(4096, 2048, 2048, 16), Case(4096, 2048, 2048, 128), Case(8192, 576, 1536, 16))
DEFAULT_PROVIDERS = ("frozen", "eager", "addmm", "materialised", "peft_default", "peft_bf16", "svdkern")


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak. Not ru_maxrss, which a child inherits from its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_extra(name: str, case: Case, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that forward and backward add to their operands, at the peak. In a process that does nothing else."""
    small = Case(64, case.K, case.N, case.r)
    warm = PROVIDERS[name](make_operands(small, dtype, device)[0])  # code and threads, not what grows with M
    warm.backward()
    layer = PROVIDERS[name](make_operands(case, dtype, device)[0])
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        layer.backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    gradients = layer.backward()
    peak = resident("VmHWM") - before
    del gradients
    return peak


def in_a_process_of_its_own(name: str, case: Case, dtype: str, device: str) -> int:
    """Peak bytes; raises with the child's last line."""
    command = [sys.executable, "-m", "bench.memory", "--one", name, "--shapes", str(case), "--dtypes", dtype]
    # every large tensor gets pages of its own, and gives them back: none hides in what an earlier one left
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [*command, "--device", device], capture_output=True, text=True, cwd=machine.ROOT, timeout=600, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return int(json.loads(done.stdout.splitlines()[-1]))


def measure(case: Case, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one (case, dtype)."""
    found: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for name in options.providers:
        try:
            found[name] = in_a_process_of_its_own(name, case, dtype, options.device)
        except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
            reasons[name] = results.why(error)
    rows = []
    for name in options.providers:
        peak, floor = found.get(name), found.get(FROZEN)
        rows.append(
            results.make(
                "memory",
                provider=name,
                dtype=dtype,
                M=case.M,
                K=case.K,
                N=case.N,
                r=case.r,
                peak_extra_mb=None if peak is None else round(peak / 1e6, 2),
                over_frozen_mb=None
                if peak is None or floor is None or not adapted(name)
                else round((peak - floor) / 1e6, 2),
                seed=0,
                **results.outcome(peak is not None, reasons.get(name)),
                **options.provenance,
            )
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("memory", __doc__)
    parser.add_argument("--shapes", type=Case.parse, nargs="+", default=list(CASES), metavar="MxKxNxr")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: fp32, and bf16 where ATen has it")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(DEFAULT_PROVIDERS))
    parser.add_argument("--one", choices=PROVIDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        dtype, device = DTYPES[options.dtypes[0]], torch.device(options.device)
        print(json.dumps(peak_extra(options.one, options.shapes[0], dtype, device)))
        return 0
    if options.dtypes is None:  # without bf16 ATen would take minutes a call
        options.dtypes = ["fp32", "bf16"] if options.device != "cpu" or machine.bf16_hardware() else ["fp32"]
    command.begin(options)
    groups = [(case, dtype) for case in options.shapes for dtype in options.dtypes]
    for case, dtype in tqdm(groups, desc="memory", unit="group", file=sys.stderr):
        rows = measure(case, dtype, options)
        parts = [f"{row['provider']} {row['peak_extra_mb'] or '–'}" for row in rows]
        tqdm.write(f"{case} {dtype}, MB beyond the operands: " + " · ".join(parts), file=sys.stderr)
        results.record(rows, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
