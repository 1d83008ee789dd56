"""Which backend a layer on a GPU takes when nobody names one."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import pytest
import torch
from emulated import emulation
from emulated_cuda import cuda_emulation
from emulated_cuda import why_not as no_kernels
from operands import cast, fused, operands
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import svdkern
from svdkern import doctor
from svdkern.backends import cuda, dispatch, gpu_choice

DEVICE = torch.device("cuda", 0)
SMALL = {"m": 512, "k": 2048, "n": 2048, "r": 64}
LARGE = {"m": 2048, "k": 2048, "n": 2048, "r": 16}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An H100 as PyTorch would describe it, whose driver runs the kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "why_missing", lambda: None)
    monkeypatch.setattr(cuda, "_refused", lambda device: None)
    monkeypatch.setattr(dispatch, "is_watched", lambda x: False)  # stand-ins are no tensors
    monkeypatch.delenv("SVDKERN_BACKEND", raising=False)
    dispatch.read_environment()
    yield monkeypatch
    monkeypatch.undo()
    dispatch.read_environment()


def on_the_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As much of a tensor as the choice looks at."""
    like = types.SimpleNamespace(shape=torch.Size(shape), dtype=dtype, device=DEVICE, is_cpu=False, is_cuda=True)
    return like  # type: ignore[return-value]


def chosen(
    m: int = 8, k: int = 4096, n: int = 2048, r: int = 16,
    dtype: torch.dtype = torch.bfloat16, requested: str | None = None, threshold: int = 0,
) -> str:  # fmt: skip
    """The backend of a layer, the same in both directions and for both ways to say None."""
    names = set()
    for asked in (requested,) if requested else (None, ""):
        x, dy = on_the_gpu(m // 2, 2, k, dtype=dtype), on_the_gpu(m, n, dtype=dtype)
        names.add(dispatch.choose_path(x, on_the_gpu(n, r), asked, threshold).name)
        names.add(dispatch.choose_path(dy, on_the_gpu(k, r), asked, threshold, backward=True).name)
    (name,) = names
    return name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [SMALL, LARGE, SMALL | {"m": 2}, SMALL | {"r": 1}, LARGE | {"threshold": 1}], ids=str)
def test_layers_of_small_rank_take_the_cuda_kernels(layer: dict[str, int], dtype: torch.dtype) -> None:
    assert chosen(**layer, dtype=dtype) == "cuda"


