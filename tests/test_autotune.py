"""SVDKERN_AUTOTUNE=1: when a running program measures, and above all when not. Nothing is timed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operands import cast, fused, operands
from paths import row
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from svdkern.backends import choices, cpu, dispatch, extension, tuned
from svdkern.backends.table import Shape

pytestmark = [
    pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension"),
    pytest.mark.usefixtures("cache"),
]


@pytest.fixture
def autotuned(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The layers that were measured, of which eager always wins."""
    found: list[Shape] = []

    def seconds(shape: Shape, dtype: torch.dtype, paths: Any, **options: Any) -> dict[str, float]:
        assert options["seconds"] <= choices.AUTOTUNE_SECONDS and options["slowest"] <= choices.AUTOTUNE_SECONDS / 10
        found.append(shape)
        return {path: 1e-3 if path == "eager" else 2e-3 for path in paths}

    monkeypatch.setattr(choices, "seconds_of_paths", seconds)
    monkeypatch.setenv("SVDKERN_AUTOTUNE", "1")
    dispatch.read_environment()
    return found


def leaves(m: int = 8, k: int = 24, n: int = 16, r: int = 4) -> dict[str, Tensor | None]:
    found = cast(operands(m, k, n, r), torch.float32, (torch.float32,) * 3)
    return {name: None if t is None else t.requires_grad_() for name, t in found.items()}


def test_the_first_call_measures_and_all_programs_know(autotuned: list[Shape]) -> None:
    o = leaves()
    first = fused(o)
    assert autotuned == [(8, 24, 16, 4)] and dispatch.choose_path(o["x"], o["v"], None, 0) is cpu.PATHS["eager"]
    for _ in range(3):
        assert torch.equal(fused(o), first)  # jmschrei/cherimoya#50: the first call's bits are those of all
    assert len(autotuned) == 1 and [found.choice for found in tuned.load()] == ["eager"]
    dispatch.read_environment()  # as in another program
    assert torch.equal(fused(o), first) and len(autotuned) == 1
    fused(leaves(9))  # so near that it is not worth 0.3 s
    assert len(autotuned) == 1
    fused(leaves(11))
    fused(leaves(8, r=5))
    assert autotuned[1:] == [(11, 24, 16, 4), (8, 24, 16, 5)]


def test_what_another_process_found_meanwhile_counts(autotuned: list[Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = choices.seconds_of_paths

    def meanwhile(shape: Shape, *rest: Any, **options: Any) -> Any:
        tuned.save(row(shape, "steps"))
        return inner(shape, *rest, **options)

    monkeypatch.setattr(choices, "seconds_of_paths", meanwhile)
    o = leaves()
    fused(o)
    assert dispatch.choose_path(o["x"], o["v"], None, 0) is cpu.PATHS["steps"]


def test_a_layer_too_large_for_it_keeps_its_choice_and_is_not_tried_again(
    autotuned: list[Shape], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Shape] = []
    monkeypatch.setattr(
        choices, "seconds_of_paths", lambda shape, *_, **__: calls.append(shape) or {"fused": None, "eager": 1.0}
    )
    o = leaves()
    for _ in range(3):
        fused(o)
    assert len(calls) == 1 and not tuned.load()
    assert dispatch.choose_path(o["x"], o["v"], None, 0) is cpu.PATHS["fused"]


def _compiled(o: dict[str, Tensor | None]) -> None:
    torch._dynamo.reset()
    torch.compile(lambda: fused(o), backend="aot_eager", fullgraph=True)().sum().backward()
    torch._dynamo.reset()


def _vmapped(o: dict[str, Tensor | None]) -> None:
    torch.func.vmap(lambda x: fused(o | {"x": x[None]}))(o["x"])


def _in_a_backward(o: dict[str, Tensor | None]) -> None:
    class Calls(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            fused(o)
            return dy

    Calls.apply(torch.ones(2, requires_grad=True)).sum().backward()


def _counted(o: dict[str, Tensor | None]) -> None:
    with FlopCounterMode(display=False):
        fused(o)


def _on_a_device(o: dict[str, Tensor | None]) -> None:
    with torch.device("meta"):
        fused(o)


def _fake(o: dict[str, Tensor | None]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fused({name: None if t is None else mode.from_tensor(t) for name, t in o.items()})


def _deterministic(o: dict[str, Tensor | None]) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        fused(o)
    finally:
        torch.use_deterministic_algorithms(False)


def _ranks(o: dict[str, Tensor | None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        fused(o)


def _capturing(o: dict[str, Tensor | None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        fused(o)


def _other_backends(o: dict[str, Tensor | None]) -> None:
    fused(o, backend="eager")
    fused({name: None if t is None else t.double() for name, t in o.items()})


def _nothing_to_do(o: dict[str, Tensor | None]) -> None:
    for sizes in ((0, 24, 16, 4), (8, 24, 16, 0)):
        fused(leaves(*sizes))


@pytest.mark.parametrize(
    "where",
    [_compiled, _vmapped, torch.func.grad, _in_a_backward, _counted, _on_a_device, _fake, _deterministic, _ranks, _capturing,
     _other_backends, _nothing_to_do],
)  # fmt: skip
def test_nothing_is_measured(where: Callable[[Any], Any], autotuned: list[Shape]) -> None:
    o = leaves()
    if where is torch.func.grad:
        torch.func.grad(lambda x: fused(o | {"x": x}).sum())(o["x"])
    else:
        where(o)
    assert not autotuned
    fused(o)
    if where not in (_deterministic, _ranks):
        assert autotuned == [(8, 24, 16, 4)]  # but by the next plain call


def test_a_checkpointed_layer_measures_once_and_never_in_the_backward(autotuned: list[Shape]) -> None:
    o = leaves()
    y = checkpoint(lambda x: fused(o | {"x": x}), o["x"], use_reentrant=False)
    assert len(autotuned) == 1
    dispatch._paths.clear()
    choices.tables().tuned._rows.clear()
    y.sum().backward()
    assert len(autotuned) == 1


def test_the_switch_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDKERN_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="SVDKERN_AUTOTUNE is 'yes', expected 0 or 1"):
        dispatch.read_environment()


def test_autotune_for_real() -> None:
    """With the real clock: whatever it says, a row appears and results stay right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDKERN_AUTOTUNE", "1")
        patch.setattr(choices, "AUTOTUNE_SECONDS", 10.0)  # so that a slow machine does not leave anything out
        inner = choices.seconds_of_paths
        patch.setattr(choices, "seconds_of_paths", lambda *a, **k: inner(*a, **k | {"seconds": 0.01}))
        dispatch.read_environment()
        o = leaves(20)
        state, versions = torch.get_rng_state(), [t._version for t in o.values() if t is not None]
        y = fused(o)
        assert torch.equal(state, torch.get_rng_state())
        assert versions == [t._version for t in o.values() if t is not None]
    assert [found.shape for found in tuned.load()] == [(20, 24, 16, 4)]
    torch.testing.assert_close(y, fused(o, backend="eager"))
