"""The cases of bench/linear.py under pytest-benchmark: its statistics, its saved runs, its comparison for regressions.

    pytest bench --benchmark-only
    pytest bench --benchmark-only --benchmark-save=before       then, after a change:
    pytest bench --benchmark-only --benchmark-compare --benchmark-compare-fail=median:5%

The same cases, operands, rotation and calls as `python -m svdkern bench linear`. Here every provider runs alone, one after
the other: for a regression of one provider that is enough; for a ratio between two, use bench/linear.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from bench import cases
from bench.cases import Case
from bench.linear import QUICK_PROVIDERS, estimated_seconds, make_call
from bench.providers import DTYPES, PROVIDERS, Operands, make_operands
from svdkern import timing

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

GROUPS = [group for group in cases.groups(("readme",)) if group[1] != "fp16" and group[2] == "fwd_bwd"]


@functools.cache
def one_set(case: Case, dtype: str) -> Operands:
    return make_operands(case, DTYPES[dtype], torch.device("cpu"))[0]


def call_of(name: str, case: Case, dtype: str) -> Callable[[int], object]:
    copies = timing.rotation_length(case.bytes(DTYPES[dtype].itemsize), cap_bytes=128 << 20)
    operands = make_operands(case, DTYPES[dtype], torch.device("cpu"), copies)
    return make_call([PROVIDERS[name](o) for o in operands], "fwd_bwd")


@pytest.mark.parametrize("name", QUICK_PROVIDERS)
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group[0]}-{group[1]}")
def test_linear(benchmark: Callable[..., object], group: tuple[Case, str, str], name: str) -> None:
    case, dtype, mode = group
    benchmark.group = f"{case} {dtype}"  # type: ignore[attr-defined]
    if dtype != "fp32" and case.M > 4 and estimated_seconds(name, one_set(case, dtype), mode, 2.0) > 2.0:
        pytest.skip("a call would take more than 2 s")
    call = call_of(name, case, dtype)
    turn = iter(range(1 << 60))
    assert benchmark(lambda: call(next(turn))) is not None


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "--benchmark-only"]))
