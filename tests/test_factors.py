"""``linalg.factors``: Chebyshev-filtered subspace iteration, where it hands over, and many layers side by side."""

from __future__ import annotations

import sys
import threading
import time
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from svdkern import SVDLinear, adapt
from svdkern.linalg import factors, filtered
from svdkern.parallel import is_small, layer_by_layer

SHAPES = [(320, 320), (700, 320), (320, 700), (192, 576)]


@lru_cache
def trained(n: int, k: int) -> Tensor:
    """A spectrum as trained weights have: a short head on a bulk with hardly a gap."""
    generator = torch.Generator().manual_seed(0)
    short = min(n, k)
    p, _ = torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64))
    q, _ = torch.linalg.qr(torch.randn(k, short, generator=generator, dtype=torch.float64))
    i = torch.arange(1, short + 1, dtype=torch.float64)
    return (p * (6 / i + 1 - 0.9 * i / short)) @ q.t()


def check(weight: Tensor, r: int) -> None:
    u, sigma, v = factors(weight, r)
    exact = torch.linalg.svdvals(weight.double())
    assert u.shape == (weight.shape[1], r) and v.shape == (weight.shape[0], r)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (u, sigma, v))
    assert bool((sigma.diff() <= 0).all())
    assert ((sigma.double() - exact[:r]).abs() / exact[:r]).max() < 1e-4
    for factor in (u, v):
        assert (factor.double().t() @ factor.double() - torch.eye(r)).abs().max() < 1e-6
    away = weight.double() @ u.double() - v.double() * sigma.double()
    back = weight.double().t() @ v.double() - u.double() * sigma.double()
    allowed = 1e-5**0.5 * exact[min(r, exact.numel() - 1)] * 1.05 + 1e-6 * exact[0]
    assert max(float(t.norm(dim=0).max()) for t in (away, back)) < allowed
    error = (weight.double() - (v.double() * sigma.double()) @ u.double().t()).norm()
    assert error <= exact[r:].norm() * (1 + 1e-5)


@pytest.fixture
def no_other_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the filter should have done this")

    monkeypatch.setattr(sys.modules["svdkern.linalg.factors"], "topk_svd", fail)  # the name is the function's, too


@pytest.mark.usefixtures("no_other_method")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_filter_against_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """huggingface/peft#3049: singular values that are off on real, slowly decaying spectra."""
    check(trained(*shape).to(dtype), 16)


@pytest.mark.usefixtures("no_other_method")
@pytest.mark.parametrize("r", [1, 5, 40])
def test_ranks(r: int) -> None:
    check(trained(400, 300).float(), r)


