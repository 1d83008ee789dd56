"""How much memory and time does the initial adapter of a model on disk take, one weight at a time?

    python -m svdkern bench init_memory                     a block of a 7B model (seven matrices)
    python -m svdkern bench init_memory --blocks 32         all of its 224 (needs 13 GB of disk)

The matrices of Llama-2-7B (4096 and 11008 wide) in bfloat16, with random values and a few large directions, in one safetensors
file a block. Each provider in a process of its own: svdkern is `python -m svdkern init`; svd_lowrank_16 and svd_lowrank_4 read the
same files weight by weight and do what PEFT's pissa_niter_16 and pissa_niter_4 do with it. peak_memory_mb is the process's peak
resident memory, libraries and pages of the file's mapping included; it is that of the largest matrix, so one block shows it.
extrapolated_s is median_s / blocks * 32, the model's blocks. Adds to bench/results/<machine>/init_memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from bench import command, machine, results
from bench.memory import resident
from svdkern import timing

MODEL, BLOCKS = "Llama-2-7B, simulated", 32
SHAPES = {
    **{f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
PROVIDERS = ("svdkern", "svd_lowrank_16", "svd_lowrank_4")
HEAD = 24  # directions above the noise, as a trained weight has them


def write_model(folder: Path, blocks: int, seed: int) -> None:
    """A file a block, so that no more than a block is ever in memory."""
    for block in tqdm(range(blocks), desc="writing the model", unit="block", file=sys.stderr, leave=False):
        generator = torch.Generator().manual_seed(seed * 1000 + block)
        tensors = {}
        for name, (n, k) in SHAPES.items():
            left, right = (torch.randn(size, HEAD, generator=generator) for size in (n, k))
            strength = 8 * (n**0.5 + k**0.5) / (n * k) ** 0.5 / torch.arange(1, HEAD + 1) ** 0.7
            weight = torch.addmm(torch.randn(n, k, generator=generator), left * strength, right.t())
            tensors[f"model.layers.{block}.{name}.weight"] = (0.02 * weight).to(torch.bfloat16)
        save_file(tensors, folder / f"model-{block + 1:05}-of-{blocks:05}.safetensors")


def run_one(provider: str, folder: Path, r: int) -> dict[str, float]:
    """Seconds and peak bytes. In a process that does nothing else."""
    from svdkern.streaming import init_adapter

    begin = time.perf_counter()
    if provider == "svdkern":
        with tempfile.TemporaryDirectory(dir=folder.parent) as out:
            init_adapter(folder, Path(out) / "adapter", "pissa", r)
    else:
        from svdkern.model_files import ModelFiles

        files, passes = ModelFiles.open(folder), int(provider.rpartition("_")[2])
        for name in files.tensors:
            weight = files.read(name)
            wide = weight.to(torch.float32)
            p, s, q = torch.svd_lowrank(wide, r, niter=passes)
            (wide - (p * s.sqrt()) @ (q * s.sqrt()).t()).to(weight.dtype)
    return {"seconds": time.perf_counter() - begin, "peak": resident("VmHWM")}


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all providers, in turn, try after try."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.providers}
    reasons: dict[str, str] = {}
    for _ in range(options.tries):
        for name in options.providers:
            code = [sys.executable, "-m", "bench.init_memory", "--one", name, str(folder), "--rank", str(options.rank)]
            done = subprocess.run(code, capture_output=True, text=True, cwd=machine.ROOT)
            if done.returncode:
                reasons[name] = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
            else:
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, found in runs.items():
        measured = timing.Timing.of([run["seconds"] for run in found]) if found else None
        rows.append(
            results.make(
                "init_memory", provider=name, dtype="bf16", model=MODEL, blocks=options.blocks, r=options.rank,
                **results.timed(measured, None),
                extrapolated_s=measured.median_s / options.blocks * BLOCKS if measured else None,
                peak_memory_mb=round(max(run["peak"] for run in found) / 1e6, 1) if found else None,
                seed=options.seed, **results.outcome(bool(found), reasons.get(name)), **options.provenance,
            )
        )  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("init_memory", __doc__)
    parser.add_argument("--blocks", type=int, default=1, help=f"of the model's {BLOCKS}")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where the model is written for the time of the run (default: a temporary one)"
    )
    parser.add_argument("--one", nargs=2, metavar=("PROVIDER", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(run_one(options.one[0], Path(options.one[1]), options.rank)))
        return 0
    options.device = "cpu"
    command.begin(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = Path(folder) / "model"
        model.mkdir()
        write_model(model, options.blocks, options.seed)
        rows = measure(model, options)
    for row in rows:
        time_ = (
            "–"
            if row["median_s"] is None
            else f"{row['median_s']:.3g} s, {row['extrapolated_s']:.3g} s for {BLOCKS} blocks"
        )
        tqdm.write(
            f"{row['provider']:16} {time_}, peak {row['peak_memory_mb']} MB {row['reason'] or ''}", file=sys.stderr
        )
    results.record(rows, out=options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
