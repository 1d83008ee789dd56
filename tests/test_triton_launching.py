"""``launching.launch``: what it remembers of Triton's, and that it never takes one compiled kernel for another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from svdkern.triton_kernels import launching
from torch.nn import Parameter
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import compute_cache_key, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit(do_not_specialize=["M"])
def kernel(x, M, N, bias, scale, R: tl.constexpr, KIND: tl.constexpr):
    pass


@triton.jit
def with_a_default(x, M, N, R: tl.constexpr = 16):
    pass


@triton.jit
def with_a_constant_between(x, R: tl.constexpr, M, N):
    pass


class Loaded(CompiledKernel):
    """A compiled kernel without a GPU: what it is launched with is noted."""

    function = "the function"
    module = packed_metadata = None
    src = None
    name = "kernel"

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def _init_handles(self) -> None:
        pass

    def run(self, *given: Any) -> None:
        grid, stream, (metadata, enter, _), arguments = given[:3], given[3], given[6:9], given[9:]
        self.launched.append((grid, arguments))
        if enter is not None:
            enter(metadata.get() | {"stream": stream})


class Driver:
    """What Triton's launcher asks of a GPU before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Cache(dict[str, Loaded]):
    """Triton's own of one kernel: everything is compiled at once; how often it was asked."""

    asked = 0

    def get(self, key: str, default: Any = None) -> Loaded:  # type: ignore[override]
        self.asked += 1
        return self.setdefault(key, Loaded())


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(launching, "_compiled", {})
    yield
    for each in (kernel, with_a_default, with_a_constant_between):
        each.device_caches.clear()


def cache_of(of: Any) -> Cache:
    cache = Cache()
    of.device_caches[0] = (cache, *of.device_caches[0][1:])
    return cache


X = torch.zeros(64)


def launch(x: torch.Tensor = X, M: int = 5, bias: Any = None, grid: tuple[int, ...] = (3,), **meta: Any) -> None:
    launching.launch(kernel, grid, x, M, 32, bias, 0.5, **({"KIND": "sigma", "R": 16, "num_warps": 4} | meta))


def test_the_second_launch_goes_to_the_compiled_kernel() -> None:
    cache, other = cache_of(kernel), torch.ones(64)
    launch()
    launch(other, M=7)
    assert cache.asked == len(cache) == 1
    (loaded,) = cache.values()
    first, second = loaded.launched
    assert first == ((3, 1, 1), (X, 5, 32, None, 0.5, 16, "sigma"))
    assert second[0] == (3, 1, 1) and second[1][0] is other and second[1][1:] == (7, 32, None, 0.5, 16, "sigma")


@pytest.mark.parametrize("grid", [(3,), (3, 4), (3, 4, 5)])
def test_a_grid_has_one_to_three_numbers(grid: tuple[int, ...]) -> None:
    cache = cache_of(kernel)
    launch(grid=grid)
    launch(grid=grid)
    (loaded,) = cache.values()
    assert [at for at, _ in loaded.launched] == [(*grid, 1, 1)[:3]] * 2 and cache.asked == 1


@pytest.mark.parametrize(
    "other",
    [{"x": X.bfloat16()}, {"x": X[1:]}, {"bias": X}, {"R": 32}, {"KIND": "core"}, {"num_warps": 8}, {"maxnreg": 128}],
    ids=["dtype", "alignment", "None", "constant", "text", "option", "another option"],
)
def test_what_triton_compiles_anew_is_asked_for_again(other: dict[str, Any]) -> None:
    cache = cache_of(kernel)
    launch()
    launch(**other)
    assert len(cache) == 2
    for _ in range(2):
        launch()
        launch(**other)
    assert cache.asked == 2 and [len(loaded.launched) for loaded in cache.values()] == [3, 3]


def test_a_knob_that_is_turned_between_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(kernel)
    launch()
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    launch()
    assert len(cache) == 2


def test_batch_sizes_do_not_fill_the_memory() -> None:
    cache_of(kernel)
    for M in range(1, 1000):
        launch(M=M)
    assert len(launching._compiled) == 3  # 1, multiples of 16, the rest


