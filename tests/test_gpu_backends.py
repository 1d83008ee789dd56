"""The GPU backends on a GPU: float64 truth, repeatability, graphs, streams, threads, and the emulator's opinion.

What Triton's alone has: test_triton_gpu.py.
"""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from operands import RNG, cast, check, fused, operands, present, run
from test_cuda import on_cuda
from torch import Tensor

from svdkern import svd_linear
from svdkern.backends import cuda as cuda_backend
from svdkern.backends import dispatch
from svdkern.backends.philox import keep_mask, keep_scale, threshold_of


def why_skipped(backend: str) -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return dispatch.why_not(backend, torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)


pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    if (reason := why_skipped(request.param)) is not None:
        pytest.skip(reason)
    return str(request.param)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    (512, 256, 384),
    (129, 100, 130),
    (300, 1024, 72),
    (16, 512, 512),
    (31, 512, 264),
    (1, 4096, 512),
    (2000, 64, 64),
    (2048, 512, 2048),
    (8000, 264, 640),
]


def scaled(m: int, k: int, n: int, r: int, **options: object) -> dict[str, Tensor | None]:
    """Operands on the GPU whose products are of order one."""
    o = operands(m, k, n, r, **options)  # type: ignore[arg-type]
    for name in ("x", "weight"):
        o[name] = o[name] / k**0.5
    return on_cuda(o)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 16, 17, 64, 128, 256, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], r: int, dtype: torch.dtype, backend: str) -> None:
    m, k, n = shape
    if backend == "triton" and r not in ((1, 16, 17, 64, 256) if dtype == torch.bfloat16 and m < 2048 else (16, 17)):
        pytest.skip("few dtypes and shapes for the other ranks: each is compiled anew")
    wanted = ("x", "u", "sigma", "v", "bias", "scale")
    check(scaled(m, k, n, r), torch.randn(m, n).cuda(), backend, dtype, (torch.float32,) * 3, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [32, 200])
def test_a_core(r: int, dtype: torch.dtype, backend: str) -> None:
    o = scaled(300, 128, 200, r, form="core")
    check(o, torch.randn(300, 200).cuda(), backend, dtype, (torch.float32,) * 3, ("x", "u", "v", "core"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: torch.dtype, backend: str) -> None:
    rng_state, p = RNG.cuda(), 0.1
    mask = keep_mask(300, 256, rng_state, threshold_of(p)).double() * keep_scale(threshold_of(p))
    o, dy = scaled(300, 256, 384, 16), torch.randn(300, 384).cuda()
    options = {"mask": mask, "dropout_p": p, "rng_state": rng_state}
    check(o, dy, backend, dtype, (torch.float32,) * 3, ("x", "u", "sigma", "v"), **options)


@pytest.mark.parametrize("kind", ["table", "top-k"])
def test_gates(kind: str, backend: str) -> None:
    o = cast(scaled(300, 128, 200, 16), torch.bfloat16, (torch.float32,) * 3)
    dy = torch.randn(300, 200, device="cuda", dtype=torch.bfloat16)
    if kind == "table":
        group = torch.randint(0, 3, (300,), device="cuda")
        value = torch.rand(3, 16, device="cuda")
        arguments = lambda gate: {"gate": gate, "group": group}  # noqa: E731
    else:
        index = torch.rand(300, 16, device="cuda").argsort(-1)[:, :4].contiguous()
        value = torch.rand(300, 4, device="cuda")
        arguments = lambda gate: {"gate": (index, gate)}  # noqa: E731
    names = ("x", "u", "sigma", "v", "gate")
    got, expected = (
        run(lambda leaves: fused(leaves, backend=name, **arguments(leaves["gate"])), o | {"gate": value}, dy, names)  # noqa: B023
        for name in (backend, "eager")
    )
    for name, a, b in zip(("y", *names), got, expected, strict=True):
        assert (a.double() - b.double()).abs().max() <= 0.03 * b.double().abs().max(), name


@pytest.mark.parametrize("rows", [4, 300])
def test_the_emulator_says_the_same(rows: int, backend: str) -> None:
    """The same launchers on the CPU, their launches in the emulator: Triton's compiled for this part."""
    o = cast(scaled(rows, 128, 200, 16), torch.bfloat16, (torch.float32,) * 3)
    dy = torch.randn(rows, 200).cuda()
    wanted = ("x", "u", "sigma", "v")
    emulation: contextlib.AbstractContextManager[object]
    if backend == "triton":
        major, minor = torch.cuda.get_device_capability()
        emulation = pytest.importorskip("emulated").emulation(arch=min(10 * major + minor, 90), ctas=8)
    else:
        emulated = pytest.importorskip("emulated_cuda")
        if emulated.why_not() is not None:
            pytest.skip(emulated.why_not())
        emulation = emulated.cuda_emulation(processors=cuda_backend.processors(dy.device))
    on_gpu = run(lambda leaves: fused(leaves, backend=backend), o, dy, wanted)
    here = {name: None if t is None else t.cpu() for name, t in o.items()}
    with emulation:
        on_cpu = run(lambda leaves: fused(leaves, backend=backend), here, dy.cpu(), wanted)
    for name, a, b in zip(("y", *wanted), on_gpu, on_cpu, strict=True):
        assert (a.cpu().double() - b.double()).abs().max() <= 0.02 * b.double().abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [8, 1000, 8192])
