"""Which backend a layer on a GPU takes when nobody names one."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator

import pytest
import torch
from emulated import emulation
from operands import cast, fused, operands
from svdkern.triton_kernels import sketch as sketch_kernel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import svdkern
from svdkern import doctor
from svdkern.backends import dispatch, gpu_choice, triton

DEVICE = torch.device("cuda", 0)
LAYER = {"m": 8192, "k": 4096, "n": 2048, "r": 16}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """An H100 as PyTorch would describe it, where Triton can compile."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton, "why_missing", lambda: None)
    monkeypatch.setattr(triton, "_compiles", {DEVICE: True})
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
    m: int = 8192, k: int = 4096, n: int = 2048, r: int = 16,
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
@pytest.mark.parametrize("other", [{}, {"m": 1024}, {"k": 2048}, {"r": 32}, {"r": 1}])
def test_large_layers_of_small_rank_take_triton(other: dict[str, int], dtype: torch.dtype) -> None:
    assert chosen(**(LAYER | other), dtype=dtype) == "triton"


@pytest.mark.parametrize(
    "other",
    [
        {"m": 1022}, {"k": 2047}, {"n": 2047}, {"r": 33}, {"r": 0}, {"threshold": 1}, {"dtype": torch.float32},
        {"dtype": torch.float64}, {"requested": "eager"},
    ],
    ids=str,
)  # fmt: skip
def test_every_other_layer_is_eager(other: dict[str, object]) -> None:
    assert chosen(**(LAYER | other)) == "eager"  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_on_other_gpus_too(gpu: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen() == "eager"


def test_a_name_decides_alone(gpu: pytest.MonkeyPatch) -> None:
    assert chosen(m=4, requested="triton") == "triton"
    for name, m in (("eager", 8192), ("triton", 4)):
        gpu.setenv("SVDKERN_BACKEND", name)
        dispatch.read_environment()
        assert chosen(m=m) == name


def test_without_triton_it_is_eager(gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpu.setattr(triton, "why_missing", lambda: "no triton")
    assert chosen() == "eager"
    assert not caplog.records


@pytest.mark.parametrize("strict", ["0", "1"])
def test_without_a_compiler_it_is_eager_and_says_so_once(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strict: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    gpu.setattr(triton, "_compiles", {})
    gpu.setattr(sketch_kernel, "sketch", fail)
    gpu.setenv("SVDKERN_STRICT", strict)
    dispatch.read_environment()
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert chosen() == chosen(m=4096) == "eager"
    (record,) = caplog.records
    assert record.getMessage().startswith("Triton's kernels cannot be used, PyTorch's operations are: Failed to find C")


def test_what_a_capture_could_not_find_out_is_asked_again(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(triton, "_compiles", {})
    gpu.setattr(sketch_kernel, "sketch", lambda *arguments, **options: torch.ones(1, 1))
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen() == "eager"
    gpu.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chosen() == "triton"


def test_doctor_says_which(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "current_device", lambda: 0)
    assert doctor._rule("eager", "cuda", torch.bfloat16) == f"PyTorch operators; triton if {gpu_choice.RULE}"
    assert (
        doctor._rule("eager", "cuda", torch.float32)
        == doctor._rule("eager", "cpu", torch.bfloat16)
        == "PyTorch operators"
    )
    gpu.setenv("SVDKERN_BACKEND", "eager")
    dispatch.read_environment()
    assert doctor._rule("eager", "cuda", torch.bfloat16) == "PyTorch operators"


def test_warmup_runs_the_layers_that_take_triton(gpu: pytest.MonkeyPatch) -> None:
    layer = svdkern.SVDLinear(32, 48, 4, dtype=torch.bfloat16, dropout_p=0.5)
    gpu.setattr(gpu_choice, "LEAST_WIDTH", 32)

    real, ran = dispatch.choose_path, list[int]()

    def as_if_on_the_gpu(x: torch.Tensor, v: torch.Tensor, requested: str, threshold: int) -> object:
        assert requested == ""  # which never measures
        return real(on_the_gpu(*x.shape, dtype=x.dtype), v, requested, threshold)

    gpu.setattr(dispatch, "choose_path", as_if_on_the_gpu)
    gpu.setattr("svdkern.graphs._run", lambda layer, x: ran.append(len(x)))
    assert svdkern.warmup(layer, [16, 1024, 4096]) == 0  # dropout
    assert svdkern.warmup(layer.eval(), [16, 1024, 4096]) == 2
    assert ran == [1024, 4096]
    with torch.autocast("cpu", torch.bfloat16):
        assert svdkern.warmup(layer.float(), [1024]) == 1
    assert svdkern.warmup(layer, [1024]) == 0


# ------------------------------------------------------------------------------ where somebody sees PyTorch's operators alone


def test_a_fake_tensor_takes_operators() -> None:
    with emulation() as how, FakeTensorMode():
        o = cast(operands(20, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
        x = o["x"].requires_grad_()
        y = fused(o | {"x": x}, backend="triton")
        (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert how.launches == [] and y.shape == (20, 48) and dx.shape == x.shape


def test_a_traced_graph_has_operators() -> None:
    o = cast(operands(20, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
    with emulation() as how:
        traced = make_fx(lambda x: fused(o | {"x": x}, backend="triton"))(o["x"])
    assert how.launches == []
    other = torch.randn_like(o["x"])
    assert torch.equal(traced(other), fused(o | {"x": other}, backend="eager"))
