"""The Triton kernels on a GPU: float64 truth, repeatability, graphs, streams, threads, memory, and the emulator's opinion."""

from __future__ import annotations

import threading

import pytest
import torch
from operands import RNG, cast, check, fused, operands, present, run
from test_cuda import on_cuda
from torch import Tensor

from svdkern import svd_linear
from svdkern.backends import dispatch, triton_gram
from svdkern.backends import triton as backend
from svdkern.backends.philox import keep_mask, keep_scale, threshold_of
from svdkern.linalg import orth_penalty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(backend.why_missing() is not None, reason="needs triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(512, 256, 384), (129, 100, 130), (300, 1024, 72), (16, 512, 512), (1, 4096, 512), (2000, 64, 64)]


def scaled(m: int, k: int, n: int, r: int, **options: object) -> dict[str, Tensor | None]:
    """Operands on the GPU whose products are of order one."""
    o = operands(m, k, n, r, **options)  # type: ignore[arg-type]
    for name in ("x", "weight"):
        o[name] = o[name] / k**0.5
    return on_cuda(o)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 16, 17, 64, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int], r: int, dtype: torch.dtype) -> None:
    m, k, n = shape
    if dtype != torch.bfloat16 and r not in (16, 17):
        pytest.skip("one dtype for the other ranks: each is compiled anew")
    wanted = ("x", "u", "sigma", "v", "bias", "scale")
    check(scaled(m, k, n, r), torch.randn(m, n).cuda(), "triton", dtype, (torch.float32,) * 3, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [("x",), ("u",), ("v",), ("core",), ("u", "v", "core", "x")])
def test_a_core_and_masks(wanted: tuple[str, ...], dtype: torch.dtype) -> None:
    o = scaled(300, 128, 200, 32, form="core")
    check(o, torch.randn(300, 200).cuda(), "triton", dtype, (torch.float32,) * 3, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dropout(dtype: torch.dtype) -> None:
    rng_state, p = RNG.cuda(), 0.1
    mask = keep_mask(300, 256, rng_state, threshold_of(p)).double() * keep_scale(threshold_of(p))
    o, dy = scaled(300, 256, 384, 16), torch.randn(300, 384).cuda()
    options = {"mask": mask, "dropout_p": p, "rng_state": rng_state}
    check(o, dy, "triton", dtype, (torch.float32,) * 3, ("x", "u", "sigma", "v"), **options)


@pytest.mark.parametrize("kind", ["table", "top-k"])
def test_gates(kind: str) -> None:
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
        for name in ("triton", "eager")
    )
    for name, a, b in zip(("y", *names), got, expected, strict=True):
        assert (a.double() - b.double()).abs().max() <= 0.03 * b.double().abs().max(), name


@pytest.mark.parametrize("rows", [4, 300])
def test_the_emulator_says_the_same(rows: int) -> None:
    """The same launchers on the CPU, in the emulator, compiled for this part."""
    emulated = pytest.importorskip("emulated")
    major, minor = torch.cuda.get_device_capability()
    o = cast(scaled(rows, 128, 200, 16), torch.bfloat16, (torch.float32,) * 3)
    dy = torch.randn(rows, 200).cuda()
    wanted = ("x", "u", "sigma", "v")
    on_gpu = run(lambda leaves: fused(leaves, backend="triton"), o, dy, wanted)
    here = {name: None if t is None else t.cpu() for name, t in o.items()}
    with emulated.emulation(arch=min(10 * major + minor, 90), ctas=8):
        on_cpu = run(lambda leaves: fused(leaves, backend="triton"), here, dy.cpu(), wanted)
    for name, a, b in zip(("y", *wanted), on_gpu, on_cpu, strict=True):
        assert (a.cpu().double() - b.double()).abs().max() <= 0.02 * b.double().abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [8, 1000])
def test_the_same_bits_every_time(rows: int, dtype: torch.dtype) -> None:
    o = cast(scaled(rows, 512, 384, 16), dtype, (torch.float32,) * 3)
    dy = torch.randn(rows, 384).cuda()
    first, *others = (run(lambda leaves: fused(leaves, backend="triton"), o, dy, present(o)) for _ in range(5))
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("rows", [8, 1000])
def test_a_captured_graph_replays_with_other_inputs(rows: int) -> None:
    o = cast(scaled(rows, 512, 384, 16), torch.bfloat16, (torch.float32,) * 3)
    x, dy = o["x"].clone().requires_grad_(), torch.randn(rows, 384, device="cuda", dtype=torch.bfloat16)
    u = o["u"].clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = svd_linear(x, o["weight"], u, o["sigma"], o["v"], backend="triton")
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