def test_the_same_bits_every_time(rows: int, dtype: torch.dtype, backend: str) -> None:
    o = cast(scaled(rows, 512, 384, 16), dtype, (torch.float32,) * 3)
    dy = torch.randn(rows, 384).cuda()
    first, *others = (run(lambda leaves: fused(leaves, backend=backend), o, dy, present(o)) for _ in range(5))
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("rows", [8, 1000, 8192])
def test_a_captured_graph_replays_with_other_inputs(rows: int, backend: str) -> None:
    o = cast(scaled(rows, 512, 384, 16), torch.bfloat16, (torch.float32,) * 3)
    x, dy = o["x"].clone().requires_grad_(), torch.randn(rows, 384, device="cuda", dtype=torch.bfloat16)
    u = o["u"].clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = svd_linear(x, o["weight"], u, o["sigma"], o["v"], backend=backend)
        return y, *torch.autograd.grad(y, (x, u), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) / 512**0.5)
        graph.replay()
        got = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.parametrize("rows", [8, 1000, 8192])
def test_two_streams_at_once(rows: int, backend: str) -> None:
    o = cast(scaled(rows, 512, 384, 16), torch.bfloat16, (torch.float32,) * 3)
    xs = [torch.randn_like(o["x"]) for _ in range(2)]
    alone = [fused(o | {"x": x}, backend=backend) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(10):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(fused(o | {"x": x}, backend=backend))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))


def test_threads(backend: str) -> None:
    o = cast(scaled(300, 256, 256, 16), torch.bfloat16, (torch.float32,) * 3)
    dy = torch.randn(300, 256).cuda()
    expected = run(lambda leaves: fused(leaves, backend=backend), o, dy, ("x", "u"))
    found: list[list[Tensor]] = []
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(run(lambda leaves: fused(leaves, backend=backend), o, dy, ("x", "u")))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 4
    assert all(torch.equal(a, b) for again in found for a, b in zip(expected, again, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    o = cast(scaled(300, 256, 256, 16), torch.bfloat16, (torch.float32,) * 3)
    other = {name: None if t is None else t.to("cuda:1") for name, t in o.items()}
    assert torch.equal(fused(other, backend=backend).cpu(), fused(o, backend=backend).cpu())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_layer_takes_the_cuda_kernels_unasked_on_hopper(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.delenv("SVDKERN_BACKEND", raising=False)
    dispatch.read_environment()
    o = cast(scaled(64, 512, 384, 16), dtype, (torch.float32,) * 3)
    unasked = dispatch.choose_path(o["x"], o["v"], None, 0)
    hopper = torch.cuda.get_device_capability() == (9, 0) and cuda_backend.why_not(o["x"].device, dtype) is None
    assert unasked.name == ("cuda" if hopper and dtype != torch.float32 else "eager")
    layer = (o["x"], o["weight"], o["u"], o["sigma"], o["v"])
    assert torch.equal(svd_linear(*layer), svd_linear(*layer, backend=unasked.name))
    monkeypatch.undo()
    dispatch.read_environment()
