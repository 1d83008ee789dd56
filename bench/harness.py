"""What every benchmark here shares: interleaved timing, the machine's description, result files.

Rules this file keeps, so that no benchmark has to:

- Candidates are timed round robin in one process, in an order rotated every round, so that a slow minute of the machine
  falls on all of them.
- A figure is a median with its 20th and 80th percentile, never a mean and never a best case.
- A result says which commit, torch and machine it comes from, and a file of results appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# Variables that make a CPU pretend to be a lesser one. A result measured under them says so.
FORCED_ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "SVDKERN_CPU_ISA")

LINEAR_FIELDS = (
    "bench",
    "provider",
    "device",
    "isa",
    "dtype",
    "factor_dtype",
    "M",
    "K",
    "N",
    "r",
    "mode",
    "median_s",
    "p20_s",
    "p80_s",
    "n",
    "ratio_to_frozen",
    "err_vs_fp64",
    "commit",
    "dirty",
    "torch",
    "machine",
    "threads",
    "status",
    "reason",
)


# ---------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile of `n` samples."""

    median_s: float
    p20_s: float
    p80_s: float
    n: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        if not samples:
            raise ValueError("no samples: a timing needs at least one")
        ordered = sorted(samples)
        last = len(ordered) - 1
        return Timing(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def cpu_clock(call: Callable[[int], object], first: int, calls: int) -> float:
    """Seconds per call of `call(first) … call(first + calls - 1)` by the wall clock."""
    start = time.perf_counter()
    for i in range(first, first + calls):
        call(i)
    return (time.perf_counter() - start) / calls


def cuda_clock(call: Callable[[int], object], first: int, calls: int) -> float:
    """The same by CUDA events: the time between two marks on the stream, host overhead included only where it shows."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for i in range(first, first + calls):
        call(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    sample_seconds: float = 2e-3,
    warmup: int = 2,
    settle: int = 0,
    in_a_row: int = 1,
    clock: Callable[[Callable[[int], object], int, int], float] = cpu_clock,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Times the calls in turn, round after round, for about `seconds` altogether.

    A call gets a running number as its only argument, with which it picks its inputs from a rotation. Calls shorter
    than `sample_seconds` are repeated within a sample, since switching candidates at every call would measure cold
    instruction caches, not the call. At its turn a candidate gives `in_a_row` samples after `settle` calls that are not
    timed: the first call after another candidate's pays for code and workspace that have left the caches, and the first
    training step after another model's for memory that the allocator gave back. `on_round(done, total)` reports progress.
    """
    if not calls:
        return {}
    names = list(calls)
    number = dict.fromkeys(names, 0)

    def sample(name: str, repeat: int) -> float:
        first = number[name]
        number[name] += repeat
        return clock(calls[name], first, repeat)

    once: dict[str, float] = {}
    for name in names:
        for _ in range(max(1, warmup)):
            once[name] = sample(name, 1)
    # The last warm-up call may still carry a first-time cost, so short calls are measured again over a few repeats.
    for name in names:
        if once[name] < sample_seconds:
            once[name] = sample(name, 10)
    repeat = {name: max(1, min(10_000, round(sample_seconds / max(once[name], 1e-9)))) for name in names}
    round_seconds = sum(once[name] * (settle + in_a_row * repeat[name]) for name in names)
    rounds = max(min_rounds, min(max_rounds, int(seconds / max(round_seconds, 1e-9))))

    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= min_rounds and time.perf_counter() - start > 1.3 * seconds:
            break  # the machine has become busier than it was when the rounds were counted
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            for _ in range(settle):
                sample(name, 1)
            samples[name].extend(sample(name, repeat[name]) for _ in range(in_a_row))
        if on_round is not None:
            on_round(done + 1, rounds)
    return {name: Timing.of(values) for name, values in samples.items()}


def least_seconds(
    call: Callable[[int], object],
    enough: float,
    *,
    tries: int = 4,
    clock: Callable[[Callable[[int], object], int, int], float] = cpu_clock,
) -> float:
    """The least time of one call in up to `tries`, none of them after one that took no more than `enough`.

    For deciding that something is too slow to be run: a first call's costs and other programs only ever make a call
    slower, and one try on a busy machine once left out the frozen layer itself. It is no result.
    """
    least = math.inf
    for i in range(tries):
        least = min(least, clock(call, i, 1))
        if least <= enough:
            break
    return least


def rotation_length(bytes_per_set: int, *, cap_bytes: int = 512 << 20, hot_below: int = 1 << 20, most: int = 96) -> int:
    """How many copies of a call's tensors to rotate through so that none is still in the last-level cache.

    A set below `hot_below` bytes is used hot (1), as such a layer is in practice. Otherwise the copies together fill
    `cap_bytes`, which is larger than the share of a cache that one process holds on most machines.
    """
    if bytes_per_set < hot_below:
        return 1
    return max(2, min(most, -(-cap_bytes // bytes_per_set)))


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in fp64 (the absolute norm where truth is zero)."""
    exact = truth.double()
    distance = torch.linalg.vector_norm(value.double() - exact).item()
    size = torch.linalg.vector_norm(exact).item()
    return distance / size if size > 0 else distance


# --------------------------------------------------------------------------------------------------- machine


def bf16_hardware() -> bool:
    """Whether ATen's bf16 matrix products are fast on this CPU (oneDNN takes them; otherwise they are scalar loops)."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def isa(device: torch.device | str = "cpu") -> str:
    """Instruction set that the results depend on: svdkern's choice where it is loaded, `+amx` where oneDNN has it."""
    if torch.device(device).type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    try:
        name = str(torch.ops.svdkern._cpu_isa())
    except (AttributeError, RuntimeError):
        name = torch.backends.cpu.get_cpu_capability().lower()
        if name == "avx512" and bf16_hardware():
            name = "avx512_bf16"
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return name + ("+amx" if amx and "amx" not in name and bf16_hardware() else "")


@cache
def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def machine(device: torch.device | str = "cpu") -> str:
    """The processor, its cores, and any variable that makes it pretend to be a lesser one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    forced = [f"{name}={os.environ[name]}" for name in FORCED_ISA_VARIABLES if name in os.environ]
    return f"{_cpu_model()}, {cores} cores" + (f" ({', '.join(forced)})" if forced else "")


def machine_id(row: Mapping[str, Any]) -> str:
    """Folder name under bench/results for a row: its machine and instruction set, in letters any file system takes."""
    name = re.sub(r"\((?:R|TM)\)", "", str(row["machine"]), flags=re.IGNORECASE)
    forced = "-forced" if "=" in name else ""
    name = re.sub(r"\s*\([^()]*=[^()]*\)", "", name)
    return re.sub(r"[^a-z0-9_+]+", "-", f"{name} {row['isa']}".lower()).strip("-") + forced


def commit() -> tuple[str, bool]:
    """(short hash, whether the tree differs from it). Without git: BENCH_COMMIT from the environment, or "unknown"."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("BENCH_COMMIT", "unknown"), True
    # Result files are written by the benchmarks themselves and do not make the measured code another one.
    status = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results")
    return head, bool(status)


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The fields of a row that say where it comes from."""
    head, dirty = commit()
    return {
        "device": torch.device(device).type,
        "isa": isa(device),
        "commit": head,
        "dirty": dirty,
        "torch": torch.__version__,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------------------------------------- result files


def checked(row: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The row with its fields in order; a missing or an unknown field is an error that names it."""
    missing = [field for field in fields if field not in row]
    unknown = [field for field in row if field not in fields]
    if missing or unknown:
        raise ValueError(f"result row has missing fields {missing} and unknown fields {unknown}")
    return {field: row[field] for field in fields}


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file as one: a reader, or a killed run, never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines; NaN and infinity are an error, since JSON has neither."""
    return "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a broken line is an error that names file and line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
    return rows
