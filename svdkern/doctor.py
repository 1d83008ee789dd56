"""``python -m svdkern doctor``: what is compiled, what loaded, which backend a call takes, and a test of each.

Layer: below ``cli``. Everything it prints is asked of the running system; nothing is assumed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
from typing import Any

import torch
from torch import Tensor

from svdkern.backends import choices, cuda, dispatch, extension, gpu_choice, triton, tuned
from svdkern.backends.cpu import SMALL_M, SMALL_WORK, isa, kernels_win
from svdkern.backends.table import Shape
from svdkern.functional import svd_linear

_PACKAGES = ("svdkern", "torch", "triton", "peft", "transformers", "safetensors")
_VARIABLES = (
    "SVDKERN_BACKEND", "SVDKERN_STRICT", "SVDKERN_CPU_ISA", "SVDKERN_AUTOTUNE", "SVDKERN_CACHE_DIR", "XDG_CACHE_HOME",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "WORLD_SIZE",
)  # fmt: skip
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53}


def add_doctor(commands: Any) -> None:
    """Add the command to the command line's sub-parsers."""
    parser = commands.add_parser(
        "doctor",
        help="what is compiled, what loaded, which backend a call takes, and a test of each",
        description="Print versions, the compiled extension and its instruction sets, which backend a call takes, and test every "
        "backend against float64. Exit status 1 if a test fails, or if SVDKERN_STRICT=1 and the extension is missing.",
    )
    parser.add_argument(
        "--shape",
        metavar="MxKxN[xr]",
        type=_shape,
        default=None,
        help="also show the path of a layer of this shape and where that choice comes from, as 1x4096x4096x8 (r = 16 if left out)",
    )
    parser.set_defaults(run=doctor)


def doctor(options: argparse.Namespace) -> int:
    """Print the report; 0 if everything that should work does."""
    for line in _versions() + _compiled() + _choices(options.shape):
        print(line)
    lines, healthy = _self_test()
    print("\n".join(lines))
    if extension.why_missing is not None and os.environ.get("SVDKERN_STRICT") == "1":
        print("SVDKERN_STRICT=1: a missing extension is an error")
        return 1
    return 0 if healthy else 1


def _versions() -> list[str]:
    lines = ["versions"]
    for name in _PACKAGES:
        try:
            # of torch the build too ("2.13.0+cu130"), which a wheel's own metadata need not have
            found = torch.__version__ if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "not installed"
        lines.append(f"  {name:<14}{found}")
    lines.append(f"  {'python':<14}{platform.python_version()}, {platform.machine()} {platform.system()}")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    lines.append(f"  {'cuda':<14}{torch.version.cuda or 'this torch has none'}, {cuda}")
    return lines


def _compiled() -> list[str]:
    lines = ["compiled extension svdkern._C"]
    if extension.why_missing is None:
        ops = torch.ops.svdkern
        lines.append(f"  loaded; instruction sets compiled in: {ops._cpu_isas()}")
        try:
            lines.append(f"  in use: {ops._cpu_isa()}")
        except RuntimeError as error:
            lines.append(f"  no instruction set can be used: {error}".splitlines()[0])
    else:
        lines.append(f"  missing: {extension.why_missing}")
        lines.append("  every call takes the eager backend; reinstall with a C++ compiler and ninja to get the kernels")
    missing = cuda.why_missing()
    lines.append(
        "CUDA kernels (NVIDIA GPUs, compute capability 8.0 and later, a driver that knows the runtime inside: nvcc 13 needs 580)"
    )
    if missing is None:
        lines.append(f"  compiled by {torch.ops.svdkern._cuda_build()}; run from their PTX by the tests")
        lines.append(
            '  taken where a call names them (backend="cuda", SVDKERN_BACKEND=cuda); unasked on sm_90, in bfloat16 and'
        )
        lines.append(f"  float16, by layers of {gpu_choice.RULE}")
    else:
        lines.append(f"  missing: {missing}")
    missing = triton.why_missing()
    lines.append("Triton kernels (NVIDIA GPUs, compute capability 8.0 and later)")
    if missing is None:
        lines.append("  can be imported; run from their PTX for sm_80 and sm_90 by the tests, compiled only for sm_100")
        lines.append(
            '  taken where a call names them (backend="triton", SVDKERN_BACKEND=triton), and by the SVD that initialises'
        )
    else:
        lines.append(f"  missing: {missing}")
    lines.append("settings")
    lines.append(f"  threads: {torch.get_num_threads()} (torch.set_num_threads)")
    asked = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    lines.append(f"  environment: {' '.join(asked) or 'nothing set'}")
    return lines