@pytest.mark.usefixtures("no_other_method")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_panels_give_what_one_panel_gives(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = trained(700, 320).to(dtype)
    whole = factors(weight, 8)
    monkeypatch.setattr(filtered, "_PANEL_ELEMENTS", 320 * 48)
    for a, b in zip(whole, factors(weight, 8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    check(weight, 8)


@pytest.mark.usefixtures("no_other_method")
def test_flat_and_strided() -> None:
    weight = torch.randn(330, 300, generator=torch.Generator().manual_seed(0))
    check(weight, 8)
    every_other = torch.zeros(330, 600)
    every_other[:, ::2] = weight
    for a, b in zip(factors(weight, 8), factors(every_other[:, ::2], 8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_u_is_the_input_side_of_a_square_weight() -> None:
    a = 0.01 * torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    a[1, 3] = 2.0  # output 1, input 3
    u, sigma, v = factors(a, 1)
    assert sigma.item() == pytest.approx(2.0, abs=0.1)
    assert u.abs().argmax() == 3 and v.abs().argmax() == 1 and float(u[3]) > 0.9 and float(v[1]) > 0.9


@pytest.mark.parametrize(
    "weight",
    [
        trained(300, 200).float() * 1e-20,
        trained(300, 200).float() * 1e20,
        torch.zeros(200, 200),
        torch.ones(220, 200),
        torch.diag(torch.logspace(0, -38, 200)),
        trained(300, 200)[:, :5].float() @ torch.randn(5, 200, generator=torch.Generator().manual_seed(1)),
        trained(300, 200).double(),
        torch.eye(200),
    ],
    ids=["tiny", "large", "zero", "ones", "huge range", "rank 5", "float64", "eye"],
)
def test_what_the_filter_refuses_is_done_all_the_same(weight: Tensor) -> None:
    u, sigma, v = factors(weight, 8)
    exact = torch.linalg.svdvals(weight.double())
    assert (sigma.double() - exact[:8]).abs().max() <= 2e-6 * exact[0]
    for factor in (u, v):
        assert (factor.double().t() @ factor.double() - torch.eye(8)).abs().max() < 2e-6
    away = weight.double() @ u.double() - v.double() * sigma.double()
    assert away.norm(dim=0).max() <= 4e-3 * exact[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float) -> None:
    weight = trained(300, 200).float()  # a copy
    weight[7, 9] = value
    with pytest.raises(ValueError, match="NaN or an infinity"):
        factors(weight, 8)


def test_without_values() -> None:
    with pytest.raises(ValueError, match="weight is on the meta device, expected a tensor that has values"):
        factors(torch.ones(300, 200, device="meta"), 8)
    with pytest.raises(TypeError, match="weight is torch.sparse_coo, expected a dense tensor"):
        factors(torch.eye(300).to_sparse(), 8)


@pytest.mark.parametrize("weight", [trained(700, 320).bfloat16(), trained(192, 320).float()], ids=["filter", "wide"])
def test_same_bits_in_any_thread_and_state(weight: Tensor) -> None:
    """huggingface/peft#3310: an initialisation that another state of the global generator changes."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, threads = factors(weight, 16), torch.get_num_threads()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [s.fp32_precision for s in settings]
    try:
        torch.set_num_threads(3)
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16):
            again = factors(weight.clone(), 16)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_bfloat16_is_multiplied_exactly() -> None:
    """G of the bfloat16 units differs from the float64 one by rounding in float32 only."""
    weight = trained(600, 200).bfloat16()
    exact = weight.double().t() @ weight.double()
    for matrix in (weight, weight.float()):
        got = filtered._gram_matrix(filtered._Panels(matrix)).double()
        assert (got - exact).abs().max() < 2e-6 * exact.diagonal().max()
    below = got[filtered._BLOCK :, : filtered._BLOCK]  # of the float32 matrix
    assert torch.equal(below, got[: filtered._BLOCK, filtered._BLOCK :].t())


# ------------------------------------------------------------------------------------------------- layers in parallel


def test_a_model_gets_the_bits_of_its_layers_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(k, n) for n, k in [(200, 200), (320, 200), (1100, 320), (24, 1100)] * 3))
    alone = [SVDLinear.from_linear(layer, 8) for layer in model if isinstance(layer, nn.Linear)]
    adapt(model, "pissa", rank=8)
    for layer, expected in zip(model, alone, strict=True):
        assert all(torch.equal(t, expected.state_dict()[name]) for name, t in layer.state_dict().items())


def test_lora_draws_in_the_models_order() -> None:
    def made(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
        adapt(model, "lora", rank=4)
        torch.set_num_threads(before)
        return [layer.u for layer in model]

    assert all(torch.equal(a, b) for a, b in zip(made(1), made(4), strict=True))


def through(calls: object) -> object:
    return calls


def test_results_keep_the_order_and_large_ones_run_alone() -> None:
    threads, running, together, lock = torch.get_num_threads(), [], [], threading.Lock()

    def work(item: int) -> tuple[int, int]:
        with lock:
            running.append(item)
            together.append(list(running))
        time.sleep(0.002)
        with lock:
            running.remove(item)
        return item, torch.get_num_threads()

    torch.set_num_threads(4)
    try:
        found = layer_by_layer(work, list(range(12)), lambda item: item % 3 > 0, through)
        assert [item for item, _ in found] == list(range(12))
        assert [count for _, count in found] == [4 if item % 3 == 0 else 1 for item in range(12)]
        assert all(group == [group[0]] for group in together if any(item % 3 == 0 for item in group))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_first_error_in_order_ends_it(error: type[BaseException]) -> None:
    done, threads = [], torch.get_num_threads()

    def work(item: int) -> int:
        if item >= 3:
            raise error(f"item {item}")
        done.append(item)
        time.sleep(0.01)
        return item

    torch.set_num_threads(2)
    try:
        with pytest.raises(error, match="item 3"):
            layer_by_layer(work, list(range(200)), lambda item: True, through)
        assert sorted(done) == [0, 1, 2] and torch.get_num_threads() == 2
        assert not [t for t in threading.enumerate() if t.name.startswith("svdkern")]
    finally:
        torch.set_num_threads(threads)


def test_what_is_small() -> None:
    assert is_small((576, 1536)) and is_small((11008, 1024))
    assert not is_small((2048, 2048)) and not is_small((1, 1 << 25))
