"""The cpu backend's own choices: our kernels or ATen's products, addresses beyond 32 bits, threads."""

from __future__ import annotations

import pytest
import torch
from operands import RNG, cast, check, fused, operands, present, run

from svdkern import svd_linear
from svdkern.backends import cpu, extension
from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

pytestmark = pytest.mark.skipif(
    extension.why_missing is not None, reason=f"needs the compiled extension: {extension.why_missing}"
)

FLOATS = (torch.float32,) * 3


@pytest.fixture
def slow_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which ATen has no half-precision products (pytorch/pytorch#146508)."""
    monkeypatch.setattr(cpu, "aten_is_fast", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(cpu, "kernels_win", lambda dtype: dtype != torch.float32)


@pytest.fixture
def fast_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which ATen's products beat ours for every dtype, and layers big enough for them."""
    monkeypatch.setattr(cpu, "SMALL_WORK", 0)
    monkeypatch.setattr(cpu, "aten_is_fast", lambda dtype: True)
    monkeypatch.setattr(cpu, "kernels_win", lambda dtype: False)


@pytest.fixture(params=["slow_aten", "fast_aten"])
def either_cpu(request: pytest.FixtureRequest) -> None:
    """Both, whatever this CPU is."""
    request.getfixturevalue(request.param)


@pytest.mark.usefixtures("either_cpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["sigma", "core", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows(dtype: torch.dtype, form: str, bias: bool) -> None:
    o = operands(47, 65, 70, 9, form=form, bias=bias)
    wanted = tuple(name for name in present(o) if name != "weight")
    check(o, torch.randn(47, 70).double(), "cpu", dtype, FLOATS, wanted)


@pytest.mark.usefixtures("either_cpu")
def test_many_rows_with_dropout() -> None:
    o = operands(47, 65, 70, 9)
    mask = keep_mask(47, 65, RNG, threshold_of(0.25)).double() * keep_scale(threshold_of(0.25))
    check(
        o, torch.randn(47, 70).double(), "cpu", torch.bfloat16, FLOATS, ("x", "u", "sigma", "v", "bias"),
        mask=mask, dropout_p=0.25, rng_state=RNG,
    )  # fmt: skip


@pytest.mark.usefixtures("slow_aten")
def test_kernels_alone_never_call_a_half_precision_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a CPU one call of ATen's bf16 product takes minutes: the path must not have any, forward or backward."""
    products: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                products.extend(a.dtype for a in args if isinstance(a, torch.Tensor) and a.dim() == 2)
            return func(*args, **(kwargs or {}))

    for m, weight, options in (
        (40, True, {}),
        (40, False, {}),
        (40, True, {"gate": torch.ones(1, 8)}),
        (8, True, {"dropout_p": 1.0}),
        (40, True, {"dropout_p": 0.5}),
    ):
        o = cast(operands(m, 48, 64, 8, weight=weight), torch.bfloat16, FLOATS)
        with Watch():
            run(lambda leaves, o=options: fused(leaves, backend="cpu", **o), o, torch.randn(m, 64), present(o))
    assert products and set(products) == {torch.float32}


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_far_apart(m: int, dtype: torch.dtype) -> None:
    """Row offsets beyond 2^31 elements (fla-org/flash-linear-attention#1080): pages that are
    never touched cost no memory."""
    stride = (1 << 31) // (m - 1) + 7
    x = torch.empty(stride * (m - 1) + 24, dtype=dtype).as_strided((m, 24), (stride, 1))
    x.copy_(torch.randn(m, 24))
    o = cast(operands(m, 24, 16, 4), dtype, FLOATS)
    far = svd_linear(x, o["weight"], o["u"], o["sigma"], o["v"], backend="cpu")
    near = svd_linear(x.contiguous(), o["weight"], o["u"], o["sigma"], o["v"], backend="cpu")
    torch.testing.assert_close(far, near)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    o = cast(operands(16, 700, 900, 20), torch.bfloat16, FLOATS)
    dy = torch.randn(16, 900)
    names = ("x", "u", "sigma", "v", "bias")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(lambda leaves: fused(leaves, backend="cpu"), o, dy, names))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
