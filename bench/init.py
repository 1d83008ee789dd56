"""What does the SVD that initialises an adapter cost, and how exact is it?

    python -m svdkern bench init                       one matrix at a time
    python -m svdkern bench init --model DIR           a whole model's adapters, too, against PEFT's

Matrices (N, K) with known singular values: `decay` (sigma_i = 1/i, as trained weights roughly have), `flat` (a Gaussian
matrix, the hard case: no gap anywhere) and `gap` (r large ones, then a thousandth). Providers: svdkern (linalg.factors),
lapack (torch.linalg.svd in fp32), svd_lowrank and svd_lowrank_16 (torch.svd_lowrank with its default of 2 passes and with
the 16 of PEFT's pissa_niter_16). err_vs_best: how much larger than the best rank-r approximation's the Frobenius error is,
relatively; err_sigma: largest error of a singular value over the largest one; same_again: whether a second call, in another
state of the global generator, gives the same bits. Adds to bench/results/<machine>/init.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import command, results
from bench.providers import DTYPES
from svdkern import linalg, timing

Factors = tuple[Tensor, Tensor, Tensor]  # (N, r), (r,), (K, r): weight ~ p diag(s) q^T
SHAPES = ((576, 576), (1536, 576), (2048, 2048))
MATRICES = ("decay", "flat", "gap")


def _svdkern(weight: Tensor, r: int) -> Factors:
    u, sigma, v = linalg.factors(weight, r)
    return v, sigma, u


def _lapack(weight: Tensor, r: int) -> Factors:
    p, s, qh = torch.linalg.svd(weight.float(), full_matrices=False)
    return p[:, :r], s[:r], qh[:r].t()


def _lowrank(passes: int) -> Callable[[Tensor, int], Factors]:
    def call(weight: Tensor, r: int) -> Factors:
        return torch.svd_lowrank(weight.float(), r, niter=passes)  # type: ignore[no-any-return]

    return call


PROVIDERS: Mapping[str, Callable[[Tensor, int], Factors]] = {
    "svdkern": _svdkern,
    "lapack": _lapack,
    "svd_lowrank": _lowrank(2),
    "svd_lowrank_16": _lowrank(16),
}


def make_matrix(kind: str, n: int, k: int, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """(weight in fp32, its singular values in fp64)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, k, generator=generator, dtype=torch.float64)
    if kind == "flat":
        weight = normal.float()
        return weight, torch.linalg.svdvals(weight.double())
    small = min(n, k)
    p, _ = torch.linalg.qr(torch.randn(n, small, generator=generator, dtype=torch.float64))
    q, _ = torch.linalg.qr(torch.randn(k, small, generator=generator, dtype=torch.float64))
    i = torch.arange(1, small + 1, dtype=torch.float64)
    sigma = 1 / i if kind == "decay" else torch.where(i <= r, 1.0, 1e-3)
    weight = ((p * sigma) @ q.t()).float()
    return weight, torch.linalg.svdvals(weight.double())


def errors(weight: Tensor, found: Factors, exact: Tensor) -> tuple[float, float]:
    """(err_vs_best, err_sigma)."""
    p, s, q = (t.double() for t in found)
    r = s.numel()
    error = torch.linalg.matrix_norm(weight.double() - (p * s) @ q.t()).item()
    best = math.sqrt(float(exact[r:].square().sum()))
    above = error / best - 1 if best > 1e-12 * float(exact[0]) else error / float(exact[0])
    return max(above, 0.0), float((s - exact[:r]).abs().max() / exact[0])


