"""The CUDA part of the build: where nvcc is, for which GPUs it compiles, and its rules in build.ninja. Imported by setup.py.

Environment: ``SVDKERN_CUDA`` (0: no kernels for GPUs, 1: an error without nvcc, auto: as nvcc is found, the default),
``SVDKERN_ARCHS`` (compute capabilities, as "80 90+ptx 120"; "+ptx": code for later GPUs too), ``CUDA_HOME``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SOURCES = tuple(
    f"csrc/cuda/{name}.cu"
    for name in ("forward", "linear", "small_linear", "outer", "shrink", "small_shrink", "pack", "modulate")
)  # the longest first
OPERATORS = ("csrc/cuda/ops.cpp", "csrc/cuda/layer_ops.cpp")
ARCHS = "80 90+ptx 100 120"
OLDEST = (12, 8)  # the first nvcc that knows sm_100 and sm_120
LIBRARIES = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
INCLUDES = ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")


class Toolkit(NamedTuple):
    """An nvcc and what belongs to it."""

    nvcc: Path
    libraries: Path  # where libcudart_static.a is
    include: Path
    version: tuple[int, int]
    archs: tuple[str, ...]  # "80", "90+ptx"

    @property
    def description(self) -> str:
        """What the binary says of itself: "nvcc 13.0: 80 90+ptx 100 120"."""
        return f"nvcc {self.version[0]}.{self.version[1]}: {' '.join(self.archs)}"


def _candidates() -> list[Path]:
    """nvcc of CUDA_HOME, of PATH, of PyPI's packages (nvidia-cuda-nvcc and its companions, of one version), in this order."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return [Path(home) / "bin/nvcc"]  # who names one means that one
    found = [Path(path)] if (path := shutil.which("nvcc")) else []
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        found += sorted(Path(folder).glob("cu[0-9]*/bin/nvcc"), reverse=True)
    return found


def _folder(top: Path, names: tuple[str, ...], file: str) -> Path | None:
    return next((top / name for name in names if (top / name / file).exists()), None)


def _ask(nvcc: Path, *arguments: str) -> str:
    done = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def toolkit() -> Toolkit | str:
    """The toolkit that the environment asks for, or in one line why there is none."""
    mode = os.environ.get("SVDKERN_CUDA") or "auto"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if mode == "0":
        return "SVDKERN_CUDA=0"
    if mode not in ("1", "auto"):
        raise SystemExit(f"svdkern: SVDKERN_CUDA is {mode!r}, expected 0, 1 or auto")
    reason = f"no nvcc in CUDA_HOME={home}" if home else "no nvcc (CUDA_HOME, PATH, or PyPI's nvidia-cuda-nvcc)"
    for nvcc in _candidates():
        if not nvcc.is_file():
            continue
        version = re.search(r"release (\d+)\.(\d+)", _ask(nvcc, "--version"))
        # nvcc on PATH may be a wrapper script: it is asked where its toolkit is
        root = re.search(r"^#\$ TOP=(.*)$", _ask(nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull), re.M)
        if version is None or root is None:
            reason = f"{nvcc} does not run"
            continue
        number = (int(version.group(1)), int(version.group(2)))
        if number < OLDEST:
            reason = f"{nvcc} is of CUDA {number[0]}.{number[1]}, the kernels need {OLDEST[0]}.{OLDEST[1]} or newer"
            continue
        top = Path(root.group(1)).resolve()
        libraries, include = _folder(top, LIBRARIES, "libcudart_static.a"), _folder(top, INCLUDES, "cuda_runtime_api.h")
        if libraries is None or include is None:
            reason = f"{nvcc} has no static runtime beside it (PyPI: nvidia-cuda-runtime)"
            continue
        return Toolkit(nvcc, libraries, include, number, _archs(nvcc, os.environ.get("SVDKERN_ARCHS") or ARCHS))
    if mode == "1":
        raise SystemExit(f"svdkern: SVDKERN_CUDA=1, and {reason}")
    return reason


def _archs(nvcc: Path, asked: str) -> tuple[str, ...]:
    known = set(re.findall(r"compute_(\d+)", _ask(nvcc, "--list-gpu-arch")))
    archs = tuple(asked.replace(",", " ").replace(";", " ").split())
    for arch in archs:
        number = arch.removesuffix("+ptx")
        if number not in known or int(number) < 80:
            some = ", ".join(sorted((k for k in known if int(k) >= 80), key=int))
            raise SystemExit(f"svdkern: {arch!r} in SVDKERN_ARCHS is none of {some}, with or without +ptx")
    return archs


def targets(archs: tuple[str, ...]) -> list[str]:
    """nvcc's options for these GPUs."""
    options = []
    for arch in archs:
        number = arch.removesuffix("+ptx")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+ptx"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def rule(kit: Toolkit, host: list[str], words: Callable[..., str]) -> str:
    """The ninja rule of a .cu file; ``words`` quotes the words of a command."""
    compiler = next(word for word in reversed(host) if not word.startswith("-"))  # behind a ccache
    compile_ = words(kit.nvcc, "-ccbin", compiler, "-std=c++17", "-O3", *targets(kit.archs), "-cudart", "static")
    host_flags = words("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter")
    return (
        f"rule nvcc\n  command = {compile_} {host_flags} -MD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = $in"
    )


def link_flags(kit: Toolkit, words: Callable[..., str]) -> str:
    """The runtime, linked statically: the extension loads where there is no CUDA at all."""
    names = ["-lcudart_static"] + ["-lculibos"] * (kit.libraries / "libculibos.a").exists()
    return words(f"-L{kit.libraries}", *names, "-ldl", "-lrt", "-lpthread")
