"""The operators of the CUDA kernels on CPU tensors: csrc/cuda/ops.cpp built for them, its launches in the PTX emulator.

What the schema marks as written may be written and not read (workspace: both); all else may only be read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ptx_emulator
import pytest
import torch
from ptx_emulator import cuda

from svdkern.backends import cuda as backend
from svdkern.backends import dispatch, extension

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
BETWEEN = ("partial", "counters", "control")  # workspace of one launch or of several


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, None if they can."""
    if extension.why_missing is not None:
        return f"needs the compiled extension, which declares the operators: {extension.why_missing}"
    return None if cuda.nvcc() else "needs nvcc (CUDA 12.8 or newer)"


@functools.cache
def setup_cuda():  # type: ignore[no-untyped-def]
    """The build's own list of sources."""
    spec = importlib.util.spec_from_file_location("svdkern_setup_cuda", ROOT / "setup_cuda.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def library() -> cuda.Library:
    """Kernels, launchers and operators; loading it registers the operators for CPU tensors, in this process."""
    torch_folder = Path(torch.__file__).parent
    flags = ("-DSVDKERN_CUDA_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{torch_folder}/include")
    loaded = cuda.build(
        "svdkern_cuda",
        tuple(ROOT / source for source in setup_cuda().SOURCES),
        ((ROOT / setup_cuda().OPERATORS, flags),),
        (f"-L{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"),
    )
    torch.ops.load_library(str(loaded.path))
    return loaded


@dataclass
class CudaEmulation:
    """How launches are emulated, and which there were."""

    mode: str = "convergent"
    seed: int = 0
    ptx: dict[str, str] = field(default_factory=dict)  # by kernel: to run instead of its own
    scale_on_host: bool = False  # on a GPU it is a buffer of the layer as a rule
    processors: int = 3
    shared: int = 227 << 10  # that a CTA may ask for: of sm_90; 163 KB of sm_80, 99 KB of sm_86, sm_89 and sm_120
    statistics: dict[str, ptx_emulator.Statistics] | None = None  # by kernel, where somebody counts
    record: Callable[[str, object], None] | None = None  # pytest's record_property
    launches: list[cuda.Launch] = field(default_factory=list)

    def call(self, name: str, *arguments: object) -> Any:
        """torch.ops.svdkern._cuda_{name}(*arguments)."""
        operator = getattr(torch.ops.svdkern, f"_cuda_{name}").default
        tensors = {
            declared.name: (value, declared.alias_info is not None and declared.alias_info.is_write)
            for declared, value in zip(operator._schema.arguments, arguments, strict=True)
            if isinstance(value, torch.Tensor)
        }
        memory = [tensor for tensor, _ in tensors.values()]
        read_only = [tensor for tensor, written in tensors.values() if not written]
        between = (*BETWEEN, "z") if name == "forward" else BETWEEN  # there one tile's z is what another reads
        write_only = [t for of, (t, written) in tensors.items() if written and of not in between]

        def run(launch: cuda.Launch) -> None:
            start = time.perf_counter()
            counts = None
            if self.statistics is not None:
                counts = self.statistics.setdefault(launch.kernel, ptx_emulator.Statistics())
            options: dict = {"mode": self.mode, "seed": self.seed, "statistics": counts}
            launch.run(memory, self.ptx.get(launch.kernel), read_only=read_only, write_only=write_only, **options)
            self.launches.append(launch)
            if self.record is not None:
                took = {"kernel": launch.kernel, "seconds": round(time.perf_counter() - start, 3)}
                self.record("launch", took | {"arch": cuda.ARCH, "mode": self.mode, "seed": self.seed})

        library().device(self.processors, self.shared)
        with library().launches(run):
            return operator(*arguments)


@contextlib.contextmanager
def cuda_emulation(**options) -> Iterator[CudaEmulation]:  # type: ignore[no-untyped-def]
    """Inside, `svd_linear(..., backend="cuda")` runs on CPU tensors, its kernels in the emulator."""
    how = CudaEmulation(**options)
    library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "call", how.call)
        patch.setattr(backend, "processors", lambda device: how.processors)
        patch.setattr(backend, "on_host", lambda scale: how.scale_on_host)
        patch.setattr(dispatch, "why_not", lambda name, device, dtype: None)
        dispatch._paths.clear()
        dispatch._chosen.clear()
        yield how
    dispatch._paths.clear()
    dispatch._chosen.clear()
