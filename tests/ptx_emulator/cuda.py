"""Run CUDA C++ kernels in the emulator, through their own launchers: nothing of a launch is said twice.

`build` compiles .cu files by nvcc, for the host as they ship and for the GPU to PTX, and links them with a runtime
(cuda_runtime.cpp) that hands launches to Python. `Library.launches(...)` then is the one place that runs them:

    library = build("kernels", sources)
    with library.launches(handle): call anything that launches          handle(Launch) -> None

A Launch has the kernel's PTX, grid, threads, shared memory and parameters as the launcher gave them, and `run(memory=...)`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launch import run_ptx
from .machine import Machine
from .parse import Kernel, parse

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda_emulated"
RUNTIME = Path(__file__).with_name("cuda_runtime.cpp")
ARCH = 80
# Two of nvcc's marks of a file's anonymous namespace, which differ by folder, are no part of a kernel's name.
_ANONYMOUS = re.compile(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}")


@functools.cache
def nvcc() -> str | None:
    """The compiler, of CUDA_HOME or on PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


@functools.cache
def include() -> str:
    """The folder of the CUDA headers of this nvcc."""
    told = subprocess.run([str(nvcc()), "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    return re.search(r'INCLUDES="-I([^"]*)"', told).group(1)  # type: ignore[union-attr]


def _digest(*parts: str | Path) -> str:
    """A name for these words and these files' contents."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return digest.hexdigest()[:20]


def _headers(source: Path) -> list[Path]:
    """What a source may include: headers below its folder and beside that."""
    return sorted({*source.parent.rglob("*.h"), *source.parent.parent.glob("*.h")})


def _cached(name: str, suffix: str, inputs: Sequence[str | Path], make: Callable[[Path], list[str]]) -> Path:
    """build/cuda_emulated/name-hash.suffix, by `make(partial)`'s command where it is not there; one process makes it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    out = BUILD / f"{name}-{_digest(*inputs)}{suffix}"
    if out.exists():
        return out
    with open(out.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            partial = out.with_name(f"{out.stem}.partial{suffix}")
            done = subprocess.run(make(partial), capture_output=True, text=True, cwd=BUILD)
            if done.returncode:
                raise RuntimeError(f"{name} does not compile:\n{done.stdout}{done.stderr}")
            partial.rename(out)
    return out


def compile_ptx(source: Path, *flags: str, arch: int = ARCH) -> str:
    """`nvcc -ptx` of a .cu file; cached by what it and its headers are."""
    command = [str(nvcc()), "-std=c++17", "-O3", "-lineinfo", f"-arch=compute_{arch}", *flags, "-ptx"]
    path = _cached(
        source.stem, ".ptx", [*command, source, *_headers(source)], lambda out: [*command, str(source), "-o", str(out)]
    )
    return path.read_text()


@functools.lru_cache(maxsize=64)
def _entries(ptx: str) -> dict[str, str]:
    """The kernels of a module, by names that do not depend on its folder."""
    return {_ANONYMOUS.sub("", entry): entry for entry in re.findall(r"\.entry\s+([$\w]+)", ptx)}


@functools.lru_cache(maxsize=256)
def _kernel(ptx: str, name: str) -> Kernel:
    return parse(ptx, _entries(ptx)[_ANONYMOUS.sub("", name)])


@dataclass
class Launch:
    """One launch, as the launcher asked for it."""

    name: str  # mangled
    ptx: str
    grid: tuple[int, int, int]
    threads: int
    shared: int  # dynamic, bytes
    parameters: list[bytes]

    @property
    def kernel(self) -> str:
        """The plain name, as "shrink_kernel"."""
        return next(m for m in re.findall(r"[a-z][a-z_]*_kernel", self.name))

    def run(self, memory: Sequence[torch.Tensor], ptx: str | None = None, **options: Any) -> Machine:
        """In the emulator, with this memory to read and write (run_ptx: read_only, write_only, mode, ...)."""
        kernel = _kernel(ptx or self.ptx, self.name)
        return run_ptx(kernel, self.grid, self.threads, self.parameters, shared=self.shared, memory=memory, **options)


UNASKED = 48 << 10
"""Bytes of shared memory, declared and dynamic, that a kernel may have unasked."""


class Library:
    """A loaded library whose launches come here."""

    def __init__(self, path: Path, ptx: Mapping[str, str]):
        self.ptx = ptx  # by the stem of the .cu file
        self.path = path
        self.handle: Callable[[Launch], None] | None = None
        self.problem: BaseException | None = None
        signature = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
        )
        self._callback = signature(self._launched)  # C keeps the pointer, Python must keep the function
        self._runtime = ctypes.CDLL(str(path))
        self._runtime.emulate_launches(self._callback)

    def device(self, processors: int, shared: int) -> None:
        """What launchers are told of the GPU: its processors, and the bytes of shared memory that a CTA may ask for."""
        self._runtime.emulate_device(processors, shared)

    def _launched(self, name: bytes, geometry: Any, arguments: Any) -> int:
        try:
            assert self.handle is not None, "a launch outside `with library.launches(...)`"
            mangled = name.decode()
            ptx = next(text for text in self.ptx.values() if _ANONYMOUS.sub("", mangled) in _entries(text))
            if geometry[4] != 1 or geometry[5] != 1:
                raise ValueError(
                    f"a block of {geometry[3]}x{geometry[4]}x{geometry[5]} threads: the emulator has x alone"
                )
            kernel = _kernel(ptx, mangled)
            declared = sum(v.size for v in kernel.variables.values() if v.space == "shared")
            if declared + geometry[6] > UNASKED and not geometry[7]:
                raise ValueError(
                    f"{declared} + {geometry[6]} bytes of shared memory, unasked at most {UNASKED}: cudaFuncSetAttribute"
                )
            parameters = [ctypes.string_at(arguments[i], p.size) for i, p in enumerate(kernel.parameters)]
            self.handle(Launch(mangled, ptx, tuple(geometry[:3]), geometry[3], geometry[6], parameters))
        except BaseException as problem:  # it cannot pass through C
            self.problem = problem
            return 1
        return 0

    @contextlib.contextmanager
    def launches(self, handle: Callable[[Launch], None]) -> Iterator[None]:
        """Inside, every launch goes to `handle`; what that raises comes out here."""
        before, self.handle, self.problem = self.handle, handle, None
        try:
            yield
        except Exception as raised:
            if self.problem is not None:
                raise self.problem from raised
            raise
        else:
            if self.problem is not None:
                raise self.problem
        finally:
            self.handle = before


@functools.cache
def build(
    name: str,
    sources: tuple[Path, ...],
    host: tuple[tuple[Path, tuple[str, ...]], ...] = (),
    link: tuple[str, ...] = (),
) -> Library:
    """The library of these .cu files and, with its flags, of each host source, linked and loaded, once a process."""
    objects = []
    for source in sources:
        command = [str(nvcc()), "-std=c++17", "-O1", f"-gencode=arch=compute_{ARCH},code=compute_{ARCH}"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-c"]
        objects.append(
            _cached(
                source.stem, ".o", [*command, source, *_headers(source)],
                lambda out, command=command, source=source: [*command, str(source), "-o", str(out)],
            )
        )  # fmt: skip
    for source, flags in (*host, (RUNTIME, ())):
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", f"-isystem{include()}", *flags, "-c"]
        objects.append(
            _cached(
                source.stem, ".o", [*command, source, *_headers(source)],
                lambda out, command=command, source=source: [*command, str(source), "-o", str(out)],
            )
        )  # fmt: skip
    library = _cached(
        name, ".so", [*map(str, objects), *link],
        lambda out: ["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(out), *link, "-ldl"],
    )  # fmt: skip
    return Library(library, {source.stem: compile_ptx(source) for source in sources})
