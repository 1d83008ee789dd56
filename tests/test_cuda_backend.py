"""The CUDA backend: whole layers, forward and backward, run from their PTX; and what it says where it cannot run."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from cover import case_name, cover
from emulated_cuda import cuda_emulation, why_not
from operands import RNG, cast, check, fused, operands, plain, present, run
from test_triton_emulated import MASKS, gates

from svdkern import svd_linear
from svdkern.backends import cuda, dispatch, extension
from svdkern.backends.philox import keep_mask, keep_scale, threshold_of

emulated = [pytest.mark.emulator, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def with_kernels(test):  # type: ignore[no-untyped-def]
    for mark in emulated:
        test = mark(test)
    return test


LAYERS = {
    "dtype": [torch.bfloat16, torch.float16],
    "shape": [(70, 136, 72), (40, 264, 33)],
    "r": [1, 17, 130],
    "form": ["sigma", "core", "none"],
    "factors": [torch.float32, None],
    "gate": ["none", "table", "top-k"],
    "dropout": [0.0, 0.1],
    "bias": [True, False],
    "wanted": list(MASKS),
    "layout": ["plain", "strided x", "transposed factors", "3-d"],
    "processors": [1, 3, 30],
    "mode": ["race"],
}
ADVERSE = {"dtype": [torch.bfloat16], "shape": [(70, 136, 24)], "r": [3], "form": ["sigma"], "gate": ["none"],
           "wanted": ["all"], "layout": ["plain"], "processors": [30], "dropout": [0.1], "factors": [None], "bias": [True],
           "mode": ["late", "adversarial 1", "adversarial 3"]}  # fmt: skip
FLOAT = {"dtype": [torch.float32], "shape": [(40, 72, 33)], "r": [3], "form": ["sigma", "core"], "factors": [None],
         "gate": ["table"], "bias": [True], "wanted": ["all"], "layout": ["plain"]}  # fmt: skip
FEW = {  # two launches forward
    "dtype": [torch.bfloat16, torch.float16, torch.float32], "shape": [(1, 328, 72), (9, 136, 33), (32, 40, 65)], "r": [1, 17],
    "processors": [1, 30],
}  # fmt: skip


def check_layer(case: dict, record: Callable[[str, object], None] | None = None) -> None:
    (m, k, n), r, dtype = case["shape"], case["r"], case["dtype"]
    o = operands(m, k, n, r, form=case["form"], bias=case["bias"])
    o["x"], o["weight"] = o["x"] / k**0.5, o["weight"] / k**0.5
    dy = torch.randn(m, n).double()
    if case["layout"] == "3-d":
        o["x"], dy = o["x"].view(1, m, k), dy.view(1, m, n)
    options: dict = {}
    mask = None
    if case["dropout"]:
        options |= {"dropout_p": case["dropout"], "rng_state": RNG}
        threshold = threshold_of(case["dropout"])
        mask = (keep_mask(m, k, RNG, threshold).double() * keep_scale(threshold)).view(o["x"].shape)
    rows_of = None
    if case["gate"] != "none":
        o["gate"], by_gate, rows_of = gates(case["gate"], o["x"].shape[:-1], r)
    wanted = tuple(name for name in MASKS[case["wanted"]] if o.get(name) is not None)

    def expected(leaves):  # type: ignore[no-untyped-def]
        if rows_of is None:
            return plain(leaves, mask)
        x, of_x = leaves["x"], lambda t: t.to(leaves["x"].dtype)
        h = (x if mask is None else x * of_x(mask)) @ of_x(leaves["u"])
        z = h if leaves["sigma"] is None else h * of_x(leaves["sigma"])
        z = z if leaves["core"] is None else h @ of_x(leaves["core"])
        z = z * of_x(rows_of(leaves["gate"])).view(z.shape)
        y = x @ leaves["weight"].t() + of_x(leaves["scale"]) * (z @ of_x(leaves["v"]).t())
        return y if leaves["bias"] is None else y + leaves["bias"]

    def call(leaves):  # type: ignore[no-untyped-def]
        return fused(leaves, backend="cuda", **options, **({} if rows_of is None else by_gate(leaves["gate"])))

    low = cast(o, dtype, (case["factors"] or dtype,) * 3)
    if case["layout"] == "strided x":
        low["x"] = torch.cat([low["x"], low["x"]], 1)[:, :k]
    elif case["layout"] == "transposed factors":
        low["u"], low["v"] = low["u"].t().contiguous().t(), low["v"].t().contiguous().t()
    exact = {name: None if t is None else t.double() for name, t in low.items()}
    results = []
    mode, _, seed = case["mode"].partition(" ")
    for how in [{}] * (mode != "race") + [{"mode": mode, "seed": int(seed or 0), "record": record}]:
        with cuda_emulation(processors=case["processors"], **how) as ran:
            results.append(run(call, low, dy.to(dtype), wanted))
    kernels = {launch.kernel for launch in ran.launches}
    if m <= 32:
        assert "linear_kernel" not in kernels
        assert [launch.kernel for launch in ran.launches[:2]] == ["small_shrink_kernel", "small_linear_kernel"]
    else:
        assert "pack_kernel" in kernels
        assert "forward_kernel" in kernels or kernels >= {"shrink_kernel", "linear_kernel"}
    assert ("outer_kernel" in kernels) == bool({"u", "v"} & set(wanted))
    for name, one, again in zip(("y", *wanted), results[0], results[-1], strict=True):
        assert torch.equal(one, again), f"{name} has other bits under {case['mode']}"
    truth = run(expected, exact, dy.to(dtype), wanted)
    sizes = {name: None if t is None else t.abs() for name, t in exact.items()}
    size = run(expected, sizes, dy.to(dtype).abs(), wanted)
    assert_accurate(results[-1], truth, size, run(expected, low, dy.to(dtype), wanted), dtype, ("y", *wanted))


@with_kernels
@pytest.mark.parametrize(
    "case",
    cover(LAYERS) + cover(LAYERS | ADVERSE) + cover(LAYERS | FLOAT),
    ids=case_name,
)
def test_a_layer_is_right_under_every_adversity(case: dict, record_property: Callable[[str, object], None]) -> None:
    check_layer(case, record_property)


@with_kernels
@pytest.mark.parametrize("case", cover(LAYERS | FEW), ids=case_name)
def test_a_layer_of_few_rows(case: dict, record_property: Callable[[str, object], None]) -> None:
    check_layer(case, record_property)


@with_kernels
@pytest.mark.parametrize("form", ["sigma", "core", "none"])
def test_a_layer_without_a_weight(form: str) -> None:
    o = operands(9, 40, 24, 5, form=form, weight=False)
    with cuda_emulation():
        check(o, torch.randn(9, 24), "cuda", torch.bfloat16, (torch.float32,) * 3, present(o))


@with_kernels
def test_the_weight_may_be_trained_and_of_another_dtype() -> None:
    o = operands(40, 64, 24, 5)
    with cuda_emulation(scale_on_host=True):
        check(o, torch.randn(40, 24), "cuda", torch.bfloat16, (torch.float32,) * 3, ("x", "weight", "u"))
        low = cast(o, torch.bfloat16, (torch.float32,) * 3)
        y = fused(low | {"weight": low["weight"].float()}, backend="cuda")
        assert torch.equal(y, fused(low, backend="cuda"))


@with_kernels
def test_an_expanded_x_and_one_whose_rows_are_not_contiguous() -> None:
    """pytorch/pytorch#30303: a stride of 0, and strides that have to be copied, give the bits of the contiguous run."""
    low = cast(operands(9, 40, 24, 3), torch.bfloat16, (torch.float32,) * 3)
    dy = torch.randn(9, 24).bfloat16()
    for x in (low["x"][:1].expand(9, 40), low["x"].t().contiguous().t(), torch.cat([low["x"]] * 2, 1)[:, ::2]):
        with cuda_emulation():
            got, want = (
                run(lambda leaves: fused(leaves, backend="cuda"), low | {"x": t}, dy, ("u",))
                for t in (x, x.contiguous())
            )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@with_kernels
