"""How fast, and how exactly, does one get a few singular triplets of a large matrix?

    python -m svdkern bench topk                                  the largest: r = 16, 128 and 512 of 4096 x 4096
    python -m svdkern bench topk --which smallest --ranks 32 --shapes 4096x4096 11008x4096
    python -m svdkern bench topk --device cuda --dtype bf16       svdkern's ways again with the products of the Triton kernels

Matrices (N, K): `power` (sigma_i = i^-1/2), `head` (64 large values over a dense bulk, as trained weights have),
`gaussian` (no gap anywhere). A provider is a way at one setting, so that the rows of a way are a curve of error against
seconds: svdkern (linalg.topk_svd at several tol), svd_lowrank (torch.svd_lowrank, q = r, at several niter), sklearn
(randomized_svd's defaults), scipy (sparse.linalg.svds, ARPACK, at several tol), lapack (torch.linalg.svd in float32).
err_sigma: the largest relative error of the r values, against float64 gesdd of the same matrix. Adds to
bench/results/<machine>/topk.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import command, results
from bench.init import shape
from bench.providers import DTYPES
from svdkern import linalg, timing
from svdkern.backends import dispatch

Values = Callable[[Tensor, int, str], Tensor]
MATRICES = ("power", "head", "gaussian")
WHICH = ("largest", "smallest")


def _svdkern(tol: float | str) -> Values:
    return lambda a, r, which: linalg.topk_svd(a, r, which=which, tol=tol).S  # type: ignore[arg-type]


def _triton(tol: float | str) -> Values:
    """With the products of ``triton_kernels/normal.py``, which are taken only where the backend is named."""

    def call(a: Tensor, r: int, which: str) -> Tensor:
        if not a.is_cuda:
            raise ValueError("skipped: needs a CUDA device")
        before = os.environ.get("SVDKERN_BACKEND")
        os.environ["SVDKERN_BACKEND"] = "triton"
        dispatch.read_environment()
        try:
            return _svdkern(tol)(a, r, which)
        finally:
            os.environ.pop("SVDKERN_BACKEND") if before is None else os.environ.update(SVDKERN_BACKEND=before)
            dispatch.read_environment()

    return call


def _lowrank(niter: int) -> Values:
    def call(a: Tensor, r: int, which: str) -> Tensor:
        _largest_alone(which)
        return torch.svd_lowrank(a.float(), r, niter=niter)[1]

    return call


def _sklearn(a: Tensor, r: int, which: str) -> Tensor:
    _largest_alone(which)
    extmath = _imported("sklearn.utils.extmath")
    return torch.from_numpy(extmath.randomized_svd(_on_cpu(a).numpy(), r, random_state=0)[1])


def _scipy(tol: float) -> Values:
    def call(a: Tensor, r: int, which: str) -> Tensor:
        _largest_alone(which)  # ARPACK would take hours for the smallest ones
        svds = _imported("scipy.sparse.linalg").svds
        s = svds(_on_cpu(a).numpy(), r, tol=tol, random_state=0)[1]
        return torch.from_numpy(s.copy()).sort(descending=True)[0]

    return call


def _lapack(a: Tensor, r: int, which: str) -> Tensor:
    s = torch.linalg.svd(a.float(), full_matrices=False)[1]
    return s[:r] if which == "largest" else s[-r:]


def _on_cpu(a: Tensor) -> Tensor:
    if not a.is_cpu:
        raise ValueError("skipped: works on the CPU alone")
    return a.float()


def _largest_alone(which: str) -> None:
    if which != "largest":
        raise ValueError("skipped: gives the largest alone")


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"skipped: {error}") from error


PROVIDERS: Mapping[str, Values] = {
    **{f"svdkern, tol={tol}": _svdkern(tol) for tol in ("fast", "balanced", 1e-4, "accurate")},
    **{f"svdkern-triton, tol={tol}": _triton(tol) for tol in ("balanced", "accurate")},
    **{f"svd_lowrank, niter={niter}": _lowrank(niter) for niter in (2, 4, 16, 64)},
    "sklearn": _sklearn,
    **{f"scipy svds, tol={tol:g}": _scipy(tol) for tol in (1e-2, 1e-6)},
    "lapack": _lapack,
}


def make_matrix(kind: str, n: int, k: int, seed: int) -> Tensor:
    """(n, k) float32."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaussian":
        return torch.randn(n, k, generator=generator)
    small = min(n, k)
    p, _ = torch.linalg.qr(torch.randn(n, small, generator=generator))
    q, _ = torch.linalg.qr(torch.randn(k, small, generator=generator))
    i = torch.arange(1, small + 1, dtype=torch.float32)
    head = min(64, small // 4)
    sigma = i**-0.5 if kind == "power" else torch.cat([8 * i[:head] ** -0.7, torch.linspace(1, 0.05, small - head)])
    return ((p * sigma) @ q.t()).contiguous()


def measure(kind: str, n: int, k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one matrix, every rank, all providers interleaved."""
    matrix = make_matrix(kind, n, k, options.seed).to(DTYPES[options.dtype])
    exact = torch.linalg.svdvals(matrix.double())
    matrix, rows = matrix.to(options.device), []
    clock = timing.cuda_clock if matrix.is_cuda else timing.cpu_clock
    for r in options.ranks:
        truth = exact[:r] if options.which == "largest" else exact[-r:]
        calls: dict[str, Callable[[int], object]] = {}
        errors: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for name in options.providers:
            try:
                torch.manual_seed(options.seed)
                found = PROVIDERS[name](matrix, r, options.which)
                errors[name] = float(((found.cpu().double() - truth).abs() / truth).max())
                calls[name] = lambda _, name=name, r=r: PROVIDERS[name](matrix, r, options.which)
            except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
                reasons[name] = results.why(error)
        timings = timing.interleave(
            calls, seconds=options.seconds, min_rounds=options.rounds, max_rounds=30, warmup=0, clock=clock
        )
        for name in options.providers:
            measured = timings.get(name)
            rows.append(
                results.make(
                    "topk",
                    provider=name,
                    dtype=options.dtype,
                    matrix=kind,
                    which=options.which,
                    N=n,
                    K=k,
                    r=r,
                    **results.timed(measured, None),
                    err_sigma=errors.get(name),
                    seed=options.seed,
                    **results.outcome(measured is not None, reasons.get(name)),
                    **options.provenance,
                )
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("topk", __doc__)
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=["power", "head"])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(4096, 4096)], metavar="NxK")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128, 512])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--which", choices=WHICH, default="largest")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one matrix and rank")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    command.begin(options)
    groups = [(kind, n, k) for n, k in options.shapes for kind in options.matrices]
    for kind, n, k in tqdm(groups, desc="topk", unit="matrix", file=sys.stderr):
        rows = measure(kind, n, k, options)
        for row in rows:
            time = f"{row['median_s']:.3g} s" if row["median_s"] is not None else f"– ({row['reason']})"
            error = "" if row["err_sigma"] is None else f", error of σ {row['err_sigma']:.1e}"
            tqdm.write(f"{options.which} {kind} {n}x{k} r={row['r']}: {row['provider']} {time}{error}", file=sys.stderr)
        results.record(rows, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
