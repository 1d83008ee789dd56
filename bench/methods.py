"""What does each published method cost in a whole training step, against the frozen model and PEFT's implementation?

    python -m svdkern bench methods --model DIR                       every method (half an hour and more)
    python -m svdkern bench methods --model DIR --methods kasa osf    some of them

DIR is a causal language model saved by save_pretrained. A step is forward, penalty, backward, hooks and AdamW. One method at a
time: the frozen model, ours and PEFT's, if it has the method, in turn in one process; peak memory in one process each. All have
the same rank, but OSF (half of the triplets trains) and KIND (all do). OSF projects gradients and parameters, PEFT's gradients
alone. Adds to bench/results/<machine>/methods.jsonl; ratios are to the frozen model of the same minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import command, machine, results
from bench.model_step import load_saved, make_ids, peak_memory_mb, quiet_transformers
from bench.providers import DTYPES
from svdkern import Hooks, adapt, regularization, timing
from svdkern.methods import METHODS

PEFT = ("lora", "pissa", "kasa", "randlora", "osf")
"""Methods that PEFT has, too, from the same start."""
OWN_RANK = ("osf", "kind")


def rank_of(method: str, rank: int) -> int | None:
    return None if method in OWN_RANK else rank


def prepared(provider: str, options: argparse.Namespace) -> nn.Module:
    """The saved model as `provider` trains it: "frozen", a method's name, or "peft_" and one."""
    model = load_saved(options.model, DTYPES[options.dtype], torch.device(options.device))
    if provider == "frozen":
        next(p for n, p in model.named_parameters() if "norm" in n).requires_grad_(True)
    elif provider.startswith("peft_"):
        model = peft_model(model, provider.removeprefix("peft_"), options.rank)
    else:
        adapt(model, provider, rank_of(provider, options.rank), data=data_for(provider, model, options))
    with torch.no_grad():
        for parameter in model.parameters():  # zeros run faster on some devices
            if parameter.requires_grad and parameter.ndim == 2 and not bool(parameter.any()):
                parameter.normal_(0.0, 0.01)
    return model


def data_for(method: str, model: nn.Module, options: argparse.Namespace) -> Any:
    """A little data for the methods that start from it: what a step costs does not depend on it."""
    needs = METHODS[method].needs
    if needs is None:
        return None
    ids = make_ids(model, 64, 64, torch.device(options.device))
    batches = [{"input_ids": ids, "labels": ids}]
    return {"forget": batches, "retain": batches} if needs == "importance" else batches


def peft_model(model: nn.Module, method: str, rank: int) -> nn.Module:
    import peft

    shared = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "randlora":
        config: Any = peft.RandLoraConfig(r=rank, **shared)
    elif method == "osf":
        names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
        config = peft.OSFConfig(target_modules=sorted(names), task_type="CAUSAL_LM")
    else:
        options = {"kasa": {"kasa_config": peft.KasaConfig()}, "pissa": {"init_lora_weights": "pissa"}}.get(method, {})
        config = peft.LoraConfig(r=rank, lora_alpha=rank, **shared, **options)
    return peft.get_peft_model(model, config)


def make_step(model: nn.Module, provider: str, ids: Tensor) -> Callable[[int], float]:
    """One training step: forward, penalty, backward, hooks, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    ours = provider in METHODS
    hooks = Hooks(model, optimizer) if ours else None

    def step(_: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        if ours:
            loss = loss + regularization(model)
        elif provider == "peft_kasa":
            loss = loss + model.base_model._get_kasa_loss()  # type: ignore[operator, union-attr]
        loss.backward()
        if hooks is not None:
            hooks.on_backward_end()
        optimizer.step()
        if hooks is not None:
            hooks.on_step_end()
        return 0.0

    return step


def memory_in_a_process_of_its_own(provider: str, options: argparse.Namespace) -> tuple[float | None, str | None]:
    """(peak in MB, None) or (None, reason)."""
    call = [sys.executable, "-m", "bench.methods", "--memory-of", provider, "--model", str(options.model)]
    call += ["--dtype", options.dtype, "--tokens", str(options.tokens), "--sequence", str(options.sequence)]
    call += ["--device", options.device, "--rank", str(options.rank)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=machine.ROOT)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"exit status {done.returncode}"
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_memory_mb"], None


def compare(method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the frozen model, ours, and PEFT's."""
    device = torch.device(options.device)
    providers = ["frozen", method, *([f"peft_{method}"] if method in PEFT else [])]
    steps: dict[str, Callable[[int], float]] = {}
    trainable: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for provider in providers:
        try:
            model = prepared(provider, options)
            trainable[provider] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            steps[provider] = make_step(model, provider, make_ids(model, options.tokens, options.sequence, device))
        except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
            reasons[provider] = results.why(error)
    model = None  # type: ignore[assignment]
    timings = timing.interleave(
        steps,
        seconds=options.budget_seconds,
        min_rounds=2,
        max_rounds=8,
        settle=1,
        in_a_row=2,
        clock=timing.cuda_clock if device.type == "cuda" else timing.cpu_clock,
    )
    steps.clear()
    gc.collect()
    provenance = machine.provenance(device)
    rows = []
    for provider in providers:
        measured, memory = timings.get(provider), None
        if measured is not None:
            memory, why = memory_in_a_process_of_its_own(provider, options)
            if why:
                reasons[provider] = f"peak memory: {why}"
        rows.append(
            results.make(
                "methods",
                provider=provider,
                dtype=options.dtype,
                factor_dtype=None if provider == "frozen" else "fp32",
                model=options.model_name or options.model.name,
                tokens=options.tokens,
                sequence=options.sequence,
                r=rank_of(provider.removeprefix("peft_"), options.rank),
                **results.timed(measured, timings.get("frozen")),
                peak_memory_mb=memory,
                trainable=trainable.get(provider),
                seed=0,
                **results.outcome(measured is not None, reasons.get(provider)),
                **provenance,
            )
        )
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("methods", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json, model.safetensors")
    parser.add_argument("--model-name", help="the name that the results carry (default: the folder's)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if machine.bf16_hardware() else "fp32")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of one step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of one sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--budget-seconds", type=float, default=60.0, help="about how long the steps of one method may take"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    quiet_transformers()
    if options.memory_of:
        device = torch.device(options.device)
        model = prepared(options.memory_of, options)
        step = make_step(model, options.memory_of, make_ids(model, options.tokens, options.sequence, device))
        for i in range(3):
            step(i)
        print(json.dumps({"provider": options.memory_of, "peak_memory_mb": peak_memory_mb(device)}))
        return 0
    command.begin(options)
    for method in tqdm(options.methods, desc="methods", unit="method", file=sys.stderr):
        rows = compare(method, options)
        results.record(rows, out=options.out)
        for row in rows:
            ratio, peak = row["ratio_to_frozen"], row["peak_memory_mb"]
            parts = [f"{ratio:.3f} × frozen" if ratio else "–", f"peak {peak:.0f} MB" if peak else "–"]
            tqdm.write(
                f"{row['provider']:14} {', '.join(parts + ([row['reason']] if row['reason'] else []))}", sys.stderr
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
