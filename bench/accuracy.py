"""How exact is each way to compute an adapted layer, on easy and on hard numbers?

    python -m svdkern bench accuracy

Normwise relative errors of y, dx, dU and dV against fp64, and the largest error of a single element of y over y's largest
element, on three kinds of data: `normal`; `outliers` (a hundredth of x's columns 100 times larger, as in LLM activations);
`cancelling` (W and the adapter nearly cancel, as after a residual W - U diag(s) V^T: what is left of y is small, and so is
the scale of its error's bound). The limit is twice eager's error and a few roundings of the data's scale.
Adds to bench/results/<machine>/accuracy.jsonl one line a (data, case, dtype, provider).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from bench import command, results
from bench.cases import Case
from bench.linear import ROUNDOFF, estimated_seconds
from bench.providers import DTYPES, PROVIDERS, Operands, adapted, factor_dtype, make_operands, relative_error, truth

CASES = (Case(512, 1024, 1024, 16), Case(512, 1024, 1024, 128), Case(4, 4096, 1024, 16))
DATA = ("normal", "outliers", "cancelling")
DEFAULT_PROVIDERS = ("eager", "addmm", "materialised", "peft_default", "peft_bf16", "svdkern-eager", "svdkern")


def operands_of(data: str, case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
    """One set of tensors of that kind."""
    o = make_operands(case, dtype, device, seed=seed)[0]
    with torch.no_grad():
        if data == "outliers":
            o.x[:, :: max(1, case.K // 100)][:, : max(1, case.K // 100)] *= 100
        if data == "cancelling":  # a weight of rank r, and the adapter that takes all but a thousandth of it away
            low = (0.999 * o.scale) * (o.v.double() @ o.u.double().t())
            o = replace(o, weight=(-low).to(dtype))
    return o


def measure(data: str, case: Case, dtype_name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one (data, case, dtype)."""
    dtype, device = DTYPES[dtype_name], torch.device(options.device)
    o = operands_of(data, case, dtype, device, options.seed)
    exact = truth(o, adapter=True)
    # what the errors of y and dx are measured by where they cancel: the size of what is added up
    base = truth(o, adapter=False)
    sizes = {
        key: max(1.0, (torch.linalg.vector_norm(base[key]) / torch.linalg.vector_norm(exact[key])).item())
        for key in base
    }
    rows: list[dict[str, Any]] = []
    eager: dict[str, float] = {}
    for name in options.providers:
        errors: dict[str, float] = {}
        worst, reason = None, None
        try:
            if device.type == "cpu" and dtype != torch.float32:
                expected = estimated_seconds(name, o, "fwd_bwd", options.max_call_seconds)
                if expected > options.max_call_seconds:
                    raise TimeoutError(f"skipped: a call would take about {expected:.0f} s")
            layer = PROVIDERS[name](o)
            with torch.no_grad():
                y = layer.forward()
            found = {"y": y, **layer.named_gradients(layer.backward())}
            errors = {key: relative_error(value, exact[key]) for key, value in found.items()}
            if not all(map(math.isfinite, errors.values())):
                raise ValueError(f"not finite: {', '.join(name for name, e in errors.items() if not math.isfinite(e))}")
            worst = ((y.double() - exact["y"]).abs().max() / exact["y"].abs().max()).item()
        except TimeoutError as error:
            reason = str(error)
        except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
            errors, worst, reason = {}, None, results.why(error)
        largest = max(errors.values(), default=None)
        if name == "eager":
            eager = errors
        # rivals are shown as they are; only what svdkern computes must keep to it, y and dx each by its own scale
        limits = {key: 2 * eager.get(key, 0.0) + 8 * ROUNDOFF[dtype_name] * sizes.get(key, 1.0) for key in errors}
        beyond = "svdkern" in name and any(errors[key] > limits[key] for key in errors)
        rows.append(
            results.make(
                "accuracy",
                provider=name,
                dtype=dtype_name,
                factor_dtype=factor_dtype(name, dtype_name),
                data=data,
                M=case.M,
                K=case.K,
                N=case.N,
                r=case.r,
                **{f"err_{key}": errors.get(key) for key in ("y", "dx", "du", "dv")},
                worst_y=worst,
                err_vs_fp64=largest,
                err_limit=max(limits.values(), default=None) if "svdkern" in name else None,
                seed=options.seed,
                **results.outcome(bool(errors) and not beyond, f"beyond its limits {limits}" if beyond else reason),
                **options.provenance,
            )
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("accuracy", __doc__)
    adapters = [name for name in PROVIDERS if adapted(name)]
    parser.add_argument("--shapes", type=Case.parse, nargs="+", default=list(CASES), metavar="MxKxNxr")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--providers", nargs="+", choices=adapters, default=list(DEFAULT_PROVIDERS))
    parser.add_argument("--max-call-seconds", type=float, default=5.0, help="a provider with slower calls is skipped")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    command.begin(options)
    groups = [(data, case, dtype) for data in options.data for case in options.shapes for dtype in options.dtypes]
    bad = 0
    for data, case, dtype in tqdm(groups, desc="accuracy", unit="group", file=sys.stderr):
        rows = measure(data, case, dtype, options)
        parts = [f"{row['provider']} {row['err_vs_fp64']:.2g}" if row["err_vs_fp64"] is not None else
                 f"{row['provider']} – ({row['status']})" for row in rows]  # fmt: skip
        tqdm.write(f"{data} {case} {dtype}: " + " · ".join(parts), file=sys.stderr)
        bad += sum("svdkern" in row["provider"] and row["status"] == "failed" for row in rows)
        results.record(rows, out=options.out)
    if bad:
        print(f"{bad} results of svdkern are wrong or missing", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
