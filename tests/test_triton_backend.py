"""The Triton backend's edges: when it refuses and says so, what it launches, and what it leaves to PyTorch."""

from __future__ import annotations

import logging
import re
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from emulated import Emulation, emulation
from operands import RNG, cast, check, fused, operands, run
from svdkern.triton_kernels import configs

from svdkern import svd_linear
from svdkern.backends import dispatch, triton
from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SVDKERN_STRICT", "1")
    dispatch.read_environment()
    yield
    monkeypatch.undo()
    dispatch.read_environment()


def layer(r: int = 4) -> dict[str, torch.Tensor | None]:
    return cast(operands(5, 8, 6, r), torch.float32, (torch.float32,) * 3)


def test_a_cpu_tensor_falls_back_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.read_environment()
    o = layer()
    with caplog.at_level(logging.WARNING, "svdkern"):
        y = fused(o, backend="triton")
    assert "the triton backend was asked for a tensor on cpu" in caplog.text
    assert torch.equal(y, fused(o, backend="eager"))


@pytest.mark.usefixtures("strict")
def test_strict_makes_a_fallback_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"SVDKERN_STRICT=1 and backend 'triton' cannot be used: .* tensor on cpu"):
        fused(layer(), backend="triton")


def cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [
        ((7, 5), torch.float16, r"Some GPU has compute capability 7\.5, the kernels need 8\.0"),
        ((9, 0), torch.float64, r"the triton backend has no torch\.float64"),
    ],
)
def test_parts_and_dtypes_that_it_does_not_serve(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, message: str
) -> None:
    reason = triton.why_not(cuda(monkeypatch, capability), dtype)
    assert reason is not None
    assert re.search(message, reason)


def test_a_part_that_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton.why_not(cuda(monkeypatch, (8, 0)), torch.bfloat16) is None


@pytest.fixture
def forgetful() -> Iterator[None]:
    triton.why_missing.cache_clear()
    yield
    triton.why_missing.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = triton.why_not(cuda(monkeypatch, (9, 0)), torch.bfloat16)
    assert reason is not None and reason.startswith("triton cannot be imported") and "pip install triton" in reason


@pytest.mark.usefixtures("forgetful")
def test_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.4.0"))
    assert triton.why_missing() == "triton is 3.4.0, the kernels need 3.6 or later"


def test_a_large_core_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    o = cast(operands(20, 40, 50, 33, form="core"), torch.float32, (torch.float32,) * 3)
    dispatch.read_environment()
    with emulation() as how, caplog.at_level(logging.WARNING, "svdkern"):
        fused(o, backend="triton")
    assert how.launches == []
    assert "a core of r=33, the triton backend takes one of up to 32 in torch.float32" in caplog.text


@pytest.mark.usefixtures("strict")
def test_strict_refuses_a_large_core() -> None:
    o = cast(operands(20, 40, 50, 33, form="core"), torch.float32, (torch.float32,) * 3)
    with emulation(), pytest.raises(RuntimeError, match="a core of r=33"):
        fused(o, backend="triton")


def test_a_rank_above_512_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    o = cast(operands(3, 600, 520, 513), torch.float32, (torch.float32,) * 3)
    dispatch.read_environment()
    with emulation() as how, caplog.at_level(logging.WARNING, "svdkern"):
        y = fused(o, backend="triton")
    assert how.launches == []
    assert "r=513, the triton backend takes r up to 512" in caplog.text
    assert torch.equal(y, fused(o, backend="eager"))


# ----------------------------------------------------------------------------------------------------------- launches


@pytest.fixture
def emulated() -> Iterator[Emulation]:
    with emulation() as how:
        yield how


