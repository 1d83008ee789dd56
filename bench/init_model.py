"""What does initialising every linear layer of a model cost, and how exact is it, against PEFT's fast initialisations?

    python -m svdkern bench init_model --model DIR        a folder made by save_pretrained

Two groups, each in turn in one process. The decompositions alone, of all weights that `adapt` would take: svdkern (linalg.factors,
small layers side by side as in `adapt`), svd_lowrank_16 and svd_lowrank_4 (torch.svd_lowrank(weight.float(), r, niter), what PEFT's
pissa_niter_16 and pissa_niter_4 call). And the whole call, a fresh model each time: svdkern_adapt, peft_pissa_niter_16,
peft_pissa_niter_4. err_sigma: largest relative error of a singular value over all layers, against fp64. ratio_to_frozen is empty.
Adds to bench/results/<machine>/init_model.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import command, results
from bench.providers import DTYPES
from svdkern import adapt, linalg, timing
from svdkern.model_files import ModelFiles
from svdkern.parallel import is_small, layer_by_layer

Sigmas = list[Tensor]


def _svdkern(weights: Sequence[Tensor], r: int) -> Sigmas:
    found = layer_by_layer(lambda w: linalg.factors(w, r), weights, lambda w: is_small(w.shape), lambda calls: calls)
    return [sigma for _, sigma, _ in found]


def _lowrank(passes: int) -> Callable[[Sequence[Tensor], int], Sigmas]:
    return lambda weights, r: [torch.svd_lowrank(w.float(), r, niter=passes)[1] for w in weights]


DECOMPOSITIONS: dict[str, Callable[[Sequence[Tensor], int], Sigmas]] = {
    "svdkern": _svdkern,
    "svd_lowrank_16": _lowrank(16),
    "svd_lowrank_4": _lowrank(4),
}


def _peft(initialisation: str) -> Callable[[Any, int], object]:
    def call(model: Any, r: int) -> object:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=r, target_modules="all-linear", init_lora_weights=initialisation))

    return call


WHOLE: dict[str, Callable[[Any, int], object]] = {
    "svdkern_adapt": lambda model, r: adapt(model, "pissa", r),
    "peft_pissa_niter_16": _peft("pissa_niter_16"),
    "peft_pissa_niter_4": _peft("pissa_niter_4"),
}


def error_of(found: Sigmas, exact: Sigmas) -> float:
    return max(float(((s.double() - e) / e).abs().max()) for s, e in zip(found, exact, strict=True))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of both groups, round after round, the order rotating."""
    from bench.model_step import load_saved, quiet_transformers

    quiet_transformers()
    device, dtype, r = torch.device(options.device), DTYPES[options.dtype], options.rank
    files = ModelFiles.open(options.model)
    names = [name for name in files.tensors if files.is_linear(name)]
    weights = [files.read(name, dtype).to(device) for name in names]
    exact = [torch.linalg.svdvals(w.double())[:r].cpu() for w in tqdm(weights, "fp64", file=sys.stderr, leave=False)]
    seconds: dict[str, list[float]] = {name: [] for name in (*DECOMPOSITIONS, *WHOLE)}
    errors: dict[str, float] = {}
    again: dict[str, bool] = {}
    first: dict[str, Sigmas] = {}
    torch.manual_seed(options.seed)
    for round_ in tqdm(range(options.rounds + 1), desc="init_model", unit="round", file=sys.stderr):
        for name in _rotated(list(DECOMPOSITIONS), round_):
            begin = time.perf_counter()
            found = DECOMPOSITIONS[name](weights, r)
            seconds[name].append(time.perf_counter() - begin)
            found = [sigma.cpu() for sigma in found]
            errors[name] = max(error_of(found, exact), errors.get(name, 0.0))
            same = all(torch.equal(a, b) for a, b in zip(found, first.setdefault(name, found), strict=True))
            again[name] = again.get(name, True) and same
        for name in _rotated(list(WHOLE), round_):
            model = load_saved(options.model, dtype, device)
            begin = time.perf_counter()
            WHOLE[name](model, r)
            seconds[name].append(time.perf_counter() - begin)
    return [
        results.make(
            "init_model", provider=name, dtype=options.dtype, model=options.model_name or options.model.name, r=r,
            layers=len(names), **results.timed(timing.Timing.of(times[1:]), None), err_sigma=errors.get(name),
            same_again=again.get(name), seed=options.seed, **results.outcome(True, None), **options.provenance,
        )
        for name, times in seconds.items()
    ]  # fmt: skip


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("init_model", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="a folder made by save_pretrained")
    parser.add_argument("--model-name", help="the name that the results carry (default: the folder's)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    command.begin(options)
    rows = measure(options)
    for row in rows:
        error = "" if row["err_sigma"] is None else f", sigma to {row['err_sigma']:.1e}"
        tqdm.write(f"{row['provider']:20} {row['median_s']:.3g} s{error}", file=sys.stderr)
    results.record(rows, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
