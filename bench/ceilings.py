"""What can this machine do at most? Products a second and bytes a second, beside which every figure is placed.

    python -m bench.ceilings

On a CPU: fused multiply-adds that stay in registers (`fma`, by dtype: the best instruction that the instruction set in
force has for it) and reads of a buffer far larger than the caches (`read`), all threads at once, by a small C++ file that
is compiled when it is needed; without a compiler they are taken from ATen's best. And ATen's product of two 1024 x 1024
matrices (`matmul`, by dtype; left out where it has no real product). On a GPU: ATen's product of two 8192 x 8192 matrices
and a copy of a gigabyte (`copy`, bytes read and written).
Writes bench/results/<machine>/ceilings.jsonl: value in flop/s or bytes/s, the best of several tries, since anything else
on the machine only ever makes it less.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench import machine, results
from bench.providers import DTYPES

SOURCE = Path(__file__).with_suffix(".cpp")
READ_BYTES = 512 << 20


@cache
def library() -> ctypes.CDLL | None:
    """The compiled file; None where there is no compiler for it."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.mkdtemp(prefix="svdkern-ceilings-"))
    path = folder / f"ceilings-{digest}.so"
    try:
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", path, SOURCE], check=True, capture_output=True)
        found = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what is loaded stays
    for name in ("fma_avx2", "fma_avx512", "fma_avx512_bf16", "fma_amx_bf16"):
        getattr(found, name).argtypes = [ctypes.c_int64]
        getattr(found, name).restype = ctypes.c_float
    found.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.read_all.restype = ctypes.c_int64
    return found


def at_once(work: Callable[[int], object], threads: int) -> float:
    """Seconds from the first start to the last end of work(0) … work(threads - 1), on a thread each.

    ctypes lets go of the interpreter while it runs.
    """
    ready, times = threading.Barrier(threads), [(0.0, 0.0)] * threads

    def run(i: int) -> None:
        ready.wait()
        start = time.perf_counter()
        work(i)
        times[i] = start, time.perf_counter()

    running = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return max(end for _, end in times) - min(start for start, _ in times)


FMA = {  # instruction set -> dtype -> (function, flop a turn)
    "avx2": {"fp32": ("fma_avx2", 12 * 2 * 8)},
    "avx512": {"fp32": ("fma_avx512", 12 * 2 * 16)},
    "avx512_bf16": {"fp32": ("fma_avx512", 12 * 2 * 16), "bf16": ("fma_avx512_bf16", 12 * 2 * 32)},
    "amx_bf16": {"fp32": ("fma_avx512", 12 * 2 * 16), "bf16": ("fma_amx_bf16", 4 * 2 * 16 * 16 * 32)},
}


def cpu_ceilings(isa: str, tries: int = 12) -> dict[tuple[str, str | None], float]:
    """(provider, dtype) -> value. Half precision without instructions of its own runs at fp32's rate."""
    threads, found = torch.get_num_threads(), library()
    base, _, more = isa.partition("+")
    values = matmul_ceilings(tries)
    if found is None or base not in FMA:
        return values | aten_ceilings(values, tries)
    if more:
        base = "amx_bf16"  # ATen's products have what ours were told not to use
    if base == "amx_bf16":  # the kernel grants the tiles' state to a process that asks: a product of ATen's does
        torch.mm(torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16))
    for dtype, (name, flop) in FMA[base].items():
        turns, call = int((1e11 if "amx" in name else 5e9) / flop), getattr(found, name)  # 30 ms or so
        seconds = min(at_once(lambda _, call=call, turns=turns: call(turns), threads) for _ in range(tries))
        values["fma", dtype] = threads * turns * flop / seconds
    for dtype in DTYPES:
        values.setdefault(("fma", dtype), values["fma", "fp32"])
    memory = torch.ones(READ_BYTES // 4)
    share = READ_BYTES // threads // 4096 * 4096
    start = -(-memory.data_ptr() // 64) * 64

    def read(i: int) -> int:
        return int(found.read_all(start + i * share, share - 4096))

    values["read", None] = max(threads * (share - 4096) / at_once(read, threads) for _ in range(tries))
    return values


def matmul_ceilings(tries: int) -> dict[tuple[str, str | None], float]:
    """ATen's products, of those dtypes that it has real ones for: elsewhere one takes seconds."""
    values: dict[tuple[str, str | None], float] = {}
    for name, dtype in DTYPES.items():
        a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        few = a[:4].clone()
        if min(_timed(lambda few=few, b=b: few @ b) for _ in range(3)) > 0.02:
            continue
        seconds = min(_timed(lambda a=a, b=b: a @ b) for _ in range(tries))
        values["matmul", name] = 2 * 1024**3 / seconds
    return values


def aten_ceilings(products: dict[tuple[str, str | None], float], tries: int) -> dict[tuple[str, str | None], float]:
    """In place of our own measurements: the best that ATen reaches."""
    values: dict[tuple[str, str | None], float] = {}
    for dtype in DTYPES:
        values["fma", dtype] = products.get(("matmul", dtype), products["matmul", "fp32"])
    memory = torch.ones(READ_BYTES // 4)
    values["read", None] = READ_BYTES / min(_timed(memory.sum) for _ in range(tries))
    return values


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gpu_ceilings(device: torch.device, tries: int = 12) -> dict[tuple[str, str | None], float]:
    """(provider, dtype) -> value, by ATen's own product and copy."""
    from svdkern.timing import cuda_clock

    values: dict[tuple[str, str | None], float] = {}
    for name, dtype in DTYPES.items():
        n = 8192 if dtype != torch.float32 else 4096
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        call = lambda _, a=a, b=b, out=out: torch.mm(a, b, out=out)  # noqa: E731
        call(0)
        values["matmul", name] = 2.0 * n**3 / min(cuda_clock(call, 0, 3) for _ in range(tries))
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    values["copy", None] = (
        2.0 * source.numel() / min(cuda_clock(lambda _: target.copy_(source), 0, 3) for _ in range(tries))
    )
    return values


def measure(device: torch.device) -> dict[tuple[str, str | None], float]:
    """The ceilings of a device."""
    return gpu_ceilings(device) if device.type == "cuda" else cpu_ceilings(machine.isa(device))


def rows(values: dict[tuple[str, str | None], float], provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Result rows."""
    without = provenance["device"] == "cpu" and library() is None
    return [
        results.make(
            "ceilings", provider=name, dtype=dtype, value=value, unit="bytes/s" if dtype is None else "flop/s",
            **results.outcome(True, "ATen's best: no compiler" if without and name != "matmul" else None), **provenance,
        )
        for (name, dtype), value in values.items()
    ]  # fmt: skip


def floor_seconds(flops: float, traffic: float, dtype: str, values: dict[tuple[str, str | None], float]) -> float:
    """The least time that so many operations on `dtype` and so many bytes can take here."""
    peak = values.get(("fma", dtype), values.get(("matmul", dtype), 0.0))
    return max(flops / peak, traffic / values.get(("read", None), values.get(("copy", None), 0.0)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ceilings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="add to this file instead of the machine's")
    options = parser.parse_args(arguments)
    import svdkern  # noqa: F401  its kernels say which instruction set is in force

    device = torch.device(options.device)
    found = rows(measure(device), machine.provenance(device))
    for row in found:
        unit = ("GB/s", 1e9) if row["dtype"] is None else ("GFLOP/s", 1e9)
        print(f"{row['provider']:8}{row['dtype'] or '':6}{row['value'] / unit[1]:10.1f} {unit[0]}", file=sys.stderr)
    results.record(found, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