def test_two_streams_at_once() -> None:
    o = cast(scaled(4000, 1024, 1024, 16), torch.bfloat16, (torch.float32,) * 3)
    expected = fused(o, backend="triton")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[list[Tensor]] = [[], []]
    for _ in range(10):
        for stream, found in zip(streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(fused(o, backend="triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for found in results for y in found)


def test_threads() -> None:
    o = cast(scaled(300, 256, 256, 16), torch.bfloat16, (torch.float32,) * 3)
    dy = torch.randn(300, 256).cuda()
    expected = run(lambda leaves: fused(leaves, backend="triton"), o, dy, ("x", "u"))
    found: list[list[Tensor]] = []
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(run(lambda leaves: fused(leaves, backend="triton"), o, dy, ("x", "u")))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 4
    assert all(torch.equal(a, b) for again in found for a, b in zip(expected, again, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    o = cast(scaled(300, 256, 256, 16), torch.bfloat16, (torch.float32,) * 3)
    other = {name: None if t is None else t.to("cuda:1") for name, t in o.items()}
    assert torch.equal(fused(other, backend="triton").cpu(), fused(o, backend="triton").cpu())


def test_compile_takes_it_whole() -> None:
    o = cast(scaled(300, 256, 256, 16), torch.bfloat16, (torch.float32,) * 3)
    rest = (o["weight"], o["u"], o["sigma"], o["v"], o["bias"])

    def layer(x: Tensor) -> Tensor:
        return svd_linear(x, *rest, scale=o["scale"], backend="triton")

    dy = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    for mode in (None, "reduce-overhead"):
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for _ in range(3):  # the first calls record what later ones replay
            x = torch.randn_like(o["x"]).requires_grad_()
            y = compiled(x)
            assert torch.equal(y, layer(x))
            (dx,) = torch.autograd.grad(y, x, dy)
            assert torch.equal(dx, torch.autograd.grad(layer(x), x, dy)[0])


def test_memory_is_that_of_the_results() -> None:
    """Nothing of the size (M, N), (M, K) or (K, N) but y and dx."""
    m, k, n, r = 4096, 2048, 2048, 16
    o = cast(scaled(m, k, n, r), torch.bfloat16, (torch.float32,) * 3)
    leaves = {
        name: t.clone().requires_grad_(name in ("x", "u", "v"))
        for name, t in o.items()
        if t is not None and name != "core"
    }
    dy = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        y = svd_linear(leaves["x"], leaves["weight"], leaves["u"], leaves["sigma"], leaves["v"], backend="triton")
        torch.autograd.grad(y, (leaves["x"], leaves["u"], leaves["v"]), dy)

    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what is kept for large blocks may be larger than what is asked for
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    results = 2 * (m * n + m * k) + 4 * r * (k + n)
    between = 4 * m * r + 2 * 2 * m * r + 4 * r * (k + n) + 2 * 2 * r * (k + n)
    assert peak <= results + between + (4 << 20), f"{peak} bytes, results {results}, between {between}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "r"), [(1, 1), (31, 17), (1000, 16), (4096, 64), (5000, 100), (4096, 512)])
@pytest.mark.parametrize("layout", ["rows", "columns", "part of wider rows"])
def test_the_gram_matrix(layout: str, rows: int, r: int, dtype: torch.dtype) -> None:
    """Symmetric, the same bits every time, and right: to the rounding of sums that tensor cores may truncate at every step."""
    factor = (torch.randn(rows, r + 3, device="cuda") / rows**0.5).to(dtype)[:, 1 : r + 1]
    if layout == "columns":
        factor = factor.t().contiguous().t()
    elif layout == "rows":
        factor = factor.contiguous()
    first, *others = (triton_gram.gram(factor) for _ in range(5))
    assert all(torch.equal(first, again) for again in others)
    assert torch.equal(first, first.t())
    exact, size = factor.double().t() @ factor.double(), factor.double().abs().t() @ factor.double().abs()
    assert first.dtype == torch.float32
    assert ((first.double() - exact).abs() <= 2**-17 * size + 1e-30).all()


def test_the_penalty_takes_the_kernel_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = torch.linalg.qr(torch.randn(1000, 16, device="cuda"))[0] * 1.1
    leaves = [factor.clone().requires_grad_() for _ in range(2)]
    expected = orth_penalty(leaves[0])
    expected.backward()
    calls = []
    kernel = triton_gram.gram
    monkeypatch.setattr(triton_gram, "gram", lambda factor: calls.append(1) or kernel(factor))
    monkeypatch.setenv("SVDKERN_BACKEND", "triton")
    dispatch.read_environment()
    try:
        got = orth_penalty(leaves[1])
    finally:
        monkeypatch.undo()
        dispatch.read_environment()
    got.backward()
    assert calls == [1]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-3, atol=1e-5)
