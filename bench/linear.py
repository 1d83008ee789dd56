"""How fast is one adapted linear layer, against the frozen layer and every other way to compute it?

    python -m svdkern bench linear                    the README's shapes, in all dtypes
    python -m svdkern bench linear --set rows ranks   other sets of cases (--help names them); all: every one
    python -m svdkern bench linear --quick --json -   a look in less than a minute, written to standard output
    python -m svdkern bench linear --shapes 1024x576x1536x16 --dtypes bf16 --dropout 0.1 --mask uv
    python -m svdkern bench linear --device cuda --graph --shapes 1x4096x4096x16      replays of CUDA graphs

Adds to bench/results/<machine>/linear.jsonl one line a (case, dtype, mode, provider): seconds of one call as median, 20th
and 80th percentile of n samples, all providers interleaved; ratio_to_frozen, over the frozen layer's median in the same
run; floor_s, what the arithmetic and the bytes take at the ceilings measured in the same run; err_vs_fp64, the largest
normwise relative error of y (and of the gradients in mode fwd_bwd) of that provider in that run, and the limit it must
keep: twice eager's, and a few roundings of the result and of the sums. `fwd` runs without gradients, as inference does;
`fwd_bwd` gives the gradients of the mask (the frozen layer: dx); with --graph both end in `_graph`, and the host's part of a
call is not in them. Factors are fp32, but for peft_bf16, whose factors have the
dtype of x. A provider that fails, or whose call would take too long, is a line with the reason. A group whose spread is too
wide is measured once more.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from bench import cases, ceilings, command, machine, results
from bench.cases import Case
from bench.providers import (
    DTYPES,
    FROZEN,
    FROZEN_FP32,
    PROVIDERS,
    Compile,
    Operands,
    Provider,
    adapted,
    factor_dtype,
    make_operands,
    relative_error,
    truth,
)
from svdkern import timing

DEFAULT_PROVIDERS = (
    "frozen", "frozen_svdkern", "eager", "addmm", "materialised", "peft_default", "peft_bf16", "svdkern-eager",
    "svdkern-cpu", "svdkern",
)  # fmt: skip
QUICK_PROVIDERS = ("frozen", "eager", "addmm", "peft_default", "svdkern")
ROUNDOFF = {"fp32": 2.0**-24, "bf16": 2.0**-8, "fp16": 2.0**-11}


def make_call(layers: Sequence[Provider], mode: str) -> Callable[[int], object]:
    """A call that takes the layer of its turn in the rotation."""
    count = len(layers)
    if mode == "fwd":

        def forward(i: int) -> object:
            with torch.no_grad():
                return layers[i % count].forward()

        return forward
    return lambda i: layers[i % count].backward()


def captured(layers: Sequence[Provider], mode: str) -> Callable[[int], object]:
    """The same call as replays of CUDA graphs, one a layer of the rotation; what they compute shares one pool of memory."""
    call, pool, graphs = make_call(layers, mode), torch.cuda.graph_pool_handle(), []
    side = torch.cuda.Stream()
    # cuBLAS keeps its workspace by stream: one that lies in the pool of graphs that are gone must not be captured again
    torch._C._cuda_clearCublasWorkspaces()
    for i in range(len(layers)):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(i)  # compiles, and makes what a library makes at its first call
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call(i)
        graphs.append(graph)
    return lambda i: graphs[i % len(graphs)].replay()


def call_error(layer: Provider, mode: str, exact: dict[str, torch.Tensor], seed: int) -> float:
    """Largest normwise relative error of what the mode computes after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    with torch.no_grad():
        found = {"y": layer.forward()}
    if mode == "fwd_bwd":
        torch.manual_seed(seed)
        found |= layer.named_gradients(layer.backward())
    return max(relative_error(value, exact[name]) for name, value in found.items())


def estimated_seconds(name: str, operands: Operands, mode: str, limit: float) -> float:
    """Seconds a call would take, from one row and four: ATen's bf16 can be 300 times slower than fp32 on some CPUs.

    What is below `limit` is not measured any closer.
    """

    def least(rows: int, enough: float) -> float:
        return timing.least_seconds(make_call([PROVIDERS[name](operands.first(rows))], mode), enough)

    rows = operands.x.shape[0]
    four = least(4, limit * 4 / rows)
    if four * rows / 4 <= limit:
        return four * rows / 4
    one = least(1, 0.0)
    return one + max(four - one, 0.0) / 3 * (rows - 1)


