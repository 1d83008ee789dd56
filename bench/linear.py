"""How fast is one adapted linear layer, against the frozen layer and every other way to compute it?

    python -m bench.linear                    all shapes and dtypes of the table in the README
    python -m bench.linear --quick            the same in a minute, with fewer rounds
    python -m bench.linear --shapes 1024x576x1536x16 --dtypes bf16 --json -

Writes bench/results/<machine>/linear.jsonl: one line a (shape, dtype, mode, provider). Fields: seconds of one call as
median, 20th and 80th percentile of n samples; ratio_to_frozen, the median over that of the frozen layer in the same
interleaved run; err_vs_fp64, the largest normwise relative error of y (and dx, dU, dV in mode fwd_bwd) of that provider
in that run. `fwd` runs without gradients, as inference does; `fwd_bwd` gives dx, dU and dV (the frozen layer: dx).
Factors are fp32, but for peft_bf16, whose factors have the dtype of x. A provider that fails, or whose call would take
too long, is a line with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import harness
from bench.linear_providers import FROZEN, FROZEN_FP32, PROVIDERS, Operands, Provider, truth

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("fwd", "fwd_bwd")
DEFAULT_PROVIDERS = ("frozen", "eager", "addmm", "peft_default", "peft_bf16", "svdkern-eager", "svdkern-cpu", "svdkern")


@dataclass(frozen=True)
class Shape:
    """x: (M, K), weight: (N, K), rank r."""

    M: int
    K: int
    N: int
    r: int

    @staticmethod
    def parse(text: str) -> Shape:
        try:
            m, k, n, r = (int(part) for part in text.lower().split("x"))
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a shape; expected MxKxNxr, as 1024x576x1536x16"
            ) from error
        if min(m, k, n, r) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: every size must be at least 1")
        return Shape(m, k, n, r)

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}x{self.r}"

    def bytes(self, size: int) -> int:
        return (self.M * (self.K + self.N) * 2 + self.K * self.N) * size + (self.K + self.N) * self.r * 4


# A square training layer at two ranks; the three layer shapes of SmolLM2-135M; decoding; call overhead.
SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        (2048, 2048, 2048, 16),
        (2048, 2048, 2048, 128),
        (1024, 576, 1536, 16),
        (1024, 1536, 576, 16),
        (1024, 576, 576, 16),
        (1, 4096, 4096, 16),
        (16, 4096, 4096, 16),
        (4, 64, 64, 4),
    )
)


def make_operands(shape: Shape, dtype: torch.dtype, device: torch.device, copies: int, seed: int = 0) -> list[Operands]:
    """`copies` sets of equal numbers in memory of their own. Random, not zero: zeros run faster on GPUs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, size: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * size

    x, dy = normal(shape.M, shape.K, 1.0).to(dtype), normal(shape.M, shape.N, 1.0).to(dtype)
    weight = normal(shape.N, shape.K, shape.K**-0.5).to(dtype)
    # Sized so that the adapter's share of y is as large as the base's: an error in it cannot hide.
    u, v = normal(shape.K, shape.r, shape.K**-0.5), normal(shape.N, shape.r, shape.r**-0.5)
    return [
        Operands(
            x=x.to(device, copy=True).requires_grad_(),
            weight=weight.to(device, copy=True),
            u=u.to(device, copy=True).requires_grad_(),
            v=v.to(device, copy=True).requires_grad_(),
            dy=dy.to(device, copy=True),
            scale=0.5,
        )
        for _ in range(copies)
    ]


def make_call(layers: Sequence[Provider], mode: str) -> Callable[[int], object]:
    """A call that takes the layer of its turn in the rotation."""
    count = len(layers)
    if mode == "fwd":

        def forward(i: int) -> object:
            with torch.no_grad():
                return layers[i % count].forward()

        return forward
    return lambda i: layers[i % count].backward()


def call_error(layer: Provider, mode: str, exact: dict[str, torch.Tensor]) -> float:
    """Largest normwise relative error of what the mode computes."""
    with torch.no_grad():
        found = {"y": layer.forward()}
    if mode == "fwd_bwd":
        found |= layer.named_gradients(layer.backward())
    return max(harness.relative_error(value, exact[name]) for name, value in found.items())


def estimated_seconds(name: str, shape: Shape, dtype: torch.dtype, mode: str, limit: float) -> float:
    """Seconds a call would take, from a few rows: ATen's bf16 can be 300 times slower than fp32 on CPUs without it.

    What is below `limit` is not measured any closer.
    """
    rows = min(shape.M, 4)
    layer = PROVIDERS[name](make_operands(Shape(rows, shape.K, shape.N, shape.r), dtype, torch.device("cpu"), 1)[0])
    share = rows / shape.M
    return harness.least_seconds(make_call([layer], mode), limit * share, clock=harness.cpu_clock) / share


