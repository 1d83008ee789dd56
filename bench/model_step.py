"""What does fine-tuning through svdkern cost, against the frozen model and against PEFT? One whole training step.

    make demo                                              runs this on SmolLM2-135M as its last part
    python -m svdkern bench model_step --model DIR         any causal language model saved by save_pretrained

Providers, all in one dtype, all with AdamW and its step included:

    frozen         nothing trains but the first norm weight, so that backward runs through every layer: the floor
    svdkern        svdkern's layers, fp32 factors
    svdkern_bf16   only with --dtype fp32: the model in bf16 with a new adapter, its frozen linears on svdkern's kernels, too,
                   and attention in fp32: for CPUs on which PyTorch's bf16 products take minutes
    peft_default   PEFT LoRA as it comes (factors raised to fp32)
    peft_bf16      PEFT LoRA with factors in the base's dtype (autocast_adapter_dtype=False)

Step times (medians) are taken in turn in one process, a few steps in a row each; peak memory in one process each,
because the peak of a process only grows. Adds to bench/results/<machine>/model_step.jsonl one line a provider. A
provider that fails, or would take too long, is a line with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging as transformers_logging

from bench import command, machine, results
from bench.providers import DTYPES
from svdkern import timing

PROVIDERS = ("frozen", "svdkern", "svdkern_bf16", "peft_default", "peft_bf16")


# ----------------------------------------------------------------------------------------------------- models


def quiet_transformers() -> None:
    """No advice between the figures."""
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT calls what will be renamed


def load_saved(directory: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model saved in `directory`, its weights in memory of their own.

    Not in the file's mapping: a provider that replaces weights could then never give their memory back, which would be
    counted against it alone.
    """
    config = AutoConfig.from_pretrained(directory)
    config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name).to(device, dtype, copy=True) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{directory}/model.safetensors has no weight {name!r}")
    # Buffers that no checkpoint holds (rotary frequencies) were made on the meta device: build those modules again.
    for name, module in model.named_modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, type(module)(config).to(device))
    return model.requires_grad_(False).train()


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a provider's model is in."""
    return torch.bfloat16 if name == "svdkern_bf16" else dtype


def attend_in_fp32(model: nn.Module) -> None:
    """Let a transformers model cast what attention multiplies, which has no weights, to fp32 and back."""

    def attention(module, query, key, value, attention_mask, **options):  # type: ignore[no-untyped-def]
        y, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
        return y.to(query.dtype), weights

    AttentionInterface.register("sdpa_in_fp32", attention)
    AttentionMaskInterface.register("sdpa_in_fp32", sdpa_mask)
    model.set_attn_implementation("sdpa_in_fp32")  # type: ignore[operator]


def adapted(
    name: str, directory: Path, dtype: torch.dtype, device: torch.device, adapter: Path | None, rank: int
) -> nn.Module:
    """The saved model as `name` trains it."""
    model = load_saved(directory, dtype_of(name, dtype), device)
    if name == "frozen":
        next(p for n, p in model.named_parameters() if "norm" in n).requires_grad_(True)
    elif name == "svdkern":
        import svdkern

        if adapter is not None:
            svdkern.load_adapter(model, adapter)
        else:
            svdkern.adapt(model, method="pissa", rank=rank)
    elif name == "svdkern_bf16":
        import svdkern

        svdkern.adapt(model, method="pissa", rank=rank, frozen_linears=True)
        attend_in_fp32(model)
    else:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=name == "peft_default")
    with torch.no_grad():
        # PEFT starts from B = 0; equal, nonzero factors for everyone, since zeros run faster on some devices.
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                parameter.normal_(0.0, 0.01)
    return model


def make_step(model: nn.Module, ids: Tensor) -> Callable[[int], float]:
    """One training step as the demo runs it; returns nothing that is waited for on a GPU."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-6, fused=True)

    def step(_: int) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return 0.0

    return step


# --------------------------------------------------------------------------------------------- time and memory


def peak_memory_mb(device: torch.device) -> float:
    """Peak of this process in MB (10⁶ bytes): allocated memory of the GPU, or resident memory on a CPU.

    On Linux VmHWM, not ru_maxrss: a child inherits ru_maxrss from the process that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    if found:
        return int(found.group(1)) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def memory_in_a_process_of_its_own(name: str, options: argparse.Namespace) -> tuple[float | None, str | None]:
    """(peak in MB, None) or (None, reason)."""
    command = [sys.executable, "-m", "bench.model_step", "--memory-of", name, "--model", str(options.model)]
    command += ["--dtype", options.dtype, "--tokens", str(options.tokens), "--sequence", str(options.sequence)]
    command += ["--device", options.device, "--rank", str(options.rank), "--threads", str(torch.get_num_threads())]
    command += ["--adapter", str(options.adapter)] if options.adapter else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"exit status {done.returncode}"
    return json.loads(done.stdout.strip().splitlines()[-1])["peak_memory_mb"], None