@pytest.mark.parametrize("shape", [(0, 8, 6, 2), (5, 8, 6, 0), (5, 0, 6, 2), (5, 8, 0, 2)])
def test_empty_sizes(shape: tuple[int, int, int, int]) -> None:
    o = operands(*shape)
    wanted = ("x", "u", "sigma", "v", "bias")
    low = cast(o, torch.bfloat16, (torch.bfloat16,) * 3)
    dy = torch.ones(shape[0], shape[2]).bfloat16()
    with cuda_emulation():
        got = run(lambda leaves: fused(leaves, backend="cuda"), low, dy, wanted)
    for a, b in zip(got, run(lambda leaves: fused(leaves, backend="eager"), low, dy, wanted), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b)


@with_kernels
def test_a_dropout_of_one_and_batched_gradients() -> None:
    o = cast(operands(6, 40, 24, 5), torch.float32, (torch.float32,) * 3)
    with cuda_emulation():
        y = fused(o, backend="cuda", dropout_p=1.0)
        assert torch.allclose(y, o["x"] @ o["weight"].t() + o["bias"], atol=1e-4)
        x = o["x"].requires_grad_()
        y = fused(o | {"x": x}, backend="cuda")
        (got,) = torch.autograd.grad(y, x, torch.eye(24).repeat(6, 1, 1).permute(1, 0, 2), is_grads_batched=True)
        (one,) = torch.autograd.grad(fused(o | {"x": x}, backend="eager"), x, torch.ones(6, 24) * torch.eye(24)[3])
    assert torch.allclose(got[3], one, atol=1e-4)


