"""linear, Linear and frozen_linears: the kernels for layers without an adapter."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from tiny_llama import tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F

import svdkern
from svdkern.backends import dispatch, extension
from svdkern.backends.cpu import CpuBackend
from svdkern.functional import svd_linear

HALF = (torch.bfloat16, torch.float16)
needs_kernels = pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension")


@pytest.fixture(params=["ours", "pytorch's"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both choices, whatever this CPU is faster with."""
    if request.param == "ours" and extension.why_missing is not None:
        pytest.skip("needs the compiled extension")
    monkeypatch.setattr(CpuBackend, "wins_without_adapter", lambda *_: request.param == "ours")
    yield request.param


def gradients(call: Any, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (40,), (3, 180), (0,), (2, 0)])
def test_values_and_gradients(chosen: str, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(*lead, 33, dtype=torch.float64), torch.randn(17, 33).double() / 6, torch.randn(17).double()
    dy = torch.randn(*lead, 17, dtype=torch.float64)
    low = [t.to(dtype) for t in (x, w, b)]
    exact = gradients(F.linear, [t.double() for t in low], dy.to(dtype).double())
    size = gradients(F.linear, [t.double().abs() for t in low], dy.to(dtype).double().abs())
    plain = gradients(F.linear, low, dy.to(dtype))
    assert_accurate(
        gradients(svdkern.linear, low, dy.to(dtype)), exact, size, plain, dtype, ("y", "x", "weight", "bias")
    )


def test_a_frozen_layer_keeps_nothing_but_its_weight(chosen: str) -> None:
    x, w, b = torch.randn(40, 33, requires_grad=True), torch.randn(17, 33), torch.randn(17)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = svdkern.linear(x, w, b)
    large = [t for t in saved if t.numel() > 1]
    assert [t.data_ptr() for t in large] == [w.data_ptr()]
    y.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(40, 33))


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(chosen: str, dtype: torch.dtype) -> None:
    x, w, b = torch.randn(5, 33, requires_grad=True), torch.randn(17, 33), torch.randn(17)
    with torch.autocast("cpu", dtype):
        y, wanted = svdkern.linear(x, w, b), F.linear(x, w, b)
    assert y.dtype == wanted.dtype == dtype
    torch.testing.assert_close(y, wanted)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_compiles_whole(chosen: str) -> None:
    torch._dynamo.reset()
    layer = svdkern.Linear(33, 17).requires_grad_(False)
    x = torch.randn(4, 5, 33, requires_grad=True)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)


def test_vmap_and_grad(chosen: str) -> None:
    w = torch.randn(17, 33) / 6
    x = torch.randn(3, 4, 33)
    wanted = torch.func.vmap(torch.func.grad(lambda a: F.linear(a, w).square().sum()))(x)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda a: svdkern.linear(a, w).square().sum()))(x), wanted, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_choice_can_be_traced_and_exported(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = svdkern.Linear(1024, 1024).to(dtype).requires_grad_(False)
    x = torch.randn(8, 1024).to(dtype)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},)).module()
    longer = torch.randn(40, 1024).to(dtype)
    torch.testing.assert_close(exported(longer), layer(longer))


def test_a_second_derivative_is_refused_where_our_kernels_run(chosen: str) -> None:
    x, w = torch.randn(5, 33, requires_grad=True), torch.randn(17, 33)
    (dx,) = torch.autograd.grad(svdkern.linear(x, w).square().sum(), x, create_graph=True)
    torch.testing.assert_close(dx, 2 * (x @ w.t()) @ w, atol=1e-3, rtol=1e-4)
    if chosen == "ours":
        with pytest.raises(RuntimeError, match="differentiable once"):
            dx.sum().backward()
    else:
        dx.sum().backward()


def test_forward_mode_goes_through_pytorch(chosen: str) -> None:
    x, w = torch.randn(5, 33), torch.randn(17, 33)
    y, derivative = torch.func.jvp(lambda a: svdkern.linear(a, w), (x,), (x,))
    torch.testing.assert_close(derivative, y)


