"""``svdkern.warmup``, and what a launch does while a CUDA graph is captured."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import emulation
from ptx_emulator.jit import specialise
from svdkern.triton_kernels import launching, pack
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import svdkern
from svdkern import SVDLinear
from svdkern.backends import dispatch, triton_gram


def model(**options: Any) -> nn.Sequential:
    """Two adapted layers in bf16; the first one's x wants no gradient."""
    layers = [
        SVDLinear(64, 48, 4, dtype=torch.bfloat16, **options),
        SVDLinear(48, 40, 5, dtype=torch.bfloat16, **options),
    ]
    return nn.Sequential(*layers)


@pytest.fixture
def by_triton() -> Iterator[list[str]]:
    """SVDKERN_BACKEND=triton on a GPU that is none; what is launched (name and specialisation) is noted and not run."""
    launched: list[str] = []

    def note(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
        signature, constants, divisible, _, options = specialise(kernel, arguments, meta)
        launched.append(f"{kernel.fn.__name__} {signature} {constants} {sorted(divisible)} {options}")

    with emulation(arch=90), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDKERN_BACKEND", "triton")
        patch.setattr(launching, "launch", note)
        dispatch.read_environment()
        yield launched
    dispatch.read_environment()


def names(launched: list[str]) -> list[str]:
    return [each.split()[0].removesuffix("_kernel") for each in launched]


@pytest.mark.parametrize("rows", [4, 40, 3000])
@pytest.mark.parametrize("how", ["train", "eval", "no bias", "dropout", "autocast", "no_grad", "sigma alone"])
def test_a_step_after_warmup_launches_nothing_new(by_triton: list[str], rows: int, how: str) -> None:
    options: dict[str, Any] = {"no bias": {"bias": False}, "dropout": {"dropout_p": 0.1}}.get(how, {})
    net = model(method="sorsa" if how == "sigma alone" else "pissa", **options)
    net.train(how != "eval")
    if how == "autocast":
        net = net.float()
    if how == "sigma alone":
        for layer in net:
            layer.u.requires_grad_(False)
            layer.v.requires_grad_(False)
    x = torch.randn(2, rows // 2, 64, dtype=torch.float32 if how == "autocast" else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.set_grad_enabled(how != "no_grad"):
        assert svdkern.warmup(net, [rows]) == 2
        compiled = set(by_triton)
        by_triton.clear()
        y = net(x)
        if how != "no_grad":
            y.sum().backward()
    assert by_triton and set(by_triton) <= compiled
    assert ("backward" in names(by_triton)) == (how != "no_grad")


def test_a_penalty_after_warmup_launches_nothing_new(by_triton: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_gram, "is_asked_for", lambda factor: True)  # it asks for a tensor on a GPU
    net = model(method="sorsa")
    svdkern.warmup(net, [40])
    compiled = set(by_triton)
    by_triton.clear()
    svdkern.regularization(net)
    assert names(by_triton) == ["gram"] * 4
    assert set(by_triton) <= compiled


def test_what_warmup_was_not_told_of_is_new(by_triton: list[str]) -> None:
    """The comparison above can fail: other rows take other kernels, a strided x other ones of theirs."""
    net = model()
    svdkern.warmup(net, [40, 40, 41])
    compiled = set(by_triton)
    with torch.no_grad():
        for x in (torch.randn(4, 64), torch.randn(40, 65)):
            by_triton.clear()
            net(x.bfloat16()[:, :64])
            assert not set(by_triton) <= compiled


def test_warmup_leaves_the_model_alone(by_triton: list[str]) -> None:
    net, called = model(dropout_p=0.1), []
    for module in net:
        module.register_forward_hook(lambda *_: called.append("hook"))
        module.u.register_hook(lambda _: called.append("gradient"))
    before = {name: (id(t), t.clone(), t._version) for name, t in net.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    assert svdkern.warmup(net, (rows for rows in (4, 40))) == 4
    assert names(by_triton).count("forward") == names(by_triton).count("linear") == 4  # x with a gradient and without
    assert called == [] and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    for name, t in net.state_dict(keep_vars=True).items():
        assert (id(t), t._version) == (before[name][0], before[name][2]) and torch.equal(t, before[name][1])


def test_warmup_skips_merged_layers_and_empty_models(by_triton: list[str]) -> None:
    net = model()
    net[0].merge()
    assert svdkern.warmup(net, [40]) == 1 and svdkern.warmup(net, []) == 0
    assert svdkern.warmup(nn.Linear(3, 3), [40]) == 0
    with pytest.raises(ValueError, match=r"rows are \[-1, 2\], expected positive"):
        svdkern.warmup(net, [2, -1])


def test_warmup_where_another_backend_serves_does_nothing() -> None:
    dispatch.read_environment()
    with emulation() as how:
        assert svdkern.warmup(model(), [4, 40]) == 0
    assert how.launches == []


def test_warmup_within_a_capture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        svdkern.warmup(model(), [4])


class Driver:
    """What Triton's launcher asks of a GPU before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)


class Loaded:
    """A kernel that was compiled."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.launches = 0

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *_: object) -> None:
        self.launches += 1


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's own launcher up to where it compiles, without a GPU, as if a graph were being captured."""
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    pack.pack_kernel.device_caches.clear()
    yield
    pack.pack_kernel.device_caches.clear()


def call_pack(rows: int = 32) -> None:
    pack.pack(torch.randn(rows, 4), False, torch.randn(rows, 4), True, torch.bfloat16)


@pytest.mark.usefixtures("capturing")
def test_a_capture_that_would_compile_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"pack_kernel is not compiled .* call svdkern\.warmup\(model, rows\)"):
        call_pack()
    assert launching.triton.knobs.runtime.jit_cache_hook is None


@pytest.mark.usefixtures("capturing")
def test_a_capture_launches_what_is_compiled() -> None:
    loaded = Loaded()
    caches = pack.pack_kernel.device_caches
    caches[0] = (types.SimpleNamespace(get=lambda key, default: loaded), *caches[0][1:])
    call_pack()
    assert loaded.launches == 1


@pytest.mark.usefixtures("capturing")
def test_another_hook_and_another_kernel_keep_their_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    runtime = launching.triton.knobs.runtime

    def mine(*, fn: Any, **_: Any) -> bool:
        asked.append(fn.name)
        return True  # which makes Triton compile nothing

    monkeypatch.setattr(runtime, "jit_cache_hook", mine)
    with launching._compiled_only(object()):  # another kernel than the one that is compiled
        pack.pack_kernel[(1,)](*pack_arguments(), R=16, BLOCK=64)
    assert asked == ["pack_kernel"] and runtime.jit_cache_hook is mine
    with pytest.raises(RuntimeError, match="is not compiled"):
        call_pack()
    assert runtime.jit_cache_hook is mine
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    call_pack()
    assert asked == ["pack_kernel"] * 2


def pack_arguments() -> list[Any]:
    factor, columns, rows = torch.randn(32, 4), torch.empty(16, 32), torch.empty(32, 16)
    return [factor, 4, 1, 32, columns, 1, 32, factor, 4, 1, 32, rows, 16, 1, 4, None, 0]
