"""The accuracy rule: a result may err twice as much as same-dtype eager PyTorch does, plus a floor of 4 roundoffs.

Errors are against the same formula in float64, norm-wise and at the worst element; the floor is relative to the formula on
absolute values, so that cancellation is not held against a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}

Results = Sequence[Tensor]


def assert_accurate(
    got: Results, truth: Results, magnitude: Results, eager: Results, dtype: torch.dtype, names: Sequence[str] = ()
) -> None:
    """Fail, naming the result, where ``got`` is less accurate than the rule allows; NaN fails."""
    for position, (a, exact, size, plain) in enumerate(zip(got, truth, magnitude, eager, strict=True)):
        name = names[position] if names else str(position)
        assert a.shape == exact.shape, f"{name} is {tuple(a.shape)}, expected {tuple(exact.shape)}"
        if not a.numel():
            continue
        error, eager_error = (a.double() - exact).abs(), (plain.double() - exact).abs()
        measures: tuple[Callable[[Tensor], Tensor], ...] = (torch.linalg.vector_norm, torch.max)
        for measure in measures:
            bound = 2 * float(measure(eager_error)) + 4 * ROUNDOFF[dtype] * float(measure(size))
            assert float(measure(error)) <= bound, (
                f"{name}: {measure.__name__} error {float(measure(error)):.3e} above {bound:.3e} "
                f"(eager {float(measure(eager_error)):.3e})"
            )
