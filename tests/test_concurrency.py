"""The kernels among other threads and processes: more threads than cores, several callers at once, after a fork."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from svdkern import svd_linear
from svdkern.backends import choices, extension
from svdkern.backends.table import Shape

pytestmark = pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension")

SHAPES = [(1, 300, 500, 4), (20, 500, 300, 16), (70, 160, 96, 5), (600, 130, 200, 17)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layer(case: int) -> list[Tensor]:
    """y and every gradient of one of 12 layers, dropout included; the same inputs at every call."""
    (m, k, n, r), dtype = SHAPES[case % 4], DTYPES[case // 4]
    g = torch.Generator().manual_seed(case)
    x, w = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, k, generator=g).to(dtype)
    u, v, sigma = (torch.randn(*size, generator=g) for size in ((k, r), (n, r), (r,)))
    leaves = [t.requires_grad_() for t in (x, u, sigma, v)]
    y = svd_linear(x, w, u, sigma, v, dropout_p=0.1, rng_state=torch.tensor([3, case]), backend="cpu")
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn(m, n, generator=g).to(dtype))]


def all_layers() -> list[list[Tensor]]:
    return [layer(case) for case in range(12)]


def same(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> bool:
    """The same bits where our kernels compute everything; near them where the base product, and its bits, are PyTorch's."""
    for case, (outputs, expected) in enumerate(zip(found, wanted, strict=True)):
        chosen = choices.choose(Shape(*SHAPES[case % 4]), DTYPES[case // 4], eager=False)
        for a, b in zip(outputs, expected, strict=True):
            if chosen.path == "fused":
                assert torch.equal(a, b), f"case {case}"
            else:
                torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    return True


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16])
def test_more_threads_than_cores_give_the_same_bits(threads: int) -> None:
    torch.set_num_threads(1)
    wanted = all_layers()
    torch.set_num_threads(threads)
    assert same(all_layers(), wanted)


def test_several_python_threads_at_once() -> None:
    wanted = all_layers()
    start = threading.Barrier(4)

    def work(_: int) -> list[list[list[Tensor]]]:
        start.wait()
        return [all_layers() for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for rounds in pool.map(work, range(4)):
            assert all(same(found, wanted) for found in rounds)


def _child(results: Any) -> None:
    torch.set_num_threads(1)  # as DataLoader's workers do: a forked process has no thread but its own
    results.put([[t.float().numpy() for t in outputs] for outputs in all_layers()])


def test_a_forked_process_computes_the_same() -> None:
    torch.set_num_threads(1)
    wanted = all_layers()  # the kernels are chosen and have workspace before the fork
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    child = context.Process(target=_child, args=(results,))
    child.start()
    try:
        found = results.get(timeout=120)
    finally:
        child.join(20)
        child.kill()
    assert child.exitcode == 0
    assert same([[torch.from_numpy(a) for a in one] for one in found], [[t.float() for t in one] for one in wanted])
