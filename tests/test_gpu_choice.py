"""Which backend a layer on a GPU takes when nobody names one."""

from __future__ import annotations

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
SMALL = {"m": 1024, "k": 4096, "n": 4096, "r": 64}
LARGE = {"m": 2048, "k": 4096, "n": 4096, "r": 16}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An H100 as PyTorch would describe it, whose driver runs the kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "why_missing", lambda: None)
    monkeypatch.setattr(cuda, "_refused", lambda device: None)
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
        SMALL | {"r": 65}, SMALL | {"r": 0}, SMALL | {"m": 1026}, LARGE | {"r": 17}, LARGE | {"m": 2050},
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


def test_what_is_chosen_during_a_capture_is_asked_again(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(cuda, "_refused", lambda device: "not now")
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen() == "eager"
    gpu.setattr(cuda, "_refused", lambda device: None)
    assert chosen() == "cuda"


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


@pytest.mark.parametrize(("backend", "emulated"), KERNELS)
def test_a_traced_graph_has_operators(backend: str, emulated) -> None:  # type: ignore[no-untyped-def]
    o = cast(operands(20, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
    with emulated() as how:
        traced = make_fx(lambda x: fused(o | {"x": x}, backend=backend))(o["x"])
    assert how.launches == []
    other = torch.randn_like(o["x"])
    assert torch.equal(traced(other), fused(o | {"x": other}, backend="eager"))