def make_ids(model: nn.Module, tokens: int, sequence: int, device: torch.device) -> Tensor:
    """Random token ids (tokens // sequence, sequence): what a step costs does not depend on the words."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return torch.randint(0, vocabulary, (tokens // sequence, sequence), generator=generator).to(device)


def expected_seconds(model: nn.Module, ids: Tensor, limit: float) -> float:
    """A step's seconds estimated from 4 tokens: ATen's bf16 backward takes minutes on CPUs without bf16 hardware.

    What is below `limit` is not measured any closer.
    """
    few = ids[:1, :4]
    share = few.numel() / ids.numel()
    return timing.least_seconds(make_step(model, few), limit * share, tries=2) / share


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all providers: step times interleaved, then peak memory one by one."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    start = time.perf_counter()
    steps: dict[str, Callable[[int], float]] = {}
    reasons: dict[str, str] = {}
    for name in options.providers:
        try:
            model = adapted(name, options.model, dtype, device, options.adapter, options.rank)
            ids = make_ids(model, options.tokens, options.sequence, device)
            if device.type == "cpu" and dtype_of(name, dtype) != torch.float32 and not machine.bf16_hardware():
                expected = expected_seconds(model, ids, options.max_step_seconds)
                if expected > options.max_step_seconds:
                    low = str(dtype_of(name, dtype)).removeprefix("torch.")
                    reasons[name] = f"skipped: a step in {low} would take about {expected:.0f} s on this CPU"
                    continue
            steps[name] = make_step(model, ids)
        except Exception as error:  # a rival that fails is a row with its reason, whatever it raises
            reasons[name] = results.why(error)
    # Peak memory takes a load and three steps for each provider; leave it its share of the time.
    seconds = 0.7 * (options.budget_seconds - (time.perf_counter() - start))
    with tqdm(desc="step time, in turn", unit="round", file=sys.stderr, leave=False) as bar:

        def on_round(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        timings = timing.interleave(
            steps,
            seconds=seconds,
            min_rounds=1,
            max_rounds=15,
            settle=1,
            in_a_row=3,
            clock=timing.cuda_clock if device.type == "cuda" else timing.cpu_clock,
            on_round=on_round,
        )
    steps.clear()
    gc.collect()
    provenance = machine.provenance(device)
    rows = []
    for name in tqdm(options.providers, desc="peak memory", unit="provider", file=sys.stderr, leave=False):
        measured, memory = timings.get(name), None
        if measured is not None:
            memory, why = memory_in_a_process_of_its_own(name, options)
            if why:
                reasons[name] = f"peak memory: {why}"
        rows.append(
            results.make(
                "model_step",
                provider=name,
                dtype="bf16" if name == "svdkern_bf16" else options.dtype,
                factor_dtype={"frozen": None, "peft_bf16": options.dtype}.get(name, "fp32"),
                model=options.model_name or options.model.name,
                tokens=options.tokens,
                sequence=options.sequence,
                r=options.rank,
                **results.timed(measured, timings.get("frozen")),
                peak_memory_mb=memory,
                seed=0,
                **results.outcome(measured is not None, reasons.get(name)),
                **provenance,
            )
        )
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("model_step", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json, model.safetensors")
    parser.add_argument("--model-name", help="the name that the results carry (default: the folder's)")
    parser.add_argument("--adapter", type=Path, help="a saved svdkern adapter of that model, instead of a new one")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if machine.bf16_hardware() else "fp32")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of one step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of one sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        help="default: all, svdkern_bf16 only where it is of use (fp32 on a CPU without bf16)",
    )
    parser.add_argument("--budget-seconds", type=float, default=120.0, help="about how long all of it may take")
    parser.add_argument("--max-step-seconds", type=float, default=60.0, help="a provider with slower steps is skipped")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--memory-of", choices=PROVIDERS, help="three steps of one provider, then its peak memory")
    options = parser.parse_args(arguments)
    if options.providers and "svdkern_bf16" in options.providers and options.dtype != "fp32":
        parser.error(f"svdkern_bf16 is compared with --dtype fp32, which is {options.dtype} here")
    if options.providers is None:
        of_use = options.dtype == "fp32" and options.device == "cpu" and not machine.bf16_hardware()
        options.providers = [name for name in PROVIDERS if of_use or name != "svdkern_bf16"]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    quiet_transformers()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        device = torch.device(options.device)
        model = adapted(options.memory_of, options.model, DTYPES[options.dtype], device, options.adapter, options.rank)
        step = make_step(model, make_ids(model, options.tokens, options.sequence, device))
        for i in range(3):
            step(i)
        print(json.dumps({"provider": options.memory_of, "peak_memory_mb": peak_memory_mb(device)}))
        return 0
    rows = compare(options)
    results.record(rows, out=options.out)
    for row in rows:
        seconds, ratio, peak = row["median_s"], row["ratio_to_frozen"], row["peak_memory_mb"]
        parts = [f"{seconds * 1e3:.0f} ms" if seconds else "–", f"{ratio:.3f} × frozen" if ratio else "–"]
        parts += [f"peak {peak:.0f} MB" if peak else "–"] + ([row["reason"]] if row["reason"] else [])
        print(f"{row['provider']:13} {', '.join(parts)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
