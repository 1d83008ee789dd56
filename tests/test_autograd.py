"""svd_linear inside PyTorch's machinery: saved tensors, autocast, checkpointing, torch.func, operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from svdkern import ops, svd_linear
from svdkern.autograd import OperatorFunction
from svdkern.backends import dispatch


def layer(m: int = 20, k: int = 24, n: int = 32, r: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (m, k), "weight": (n, k), "u": (k, r), "sigma": (r,), "v": (n, r), "bias": (n,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def call(t: dict[str, Tensor], **options: object) -> Tensor:
    return svd_linear(t["x"], t["weight"], t["u"], t["sigma"], t["v"], t["bias"], **options)


def trainable(t: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    for name in names:
        t[name].requires_grad_()
    return t


def saved_by(run: Callable[[], object], known: dict[str, Tensor]) -> tuple[list[str], list[tuple[torch.dtype, tuple]]]:
    """What a forward saves: the names of inputs, and dtype and shape of whatever else has a dimension."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (saved.append(s), s)[1], lambda s: s):
        run()
    names = {tensor.untyped_storage().data_ptr(): name for name, tensor in known.items()}
    found = [(names.get(s.untyped_storage().data_ptr()), s) for s in saved]
    return sorted(n for n, _ in found if n), [(s.dtype, tuple(s.shape)) for n, s in found if n is None and s.dim()]


@pytest.mark.parametrize("by_operator", [False, True])
@pytest.mark.parametrize("m", [4, 64])
@pytest.mark.parametrize(
    ("names", "inputs", "saves_h"),
    [
        (("x", "u", "sigma", "v"), ["weight", "x"], True),
        (("u", "sigma", "v"), ["x"], True),
        (("x", "sigma"), ["weight"], True),
        (("sigma",), [], True),
        (("v", "bias"), [], True),
        (("x",), ["weight"], False),
        (("u",), ["x"], False),
        (("bias",), [], False),
        (("weight",), ["weight", "x"], False),
    ],
)
def test_saved_tensors(
    backend: str, m: int, by_operator: bool, names: tuple[str, ...], inputs: list[str], saves_h: bool
) -> None:
    """By reference, once, what the mask needs, and h (M, r): nothing of (M, N) or (K, N); sigma alone saves no x
    (huggingface/peft#2196)."""
    t = trainable(layer(m), *names)
    none = (None,) * 2
    operands = (*(t[name] for name in ("x", "weight", "u", "sigma", "v", "bias")), torch.tensor(1.0), *none)
    run = lambda: OperatorFunction.apply(backend, *none, 0, *operands) if by_operator else call(t, backend=backend)  # noqa: E731
    found, fresh = saved_by(run, t)
    assert found == sorted([*inputs, "u", "sigma", "v"])
    assert fresh == ([(torch.float32, (m, 4))] if saves_h else [])


def test_nothing_is_saved_without_gradients(backend: str) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: (saved.append(s), s)[1], lambda s: s):
        y = call(layer(), backend=backend)
        with torch.no_grad():
            call(trainable(layer(), "x", "u"), backend=backend)
    assert not saved and not y.requires_grad


@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("x_too", [True, False])
def test_saved_tensors_under_autocast(backend: str, m: int, x_too: bool) -> None:
    """A float32 weight's copy is kept as PyTorch's own linear keeps it: one, and only where x needs a gradient."""
    t = trainable(layer(m), "u", "v", *(["x"] if x_too else []))
    low = torch.bfloat16
    with torch.autocast("cpu", low):
        found, fresh = saved_by(lambda: call(t, backend=backend), t)
        own, theirs = saved_by(lambda: torch.nn.functional.linear(t["x"], t["weight"]), t)
    assert found == ["sigma", "u", "v"]
    shapes = [s for dtype, s in fresh if dtype == low and s != (m, 4)]
    assert shapes == [(m, 24), *([(32, 24)] if x_too else [])]
    assert not own and [s for _, s in theirs if s in ((32, 24), (24, 32))] == ([(24, 32)] if x_too else [])
    wide = t | {"x": t["x"].detach().to(low).requires_grad_(x_too)}
    found, fresh = saved_by(lambda: call(wide, backend=backend), wide)  # a float32 weight without autocast
    assert found == sorted(["sigma", "u", "v", "x", *(["weight"] if x_too else [])])
    assert [s for _, s in fresh] == [(m, 4)]


