"""torch.compile(fullgraph=True): every feature is one graph with eager's numbers, and few graphs serve many layers.

``aot_eager`` runs what the compiler traced without generating code, so its results are eager's to the bit; Inductor is
used only where it does something of its own (random numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from test_autograd import call, layer, trainable
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from svdkern import adapt, svd_linear

NAMES = ("x", "u", "sigma", "v", "bias")
Operands = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(function: Callable[[Operands], Tensor], t: Operands, names: tuple[str, ...]) -> list[Tensor]:
    """y and the gradients of ``names``, with the generator set."""
    torch.manual_seed(3)
    y = function(t)
    return [y.detach(), *torch.autograd.grad(y.float().pow(2).sum(), [t[name] for name in names])]


def assert_as_eager(function: Callable[[Operands], Tensor], t: Operands, names: tuple[str, ...] = NAMES) -> None:
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, t, names), results(function, t, names), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("m", [4, 40])
def test_half_precision_with_float32_factors(backend: str, m: int) -> None:
    t = trainable(layer(m, dtype=torch.bfloat16), "x", "bias")
    t |= {name: t[name].detach().float().requires_grad_() for name in ("u", "sigma", "v")}
    assert_as_eager(lambda s: call(s, backend=backend, scale=torch.tensor(0.5)), t)


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(backend: str, m: int, inside: bool) -> None:
    """Autocast entered in the compiled function, or around it: bfloat16 out, gradients in the operands' own dtype."""

    def within(s: Operands) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(s, backend=backend)

    t = trainable(layer(m), *NAMES)
    if inside:
        assert_as_eager(within, t)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert_as_eager(lambda s: call(s, backend=backend), t)
    assert results(torch.compile(within, backend="aot_eager"), t, NAMES)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout(backend: str, m: int, p: float) -> None:
    """The generator's state gives the mask that it gives in eager mode; so does an explicit one."""
    t = trainable(layer(m), *NAMES)
    assert_as_eager(lambda s: call(s, backend=backend, dropout_p=p), t)
    assert_as_eager(lambda s: call(s, backend=backend, dropout_p=p, rng_state=torch.tensor([5, -6])), t)


def test_dropout_in_inductor() -> None:
    """It has a generator of its own: another mask at every call, and the backward has the forward's."""
    t = trainable(layer(40), "x", "u")
    del t["bias"]  # then y is linear in x for a given mask, and <y, dy> = <x, dx>

    def dropped(s: Operands) -> Tensor:
        return svd_linear(s["x"], s["weight"], s["u"], s["sigma"], s["v"], dropout_p=0.4)

    compiled, seen = torch.compile(dropped, fullgraph=True), []
    for _ in range(2):
        y = compiled(t)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, t["x"], dy)
        torch.testing.assert_close((dx * t["x"]).sum(), (dy * y).sum(), rtol=1e-4, atol=1e-2)
        seen.append(y.detach())
    assert not torch.equal(*seen)


@pytest.mark.parametrize("m", [4, 40])
def test_dropout_under_activation_checkpointing(m: int) -> None:
    t = trainable(layer(m), *NAMES)

    def layer_of(s: Operands) -> Callable[[Tensor], Tensor]:
        return lambda x: call(s | {"x": x}, dropout_p=0.4).relu()

    compiled = torch.compile(
        lambda s: checkpoint(layer_of(s), s["x"], use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    eager = results(lambda s: layer_of(s)(s["x"]), t, NAMES)
    assert all(torch.equal(a, b) for a, b in zip(results(compiled, t, NAMES), eager, strict=True))


@pytest.mark.parametrize("m", [4, 40])
def test_core(backend: str, m: int) -> None:
    t = trainable(layer(m) | {"core": torch.randn(4, 4)}, "x", "u", "core", "v")
    assert_as_eager(
        lambda s: svd_linear(s["x"], s["weight"], s["u"], None, s["v"], core=s["core"], backend=backend),
        t, ("x", "u", "core", "v"),
    )  # fmt: skip


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("kind", ["table", "shared", "top-k"])
def test_gates(backend: str, m: int, kind: str) -> None:
    shape = {"table": (3, 4), "shared": (1, 4), "top-k": (m, 2)}[kind]
    t = trainable(layer(m) | {"gate": torch.rand(shape)}, *NAMES, "gate")
    group, index = torch.randint(0, 3, (m,)), torch.rand(m, 4).argsort(-1)[:, :2]

    def gated(s: Operands) -> Tensor:
        gate = (index, s["gate"]) if kind == "top-k" else s["gate"]
        return call(s, backend=backend, gate=gate, group=group if kind == "table" else None)

    assert_as_eager(gated, t, (*NAMES, "gate"))


# ---- how many graphs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (5,)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}], ids=["plain", "dropout"])
def test_a_dynamic_batch_is_one_graph(lead: tuple[int, ...], options: dict[str, float]) -> None:
    """Also across the number of rows at which the cpu backend changes over from one way to the other."""
    counter = CompileCounterWithBackend("aot_eager")
    t = trainable(layer(), *NAMES)
    function = lambda s: call(s, **options)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for m in (4, 40, 7, 16, 17):
        t["x"] = torch.randn(m, *lead, 24, requires_grad=True)
        torch._dynamo.mark_dynamic(t["x"], 0)
        for got, want in zip(results(compiled, t, NAMES), results(function, t, NAMES), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1


def test_a_second_batch_size_is_a_second_graph_and_the_last() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    t = trainable(layer(), *NAMES)
    compiled = torch.compile(lambda s: call(s), fullgraph=True, backend=counter)
    for m in (8, 12, 40, 7, 100):
        t["x"] = torch.randn(m, 24, requires_grad=True)
        results(compiled, t, NAMES)
    assert counter.frame_count == 2


def test_a_scale_is_no_constant() -> None:
    """Forty layers with forty scales are a compile or two, and a changed scale takes effect (Comfy-Org/ComfyUI#9289)."""
    t = layer()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda s, scale: call(s, scale=scale), fullgraph=True, backend=counter)
    for step in range(40):
        scale = torch.tensor(1.0 + step)
        torch.testing.assert_close(compiled(t, scale), call(t, scale=scale))
    assert counter.frame_count <= 2


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.layers:
            x = module(x)
        return x


@pytest.mark.parametrize("each", [False, True], ids=["the model", "each layer"])
def test_layers_of_a_model_share_graphs(each: bool) -> None:
    """Layers that are compiled one by one need two graphs: the first one's x needs no gradient."""
    model = Stack()
    adapt(model, "sorsa", rank=4, alpha=8.0)
    x, counter = torch.randn(12, 24), CompileCounterWithBackend("aot_eager")
    expected = model(x)
    for module in model.layers if each else (model,):
        module.compile(fullgraph=True, backend=counter)
    assert torch.equal(model(x), expected)
    graphs = counter.frame_count
    assert graphs == (2 if each else 1)
    for position, module in enumerate(model.layers):
        module.scale = 0.1 * position
    y = model(x)
    y.sum().backward()
    assert counter.frame_count == graphs and not torch.equal(y, expected)
