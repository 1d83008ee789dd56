"""What is certain about leading triplets, and with which probability.

With ``A V = U diag(S)`` (exact: the triplets are a Rayleigh-Ritz step) and any orthonormal completions, A is unitarily

    [ diag(S)  F ]      |F| = |A^T U - V diag(S)|, computed
    [    0     G ]      |G| = |A (I - V V^T)|, not known: a direction that was missed is in G

So everything hangs on ``|G|``. A residual says nothing about it; a random probe does: with Gaussian columns Omega (n, p) and
``M = (I - VV^T) A^T A (I - VV^T)``, a unit vector w with ``M w = |G|^2 w`` gives

    lambda_max(Omega^T M^q Omega) >= |G|^2q |Omega^T w|^2,        |Omega^T w|^2 ~ chi^2_p

because Omega is independent of V and so of w. Hence ``|G| <= (lambda_max / x)^(1/2q)`` for every q at once, but for the
probability ``delta = P[chi^2_p < x]``. The more products (q), the nearer this bound is to ``|G|``.

If ``|G| <= S_k``, nothing was missed. Then ``|sigma_i - S_i| <= |F|`` (Weyl), and beyond the bound ``B`` of ``|G|``, with
``gap_i = S_i - B > 0``:

    |sigma_i - S_i| <= 2 |F|^2 / (gap_i + sqrt(gap_i^2 + 4 |F|^2))        sin angle <= |F| / gap_k

References: Dixon, "Estimating extremal eigenvalues and condition numbers of matrices", SINUM 1983; Li & Li, "A note on
eigenvalues of perturbed Hermitian matrices", LAA 2005; Davis & Kahan 1970, Wedin 1972.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdkern.linalg.operand import Operator
from svdkern.linalg.sketch import gaussian

DELTA = 1e-3
COLUMNS = 16


@dataclass(frozen=True)
class Certificate:
    """Bounds that hold with probability at least ``1 - delta`` over the probe, up to rounding; true singular values are
    called ``sigma_i``."""

    delta: float
    missed: float
    """No unit vector orthogonal to V is stretched by more than this."""
    complete: bool
    """Whether ``missed`` is below the last value: then no direction was missed, and the k values are the k largest. If not,
    the matrix may have another value up to ``missed`` beside them, or it has no gap that so few products could show."""
    values: Tensor
    """(k,) float64: ``|S[i] - sigma_i|`` is at most this, given that nothing was missed."""
    subspace: float
    """The sine of the largest angle between the space found and the true one, of U and of V, given that nothing was missed;
    1 where there is no gap to tell them apart. Nothing is said about single vectors within a cluster."""
    energy: float
    """``|A - U diag(S) V^T|_F^2`` is at most this above that of the best rank k, given that nothing was missed."""

    def scaled(self, scale: float) -> Certificate:
        """That of ``scale * A``."""
        return replace(self, missed=self.missed * scale, values=self.values * scale, energy=self.energy * scale * scale)


def probe(operator: Operator, right: Tensor, seed: int) -> Tensor:
    """Omega, with the found space taken out; right (columns, k) float64."""
    omega = gaussian(operator.columns, COLUMNS, seed=seed, device=operator.device)
    return _without(right, omega).to(operator.dtype)


def bound_of_the_rest(
    operator: Operator, right: Tensor, omega: Tensor, first: tuple[Tensor, Tensor] | None, products: int, delta: float
) -> float:
    """A bound of ``|C (I - right right^T)|`` that holds but for the probability ``delta``.

    Args:
        omega: what ``probe`` made.
        first: ``operator.both(omega)``, where it is known.
        products: how many times both products are made.
    """
    quantile = _chi2_quantile(omega.shape[1], delta)
    bound, x, log_scale = math.inf, omega, 0.0
    for i in range(products):
        image, back = first if i == 0 and first is not None else operator.both(x)
        back64 = _without(right, back.to(torch.float64))
        for q, half in ((2 * i + 1, image.to(torch.float64)), (2 * i + 2, back64)):
            largest = float(torch.linalg.eigvalsh(half.t() @ half)[-1])
            if largest <= 0:
                return 0.0
            bound = min(bound, math.exp((math.log(largest / quantile) + log_scale) / (2 * q)))
        size = float(torch.linalg.vector_norm(back64))
        log_scale += 2 * math.log(size)
        x = (back64 / size).to(operator.dtype)
    return bound


def certificate(sigma: Tensor, coupling: Tensor, rest: float, noise: float, delta: float) -> Certificate:
    """Args:
    sigma: (k,) S, descending, float64.
    coupling: (k, k) ``F F^T``, float64.
    rest: the bound of ``|G|``.
    noise: the rounding error of a singular value.
    """
    squares = torch.linalg.eigvalsh(coupling)
    f = math.sqrt(max(float(squares[-1]), 0.0))
    rest = rest + noise
    gap = (sigma - rest).clamp(min=0)
    values = 2 * f * f / (gap + (gap.square() + 4 * f * f).sqrt()).clamp(min=torch.finfo(torch.float64).tiny) + noise
    last = float(gap[-1])
    return Certificate(
        delta=delta,
        missed=rest,
        complete=last > 0,
        values=values.to("cpu"),
        subspace=min(1.0, (f + noise) / last) if last > 0 else 1.0,
        energy=float((2 * sigma * values + values.square()).sum()),
    )


def _without(right: Tensor, x: Tensor) -> Tensor:
    return x - right @ (right.t() @ x)


def _chi2_quantile(freedom: int, probability: float) -> float:
    """x with ``P[chi^2 < x] = probability``, by bisection of the regularised incomplete gamma function."""
    low, high = 0.0, float(freedom)
    half = torch.tensor(freedom / 2, dtype=torch.float64, device="cpu")
    for _ in range(100):
        middle = (low + high) / 2
        below = float(torch.special.gammainc(half, half.new_tensor(middle / 2)))
        low, high = (middle, high) if below < probability else (low, middle)
    return low