def measure(
    shape: Shape,
    dtype_name: str,
    mode: str,
    providers: Sequence[str],
    device: torch.device,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Rows of one (shape, dtype, mode), all providers interleaved."""
    dtype = DTYPES[dtype_name]
    names = list(providers)
    reasons: dict[str, str] = {}
    slow_dtype = device.type == "cpu" and dtype != torch.float32
    for name in names:
        # A few rows cost nothing, and tell a provider that would take minutes before it takes them.
        try:
            if slow_dtype and shape.M > 4:
                expected = estimated_seconds(name, shape, dtype, mode, options.max_call_seconds)
                if expected > options.max_call_seconds:
                    reasons[name] = f"skipped: a call would take about {expected:.0f} s"
        except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if FROZEN in reasons and FROZEN_FP32 not in names:
        names.insert(0, FROZEN_FP32)

    copies = harness.rotation_length(shape.bytes(dtype.itemsize), cap_bytes=options.rotation_mb << 20)
    operands = make_operands(shape, dtype, device, copies)
    exact = {adapted: truth(operands[0], adapted=adapted) for adapted in (False, True)}
    calls: dict[str, Callable[[int], object]] = {}
    errors: dict[str, float] = {}
    for name in names:
        if name in reasons:
            continue
        try:
            layers = [PROVIDERS[name](o) for o in operands]
            errors[name] = call_error(layers[0], mode, exact[name not in (FROZEN, FROZEN_FP32)])
            if not errors[name] < 0.1:
                raise ValueError(f"wrong result: relative error {errors[name]:.2g} against fp64")
            calls[name] = make_call(layers, mode)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    clock = harness.cuda_clock if device.type == "cuda" else harness.cpu_clock
    # In a model a layer follows one of its own kind: its code, and not the operands, is in the caches.
    timings = harness.interleave(
        calls,
        seconds=options.seconds,
        min_rounds=options.min_rounds,
        max_rounds=options.max_rounds,
        settle=1,
        clock=clock,
    )

    yardstick = FROZEN if FROZEN in timings else FROZEN_FP32
    floor = timings.get(yardstick)
    rows = []
    for name in names:
        timing = timings.get(name)
        reason = reasons.get(name)
        if timing is not None and yardstick == FROZEN_FP32 and name != FROZEN_FP32:
            reason = f"ratio to the frozen layer in fp32 ({reasons.get(FROZEN, 'the frozen layer was not asked for')})"
        low = name in (FROZEN, FROZEN_FP32, "peft_bf16")
        row = {
            "bench": "linear",
            "provider": name,
            "dtype": "fp32" if name == FROZEN_FP32 else dtype_name,
            "factor_dtype": dtype_name if low else "fp32",
            "M": shape.M,
            "K": shape.K,
            "N": shape.N,
            "r": shape.r,
            "mode": mode,
            "median_s": timing.median_s if timing else None,
            "p20_s": timing.p20_s if timing else None,
            "p80_s": timing.p80_s if timing else None,
            "n": timing.n if timing else 0,
            "ratio_to_frozen": timing.median_s / floor.median_s if timing and floor else None,
            "err_vs_fp64": errors.get(name) if timing else None,
            "status": "ok" if timing else ("skipped" if (reason or "").startswith("skipped") else "failed"),
            "reason": reason,
            **options.provenance,
        }
        rows.append(harness.checked(row, harness.LINEAR_FIELDS))
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """One line a group: the frozen time and every provider's ratio to it."""
    first = rows[0]
    parts = []
    for row in rows:
        if row["median_s"] is None:
            parts.append(f"{row['provider']} – ({row['status']})")
        elif row["provider"].startswith("frozen"):
            parts.append(f"{row['provider']} {row['median_s'] * 1e3:.3f} ms")
        else:
            parts.append(f"{row['provider']} {row['ratio_to_frozen'] or float('nan'):.3f}")
    shape = f"M={first['M']} K={first['K']} N={first['N']} r={first['r']}"
    return f"{shape} {rows[-1]['dtype']} {first['mode']}: " + " · ".join(parts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=SHAPES, metavar="MxKxNxr")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(DEFAULT_PROVIDERS))
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the plain expression")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=8.0, help="time for one (shape, dtype, mode)")
    parser.add_argument("--quick", action="store_true", help="1 s each: a look, not a result to publish")
    parser.add_argument("--rotation-mb", type=int, default=512, help="memory that the rotated tensors fill")
    parser.add_argument("--max-call-seconds", type=float, default=5.0, help="a provider with slower calls is skipped")
    parser.add_argument("--out", type=Path, help="result file (default bench/results/<machine>/linear.jsonl)")
    parser.add_argument("--json", metavar="-", choices=["-"], help="write to standard output instead of a file")
    options = parser.parse_args(arguments)
    if options.compile and "compile" not in options.providers:
        options.providers.append("compile")
    if options.quick:
        options.seconds = min(options.seconds, 1.0)
    options.min_rounds, options.max_rounds = (3, 50) if options.quick else (7, 200)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if "svdkern" in " ".join(options.providers):
        try:
            import svdkern  # noqa: F401  loads the ops, so that `isa` below is the one they use
        except Exception as error:
            print(f"svdkern does not import ({error}); its rows will say so", file=sys.stderr)
    options.provenance = harness.provenance(device)
    groups = [(s, d, m) for s in options.shapes for d in options.dtypes for m in options.modes]
    rows: list[dict[str, Any]] = []
    bar = tqdm(groups, desc="linear", unit="group", file=sys.stderr)
    for shape, dtype_name, mode in bar:
        bar.set_postfix_str(f"{shape} {dtype_name} {mode}")
        group = measure(shape, dtype_name, mode, options.providers, device, options)
        tqdm.write(describe(group), file=sys.stderr)
        rows += group
        if options.out:  # a run that is ended early leaves what it has measured
            harness.write_atomically(options.out, harness.to_jsonl(rows))
    if options.json:
        sys.stdout.write(harness.to_jsonl(rows))
        return 0
    path = options.out or harness.RESULTS / harness.machine_id(options.provenance) / "linear.jsonl"
    harness.write_atomically(path, harness.to_jsonl(rows))
    print(f"wrote {len(rows)} rows to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