@pytest.mark.parametrize(
    ("of", "arguments", "meta"),
    [
        (kernel, (X, 5, 32, None, 0.5, 16), {"KIND": "core"}),
        (with_a_default, (X, 5, 32), {}),
        (with_a_constant_between, (X, 16, 5, 32), {}),
        (with_a_constant_between, (X,), {"R": 16, "M": 5, "N": 32}),
        (kernel, (X, 5, 32, (X, 2), 0.5), {"R": 16, "KIND": "core"}),
    ],
    ids=["a constant by position", "a default", "a constant between", "an argument by name", "a tuple"],
)
def test_launches_of_other_forms_are_tritons_own(of: Any, arguments: tuple[Any, ...], meta: dict[str, Any]) -> None:
    cache = cache_of(of)
    for _ in range(2):
        launching.launch(of, (1,), *arguments, **meta)
    assert cache.asked == 2 and not launching._compiled
    (loaded,) = cache.values()
    assert [len(given) for _, given in loaded.launched] == [len(of.arg_names)] * 2


def test_what_was_not_compiled_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **_: True)  # Triton compiles nothing, gives None
    launch()
    assert not launching._compiled


def test_hooks_see_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, seen = cache_of(kernel), []
    launch()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", seen.append)
    launch()
    assert seen == [{"name": "kernel", "function": "the function", "stream": 7}] and cache.asked == 1
    before: list[int] = []
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *arguments, **_: before.append(arguments[1])])
    launch(M=9)
    assert before == [9] and len(seen) == 2


def test_a_capture_takes_what_is_remembered_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(kernel)
    launch()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch()
    (loaded,) = cache.values()
    assert len(loaded.launched) == 2 and cache.asked == 1
    monkeypatch.setattr(Cache, "get", lambda self, key, default=None: default)
    with pytest.raises(RuntimeError, match=r"kernel is not compiled .* call svdkern\.warmup\(model, rows\)"):
        launch(X.half())


# ------------------------------------------------------------------------------------------------- as fine as Triton's key

NEAR = {sign * (1 << bits) + near for bits in (0, 4, 31, 32, 63) for sign in (1, -1) for near in (-16, -1, 0, 1, 16)}
INTEGERS = sorted(n for n in NEAR if -(1 << 63) <= n < 1 << 64)  # those that Triton takes


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64])
    )
    tensor = torch.zeros(64, dtype=dtype)[draw(st.sampled_from([0, 1, 2, 4, 8, 16])) :]
    return Parameter(tensor) if dtype.is_floating_point and draw(st.booleans()) else tensor


@st.composite
def descriptors(draw: st.DrawFn) -> TensorDescriptor:
    base = torch.zeros(64, 64, dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])))
    return launching.descriptor(base, draw(st.sampled_from([[16, 64], [64, 16], [1, 16], [32, 64]])))


KINDS = [st.sampled_from(INTEGERS), st.none(), st.booleans(), st.floats(width=32), tensors(), descriptors()]
VALUES = st.one_of(KINDS)


@triton.jit(do_not_specialize=["c"])
def any_kernel(a, b, c, d, R: tl.constexpr):
    pass


BINDER = create_function_from_signature(any_kernel.signature, any_kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))


def check_keys(launches: list[list[Any]]) -> None:
    keys = []
    for arguments in launches:
        ours = launching._specialisation(tuple(arguments))
        assert ours is not None
        keys.append((compute_cache_key({}, *BINDER(*arguments, R=16)[1:]), ours))
    for (theirs, ours), (their_other, our_other) in itertools.combinations(keys, 2):
        assert theirs == their_other or ours != our_other


@settings(deadline=None, max_examples=400)
@given(st.lists(VALUES, min_size=4, max_size=4), st.integers(0, 3), st.one_of([st.tuples(k, k) for k in KINDS]), VALUES)
def test_what_triton_tells_apart_has_two_keys(rest: list[Any], place: int, alike: tuple[Any, Any], other: Any) -> None:
    check_keys([[*rest[:place], value, *rest[place + 1 :]] for value in (*alike, other)])


@pytest.mark.parametrize("place", [0, 2], ids=["specialised", "not specialised"])
def test_integers_that_triton_tells_apart_have_two_keys(place: int) -> None:
    check_keys([[value if at == place else None for at in range(4)] for value in INTEGERS])
