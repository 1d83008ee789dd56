"""How many tokens a second does an adapted model decode, against the frozen model and PEFT?

    python -m svdkern bench decode --model DIR            any causal language model saved by save_pretrained
    python -m svdkern bench decode --model DIR --batch 1 4 16

One greedy step at a time on a filled key-value cache, adapter attached (not merged), without gradients: every layer has
as many rows as the batch has sequences, so a step reads the weights once. Providers in turn in one process, a few steps
in a row each. Adds to bench/results/<machine>/decode.jsonl one line a (provider, batch): seconds of a step, ratio to the
frozen model in the same run, tokens a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import command, machine, results
from bench.model_step import adapted, make_ids, quiet_transformers
from bench.providers import DTYPES, factor_dtype
from svdkern import timing

PROVIDERS = ("frozen", "svdkern", "peft_default", "peft_bf16")
PROMPT = 64


def make_step(model: nn.Module, prompt: Tensor) -> Callable[[int], object]:
    """One token for every sequence, always at the same place: the cache loses it again afterwards."""
    model.eval()
    model.config.use_cache = True
    with torch.inference_mode():
        first = model(input_ids=prompt, use_cache=True)
    cache, token = first.past_key_values, first.logits[:, -1:].argmax(-1)

    def step(_: int) -> object:
        with torch.inference_mode():
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits[:, -1].argmax(-1)

    return step


def measure(batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one batch size, all providers interleaved."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    steps: dict[str, Callable[[int], object]] = {}
    reasons: dict[str, str] = {}
    for name in options.providers:
        try:
            model = adapted(name, options.model, dtype, device, None, options.rank)
            step = make_step(model, make_ids(model, batch * PROMPT, PROMPT, device))
            step(0)
            steps[name] = step
        except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
            reasons[name] = results.why(error)
    clock = timing.cuda_clock if device.type == "cuda" else timing.cpu_clock
    timings = timing.interleave(steps, seconds=options.seconds, settle=1, in_a_row=4, max_rounds=40, clock=clock)
    rows = []
    for name in options.providers:
        measured = timings.get(name)
        rows.append(
            results.make(
                "decode",
                provider=name,
                dtype=options.dtype,
                factor_dtype=factor_dtype(name, options.dtype),
                model=options.model_name or options.model.name,
                batch=batch,
                r=options.rank,
                **results.timed(measured, timings.get("frozen")),
                tokens_per_s=batch / measured.median_s if measured else None,
                seed=0,
                **results.outcome(measured is not None, reasons.get(name)),
                **options.provenance,
            )
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("decode", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json, model.safetensors")
    parser.add_argument("--model-name", help="the name that the results carry (default: the folder's)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if machine.bf16_hardware() else "fp32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--seconds", type=float, default=12.0, help="time for one batch size")
    options = parser.parse_args(arguments)
    quiet_transformers()
    command.begin(options)
    for batch in tqdm(options.batch, desc="decode", unit="batch", file=sys.stderr):
        rows = measure(batch, options)
        for row in rows:
            speed = f"{row['tokens_per_s']:.1f} tokens/s" if row["tokens_per_s"] else row["reason"]
            ratio = f"{row['ratio_to_frozen']:.3f} × frozen" if row["ratio_to_frozen"] else "–"
            tqdm.write(f"batch {batch} {row['provider']:13} {speed}, {ratio}", file=sys.stderr)
        results.record(rows, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