def _choices(shape: Shape | None) -> list[str]:
    lines = ["backend by device and dtype"]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, dtype in _DTYPES.items():
            try:
                chosen = dispatch.choose(torch.empty(0, dtype=dtype, device=device), None).name
                lines.append(f"  {device:<6}{name:<10}{chosen:<8}{_rule(chosen, device, dtype)}")
            except RuntimeError as error:
                lines.append(f"  {device:<6}{name:<10}none: {error}".splitlines()[0])
    try:
        lines += _tables() if extension.why_missing is None else []
        lines += _shape_lines(shape) if shape is not None else []
    except RuntimeError as error:  # strict, or a wrong SVDKERN_CPU_ISA
        lines.append(f"no choice can be made: {error}".splitlines()[0])
    return lines


_PATHS = {
    "fused": "one C++ call each way",
    "steps": "the formula's steps as calls, the base product by ATen where it is fast",
    "eager": "PyTorch operators",
}


def _rule(chosen: str, device: str, dtype: torch.dtype) -> str:
    if chosen in ("triton", "cuda"):
        return "its kernels"
    if chosen == "eager":
        unasked = device == "cuda" and dispatch.named() is None
        if unasked and gpu_choice.may_take_cuda(torch.device(device, torch.cuda.current_device()), dtype):
            return f"{_PATHS['eager']}; cuda if {gpu_choice.RULE}"
        return _PATHS["eager"]
    if kernels_win(dtype):
        return f"by the tables, else the rule: {_PATHS['fused']}"
    return f"by the tables, else the rule: {_PATHS['fused']} if M <= {SMALL_M} or M*K*N <= {SMALL_WORK}"


def _tables() -> list[str]:
    mine = [row for row in choices.tables().shipped if row.isa == isa()]
    here = f"{len(choices.tables().tuned)} layers, in {tuned.folder() or 'no folder: HOME is not set'}"
    if choices.distributed():
        here += " (ignored: one of several ranks)"
    return [
        f"measured choices for {isa()}",
        f"  shipped table: {len(mine)} layers",
        f"  tuned here (python -m svdkern tune): {here}",
    ]


def _shape_lines(shape: Shape) -> list[str]:
    lines = [f"path of {' '.join(f'{name}={size}' for name, size in shape._asdict().items())}"]
    for name, dtype in _DTYPES.items():
        found = dispatch.explain(shape, dtype)
        lines.append(f"  {name:<10}{found.path:<8}{_PATHS[found.path]} ({found.source})")
    return lines


def _shape(text: str) -> Shape:
    try:
        sizes = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not MxKxN or MxKxNxr with positive sizes, as 1x4096x4096")
    return Shape(*(sizes if len(sizes) == 4 else [*sizes, 16]))


def _self_test() -> tuple[list[str], bool]:
    lines, healthy = ["self-test against float64 (largest error of y and all gradients, in units of its bound)"], True
    for backend in dispatch.BACKENDS:
        for name, dtype in _DTYPES.items():
            device = torch.device("cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu")
            reason = dispatch.why_not(backend, device, dtype)
            if reason is not None:
                lines.append(f"  {backend:<8}{name:<10}skipped: {reason}")
                continue
            for m in (3, 40):
                try:
                    ratio = _error_in_bounds(backend, name, m, device)
                except Exception as error:  # a compiler's own, too: the report goes on
                    lines.append(f"  {backend:<8}{name:<10}M={m:<4}FAILED: {error}".splitlines()[0])
                    healthy = False
                    continue
                healthy &= ratio <= 1.0
                lines.append(f"  {backend:<8}{name:<10}M={m:<4}{'ok' if ratio <= 1.0 else 'FAILED'}  {ratio:.2f}")
    return lines, healthy


def _error_in_bounds(backend: str, dtype_name: str, m: int, device: torch.device) -> float:
    """The largest norm-wise error over 2 roundoffs of the formula on absolute values."""
    k, n, r = 96, 80, 8
    dtype = _DTYPES[dtype_name]
    generator = torch.Generator().manual_seed(0)
    shapes = ((m, k), (n, k), (k, r), (r,), (n, r), (n,), (m, n))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]

    def results(cast: torch.dtype, backend: str | None, absolute: bool = False) -> list[Tensor]:
        x, weight, u, sigma, v, bias, dy = (t.to(cast).abs() if absolute else t.to(cast) for t in tensors)
        leaves = [t.requires_grad_() for t in (x, u, sigma, v, bias)]
        if backend is None:
            y = torch.nn.functional.linear(x, weight, bias) + ((x @ u) * sigma) @ v.t()
        else:
            y = svd_linear(x, weight, u, sigma, v, bias, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    worst = 0.0
    truth, size = results(torch.float64, None), results(torch.float64, None, absolute=True)
    for got, exact, magnitude in zip(results(dtype, backend), truth, size, strict=True):
        bound = 2 * _ROUNDOFF[dtype_name] * float(magnitude.norm())
        error = float((got.double() - exact).norm())
        worst = max(worst, error / bound if math.isfinite(error) else math.inf)
    return worst
