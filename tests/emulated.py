"""The Triton backend on CPU tensors: its launches go to the PTX emulator instead of a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ptx_emulator
import pytest
import torch
from ptx_emulator.compile import versions
from svdkern.triton_kernels import launching

from svdkern.backends import dispatch

OUTPUTS = {
    "pack_kernel": ("first_out", "second_out", "control"),
    "shrink_kernel": ("out",),
    "linear_kernel": ("y", "h_out"),
    "forward_kernel": ("y", "h_out"),
    "backward_kernel": ("dx", "dsigma", "dcore", "dscale", "dgate", "du", "dv", "dbias"),
    "reduce_kernel": ("out",),
    "gram_kernel": ("partial",),
    "sketch_kernel": ("out",),
    "residual_kernel": ("out",),
    "normal_kernel": ("partial",),
    "parts_kernel": ("out", "parts"),
}
# written and read by tiles of one launch; everything else is read alone
BETWEEN = ("control", "z", "q", "sigmas", "cores", "scales", "u_sum", "v_sum", "bias_sum")


@dataclass
class Emulation:
    """How launches are emulated, and which there were."""

    arch: int = 80
    version: str | None = None  # of Triton; None: the interpreter's own
    mode: str = "convergent"
    seed: int = 0
    scale_on_host: bool = False  # on a GPU it is a buffer of the layer as a rule
    ctas: int = 3  # what the kernels take for the number of processors
    record: Callable[[str, object], None] | None = None  # pytest's record_property
    statistics: dict[str, ptx_emulator.Statistics] | None = None  # by kernel, where somebody counts
    launches: list[str] = field(default_factory=list)

    def launch(self, kernel, grid, *arguments, **meta):  # type: ignore[no-untyped-def]
        self.launches.append(kernel.fn.__name__)
        options: dict = {"arch": self.arch, "version": self.version, "mode": self.mode, "seed": self.seed}
        start = time.perf_counter()
        counts = None
        if self.statistics is not None:
            counts = self.statistics.setdefault(kernel.fn.__name__, ptx_emulator.Statistics())
        tensors = {p.name: t for p, t in zip(kernel.params, arguments, strict=False) if isinstance(t, torch.Tensor)}
        outputs = OUTPUTS[kernel.fn.__name__]
        options["write_only"] = [t for name, t in tensors.items() if name in outputs]
        options["read_only"] = [t for name, t in tensors.items() if name not in (*outputs, *BETWEEN)]
        ptx_emulator.emulate(kernel, grid, *arguments, statistics=counts, **options, **meta)
        if self.record is not None:
            took = {"kernel": kernel.fn.__name__, "seconds": round(time.perf_counter() - start, 3)}
            how = {"arch": self.arch, "triton": self.version or tritons()[0], "mode": self.mode, "seed": self.seed}
            self.record("launch", took | how)

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
        patch.setattr(launching, "on_host", lambda scale: how.scale_on_host)
        patch.setattr(dispatch, "why_not", lambda name, device, dtype: None)
        dispatch._paths.clear()
        dispatch._chosen.clear()
        yield how
    dispatch._paths.clear()
    dispatch._chosen.clear()


def tritons() -> list[str]:
    """The versions of Triton that can compile here, the interpreter's own first."""
    return list(versions())
