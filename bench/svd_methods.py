"""Which way to a few singular triplets is the fastest, by size: the measurements behind `svdkern/linalg/crossovers.py`.

    python -m svdkern bench svd_methods                    square matrices, two spectra (a few minutes)
    python -m svdkern bench svd_methods --dtype bf16

Square (n, n) matrices as in `bench topk`. Providers: exact and krylov (linalg.topk_svd with that method, tol 1e-5) and filter
(what linalg.factors tries first), in turn. The method that topk_svd or factors would take is marked in what is printed. Adds to
bench/results/<machine>/svd_methods.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from bench import command, results
from bench.providers import DTYPES
from bench.topk import MATRICES, make_matrix
from svdkern import linalg, timing
from svdkern.linalg.crossovers import takes_filter, takes_krylov
from svdkern.linalg.filtered import fits, leading_triplets
from svdkern.linalg.precision import full_precision

TOL = 1e-5


def _filter(a: Tensor, r: int) -> None:
    if not fits(a, r):
        raise ValueError("skipped: the space would be too large a part of the matrix, or float64")
    with full_precision(a.device):
        if leading_triplets(a, r, TOL, seed=0) is None:
            raise ValueError("skipped: not possible in float32 for this matrix")


PROVIDERS: dict[str, Callable[[Tensor, int], object]] = {
    "exact": lambda a, r: linalg.topk_svd(a, r, method="exact", tol=TOL),
    "krylov": lambda a, r: linalg.topk_svd(a, r, method="krylov", tol=TOL),
    "filter": _filter,
}


def taken(a: Tensor, r: int) -> set[str]:
    """What topk_svd and factors take."""
    side = min(a.shape)
    return {"krylov" if takes_krylov(side, r) else "exact"} | ({"filter"} if takes_filter(a, r) else set())


def measure(kind: str, side: int, r: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one matrix and rank."""
    matrix = make_matrix(kind, side, side, options.seed).to(DTYPES[options.dtype]).to(options.device)
    calls: dict[str, Callable[[int], object]] = {}
    reasons: dict[str, str] = {}
    for name, call in PROVIDERS.items():
        try:
            call(matrix, r)
            calls[name] = lambda _, call=call: call(matrix, r)
        except Exception as error:
            reasons[name] = results.why(error)
    clock = timing.cuda_clock if matrix.is_cuda else timing.cpu_clock
    timings = timing.interleave(calls, seconds=options.seconds, min_rounds=3, max_rounds=30, warmup=0, clock=clock)
    rows = []
    for name in PROVIDERS:
        measured = timings.get(name)
        rows.append(
            results.make(
                "svd_methods", provider=name, dtype=options.dtype, matrix=kind, N=side, K=side, r=r,
                **results.timed(measured, None), seed=options.seed,
                **results.outcome(measured is not None, reasons.get(name)), **options.provenance,
            )
        )  # fmt: skip
    chosen = taken(matrix, r)
    told = [
        f"{name}{'*' if name in chosen else ''} {t.median_s * 1e3:.3g} ms"
        if (t := timings.get(name))
        else f"{name}{'*' if name in chosen else ''} –"
        for name in PROVIDERS
    ]
    tqdm.write(f"{kind} {side} r={r} {options.dtype}: {' · '.join(told)}", file=sys.stderr)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("svd_methods", __doc__)
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=["power", "head"])
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 768, 1024, 1536, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for one matrix and rank")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    command.begin(options)
    groups = [(n, r, kind) for n in options.sides for r in options.ranks if 2 * r <= n for kind in options.matrices]
    for side, r, kind in tqdm(groups, desc="svd_methods", unit="case", file=sys.stderr):
        results.record(measure(kind, side, r, options), out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
