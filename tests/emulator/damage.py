"""The kernels of kernels/planted.py with inputs, run from PTX that may have been damaged by an edit of its text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ptx_emulator import TensorMap, run_ptx
from ptx_emulator.compile import Compiled, compile_kernel

BF16 = torch.bfloat16


def edited(
    text: str, pattern: str, replacement: str, *, after: str = "", before: str = "", nth: int = 0, every: bool = False
) -> str:
    """The text with one match of `pattern`, which must be there, replaced: the nth behind `after`, the nth back from `before`."""
    start = re.search(after, text).end() if after else 0  # type: ignore[union-attr]
    stop = re.search(before, text).start() if before else len(text)  # type: ignore[union-attr]
    found = [m for m in re.finditer(pattern, text) if start <= m.start() < stop]
    assert len(found) > nth, f"{pattern} is {len(found)} times in this part of the PTX"
    chosen = found if every else [found[-1 - nth if before else nth]]
    for match in reversed(chosen):
        text = text[: match.start()] + match.expand(replacement) + text[match.end() :]
    return text


@dataclass(frozen=True)
class Case:
    """A kernel with its inputs. `run(compiled, ptx, **options)` gives the outputs; `truth` what they should be near."""

    compile: Callable[[int, str | None], Compiled]
    run: Callable[..., torch.Tensor]
    truth: Callable[[], torch.Tensor]


def _random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) / 4).to(BF16)


def _nan(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _compile(name: str, types: Sequence[str], divisible: str, **constants) -> Callable[..., Compiled]:  # type: ignore[no-untyped-def]
    """types: of the parameters, in order, as "*bf16 x w". Tiles are small where none are given; wgmma needs 64 rows, four warps."""

    def compile_(arch: int, version: str | None) -> Compiled:
        fixed = ({"BM": 64 if arch >= 90 else 32, "BN": 32, "BK": 32} if "BM" not in constants else {}) | constants
        signature = {n: kind for kind, *names in map(str.split, types) for n in names} | dict.fromkeys(
            fixed, "constexpr"
        )
        options = {"num_warps": 4 if arch >= 90 or "BM" in constants else 2, "num_stages": 3}
        return compile_kernel(
            "emulator.kernels.planted", name, signature, fixed, set(divisible.split()), arch, version, **options
        )

    return compile_


def _launch(compiled: Compiled, ptx: str, grid: tuple[int, ...], arguments: list, **options) -> None:  # type: ignore[no-untyped-def]
    options = {"budget": 30_000} | options
    run_ptx(ptx, grid, 32 * compiled.num_warps, arguments, shared=compiled.shared, **options)


def _grid(compiled: Compiled) -> tuple[int, int]:
    """Tiles of 32 columns, of 32 or 64 rows."""
    return -(-M // (16 * compiled.num_warps)), -(-N // 32)


# ------------------------------------------------------------------------------------------------ y = x w^T, pipelined

M, N, K = 80, 40, 144  # five steps of k, the last of half a tile
X, W = _random(M, K, seed=1), _random(N, K, seed=2)


def _run_product(compiled: Compiled, ptx: str, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
    y = _nan(M, 48)[:, :N]
    _launch(compiled, ptx, _grid(compiled), [X, W, y, M, N, K, K, K, 48], read_only=[X, W], **options)
    return y.contiguous()


PRODUCT = Case(
    _compile("product", ["*bf16 x w y", "i32 M N K sxm swn sym"], "x w y K sxm swn sym"),
    _run_product,
    lambda: X.double() @ W.double().T,
)

# ----------------------------------------------------------------------------- z = x u^T, y = x w^T + z f^T, one launch

U, F = _random(16, K, seed=3), _random(N, 16, seed=4)
XS = [_random(M, K, seed=5), _random(M, K, seed=6)]


def _compile_forward(tickets: bool) -> Callable[..., Compiled]:
    types = ["*bf16 x w u f z", "*i32 control", "*bf16 y", "i32 M N K sxm swn sun sfn sym COLUMN_TILES TILES"]
    divisible = "x w u f z control y K sxm swn sun sfn sym"
    return _compile("forward", types, divisible, BR=16, TICKETS=tickets)


def _run_forward(compiled: Compiled, ptx: str, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Two launches of three CTAs on one workspace, as two replays of a graph are, with other values of x."""
    rows, columns = _grid(compiled)
    control, z, outputs = torch.zeros(3 + rows, dtype=torch.int32), _nan(M, 16), []
    for x in XS:
        y = _nan(M, 48)
        arguments = [x, W, U, F, z, control, y, M, N, K, K, K, K, 16, 48, columns, rows * (columns + 1)]
        _launch(compiled, ptx, (3,), arguments, read_only=[x, W, U, F], **options)
        outputs.append(y[:, :N])
    return torch.cat(outputs)


def _true_forward() -> torch.Tensor:
    shrunk = [(x.double() @ U.double().T).to(BF16).double() for x in XS]
    return torch.cat([x.double() @ W.double().T + z @ F.double().T for x, z in zip(XS, shrunk, strict=True)])


FORWARD = Case(_compile_forward(True), _run_forward, _true_forward)
DEALT = Case(_compile_forward(False), _run_forward, _true_forward)

# ---------------------------------------------------------------------------------------------- c = a b^T, tensor copies

A, B = _random(M, 288, seed=7), _random(64, 288, seed=8)  # five steps of k: every stage is filled again


def _run_copied(compiled: Compiled, ptx: str, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
    c = _nan(M, 64)
    arguments: list = []
    for tensor, about in zip((A, B, c), compiled.tensor_maps, strict=True):
        sizes, strides = tuple(reversed(tensor.shape)), (2 * tensor.stride(0),)
        arguments.append(TensorMap(tensor.data_ptr(), 2, sizes, strides, (64, 64), about["swizzle"]))
        arguments += [*tensor.shape, *tensor.stride()]
    _launch(compiled, ptx, (2, 1), [*arguments, 288], **options)
    return c


COPIED = Case(
    _compile("copied", ["tensordesc<bf16[64,64]> a b c", "i32 K"], "K", BM=64, BN=64, BK=64),
    _run_copied,
    lambda: A.double() @ B.double().T,
)

# --------------------------------------------------------------------------------------------------------- sums of rows

ROWS = _random(8, 500, seed=9).float()


def _run_sums(compiled: Compiled, ptx: str, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
    y = _nan(8, dtype=torch.float32)
    _launch(compiled, ptx, (1,), [ROWS, y, 500], read_only=[ROWS], **options)
    return y


SUMS = Case(_compile("sums", ["*fp32 x y", "i32 K"], "x y", BM=8, BK=512), _run_sums, lambda: ROWS.double().sum(1))
