"""The dropout stream in PyTorch: made in blocks of rows, whatever their height; what it takes of memory; derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operands import RNG
from test_autograd import call, layer, trainable
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svdkern.backends import philox
from svdkern.backends.philox import dropped, keep_mask, keep_scale


@pytest.mark.parametrize("row0", [0, 2**31 - 2, 2**32 - 3])
@pytest.mark.parametrize(("rows", "cols"), [(7, 37), (5, 8), (1, 1), (0, 9), (4, 0)])
def test_the_height_of_a_block_does_not_change_a_bit(
    monkeypatch: pytest.MonkeyPatch, rows: int, cols: int, row0: int
) -> None:
    whole = keep_mask(rows, cols, RNG, 20000, row0)
    assert whole.shape == (rows, cols)
    for elements in (1, 2 * cols, 3 * cols + 1):
        monkeypatch.setattr(philox, "_CACHE_ELEMENTS", elements)
        assert torch.equal(keep_mask(rows, cols, RNG, 20000, row0), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dropped(dtype: torch.dtype) -> None:
    """Kept elements are rescaled with one rounding, dropped ones are 0 whatever they were; a is not written to."""
    a = torch.randn(30, 21).to(dtype)
    a[3], a[4] = float("inf"), float("nan")
    before, keep = a.clone(), keep_mask(30, 21, RNG, 20000)
    out = dropped(a, RNG, 20000)
    assert torch.equal(out[~keep], torch.zeros_like(out[~keep]))
    torch.testing.assert_close(out[keep], a[keep] * keep_scale(20000), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a, before, rtol=0, atol=0, equal_nan=True)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside take at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in inputs:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_nothing_of_the_size_of_x_but_the_mask_and_the_result() -> None:
    """Made whole, the int64 words took ten times the memory of a bfloat16 x."""
    x = torch.randn(4096, 512).to(torch.bfloat16)
    with PeakBytes() as watch:
        out = dropped(x, RNG, 20000)
    block = 16 * philox._CACHE_ELEMENTS
    assert out.nbytes + x.numel() <= watch.peak <= out.nbytes + x.numel() + block
    assert block < 2 * x.nbytes


def test_forward_mode_and_batched_gradients_pass_through_the_mask() -> None:
    t = trainable(layer(20), "x", "u")
    options = {"backend": "eager", "dropout_p": 0.4, "rng_state": RNG}
    y = call(t, **options)
    upstream = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, (t["x"], t["u"]), upstream, is_grads_batched=True, retain_graph=True)
    for example in range(3):
        single = torch.autograd.grad(y, (t["x"], t["u"]), upstream[example], retain_graph=True)
        for a, b in zip(batched, single, strict=True):
            torch.testing.assert_close(a[example], b, rtol=1e-5, atol=1e-5)
    t = {name: tensor.detach() for name, tensor in t.items()}
    tangent = torch.randn_like(t["x"])
    with torch.autograd.forward_ad.dual_level():
        y = call(t | {"x": torch.autograd.forward_ad.make_dual(t["x"], tangent)}, **options)
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(got, call(t | {"x": tangent}, **options) - t["bias"], rtol=1e-4, atol=1e-4)
