"""The CUDA kernels on a GPU: float64 truth, repeatability, graphs, streams, and the emulator's opinion."""

from __future__ import annotations

import pytest
import torch
from operands import RNG, cast, check, fused, operands, present, run
from test_cuda import on_cuda
from torch import Tensor

from svdkern import svd_linear
from svdkern.backends import cuda as backend
from svdkern.backends.philox import keep_mask, keep_scale, threshold_of


def why_skipped() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return backend.why_not(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_skipped() is not None, reason=str(why_skipped()))]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    (512, 256, 384),
    (129, 100, 130),
    (300, 1024, 72),
    (16, 512, 512),
    (1, 4096, 512),
    (2000, 64, 64),
    (2048, 512, 2048),
]


def scaled(m: int, k: int, n: int, r: int, **options: object) -> dict[str, Tensor | None]:
    """Operands on the GPU whose products are of order one."""
    o = operands(m, k, n, r, **options)  # type: ignore[arg-type]
    for name in ("x", "weight"):
        o[name] = o[name] / k**0.5
    return on_cuda(o)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 16, 17, 64, 128, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], r: int, dtype: torch.dtype) -> None:
    m, k, n = shape
    wanted = ("x", "u", "sigma", "v", "bias", "scale")
    check(scaled(m, k, n, r), torch.randn(m, n).cuda(), "cuda", dtype, (torch.float32,) * 3, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [32, 200])
def test_a_core(r: int, dtype: torch.dtype) -> None:
    o = scaled(300, 128, 200, r, form="core")
    check(o, torch.randn(300, 200).cuda(), "cuda", dtype, (torch.float32,) * 3, ("x", "u", "v", "core"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: torch.dtype) -> None:
    rng_state, p = RNG.cuda(), 0.1
    mask = keep_mask(300, 256, rng_state, threshold_of(p)).double() * keep_scale(threshold_of(p))
    o, dy = scaled(300, 256, 384, 16), torch.randn(300, 384).cuda()
    options = {"mask": mask, "dropout_p": p, "rng_state": rng_state}
    check(o, dy, "cuda", dtype, (torch.float32,) * 3, ("x", "u", "sigma", "v"), **options)


@pytest.mark.parametrize("rows", [4, 300])
def test_the_emulator_says_the_same(rows: int) -> None:
    """The same operators on the CPU, their launches in the emulator."""
    emulated = pytest.importorskip("emulated_cuda")
    if emulated.why_not() is not None:
        pytest.skip(emulated.why_not())
    o = cast(scaled(rows, 128, 200, 16), torch.bfloat16, (torch.float32,) * 3)
    dy = torch.randn(rows, 200).cuda()
    wanted = ("x", "u", "sigma", "v")
    on_gpu = run(lambda leaves: fused(leaves, backend="cuda"), o, dy, wanted)
    here = {name: None if t is None else t.cpu() for name, t in o.items()}
    with emulated.cuda_emulation(processors=backend.processors(dy.device)):
        on_cpu = run(lambda leaves: fused(leaves, backend="cuda"), here, dy.cpu(), wanted)
    for name, a, b in zip(("y", *wanted), on_gpu, on_cpu, strict=True):
        assert (a.cpu().double() - b.double()).abs().max() <= 0.02 * b.double().abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [8, 1000])
def test_the_same_bits_every_time(rows: int, dtype: torch.dtype) -> None:
    o = cast(scaled(rows, 512, 384, 16), dtype, (torch.float32,) * 3)
    dy = torch.randn(rows, 384).cuda()
    first, *others = (run(lambda leaves: fused(leaves, backend="cuda"), o, dy, present(o)) for _ in range(5))
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("rows", [8, 1000])
def test_a_captured_graph_replays_with_other_inputs(rows: int) -> None:
    o = cast(scaled(rows, 512, 384, 16), torch.bfloat16, (torch.float32,) * 3)
    x, dy = o["x"].clone().requires_grad_(), torch.randn(rows, 384, device="cuda", dtype=torch.bfloat16)
    u = o["u"].clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = svd_linear(x, o["weight"], u, o["sigma"], o["v"], backend="cuda")
        return y, *torch.autograd.grad(y, (x, u), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(held, step(), strict=True))


def test_two_streams_at_once() -> None:
    o = cast(scaled(1000, 512, 384, 16), torch.bfloat16, (torch.float32,) * 3)
    xs = [torch.randn_like(o["x"]) for _ in range(2)]
    alone = [fused(o | {"x": x}, backend="cuda") for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(10):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(fused(o | {"x": x}, backend="cuda"))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
