"""The Triton backend on CPU tensors: its launches go to the PTX emulator instead of a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ptx_emulator
import pytest
from ptx_emulator.compile import versions
from svdkern.triton_kernels import launching, workspace

from svdkern.backends import dispatch


@dataclass
class Emulation:
    """How launches are emulated, and which there were."""

    arch: int = 80
    version: str | None = None  # of Triton; None: the interpreter's own
    mode: str = "convergent"
    seed: int = 0
    ctas: int = 3  # what the kernels take for the number of processors
    record: Callable[[str, object], None] | None = None  # pytest's record_property
    statistics: dict[str, ptx_emulator.Statistics] | None = None  # by kernel, where somebody counts
    launches: list[str] = field(default_factory=list)

    def launch(self, kernel, grid, *arguments, **meta):  # type: ignore[no-untyped-def]
        self.launches.append(kernel.fn.__name__)
        options = {"arch": self.arch, "version": self.version, "mode": self.mode, "seed": self.seed}
        start = time.perf_counter()
        counts = None
        if self.statistics is not None:
            counts = self.statistics.setdefault(kernel.fn.__name__, ptx_emulator.Statistics())
        ptx_emulator.emulate(kernel, grid, *arguments, statistics=counts, **options, **meta)
        if self.record is not None:
            took = {"kernel": kernel.fn.__name__, "seconds": round(time.perf_counter() - start, 3)}
            self.record("launch", took | options | {"version": self.version or tritons()[0]})

    def triton_version(self) -> tuple[int, ...]:
        return tuple(int(n) for n in (self.version or next(iter(versions()))).split(".")[:2])


@contextlib.contextmanager
def emulation(**options) -> Iterator[Emulation]:  # type: ignore[no-untyped-def]
    """Inside, `svd_linear(..., backend="triton")` runs on CPU tensors, its kernels in the emulator."""
    how = Emulation(**options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "launch", how.launch)
        patch.setattr(launching, "processors", lambda device: how.ctas)
        patch.setattr(launching, "architecture", lambda device: how.arch)
        patch.setattr(launching, "triton_version", how.triton_version)
        patch.setattr(launching, "stream", lambda device: 0)
        patch.setattr(launching, "capturing", lambda device: False)
        patch.setattr(dispatch, "why_not", lambda name, device, dtype: None)
        patch.setattr(workspace, "_controls", {})
        dispatch._paths.clear()
        dispatch._chosen.clear()
        yield how
    dispatch._paths.clear()
    dispatch._chosen.clear()


def tritons() -> list[str]:
    """The versions of Triton that can compile here, the interpreter's own first."""
    return list(versions())
