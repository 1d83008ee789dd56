"""The function on a CUDA device: every dtype, mask and feature against float64, dropout bits, graph capture, streams."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import assert_accurate
from operands import cast, fused, operands, plain, present, run

from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def on_cuda(o):  # type: ignore[no-untyped-def]
    return {name: None if t is None else t.cuda() for name, t in o.items()}


def check(o, dy, dtype, factor, wanted, *, mask=None, **options):  # type: ignore[no-untyped-def]
    low = cast(o, dtype, (factor,) * 3)
    dy = dy.to(dtype)
    exact = {name: None if t is None else t.double() for name, t in low.items()}
    sizes = {name: None if t is None else t.abs() for name, t in exact.items()}
    got = run(lambda leaves: fused(leaves, **options), on_cuda(low), dy.cuda(), wanted)
    truth = run(lambda leaves: plain(leaves, mask), exact, dy, wanted)
    size = run(lambda leaves: plain(leaves, mask), sizes, dy.abs(), wanted)
    eager = run(lambda leaves: plain(leaves, None if mask is None else mask.cuda()), on_cuda(low), dy.cuda(), wanted)
    assert_accurate([t.cpu() for t in got], truth, size, [t.cpu() for t in eager], dtype, ("y", *wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["sigma", "core", "none"])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(1, 64, 48, 3), (129, 257, 96, 17), (300, 512, 640, 100), (0, 64, 48, 4)]
)
def test_values_and_all_gradients(dtype: torch.dtype, form: str, m: int, k: int, n: int, r: int) -> None:
    o = operands(m, k, n, r, form=form)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    check(o, torch.randn(m, n).double(), dtype, factor, present(o))


@pytest.mark.parametrize("form", ["sigma", "core"])
def test_every_gradient_mask(form: str) -> None:
    o = operands(33, 40, 24, 5, form=form)
    names = present(o)
    for size in range(1, len(names)):
        for wanted in itertools.combinations(names, size):
            check(o, torch.randn(33, 24).double(), torch.bfloat16, torch.float32, wanted)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_dropout_bits_are_the_cpus(dtype: torch.dtype) -> None:
    rng, t = torch.tensor([3, -4]), threshold_of(0.3)
    mask = keep_mask(70, 90, rng, t)
    assert torch.equal(keep_mask(70, 90, rng.cuda(), t).cpu(), mask)
    o = operands(70, 90, 40, 6)
    scaled = mask.double() * keep_scale(t)
    options = {"dropout_p": 0.3, "rng_state": rng.cuda()}
    check(o, torch.randn(70, 40).double(), dtype, torch.float32, ("x", "u", "sigma", "v"), mask=scaled, **options)


def test_the_same_bits_every_time() -> None:
    o = on_cuda(cast(operands(256, 512, 384, 16), torch.bfloat16, (torch.float32,) * 3))
    dy = torch.randn(256, 384).cuda()
    group = torch.randint(0, 3, (256,)).cuda()
    gate = torch.rand(3, 16).cuda()
    names = (*present(o), "gate")
    results = [
        run(lambda leaves: fused(leaves, gate=leaves["gate"], group=group), o | {"gate": gate}, dy, names)
        for _ in range(4)
    ]
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4}], ids=["plain", "dropout"])
def test_graph_capture_and_replay(options: dict[str, float]) -> None:
    """Forward, backward and optimizer step in one CUDA graph: y and the gradients of a replay with changed inputs are
    eager's at the parameters that the replay before it has left (NVlabs/cuHPX#11)."""
    names = ("x", "u", "sigma", "v", "bias")
    o = on_cuda(cast(operands(64, 128, 96, 8), torch.bfloat16, (torch.float32,) * 3))
    leaves = {name: t if t is None else t.clone().requires_grad_(name in names) for name, t in o.items()}
    dy, rng = torch.randn(64, 96, device="cuda", dtype=torch.bfloat16), torch.tensor([1, 2], device="cuda")

    def layer(leaves):  # type: ignore[no-untyped-def]
        return fused(leaves, rng_state=rng, **options)

    def step() -> list[torch.Tensor]:
        y = layer(leaves)
        gradients = torch.autograd.grad(y, [leaves[name] for name in names], dy)
        with torch.no_grad():
            for name, gradient in zip(names[1:], gradients[1:], strict=True):
                leaves[name].sub_(gradient, alpha=1e-4)
        return [y.detach(), *gradients]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    previous = None
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for static in (leaves["x"], dy):
                static.copy_(torch.randn_like(static))
            rng.copy_(torch.tensor([seed, -seed]))
        before = {name: t if t is None else t.detach().clone() for name, t in leaves.items()}
        graph.replay()
        replayed = [t.clone() for t in captured]
        for name, got, want in zip(("y", *names), replayed, run(layer, before, dy, names), strict=True):
            atol = 2e-2 * float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=2e-2, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
        for name in names[1:]:  # the step is in the graph, too
            assert not torch.equal(leaves[name], before[name]), name
        if previous is not None:
            assert not any(torch.equal(a, b) for a, b in zip(replayed, previous, strict=True))
        previous = replayed


def test_graph_replays_draw_new_masks() -> None:
    """The dropout stream is drawn in the graph; forward and backward of one replay have the same mask."""
    o = on_cuda(cast(operands(64, 128, 96, 8, bias=False), torch.float32, (torch.float32,) * 3))
    x, dy = o["x"].requires_grad_(), torch.randn(64, 96, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        y = fused(o, dropout_p=0.4)
        (dx,) = torch.autograd.grad(y, x, dy)
        return y.detach(), dx

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(y.clone())
        # y is linear in x for a given mask; TF32 is off by default
        torch.testing.assert_close((dx * x).sum(), (dy * y).sum(), rtol=1e-3, atol=float((dy * y).abs().sum()) * 1e-5)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_two_streams_at_once() -> None:
    o = on_cuda(cast(operands(512, 256, 256, 16), torch.float32, (torch.float32,) * 3))
    expected = fused(o)
    torch.cuda.synchronize()
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            results.append(fused(o))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_mixed_devices_are_refused() -> None:
    o = cast(operands(4, 8, 6, 3), torch.float32, (torch.float32,) * 3)
    with pytest.raises(ValueError, match=r"u is on cpu, expected x's device cuda:0"):
        fused(o | {"x": o["x"].cuda()})


def test_compile_fullgraph() -> None:
    o = on_cuda(cast(operands(64, 128, 96, 8), torch.bfloat16, (torch.float32,) * 3))
    names = ("x", "u", "sigma", "v")
    dy = torch.randn(64, 96).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(lambda leaves: fused(leaves), fullgraph=True)
    for got, want in zip(run(compiled, o, dy, names), run(fused, o, dy, names), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
