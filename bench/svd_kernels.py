"""What do the Triton kernels behind the SVD save beside PyTorch's operations on the same GPU?

    python -m svdkern bench svd_kernels                                bf16 weights of a 7B model, r = 16 and 64
    python -m svdkern bench svd_kernels --dtypes fp32 --shapes 4096x4096

Kernels of a weight (N, K): `sketch` (K, r), `residual` of r ranks, `normal`, both products of a Krylov step with r columns.
Providers: torch (what a CPU or a GPU without Triton takes) and triton. err: the largest difference of the two over the
largest value; 0 for sketch and residual, whose bits are the same. Adds to bench/results/<machine>/svd_kernels.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import command, results
from bench.init import shape
from bench.providers import DTYPES
from svdkern import timing
from svdkern.backends import triton, triton_svd
from svdkern.linalg.operand import Operand
from svdkern.linalg.residual import float64_factors, residual_in_torch
from svdkern.linalg.sketch import sketch_in_torch

KERNELS = ("sketch", "residual", "normal")
PROVIDERS = ("torch", "triton")
Call = Callable[[], Tensor]


def calls(kernel: str, weight: Tensor, r: int) -> Mapping[str, Call]:
    """Both ways to compute the same."""
    (n, k), device = weight.shape, weight.device
    if kernel == "sketch":
        options: dict[str, Any] = {"seed": 0, "first": 0, "dtype": torch.float32, "device": device}
        return {
            "torch": lambda: sketch_in_torch(k, r, **options),
            "triton": lambda: triton_svd.sketch(k, r, **options),
        }
    if kernel == "residual":
        u, sigma, v = (torch.randn(*size, device=device) for size in ((k, r), (r,), (n, r)))

        def by_triton() -> Tensor:
            a, columns = float64_factors(u, sigma, v, 0.5)
            return triton_svd.residual(weight, columns, a)

        return {"torch": lambda: residual_in_torch(weight, u, sigma, v, 0.5), "triton": by_triton}
    operand, x = Operand(weight, "weight"), torch.randn(k, r, device=device)
    return {
        "torch": lambda: operand.both(x)[1],
        "triton": lambda: triton_svd.both(weight, x, operand.factor)[1],
    }


def measure(kernel: str, n: int, k: int, r: int, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one kernel and size, the providers in turn."""
    torch.manual_seed(options.seed)
    weight = torch.randn(n, k).to(DTYPES[dtype]).to(options.device)
    ways = calls(kernel, weight, r)
    expected = ways["torch"]().double()
    errors, reasons, timed = {}, {}, {}
    for name, call in ways.items():
        try:
            if name == "triton" and (reason := triton.why_not(weight.device, torch.float32)):
                raise ValueError(f"skipped: {reason}")
            errors[name] = float((call().double() - expected).abs().max() / expected.abs().max())
            timed[name] = lambda _, call=call: call()
        except Exception as error:  # a way that fails is a row with its reason, whatever it raises
            reasons[name] = results.why(error)
    clock = timing.cuda_clock if weight.is_cuda else timing.cpu_clock
    timings = timing.interleave(timed, seconds=options.seconds, clock=clock)
    return [
        results.make(
            "svd_kernels", provider=name, dtype=dtype, kernel=kernel, N=n, K=k, r=r, err=errors.get(name),
            **results.timed(timings.get(name), None), seed=options.seed,
            **results.outcome(name in timings, reasons.get(name)), **options.provenance,
        )
        for name in ways
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("svd_kernels", __doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(4096, 4096), (14336, 4096)], metavar="NxK")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for one kernel and size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    command.begin(options)
    groups = [
        (kernel, n, k, r, dtype)
        for n, k in options.shapes
        for kernel in options.kernels
        for r in options.ranks
        for dtype in options.dtypes
    ]
    for group in tqdm(groups, desc="svd_kernels", file=sys.stderr):
        rows = measure(*group, options)
        for row in rows:
            time = f"{row['median_s'] * 1e6:.0f} us" if row["median_s"] is not None else f"– ({row['reason']})"
            name = f"{row['kernel']} {row['N']}x{row['K']} r={row['r']} {row['dtype']}"
            tqdm.write(f"{name}: {row['provider']} {time}", file=sys.stderr)
        results.record(rows, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