def measure(kind: str, n: int, k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one matrix, all providers interleaved."""
    r = options.rank
    weight, exact = make_matrix(kind, n, k, r, options.seed)
    weight = weight.to(DTYPES[options.dtype])
    if options.dtype != "fp32":
        exact = torch.linalg.svdvals(weight.double())
    device_weight = weight.to(options.device)
    calls: dict[str, Callable[[int], object]] = {}
    found: dict[str, tuple[float, float, bool]] = {}
    reasons: dict[str, str] = {}
    for name in options.providers:
        try:
            torch.manual_seed(options.seed)
            first = PROVIDERS[name](device_weight, r)
            again = PROVIDERS[name](device_weight, r)
            same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            found[name] = *errors(weight, tuple(t.cpu() for t in first), exact), same  # type: ignore[arg-type]
            calls[name] = lambda _, name=name: PROVIDERS[name](device_weight, r)
        except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
            reasons[name] = results.why(error)
    clock = timing.cuda_clock if options.device.startswith("cuda") else timing.cpu_clock
    timings = timing.interleave(calls, seconds=options.seconds, min_rounds=3, max_rounds=30, warmup=1, clock=clock)
    rows = []
    for name in options.providers:
        above, sigma, same = found.get(name, (None, None, None))
        rows.append(_row(name, kind, n, k, timings.get(name), reasons.get(name), (above, sigma, same), options))
    return rows


def _row(name: str, matrix: str, n: int, k: int, measured: timing.Timing | None, reason: str | None,
         found: tuple[float | None, float | None, bool | None], options: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    return results.make(
        "init",
        provider=name,
        dtype=options.dtype,
        matrix=matrix,
        N=n,
        K=k,
        r=options.rank,
        **results.timed(measured, None),
        err_vs_best=found[0],
        err_sigma=found[1],
        same_again=found[2],
        seed=options.seed,
        **results.outcome(measured is not None, reason),
        **options.provenance,
    )


def whole_model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of adapting every linear layer of a model, once each: a load is between two tries."""
    from bench.model_step import load_saved, quiet_transformers

    quiet_transformers()

    def ours(model: Any) -> None:
        import svdkern

        svdkern.adapt(model, method="pissa", rank=options.rank)

    def peft(initialisation: str) -> Callable[[Any], None]:
        def call(model: Any) -> None:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=options.rank, target_modules="all-linear", init_lora_weights=initialisation)
            get_peft_model(model, config)

        return call

    rows = []
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    ways = {"svdkern": ours, "peft_pissa_niter_16": peft("pissa_niter_16"), "peft_pissa": peft("pissa")}
    for name, adapt in tqdm(ways.items(), desc="whole model", unit="provider", file=sys.stderr, leave=False):
        measured, reason = None, None
        try:
            seconds = []
            for _ in range(options.tries):
                model = load_saved(options.model, dtype, device)
                seconds.append(timing.cpu_clock(lambda _, adapt=adapt, model=model: adapt(model), 0, 1))
            measured = timing.Timing.of(seconds)
        except Exception as error:
            reason = results.why(error)
        rows.append(
            _row(name, options.model_name or options.model.name, 0, 0, measured, reason, (None, None, None), options)
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("init", __doc__)
    parser.add_argument("--matrices", nargs="+", choices=MATRICES, default=list(MATRICES))
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(SHAPES), metavar="NxK")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--model", type=Path, help="also adapt this whole model, a folder made by save_pretrained")
    parser.add_argument("--model-name", help="the name that the results carry (default: the folder's)")
    parser.add_argument("--tries", type=int, default=3, help="of a whole model")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one matrix")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    command.begin(options)
    groups = [(kind, n, k) for n, k in options.shapes for kind in options.matrices]
    for kind, n, k in tqdm(groups, desc="init", unit="matrix", file=sys.stderr):
        rows = measure(kind, n, k, options)
        _say(f"{kind} {n}x{k} r={options.rank}", rows)
        results.record(rows, out=options.out)
    if options.model:
        rows = whole_model(options)
        _say(str(rows[0]["matrix"]), rows)
        results.record(rows, out=options.out)
    return 0


def _say(what: str, rows: Sequence[dict[str, Any]]) -> None:
    def text(row: dict[str, Any]) -> str:
        if row["median_s"] is None:
            return f"{row['provider']} – ({row['reason']})"
        error = "" if row["err_vs_best"] is None else f" (+{row['err_vs_best']:.1e})"
        return f"{row['provider']} {row['median_s']:.3g} s{error}"

    tqdm.write(f"{what}: " + " · ".join(map(text, rows)), file=sys.stderr)


def shape(text: str) -> tuple[int, int]:
    try:
        n, k = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; expected NxK, as 2048x2048") from error
    if min(n, k) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: every size must be at least 1")
    return n, k


if __name__ == "__main__":
    sys.exit(main())