def test_a_weight_that_is_no_plain_tensor_is_left_alone() -> None:
    class Quantised(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = Quantised(torch.randn(8, 8))
    svdkern.adapt(model, "lora", 2, ["0"], frozen_linears=True)
    assert type(model[1]) is nn.Linear and type(model[2]) is svdkern.Linear


@needs_kernels
def test_the_choice_is_by_size_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def spy(x: Tensor, *arguments: Any) -> Tensor:
        calls.append(x.shape[0])
        return svd_linear(x, *arguments)

    monkeypatch.setattr("svdkern.frozen.svd_linear", spy)
    monkeypatch.setattr("svdkern.backends.cpu.kernels_win", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr("svdkern.backends.cpu.FROZEN_WEIGHT", 1 << 20)  # 16 MB of weight say no more
    wide, small = torch.randn(1024, 1024), torch.randn(16, 16)
    for rows in (1, 2, 32, 33):
        svdkern.linear(torch.randn(rows, 1024), wide)
    assert calls == [2, 32]
    svdkern.linear(torch.randn(8, 16), small)
    assert calls == [2, 32]
    svdkern.linear(torch.randn(50, 16).bfloat16(), small.bfloat16())
    assert calls == [2, 32, 50]


@needs_kernels
def test_the_environment_can_refuse_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdkern.frozen.svd_linear", lambda *_: pytest.fail("ours was called"))
    monkeypatch.setattr("svdkern.backends.cpu.FROZEN_WEIGHT", 1 << 20)
    monkeypatch.setenv("SVDKERN_BACKEND", "eager")
    dispatch.read_environment()
    try:
        assert svdkern.linear(torch.randn(8, 1024), torch.randn(1024, 1024)).shape == (8, 1024)
    finally:
        monkeypatch.delenv("SVDKERN_BACKEND")
        dispatch.read_environment()


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.ones(3, 5), torch.ones(4, 6), None),
        (torch.ones(3, 5), torch.ones(4, 5).bfloat16(), None),
        (torch.ones(3, 5), torch.ones(4, 5), torch.ones(3)),
        (torch.ones(3, 5, dtype=torch.int64), torch.ones(4, 5), None),
    ],
    ids=["width", "dtype", "bias", "integers"],
)
def test_what_does_not_fit_is_refused(chosen: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        svdkern.linear(x, weight, bias)


def test_the_module_is_an_nn_linear(chosen: str) -> None:
    plain = nn.Linear(33, 17)
    layer = copy.deepcopy(plain)
    layer.__class__ = svdkern.Linear
    assert isinstance(layer, nn.Linear) and layer.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 3, 33)
    torch.testing.assert_close(layer(x), plain(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert type(again) is svdkern.Linear and torch.equal(again(x), layer(x))


def test_adapt_lets_the_other_layers_run_on_the_kernels(chosen: str, tmp_path: Path) -> None:
    ids = torch.arange(24).reshape(2, 12)
    base = tiny_llama()
    head = base.lm_head
    seen: list[int] = []
    head.register_forward_hook(lambda *_: seen.append(1))
    wanted = base(input_ids=ids).logits
    model = base
    svdkern.adapt(model, "lora", 4, ["q_proj", "v_proj"], frozen_linears=True)
    assert model.lm_head is head and type(head) is svdkern.Linear and head.weight is model.model.embed_tokens.weight
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {svdkern.Linear}
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
    assert seen == [1, 1]

    svdkern.save_adapter(model, tmp_path / "a")
    again = tiny_llama()
    svdkern.load_adapter(again, tmp_path / "a", frozen_linears=True)
    assert type(again.lm_head) is svdkern.Linear
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    svdkern.adapt(again, "lora", 4, ["down_proj"])  # a Linear is adapted like the layer that it was
    assert isinstance(again.model.layers[0].mlp.down_proj, svdkern.SVDLinear)


def test_without_being_asked_no_other_layer_changes() -> None:
    model = tiny_llama()
    svdkern.adapt(model, "lora", 4, ["q_proj"])
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_a_merged_layer_takes_the_same_choice(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = svdkern.SVDLinear.from_linear(nn.Linear(33, 17), 4, "pissa")
    x = torch.randn(5, 33)
    layer.merge()
    called: list[str] = []
    plain = F.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: called.append("pytorch's") or plain(*a))
    torch.testing.assert_close(layer(x), plain(x, layer.weight, layer.bias))
    assert called == ([] if chosen == "ours" else ["pytorch's"])