@pytest.mark.emulator
@pytest.mark.parametrize(
    ("rows", "forward", "backward"),
    [
        (17, ["pack_kernel", "forward_kernel"], ["pack_kernel", "backward_kernel"]),
        (16, ["shrink_kernel", "linear_kernel"], ["pack_kernel", "backward_kernel"]),
    ],
)
def test_launches_of_a_layer(emulated: Emulation, rows: int, forward: list[str], backward: list[str]) -> None:
    o = cast(operands(rows, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
    x = o["x"].requires_grad_()
    u = o["u"].requires_grad_()
    y = svd_linear(x, o["weight"], u, o["sigma"], o["v"], backend="triton")
    assert emulated.launches == forward
    emulated.launches.clear()
    y.backward(torch.ones_like(y))
    assert emulated.launches == backward


@pytest.mark.emulator
def test_gradients_that_nobody_wants_are_not_computed(emulated: Emulation) -> None:
    o = cast(operands(20, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
    bias = o["bias"].requires_grad_()
    y = svd_linear(o["x"], o["weight"], o["u"], o["sigma"], o["v"], bias, backend="triton")
    emulated.launches.clear()
    (db,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.equal(db, torch.full_like(bias, 20))
    assert emulated.launches == ["pack_kernel", "backward_kernel"]


@pytest.mark.emulator
def test_no_rows_launch_nothing(emulated: Emulation) -> None:
    o = cast(operands(0, 32, 48, 4), torch.bfloat16, (torch.float32,) * 3)
    got = run(lambda leaves: fused(leaves, backend="triton"), o, torch.ones(0, 48), ("x", "u", "sigma", "v", "bias"))
    assert emulated.launches == []
    assert [tuple(g.shape) for g in got] == [(0, 48), (0, 32), (32, 4), (4,), (48, 4), (48,)]
    assert all(not g.any() for g in got)


@pytest.mark.emulator
def test_everything_dropped_launches_nothing(emulated: Emulation) -> None:
    o = cast(operands(20, 32, 48, 4), torch.float32, (torch.float32,) * 3)
    y = fused(o, backend="triton", dropout_p=1.0)
    assert emulated.launches == []
    assert torch.equal(y, torch.nn.functional.linear(o["x"], o["weight"], o["bias"]))


@pytest.mark.emulator
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("arch", [80, 90])
def test_float32(rows: int, arch: int) -> None:
    with emulation(arch=arch):
        check(
            operands(rows, 40, 24, 20),
            torch.randn(rows, 24),
            "triton",
            torch.float32,
            (torch.float32,) * 3,
            ("x", "u", "sigma", "v"),
        )


@pytest.mark.emulator
@pytest.mark.parametrize("rows", [3, 40])
def test_the_branch_alone(rows: int) -> None:
    with emulation():
        o = operands(rows, 40, 24, 5, weight=False)
        check(o, torch.randn(rows, 24), "triton", torch.bfloat16, (torch.float32,) * 3, ("x", "u", "v", "bias"))


@pytest.mark.emulator
def test_a_weight_in_columns_and_of_another_dtype() -> None:
    o = operands(40, 48, 24, 5)
    o["weight"] = o["weight"].t().contiguous().t()
    with emulation():
        check(o, torch.randn(40, 24), "triton", torch.bfloat16, (torch.float32,) * 3, ("x", "weight", "u"))
    low = cast(o, torch.bfloat16, (torch.float32,) * 3)
    with emulation():
        y = fused(low | {"weight": low["weight"].float()}, backend="triton")
        assert torch.equal(y, fused(low, backend="triton"))


@pytest.mark.emulator
def test_a_gradient_of_zero_stride() -> None:
    """What y.sum().backward() sends: one number for all of dy."""
    o = cast(operands(20, 32, 48, 4), torch.float32, (torch.float32,) * 3)
    with emulation():
        x = o["x"].requires_grad_()
        svd_linear(x, o["weight"], o["u"], o["sigma"], o["v"], backend="triton").sum().backward()
    expected = o["weight"].sum(0) + (o["v"].sum(0) * o["sigma"]) @ o["u"].t()
    torch.testing.assert_close(x.grad, expected.expand(20, 32), rtol=1e-4, atol=1e-4)


@pytest.mark.emulator
def test_dropout_bits_are_those_of_the_other_backends() -> None:
    """u is the identity and x is ones: h is the mask, times its factor."""
    rows, width, p = 37, 64, 0.25
    eye = torch.eye(width)
    weight = torch.zeros(width, width)
    with emulation():
        ones = torch.ones(rows, width)
        y = svd_linear(ones, weight, eye, None, eye, dropout_p=p, rng_state=RNG, backend="triton")
    threshold = threshold_of(p)
    assert torch.equal(y != 0, keep_mask(rows, width, RNG, threshold))
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, keep_scale(threshold)])


@pytest.mark.emulator
@pytest.mark.parametrize("seed", range(5))
def test_fewer_processors_than_tiles(seed: int) -> None:
    """Row groups in several super-groups, few CTAs, unfair schedules: whoever waits, waits for a tile that somebody has."""
    o = cast(operands(300, 32, 40, 4), torch.bfloat16, (torch.float32,) * 3)
    dy = torch.randn(300, 40).bfloat16()
    wanted = ("x", "u", "sigma", "v", "bias")
    with emulation() as plain:
        expected = run(lambda leaves: fused(leaves, backend="triton"), o, dy, wanted)
    with emulation(mode="adversarial", seed=seed, ctas=2) as unfair:
        got = run(lambda leaves: fused(leaves, backend="triton"), o, dy, wanted)
    assert plain.launches == unfair.launches
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.emulator
@pytest.mark.parametrize("rows", [3, 20])
def test_small_operands_of_any_strides(rows: int) -> None:
    form = {"sigma": {"sigma": torch.randn(4, 2)[:, 0]}, "core": {"core": torch.randn(4, 4).t()}}
    for name, odd in form.items():
        o = cast(operands(rows, 32, 40, 4, form=name), torch.float32, (torch.float32,) * 3)
        o |= odd | {"bias": torch.randn(40, 2)[:, 1]}
        wanted = ("x", "u", name, "v", "bias")
        state = torch.stack([RNG, RNG], 1)[:, 0]
        options = {"dropout_p": 0.3, "rng_state": state}
        dy = torch.randn(rows, 40)
        expected = run(lambda leaves: fused(leaves, backend="eager", **options), o, dy, wanted)  # noqa: B023
        with emulation():
            got = run(lambda leaves: fused(leaves, backend="triton", **options), o, dy, wanted)  # noqa: B023
        for what, a, b in zip(("y", *wanted), got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.emulator
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("rows", [3, 40])
def test_rows_far_apart(rows: int, arch: int) -> None:
    """Offsets beyond 2^31 elements, of x and of the weight (fla-org/flash-linear-attention#1080): pages that are never touched
    cost no memory."""
    o = cast(operands(rows, 24, 16, 4), torch.bfloat16, (torch.float32,) * 3)
    dy, wanted = torch.randn(rows, 16), ("x", "u", "sigma", "v")
    with emulation(arch=arch):
        near = run(lambda leaves: fused(leaves, backend="triton"), o, dy, wanted)
        for name in ("x", "weight"):
            tensor = o[name]
            stride = ((1 << 31) // (tensor.shape[0] - 1) + 7) // 8 * 8  # in sum beyond 2^31, and rows of 16 bytes
            stride += 8 * (stride * (tensor.shape[0] - 1) < 1 << 31)
            far = torch.empty(stride * (tensor.shape[0] - 1) + 24, dtype=torch.bfloat16)
            o |= {name: far.as_strided(tensor.shape, (stride, 1)).copy_(tensor)}
            assert (tensor.shape[0] - 1) * stride >= 1 << 31
            again = run(lambda leaves: fused(leaves, backend="triton"), o, dy, wanted)
            assert all(torch.equal(a, b) for a, b in zip(near, again, strict=True)), name


@pytest.mark.emulator
@pytest.mark.parametrize("arch", [80, 90])
def test_a_scale_on_the_host_and_on_the_device(arch: int) -> None:
    o = cast(operands(20, 32, 40, 4), torch.bfloat16, (torch.float32,) * 3)
    found = []
    for on_host in (True, False):
        with emulation(arch=arch, scale_on_host=on_host):
            found.append(run(lambda leaves: fused(leaves, backend="triton"), o, torch.randn(20, 40), ("x",))[0])
    assert torch.equal(*found)


@pytest.mark.emulator
@pytest.mark.parametrize("arch", [80, 90])
def test_tf32_where_pytorch_may(arch: int) -> None:
    o = cast(operands(20, 32, 40, 4), torch.float32, (torch.float32,) * 3)
    exact = fused({name: None if t is None else t.double() for name, t in o.items()}, backend="eager")
    errors = []
    before = torch.backends.cuda.matmul.fp32_precision
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        try:
            with emulation(arch=arch):
                errors.append(float((fused(o, backend="triton") - exact).abs().max() / exact.abs().max()))
        finally:
            torch.backends.cuda.matmul.fp32_precision = before
    assert errors[0] < 1e-6 < errors[1] < 3e-3


@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 0)])
@pytest.mark.parametrize("rows", [3, 20])
def test_empty_sides(rows: int, k: int, n: int) -> None:
    o = cast(operands(rows, k, n, 2), torch.float32, (torch.float32,) * 3)
    with emulation(arch=90) as how:
        assert torch.equal(fused(o, backend="triton"), fused(o, backend="eager"))
    assert how.launches == []


# ------------------------------------------------------------------------------------------------------ configurations


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [16, 32, 64, 128, 256, 512])
def test_every_configuration_is_one_the_kernels_can_take(arch: int, dtype: torch.dtype, rank: int) -> None:
    found = [configs.decoding(dtype, rank)]
    for rows in (17, 10**5):
        for core in (False, True) if rank <= configs.core_ranks(dtype) else (False,):
            found.append(configs.training(arch, dtype, rank, core, rows, 4096, 132))
            assert rank % found[-1].RT == 0
            assert not core or found[-1].RT == rank
    for config in found:
        assert all(n >= 16 and n & (n - 1) == 0 for n in (config.BM, config.BN, config.BK, config.BF, config.BD))
    assert found[0].BM >= configs.DECODE_M
