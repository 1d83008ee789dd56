"""Where a result comes from: processor, instruction set, clock, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

# What a user has tuned on this machine is not what others get: the choices that are measured are the shipped ones.
os.environ["SVDKERN_CACHE_DIR"] = os.devnull

ROOT = Path(__file__).resolve().parent.parent

# Variables that make a CPU pretend to be a lesser one. A result measured under them says so.
FORCED_ISA_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "SVDKERN_CPU_ISA")

# Variables that make svdkern choose otherwise than it does for everyone.
CHOICE_VARIABLES = ("SVDKERN_BACKEND", "SVDKERN_AUTOTUNE")

PACKAGES = ("svdkern", "triton", "peft", "transformers")


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
    hidden = "AMX" not in os.environ.get("ONEDNN_MAX_CPU_ISA", "AMX").upper()
    return name + ("+amx" if amx and not hidden and "amx" not in name and bf16_hardware() else "")


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


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def clock_mhz(device: torch.device | str = "cpu") -> float | None:
    """The clock at this moment where it can be read: the GPU's SM clock, or the mean over the CPU's cores."""
    if torch.device(device).type == "cuda":
        found = _output("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits")
        return float(found.splitlines()[0]) if found and found.splitlines()[0].strip().isdigit() else None
    try:
        clocks = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return round(sum(map(float, clocks)) / len(clocks), 1) if clocks else None


@cache
def versions() -> dict[str, str | None]:
    """Of everything that a figure may depend on; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["driver"] = driver.splitlines()[0] if driver else None
    return found


def commit() -> tuple[str, bool]:
    """(short hash, whether the tree differs from it).

    A copy without git is told its commit by BENCH_COMMIT and counts as unchanged; without that it is "unknown".
    """
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if head is None:
        told = os.environ.get("BENCH_COMMIT")
        return (told, False) if told else ("unknown", True)
    # Result files are written by the benchmarks themselves and do not make the measured code another one.
    status = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".",
                     ":(exclude)bench/results")  # fmt: skip
    return head, status != ""


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The fields of a row that say where it comes from."""
    head, dirty = commit()
    if set_here := [name for name in CHOICE_VARIABLES if os.environ.get(name) not in (None, "", "0")]:
        raise SystemExit(f"{', '.join(set_here)} is set: svdkern's rows would not be its own choice; unset it")
    return {
        "device": torch.device(device).type,
        "machine": machine(device),
        "isa": isa(device),
        "clock_mhz": clock_mhz(device),
        "threads": torch.get_num_threads(),
        "commit": head,
        "dirty": dirty,
        "versions": versions(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