@pytest.mark.parametrize("m", [4, 40])
def test_inputs_and_saved_tensors_are_never_written(backend: str, m: int) -> None:
    """Another user of the activation sees it unchanged; a second backward gives the same (axolotl-ai-cloud/axolotl#3800)."""
    t = trainable(layer(m), "x", "u", "sigma", "v", "bias")
    other = layer(m)
    a = t["x"] * 1
    upstream: list[tuple[Tensor, Tensor, int]] = []
    y = call(t | {"x": a}, backend=backend) + call(other | {"x": a}, backend=backend)
    y.register_hook(lambda g: upstream.append((g, g.clone(), g._version)))
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in (t | {"a": a}).items()}
    loss = y.sum() + (a**2).sum()
    names = ("x", "u", "sigma", "v", "bias")
    first = torch.autograd.grad(loss, [t[name] for name in names], retain_graph=True)
    second = torch.autograd.grad(loss, [t[name] for name in names])
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    for name, (value, version) in before.items():
        tensor = a if name == "a" else t[name]
        assert torch.equal(tensor, value) and tensor._version == version, name
    assert all(torch.equal(g, copy) and g._version == version for g, copy, version in upstream)


def test_second_derivative_is_a_clear_error(backend: str) -> None:
    t = trainable(layer(), "x", "u")
    dtype = torch.float64 if backend == "eager" else torch.float32
    t = {name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad) for name, tensor in t.items()}
    (dx,) = torch.autograd.grad(call(t, backend=backend).sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="svd_linear is differentiable once"):
        dx.sum().backward()


