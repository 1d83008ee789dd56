"""A layer as one operator: what its launches are, and what it refuses. That its results are right is in test_cuda_backend.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulated_cuda import CudaEmulation, why_not
from torch import Tensor

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

M, K, N, R = 70, 24, 40, 5


def layer(rows: int = M) -> dict[str, Tensor]:
    sizes = {"x": (rows, K), "dy": (rows, N), "w": (N, K)}
    made = {name: torch.randn(size).bfloat16() for name, size in sizes.items()}
    return made | {"u": torch.randn(K, R), "v": torch.randn(N, R), "sigma": torch.rand(R), "h": torch.randn(rows, R)}


def forward(how: CudaEmulation, t: dict[str, Tensor], less: int = 0, **other: Tensor) -> tuple[Tensor, Tensor]:
    t = t | other
    rows = len(t["x"])
    y, h = t.get("y", torch.empty(rows, N, dtype=torch.bfloat16)), torch.empty(rows, R)
    size = how.call("workspace", t["x"], rows, K, N, R, True, False, 0) - less
    how.call(
        "layer_forward", t["x"], t["w"].t(), t["u"], t["sigma"], t["v"], None, None, 0.5, None, None, None, 0, y, h,
        t.get("z"), t.get("factor"), torch.empty(size, dtype=torch.uint8),
    )  # fmt: skip
    return y, h


def backward(how: CudaEmulation, t: dict[str, Tensor], wanted: str, less: int = 0) -> dict[str, Tensor]:
    rows = len(t["dy"])
    like = {"x": t["x"], "u": t["u"], "sigma": t["sigma"], "v": t["v"], "p": t["h"]}
    outs = {name: torch.full_like(value, float("nan")) for name, value in like.items() if name in wanted.split()}
    mask = sum(bit for bit, name in ((1, "x"), (2, "u"), (4, "sigma"), (8, "v"), (16, "p")) if name in outs)
    size = how.call("workspace", t["dy"], rows, K, N, R, "x" in outs, True, mask) - less
    how.call(
        "layer_backward", t["dy"], t["x"] if "u" in outs else None, t["w"] if "x" in outs else None, t["u"], t["sigma"], t["v"],
        None, 0.5, None, None, t["h"] if {"sigma", "v"} & set(outs) else None, None, 0, *(outs.get(n) for n in like), None, None,
        torch.empty(size, dtype=torch.uint8),
    )  # fmt: skip
    return outs


@pytest.mark.parametrize(
    ("rows", "wanted", "launches"),
    [
        (M, "x u sigma v", "pack shrink linear modulate outer outer"),
        (M, "x", "pack shrink linear"),
        (M, "u", "pack shrink outer"),
        (M, "sigma", "pack shrink modulate"),
        (M, "v", "modulate outer"),
        (M, "p", "pack shrink"),
        (9, "x u sigma v p", "small_shrink small_linear modulate outer outer"),
        (9, "u v", "pack shrink modulate outer outer"),
    ],
)
def test_no_launch_that_nobody_wants(rows: int, wanted: str, launches: str) -> None:
    torch.manual_seed(0)
    t, how = layer(rows), CudaEmulation(processors=30)
    outs = backward(how, t, wanted)
    assert [launch.kernel.removesuffix("_kernel") for launch in how.launches] == launches.split()
    dy, v, sigma = t["dy"].double(), t["v"].bfloat16().double(), t["sigma"].double()
    t16 = 0.5 * dy @ v
    q = (t16 * sigma).bfloat16().double()
    expected = {
        "p": dy @ v,
        "sigma": (t["h"].double() * t16).sum(0),
        "x": dy @ t["w"].double() + q @ t["u"].bfloat16().double().t(),
        "u": t["x"].double().t() @ q,
        "v": dy.t() @ (0.5 * t["h"].double() * sigma).bfloat16().double(),
    }
    for name, got in outs.items():
        assert torch.allclose(got.double(), expected[name], rtol=2**-6, atol=2**-7 * expected[name].abs().max()), name


def test_the_launches_of_a_forward() -> None:
    for rows, launches in ((9, "small_shrink small_linear"), (M, "pack shrink linear")):
        how = CudaEmulation()
        forward(how, layer(rows))
        assert [launch.kernel.removesuffix("_kernel") for launch in how.launches] == launches.split()


BAD: list[tuple[Callable[[CudaEmulation], object], str]] = [
    (lambda how: forward(how, layer(), less=200), "workspace has [0-9]+ bytes, expected [0-9]+"),
    (lambda how: backward(how, layer(), "x u sigma v", less=200), "workspace has [0-9]+ bytes, expected [0-9]+"),
    (lambda how: forward(how, layer(), x=torch.randn(M, 2 * K).bfloat16()[:, ::2]), "the rows of x must be contiguous"),
    (lambda how: forward(how, layer(), v=torch.randn(N + 1, R)), "v is 41, expected 40"),
    (lambda how: forward(how, layer(), u=torch.randn(K, R + 1)), "the rank of a factor is 5, expected 6"),
    (lambda how: forward(how, layer(), y=torch.empty(M, N)), "y must have the dtype of x"),
    (
        lambda how: forward(how, layer(), z=torch.empty(M, 16).bfloat16(), factor=torch.empty(N, 16).bfloat16()),
        r"either a result, or z \(or q\) and factor for it",
    ),
    (lambda how: forward(how, layer(), z=torch.empty(M, 16).bfloat16()), r"z \(or q\) and factor come together"),
    (lambda how: forward(how, layer(), sigma=torch.rand(R + 1)), "the size of sigma is 6, expected 5"),
]


@pytest.mark.parametrize(("run", "message"), BAD, ids=[message for _, message in BAD])
def test_what_does_not_fit_is_refused_before_a_launch(run: Callable[[CudaEmulation], object], message: str) -> None:
    how = CudaEmulation()
    with pytest.raises(RuntimeError, match=message):
        run(how)
    assert not how.launches


@pytest.mark.parametrize(("shared", "large"), [(99 << 10, False), (163 << 10, True)])
def test_few_rows_keep_to_the_shared_memory_that_there_is(shared: int, large: bool) -> None:
    how = CudaEmulation(processors=30, shared=shared)
    forward(how, layer(20))
    of_linear = next(launch for launch in how.launches if launch.kernel == "small_linear_kernel")
    assert of_linear.shared < shared and (of_linear.shared > 99 << 10) == large
