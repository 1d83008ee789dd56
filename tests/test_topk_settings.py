"""topk_svd beside the process's settings: precision of products, autocast, default device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from spectra import indices, seeded, with_spectrum

from svdkern.linalg import topk_svd
from svdkern.linalg.precision import full_precision
from svdkern.linalg.topk import Which


def test_autocast_and_reduced_precision_do_not_reach_the_products() -> None:
    a = torch.randn(300, 260, generator=seeded())
    expected = [topk_svd(a, 5, method=method) for method in ("krylov", "exact")]
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "bf16"
        with torch.autocast("cpu", torch.bfloat16):
            inside = [topk_svd(a, 5, method=method) for method in ("krylov", "exact")]
        assert setting.fp32_precision == "bf16"
    finally:
        setting.fp32_precision = before
    for found, wanted in zip(inside, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found[:3], wanted[:3], strict=True))


@pytest.fixture
def precisions() -> Iterator[tuple[Any, ...]]:
    """torch.backends, which the others follow, and those of the CPU's and the GPU's products."""
    settings = (torch.backends, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = torch.backends.fp32_precision
    yield settings
    torch.backends.fp32_precision = before
    for setting in settings[1:]:
        setting.fp32_precision = "none"


def test_a_precision_that_is_inherited_is_still_inherited(precisions: tuple[Any, ...]) -> None:
    above, *own = precisions
    above.fp32_precision = "tf32"
    topk_svd(torch.randn(30, 20, generator=seeded()), 3)
    assert [setting.fp32_precision for setting in own] == ["tf32", "tf32"]
    above.fp32_precision = "ieee"
    assert own[0].fp32_precision == "ieee"


def test_calls_that_overlap_leave_the_precision_as_it_was(precisions: tuple[Any, ...]) -> None:
    setting = precisions[1]
    setting.fp32_precision = "bf16"
    cpu = torch.device("cpu")
    first, second = full_precision(cpu), full_precision(cpu)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert setting.fp32_precision == "bf16"


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_another_default_device_changes_nothing(which: Which) -> None:
    a = with_spectrum(230, 210, indices(210) ** -0.5).float()
    options = {"which": which, "method": "krylov", "certify": which == "largest"}
    plain = topk_svd(a, 3, **options)
    with torch.device("meta"):
        found = topk_svd(a, 3, **options)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], plain[:3], strict=True))
