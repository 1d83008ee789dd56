"""Small layers side by side, each on one thread; large ones alone, with all threads.

A small layer's decomposition is a chain of small operations, which more threads make slower. Layer: below ``model``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from svdkern.linalg.precision import full_precision

Item = TypeVar("Item")
Result = TypeVar("Result")

_SHORT_SIDE = 1024  # up to here svdkern.linalg.factors takes one thread anyway, so that its bits are the same here
_MOST_ELEMENTS = 1 << 24


def is_small(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape is decomposed on one thread, with little memory."""
    return min(shape) <= _SHORT_SIDE and shape[0] * shape[1] <= _MOST_ELEMENTS


def layer_by_layer(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    small: Callable[[Item], bool],
    progress: Callable[[Iterable[Callable[[], Result]]], Iterable[Callable[[], Result]]],
) -> list[Result]:
    """``[work(item) for item in items]``, the small ones in as many threads at once as PyTorch computes with.

    The first error, of the small ones in their order, then of the large ones, is raised once those at work have ended; what has
    not begun does not begin. ``progress`` wraps the sequence of calls that are waited for, in the same order.
    """
    threads = torch.get_num_threads()
    order = sorted(range(len(items)), key=lambda i: not small(items[i]))
    found: dict[int, Result] = {}
    try:
        # Its settings are the process's: entered here, the threads find nothing to change, and none undoes another's.
        with full_precision(torch.device("cpu")), ThreadPoolExecutor(threads, "svdkern", _take_one_thread) as pool:
            try:
                calls: list[Callable[[], Result]] = [
                    pool.submit(work, items[i]).result if small(items[i]) else partial(work, items[i]) for i in order
                ]
                for i, call in zip(order, progress(calls), strict=True):
                    found[i] = call()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # what a thread sets is the default of threads that begin later
    return [found[i] for i in range(len(items))]


def _take_one_thread() -> None:
    torch.set_num_threads(1)