def measure(case: Case, dtype_name: str, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one (case, dtype, mode), all providers interleaved; once more if the machine was too busy."""
    for tries in (1, 0):
        rows = measure_once(case, dtype_name, mode, options)
        widest = max((row["spread"] or 0.0 for row in rows), default=0.0)
        if not tries or options.quick or widest <= results.WIDEST_SPREAD:
            break
    return rows


def measure_once(case: Case, dtype_name: str, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    dtype, device = DTYPES[dtype_name], torch.device(options.device)
    names = list(options.providers)
    reasons: dict[str, str] = {}
    copies = timing.rotation_length(case.bytes(dtype.itemsize), cap_bytes=options.rotation_mb << 20)
    operands = make_operands(case, dtype, device, copies, options.seed)
    slow_dtype = device.type == "cpu" and dtype != torch.float32
    for name in names:
        # A few rows cost nothing, and tell a provider that would take minutes before it takes them.
        try:
            if slow_dtype and case.M > 4:
                expected = estimated_seconds(name, operands[0], mode, options.max_call_seconds)
                if expected > options.max_call_seconds:
                    reasons[name] = f"skipped: a call would take about {expected:.0f} s"
        except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
            reasons[name] = results.why(error)
    if FROZEN in reasons and FROZEN_FP32 not in names:
        names.insert(0, FROZEN_FP32)

    Compile.start_anew()
    calls: dict[str, Callable[[int], object]] = {}
    errors: dict[str, float] = {}
    without_dropout = functools.cache(lambda adapter: truth(operands[0], adapter=adapter))
    for name in names:
        if name in reasons:
            continue
        try:
            layers = [PROVIDERS[name](o) for o in operands]
            mask = layers[0].mask(options.seed) if adapted(name) else None
            exact = without_dropout(adapted(name)) if mask is None else truth(operands[0], adapter=True, mask=mask)
            errors[name] = call_error(layers[0], mode, exact, options.seed)
            if not errors[name] < 0.1:
                raise ValueError(f"wrong result: relative error {errors[name]:.2g} against fp64")
            calls[name] = captured(layers, mode) if options.graph else make_call(layers, mode)
        except Exception as error:
            reasons[name] = results.why(error)
    clock = timing.cuda_clock if device.type == "cuda" else timing.cpu_clock
    # In a model a layer follows one of its own kind: its code, and not the operands, is in the caches.
    timings = timing.interleave(
        calls,
        seconds=options.seconds,
        min_rounds=options.min_rounds,
        max_rounds=options.max_rounds,
        settle=1,
        clock=clock,
    )

    yardstick = FROZEN if FROZEN in timings else FROZEN_FP32
    # fp32 sums of so many random products, whose sizes add up to 0.64 sqrt(n) of the sum's own, may lose digits
    sums = 0.64 * max(case.M, case.K, case.N) ** 0.5
    limit = 2 * errors.get("eager", 0.0) + 8 * ROUNDOFF[dtype_name] + 4 * ROUNDOFF["fp32"] * sums
    rows = []
    for name in names:
        measured, reason = timings.get(name), reasons.get(name)
        if measured is not None and yardstick == FROZEN_FP32 and name != FROZEN_FP32 and FROZEN_FP32 in timings:
            reason = f"ratio to the frozen layer in fp32 ({reasons.get(FROZEN, 'the frozen layer was not asked for')})"
        computed, passes = case, mode
        if not adapted(name):  # dx at most
            computed, passes = replace(case, r=0, mask="x"), mode if "x" in case.mask else "fwd"
        used = "fp32" if name == FROZEN_FP32 else dtype_name
        size = DTYPES[used].itemsize
        floor = ceilings.floor_seconds(computed.flops(passes), computed.traffic(passes, size), used, options.ceilings)
        rows.append(
            results.make(
                "linear",
                provider=name,
                dtype=dtype_name,  # of the group: that frozen_fp32 is in fp32 its name says
                factor_dtype=factor_dtype(name, dtype_name),
                M=case.M,
                K=case.K,
                N=case.N,
                r=case.r,
                dropout=case.dropout,
                mask=case.mask,
                mode=f"{mode}_graph" if options.graph else mode,
                **results.timed(measured, timings.get(yardstick), floor),
                err_vs_fp64=errors.get(name) if measured else None,
                err_limit=limit if measured else None,
                seed=options.seed,
                **results.outcome(measured is not None, reason),
                **options.provenance,
            )
        )
    return rows


def wrong(row: dict[str, Any]) -> bool:
    """Whether svdkern failed, or its error is beyond the limit."""
    beyond = row["err_vs_fp64"] is not None and not row["err_vs_fp64"] <= row["err_limit"]
    return row["provider"].startswith("svdkern") and (row["status"] == "failed" or beyond)


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """One line a group: the frozen time and every provider's ratio to it."""
    first = rows[0]
    parts = []
    for row in rows:
        if row["median_s"] is None:
            parts.append(f"{row['provider']} – ({row['status']})")
        elif row["provider"] in (FROZEN, FROZEN_FP32):
            parts.append(f"{row['provider']} {row['median_s'] * 1e3:.3f} ms")
        else:
            parts.append(f"{row['provider']} {row['ratio_to_frozen'] or float('nan'):.3f}")
    case = Case(*(first[name] for name in ("M", "K", "N", "r", "dropout", "mask")))
    return f"{case} {rows[-1]['dtype']} {first['mode']}: " + " · ".join(parts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = "".join(f"\n    {name:9}{chosen.what}" for name, chosen in cases.SETS.items())
    parser = command.parser("linear", __doc__)
    parser.epilog = f"sets of cases:{known}"
    parser.add_argument("--set", nargs="+", choices=[*cases.SETS, "all"], default=["readme"], help="see below")
    parser.add_argument("--shapes", type=Case.parse, nargs="+", metavar="MxKxNxr", help="instead of a set")
    parser.add_argument("--dropout", type=float, default=0.0, help="with --shapes")
    parser.add_argument("--mask", choices=cases.MASKS, default=cases.MASKS[0], help="with --shapes: gradients wanted")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="only these (with --shapes: default all)")
    parser.add_argument("--modes", nargs="+", choices=cases.MODES, help="only these (with --shapes: default both)")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: all but compile")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain expression")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs; with --device cuda")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one (case, dtype, mode)")
    parser.add_argument("--quick", action="store_true", help="fewer providers and rounds: a look, nothing is filed")
    parser.add_argument("--rotation-mb", type=int, default=512, help="memory that the rotated tensors fill")
    parser.add_argument("--max-call-seconds", type=float, default=5.0, help="a provider with slower calls is skipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="-", choices=["-"], help="write to standard output instead of a file")
    options = parser.parse_args(arguments)
    if options.providers is None:
        options.providers = list(QUICK_PROVIDERS if options.quick else DEFAULT_PROVIDERS)
    if options.graph and torch.device(options.device).type != "cuda":
        parser.error(f"--graph needs --device cuda, not {options.device}")
    if options.compile and "compile" not in options.providers:
        options.providers.append("compile")
    if options.quick:
        options.seconds, options.modes = min(options.seconds, 0.3), options.modes or ["fwd_bwd"]
        options.dtypes = options.dtypes or ["fp32", "bf16"]
        options.rotation_mb = min(options.rotation_mb, 128)
    options.min_rounds, options.max_rounds = (3, 50) if options.quick else (7, 200)
    if options.shapes:
        chosen = [replace(case, dropout=options.dropout, mask=options.mask) for case in options.shapes]
        options.groups = [
            (case, dtype, mode)
            for case in chosen
            for dtype in options.dtypes or DTYPES
            for mode in options.modes or cases.MODES
        ]
    else:
        names = tuple(cases.SETS) if "all" in options.set else tuple(options.set)
        options.groups = [
            (case, dtype, mode)
            for case, dtype, mode in cases.groups(names)
            if dtype in (options.dtypes or DTYPES) and mode in (options.modes or cases.MODES)
        ]
    if not options.groups:
        parser.error("no case is left: the chosen sets have none of these dtypes and modes")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    timing.keep_freed_memory()
    device = torch.device(options.device)
    options.provenance = machine.provenance(device)
    options.ceilings = ceilings.measure(device)
    scratch = options.out or (results.SCRATCH / "linear.jsonl" if options.quick else None)
    if not options.json:
        results.say_if_refused(options.provenance, scratch)
    bad = 0
    bar = tqdm(options.groups, desc="linear", unit="group", file=sys.stderr)
    for case, dtype_name, mode in bar:
        bar.set_postfix_str(f"{case} {dtype_name} {mode}")
        group = measure(case, dtype_name, mode, options)
        tqdm.write(describe(group), file=sys.stderr)
        bad += sum(map(wrong, group))
        if options.json:
            sys.stdout.write(results.to_jsonl(group))
        else:  # group by group: a run that is ended early leaves what it has measured
            results.record(group, out=scratch)
    if not options.json and not options.quick:
        if options.out is None:  # a file of one bench
            results.record(ceilings.rows(options.ceilings, options.provenance))
    if bad:
        print(f"{bad} results of svdkern are wrong or missing", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