@pytest.mark.parametrize("m", [4, 40])
def test_autocast(backend: str, m: int) -> None:
    """x, weight and bias take autocast's dtype, factors keep theirs, nothing sticks (unslothai/unsloth#5766)."""
    t = trainable(layer(m), "u", "sigma", "v", "x")
    before = call(t, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(t, backend=backend)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    low = {n: s.detach().bfloat16() if n in ("x", "weight", "bias") else s.detach() for n, s in t.items()}
    assert torch.equal(y, call(low, backend=backend))
    assert all(t[name].grad.dtype == torch.float32 for name in ("x", "u", "sigma", "v"))
    assert torch.equal(call(t, backend=backend), before)
    with torch.no_grad():
        t["u"].mul_(2.0)
        t["v"].data.copy_(torch.randn_like(t["v"]))
    with torch.autocast("cpu", torch.bfloat16):
        again = call(t, backend=backend)
    fresh = {name: tensor.detach().clone() for name, tensor in t.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(again, call(fresh, backend=backend))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(backend: str, reentrant: bool) -> None:
    """The recomputed forward draws the same dropout mask."""
    t = trainable(layer(), "x", "u", "v")
    gradients = []
    for run in (lambda x: call(t | {"x": x}, backend=backend, dropout_p=0.5),) * 2:
        torch.manual_seed(3)
        y = checkpoint(run, t["x"], use_reentrant=reentrant) if gradients else run(t["x"])
        y.sum().backward()
        gradients.append([t[name].grad for name in ("x", "u", "v")])
        for name in ("x", "u", "v"):
            t[name].grad = None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_func_transforms() -> None:
    t = {name: tensor.double() for name, tensor in layer(6).items()}

    def loss(x: Tensor, u: Tensor) -> Tensor:
        return call(t | {"x": x, "u": u}).pow(2).sum()

    x, u = t["x"].clone().requires_grad_(), t["u"].clone().requires_grad_()
    expected = torch.autograd.grad(loss(x, u), (x, u))
    for got, want in zip(torch.func.grad(loss, (0, 1))(t["x"], t["u"]), expected, strict=True):
        torch.testing.assert_close(got, want)
    per_sample = torch.func.vmap(torch.func.grad(loss, 1), (0, None))(t["x"], t["u"])
    torch.testing.assert_close(per_sample.sum(0), expected[1])
    stacked = torch.func.vmap(lambda u: call(t | {"u": u}))(torch.stack((t["u"], 2 * t["u"])))
    torch.testing.assert_close(stacked[1], call(t | {"u": 2 * t["u"]}))


def test_second_derivative_under_func_is_a_clear_error() -> None:
    """A raw operator's derivative would be zero, with a warning at most."""
    t = layer(6)
    loss = lambda x: call(t | {"x": x}).pow(2).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="svd_linear is differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(t["x"])


@pytest.mark.parametrize("m", [4, 40])
def test_forward_mode_keeps_the_tangent(m: int) -> None:
    t = layer(m)
    tangent = torch.randn_like(t["x"])
    with torch.autograd.forward_ad.dual_level():
        y = call(t | {"x": torch.autograd.forward_ad.make_dual(t["x"], tangent)})
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert got is not None
    torch.testing.assert_close(got, call(t | {"x": tangent}) - t["bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [4, 40])
def test_batched_upstream_gradients(backend: str, m: int) -> None:
    t = trainable(layer(m), "x", "u")
    y = call(t, backend=backend)
    upstream = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, (t["x"], t["u"]), upstream, is_grads_batched=True, retain_graph=True)
    for example in range(3):
        single = torch.autograd.grad(y, (t["x"], t["u"]), upstream[example], retain_graph=True)
        for a, b in zip(batched, single, strict=True):
            torch.testing.assert_close(a[example], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [4, 40])
def test_fake_tensors_and_default_devices(backend: str, m: int) -> None:
    """Memory estimators run layers on fake tensors; a default device does not move what belongs to the host."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        t = trainable(layer(m), "x", "u", "sigma", "v")
        y = call(t, backend=backend, dropout_p=0.5)
        y.sum().backward()
        assert y.shape == (m, 32) and t["u"].grad.shape == t["u"].shape
    real = layer(m)
    expected = call(real, backend=backend, scale=0.5)
    with torch.device("meta"):
        assert torch.equal(call(real, backend=backend, scale=0.5), expected)


@pytest.mark.parametrize("form", ["sigma", "core", "gate", "group", "none"])
def test_opcheck(form: str) -> None:
    """Schema, fake kernels and tracing of both operators, for inputs that do not require grad."""
    m, k, n, r = 5, 8, 6, 3
    x, weight, u, v, bias, dy = (torch.randn(s) for s in ((m, k), (n, k), (k, r), (n, r), (n,), (m, n)))
    sigma = torch.randn(r) if form == "sigma" else None
    core = torch.randn(r, r) if form == "core" else None
    gate = torch.rand(2, r) if form == "group" else torch.rand(m, 2) if form == "gate" else None
    index = torch.randint(0, 2, (m,)) if form == "group" else torch.tensor([[0, 2]] * m) if form == "gate" else None
    scale, rng = torch.tensor(0.5), torch.tensor([1, 2])
    threshold = 20000 if form == "none" else 0
    forward = (x, weight, u, sigma, v, bias, scale, core, gate, index, rng, threshold, "")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.svd_linear_forward, forward, test_utils=tests)
    _, h = ops.svd_linear_forward(*forward)
    want = [True, True, True, sigma is not None, True, True, True, core is not None, gate is not None]
    backward = (dy, x, weight, u, sigma, v, scale, core, gate, index, h, rng, threshold, "", want)
    torch.library.opcheck(ops.svd_linear_backward, backward, test_utils=tests)


# ---- dispatch ------------------------------------------------------------------------------------------------------


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 3)
    try:
        monkeypatch.setenv("SVDKERN_BACKEND", "eager")
        dispatch.read_environment()
        assert dispatch.choose(x, None).name == "eager"
        monkeypatch.setenv("SVDKERN_BACKEND", "cpuu")
        with pytest.raises(
            ValueError, match=r"SVDKERN_BACKEND is 'cpuu', expected one of eager, cpu, triton, cuda; did you mean 'cpu'"
        ):
            dispatch.read_environment()
        monkeypatch.delenv("SVDKERN_BACKEND")
        monkeypatch.setenv("SVDKERN_STRICT", "1")
        dispatch.read_environment()
        with pytest.raises(RuntimeError, match=r"SVDKERN_STRICT=1 and backend 'cpu' cannot be used"):
            dispatch.choose(x.double(), "cpu")
        assert dispatch.choose(x.double(), None).name == "eager"
    finally:
        monkeypatch.undo()
        dispatch.read_environment()


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.read_environment()
    with caplog.at_level("WARNING", logger="svdkern"):
        for _ in range(3):
            assert dispatch.choose(torch.randn(2, 2, dtype=torch.float64), "cpu").name == "eager"
    assert len(caplog.records) == 1
    assert "falling back to the eager backend" in caplog.text
