"""What a block Krylov method may have missed: more copies of a value than a block has columns, or of values close to it.

A Krylov space holds as many directions of a multiple value as its block has columns, and as long as its residuals are
larger than the gaps within a cluster it takes the cluster for one such value. The next triplets it shows are then those of
smaller values, and nothing in their residuals tells. So where a block's number of values in a row are as close as that, a
few new random columns look for another direction beside those found:

    M = (I - V V^T) C^T C (I - V V^T)        W = span(Omega, M Omega, ... M^(m-1) Omega)       Omega (n, p)

If a unit vector w has ``M w = s^2 w`` and t < s, then W shows a value above t, but for the probability
``P[chi^2_p < x]`` over Omega (+-1 here, nearly Gaussian), as soon as

    T_(m-1)(2 s^2 / t^2 - 1)^2  >=  n / x * t^2 / (s^2 - t^2)

(the Rayleigh quotient of ``T_(m-1)(2 M / t^2 - I) Omega Omega^T w``; Saad, "Numerical methods for large eigenvalue
problems", chapter 6, has the argument).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from svdkern.linalg.operand import Operator
from svdkern.linalg.orthogonal import new_directions, project_out
from svdkern.linalg.space import Ritz, Space

COLUMNS = 16
_QUANTILE = 3.94  # chi^2 with 16 degrees of freedom is below it with probability 1e-3
_EQUAL = 1e-4  # relative spread that counts as none, whatever the residuals
_RESIDUALS = 4  # a cluster of width w leaves residuals of w / 2 at most, and Ritz values that spread less


def suspicion(found: Ritz, block: int, tol: float) -> tuple[float, float] | None:
    """The least of ``block`` values in a row that may be one value, and the value above which another direction would
    change the result by more than its residuals say; None where no run of values would."""
    sigma, away = found.sigma, float(found.residuals.max())
    if sigma.numel() <= block:
        return None
    first, last = sigma[: 1 - block], sigma[block - 1 :]
    least = float(sigma[-1]) + max(2 * away, 2 * tol * found.next_value)
    run = (first - last <= (_EQUAL * first).clamp(min=_RESIDUALS * away)) & (last > least)
    return (float(last[run].min()), least) if bool(run.any()) else None


def missed_directions(
    operator: Operator, right: Tensor, value: float, least: float, most: int, fresh: Callable[[int], Tensor]
) -> Tensor | None:
    """Columns (n, p) near directions orthogonal to ``right`` that C stretches by more than ``least``; None if it shows none.

    Args:
        right: (n, k), the right vectors found.
        value: that of a direction to be found with probability 1 - 1e-3, if ``most`` steps are enough.
        fresh: makes random columns.
    """
    known = right.to(operator.dtype)
    width = min(COLUMNS, operator.columns - known.shape[1])
    steps = min(most, _steps(operator.columns, value, least), (operator.columns - known.shape[1]) // width)
    space = Space(operator, steps * width)
    rest, before = fresh(width), 0
    for step in range(steps):
        project_out(known, rest)
        block = new_directions(torch.cat([known, space.basis], dim=1), rest, 0.0, fresh)[0]
        image, rest = operator.both(block)
        project_out(known, rest)
        space.append(block, image, rest)
        values, vectors = space.ritz()
        above = int((values > least * least).sum())
        if above and (above == before or step == steps - 1):
            return torch.mm(space.basis, vectors[:, :above].to(operator.device, operator.dtype))
        before = above
    return None


def _steps(columns: int, value: float, least: float) -> int:
    ratio = (value / least) ** 2
    growth = math.sqrt(columns / _QUANTILE / (ratio - 1))
    return 1 + math.ceil(math.acosh(max(growth, 1.0)) / math.acosh(2 * ratio - 1))