@pytest.mark.parametrize(
    "layer",
    [
        SMALL | {"r": 65}, SMALL | {"r": 0}, SMALL | {"m": 514}, LARGE | {"r": 17}, LARGE | {"m": 2050},
        SMALL | {"dtype": torch.float32}, SMALL | {"dtype": torch.float64}, SMALL | {"requested": "eager"},
    ],
    ids=str,
)  # fmt: skip
def test_every_other_layer_is_eager(layer: dict[str, object]) -> None:
    assert chosen(**layer) == "eager"  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_on_other_gpus_too(gpu: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen() == "eager"


def test_a_name_decides_alone(gpu: pytest.MonkeyPatch) -> None:
    assert chosen(**(SMALL | {"r": 100}), requested="cuda") == "cuda"
    for name, r in (("eager", 16), ("cuda", 100)):
        gpu.setenv("SVDKERN_BACKEND", name)
        dispatch.read_environment()
        assert chosen(r=r) == name


@pytest.mark.parametrize(("what", "reason"), [("why_missing", "built without"), ("_refused", "driver is too old")])
def test_where_the_kernels_cannot_run_it_is_eager_without_a_word(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, reason: str
) -> None:
    gpu.setattr(cuda, what, lambda *device: reason)
    assert chosen() == "eager"
    assert not caplog.records


@pytest.mark.parametrize("capturing", [True, False])
def test_what_a_driver_says_during_a_capture_is_asked_again(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    monkeypatch.undo()
    says = ["not now", ""]
    probe = types.SimpleNamespace(default=lambda on: says.pop(0))
    monkeypatch.setattr(cuda, "_answers", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(
        cuda.torch, "ops", types.SimpleNamespace(svdkern=types.SimpleNamespace(_cuda_probe=probe, _cuda_build=str))
    )
    device = torch.device("cpu", 0)
    assert "not now" in str(cuda._refused(device))
    assert (cuda._refused(device) is None) == capturing and len(says) == (0 if capturing else 1)


def test_a_choice_for_who_looks_on_is_not_kept(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(dispatch, "is_watched", lambda x: True)
    assert chosen() == "eager"
    gpu.setattr(dispatch, "is_watched", lambda x: False)
    assert chosen() == "cuda"


@pytest.mark.parametrize(
    ("rows", "width", "out", "capability", "expected"),
    [
        (2048, 4096, 2048, 9, False), (2049, 4096, 2048, 9, True), (2049, 4096, 2048, 10, True), (2049, 4096, 2048, 8, False),
        (2049, 4096, 2048, 12, False), (32, 1 << 15, 1 << 15, 9, False), (33, 1 << 15, 1 << 15, 9, True),
    ],
)  # fmt: skip
def test_a_large_product_is_the_librarys_where_its_tensor_cores_are_faster(
    gpu: pytest.MonkeyPatch, rows: int, width: int, out: int, capability: int, expected: bool
) -> None:
    gpu.setattr(cuda, "major", lambda device: capability)
    assert cuda.by_library(rows, width, out, DEVICE) is expected


def test_doctor_says_which(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "current_device", lambda: 0)
    assert doctor._rule("eager", "cuda", torch.bfloat16) == f"PyTorch operators; cuda if {gpu_choice.RULE}"
    assert (
        doctor._rule("eager", "cuda", torch.float32)
        == doctor._rule("eager", "cpu", torch.bfloat16)
        == "PyTorch operators"
    )
    gpu.setenv("SVDKERN_BACKEND", "eager")
    dispatch.read_environment()
    assert doctor._rule("eager", "cuda", torch.bfloat16) == "PyTorch operators"


def test_warmup_runs_the_layers_that_take_kernels(gpu: pytest.MonkeyPatch) -> None:
    layer = svdkern.SVDLinear(32, 48, 4, dtype=torch.bfloat16)
    gpu.setattr(gpu_choice, "LIMITS", ((32 * 48 * 1024, 4),))

    real, ran = dispatch.choose_path, list[int]()

    def as_if_on_the_gpu(x: torch.Tensor, v: torch.Tensor, requested: str, threshold: int) -> object:
        assert requested == ""  # which never measures
        return real(on_the_gpu(*x.shape, dtype=x.dtype), v, requested, threshold)

    gpu.setattr(dispatch, "choose_path", as_if_on_the_gpu)
    gpu.setattr("svdkern.graphs._run", lambda layer, x: ran.append(len(x)))
    assert svdkern.warmup(layer, [16, 1024, 4096]) == 2
    assert ran == [16, 1024]
    with torch.autocast("cpu", torch.bfloat16):
        assert svdkern.warmup(layer.float(), [1024]) == 1
    assert svdkern.warmup(layer, [1024]) == 0


# ------------------------------------------------------------------------------ where somebody sees PyTorch's operators alone

KERNELS = [
    pytest.param("triton", emulation, id="triton"),
    pytest.param(
        "cuda", cuda_emulation, id="cuda", marks=pytest.mark.skipif(no_kernels() is not None, reason=str(no_kernels()))
    ),
]


@pytest.mark.parametrize(("backend", "emulated"), KERNELS)
def test_a_fake_tensor_takes_operators(backend: str, emulated) -> None:  # type: ignore[no-untyped-def]
    with emulated() as how, FakeTensorMode():
        o = cast(operands(20, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
        x = o["x"].requires_grad_()
        y = fused(o | {"x": x}, backend=backend)
        (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert how.launches == [] and y.shape == (20, 48) and dx.shape == x.shape


def test_a_fake_tensor_on_a_gpu_that_is_not_there_takes_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is one")
    dispatch.read_environment()
    with FakeTensorMode():
        x, w, u, v = (torch.empty(size, device="cuda") for size in ((20, 32), (48, 32), (32, 4), (48, 4)))
        assert svdkern.svd_linear(x, w, u, None, v).shape == (20, 48)


class Subclass(torch.Tensor):
    """Of which only PyTorch's operators know what it means."""


@pytest.mark.parametrize(("backend", "emulated"), KERNELS)
def test_a_weight_of_another_class_takes_operators(backend: str, emulated) -> None:  # type: ignore[no-untyped-def]
    o = cast(operands(20, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
    with emulated() as how:
        y = fused(o | {"weight": o["weight"].as_subclass(Subclass)}, backend=backend)
    assert how.launches == []
    assert torch.equal(y.as_subclass(torch.Tensor), fused(o, backend="eager"))


@pytest.mark.parametrize(("backend", "emulated"), KERNELS)
def test_a_traced_graph_has_operators(backend: str, emulated) -> None:  # type: ignore[no-untyped-def]
    o = cast(operands(20, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
    with emulated() as how:
        traced = make_fx(lambda x: fused(o | {"x": x}, backend=backend))(o["x"])
    assert how.launches == []
    other = torch.randn_like(o["x"])
    assert torch.equal(traced(other), fused(o | {"x": other}, backend="eager"))