@with_kernels
def test_inputs_keep_their_values_and_no_random_number_is_drawn() -> None:
    o = cast(operands(20, 40, 24, 5), torch.bfloat16, (torch.float32,) * 3)
    before = {name: t.clone() for name, t in o.items() if t is not None}
    state = torch.get_rng_state()
    with cuda_emulation():
        run(
            lambda leaves: fused(leaves, backend="cuda", dropout_p=0.3, rng_state=RNG),
            o,
            torch.ones(20, 24).bfloat16(),
            ("x", "u"),
        )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(o[name], t) for name, t in before.items())


# ---------------------------------------------------------------------------------------------- where it cannot run


def test_without_a_gpu_it_says_so_and_falls_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch.read_environment()
    x, w, u, v = torch.ones(2, 8), torch.ones(4, 8), torch.ones(8, 1), torch.ones(4, 1)
    with caplog.at_level(logging.WARNING, "svdkern"):
        for _ in range(2):
            svd_linear(x, w, u, None, v, backend="cuda")
    assert [r.message for r in caplog.records] == [
        "falling back to the eager backend: the cuda backend was asked for a tensor on cpu"
    ]
    monkeypatch.setenv("SVDKERN_STRICT", "1")
    dispatch.read_environment()
    with pytest.raises(RuntimeError, match="SVDKERN_STRICT=1 and backend 'cuda' cannot be used"):
        svd_linear(x, w, u, None, v, backend="cuda")
    monkeypatch.undo()
    dispatch.read_environment()


def a_gpu(monkeypatch: pytest.MonkeyPatch, error: str = "", capability: tuple[int, int] = (9, 0)) -> torch.device:
    """A device as PyTorch would describe it, whose driver says `error` to the kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(cuda, "why_missing", lambda: None)
    monkeypatch.setattr(cuda, "_refused", lambda device: error or None)
    return torch.device("cuda", 0)


def test_a_driver_that_is_too_old_gives_triton(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = a_gpu(monkeypatch, "CUDA driver version is insufficient for CUDA runtime version (35)")
    monkeypatch.setattr("svdkern.backends.triton.why_missing", lambda: None)
    dispatch.read_environment()
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert dispatch._decide("cuda", device, torch.bfloat16).name == "triton"
        assert dispatch._decide("cuda", device, torch.float16).name == "triton"
    assert [r.message for r in caplog.records] == [
        "falling back to the triton backend: CUDA driver version is insufficient for CUDA runtime version (35)"
    ]
    monkeypatch.setattr("svdkern.backends.triton.why_missing", lambda: "no triton")
    assert dispatch._decide("cuda", device, torch.bfloat16).name == "eager"
    dispatch.read_environment()


def test_what_a_gpu_must_have(monkeypatch: pytest.MonkeyPatch) -> None:
    device = a_gpu(monkeypatch)
    assert dispatch.why_not("cuda", device, torch.bfloat16) is None
    assert "has no torch.float64" in str(dispatch.why_not("cuda", device, torch.float64))
    device = a_gpu(monkeypatch, capability=(7, 5))
    assert "compute capability 7.5, the kernels need 8.0" in str(dispatch.why_not("cuda", device, torch.bfloat16))
    monkeypatch.undo()
    monkeypatch.setattr(extension, "why_missing", "no file")
    assert cuda.why_missing() == "the compiled extension is not there: no file"


def test_splits_of_few_rows_fill_every_processor_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "processors", lambda device: 132)
    like = torch.empty(0, dtype=torch.bfloat16)

    def splits(depth: int, out: int, adapter: bool = True, w: torch.Tensor | None = like) -> tuple[int, int]:
        work = cuda._Work(like)
        work.small_counters(1, depth, out, w, adapter)
        return work.of_small[0], work.counted

    assert splits(4096, 4096) == (4 + 1, 64)  # 256 CTAs of w, 64 of the adapter
    assert splits(4096, 14336) == (1 + 1, 224)
    assert splits(4096, 14336, adapter=False) == (1, 0)
    assert splits(512, 64) == (2 + 1, 1)  # four steps of 64 columns each
    assert splits(4096, 4096, w=None) == (1, 0)


def test_splits_keep_every_processor_busy_and_none_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "processors", lambda device: 132)
    work = cuda._Work(torch.empty(0, dtype=torch.bfloat16))
    assert work.splits(64 * 300, 16, 4096) == 1  # tiles enough
    assert work.splits(16, 16, 4096) == 16  # steps of 64 columns, four each at least
    assert work.splits(4096, 16, 8192) == 5  # 64 tiles
    assert work.splits(16, 200, 1 << 20) == cuda.MOST_SPLITS
    assert work.splits(16, 16, 8) == 1
