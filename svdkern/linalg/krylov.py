"""The leading singular triplets of an operator by a block Krylov method: one-sided block Golub-Kahan, restarted thick.

    V_1 = orth(C^T C Omega)         Omega +-1
    V_{j+1} R_j = orth(C^T C V_j, less all of V_1 ... V_j)

The triplets are those of C on the leading Ritz vectors of ``V^T C^T C V`` (``space.py``). The Ritz residual of ``C^T C`` comes
with R_j for nothing and says when to look; the residual ``|C^T u_i - sigma_i v_i|``, computed by the products that give the
triplets, says whether to stop. When the basis is full its leading Ritz vectors and the last block go on.

References: Golub, Luk, Overton, "A block Lanczos method for computing the singular values and corresponding singular
vectors of a matrix", TOMS 1981; Musco & Musco, "Randomized block Krylov methods", NeurIPS 2015; Tropp & Webber, "Randomized
algorithms for low-rank matrix approximation", 2023; Wu & Simon, "Thick-restart Lanczos method", SIMAX 2000.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdkern.linalg.certificate import DELTA, Certificate, bound_of_the_rest, certificate, probe
from svdkern.linalg.missed import missed_directions, suspicion
from svdkern.linalg.operand import ROUGH, ROUGH_COLUMNS, Operator
from svdkern.linalg.orthogonal import new_directions, project_out
from svdkern.linalg.sketch import sketch
from svdkern.linalg.space import Ritz, Space

_ROUGH_TOL = 1e-5  # below it every step is made in the working precision


@dataclass(frozen=True)
class Leading:
    """``C ~ left diag(sigma) right^T`` in float64, and how it was found."""

    left: Tensor
    sigma: Tensor
    right: Tensor
    residuals: Tensor
    next_value: float
    converged: bool
    steps: int
    restarts: int
    passes: int
    fallbacks: tuple[str, ...]
    certificate: Certificate | None
    rough: bool


@dataclass
class _Schedule:
    """When to compute triplets: the estimates fall geometrically, and looking costs a product and two small problems."""

    due: int = 2
    last: tuple[int, float] | None = None

    def note(self, step: int, excess: float) -> None:
        """``excess``: the largest estimated residual over what is allowed, more than 1."""
        ahead = 1
        if self.last is not None and 0 < excess < self.last[1] and math.isfinite(self.last[1]):
            rate = math.log(self.last[1] / excess) / (step - self.last[0])
            ahead = min(3, max(1, int(math.log(excess) / rate)))
        self.last = (step, excess)
        self.due = step + ahead


@dataclass
class _Random:
    """The columns of the endless sketch, in turn."""

    operator: Operator
    seed: int
    used: int = 0
    fallbacks: list[str] = field(default_factory=list)

    def take(self, count: int) -> Tensor:
        first, self.used = self.used, self.used + count
        return sketch(
            self.operator.columns,
            count,
            seed=self.seed,
            first=first,
            dtype=self.operator.dtype,
            device=self.operator.device,
        )

    def note(self, fallback: str | None) -> None:
        if fallback and fallback not in self.fallbacks:
            self.fallbacks.append(fallback)


def leading(
    operator: Operator,
    k: int,
    *,
    block: int,
    capacity: int,
    tol: float,
    max_passes: int,
    seed: int,
    start: Tensor | None = None,
    certify: bool = False,
) -> Leading:
    """The k leading triplets of ``operator``.

    Args:
        block: columns of a block; a value of higher multiplicity than this is found where k asks for it, but later.
        capacity: columns of the basis before it is restarted, at least ``5/4 k + 3 block`` (or all columns).
        tol: stop when every ``residual_i^2 <= tol * next_value^2``, or when it is rounding error.
        max_passes: products with the operator or its transpose; the best triplets until then are returned.
        start: (columns, p) of a subspace that is close to the wanted one.
        certify: probes what was not found (``certificate.py``), at the cost of a few more products.
    """
    random = _Random(operator, seed)
    space = Space(operator, capacity)
    probing = (lambda right: probe(operator, right, seed)) if certify else None
    q = _first_block(operator, min(block, operator.columns), random, start)
    schedule, steps, restarts = _Schedule(), 0, 0
    rough = began_rough = operator.has_rough and tol >= _ROUGH_TOL and min(block, operator.columns) >= ROUGH_COLUMNS
    while True:
        image, rest = operator.both(q, rough)
        longest = float(torch.linalg.vector_norm(rest, dim=0).max())
        largest = space.append(q, image, rest)
        steps += 1
        noise = operator.noise(largest) * largest + 4 * torch.finfo(operator.dtype).eps * longest
        following, _, fallback = new_directions(space.basis, rest, noise, random.take)
        random.note(fallback)
        last, more = q.shape[1], None
        exhausted = following.shape[1] == 0
        spent = operator.passes + 4 > max_passes and space.width >= k  # a step and the triplets
        enough = space.width > k
        if exhausted or spent or (enough and steps >= schedule.due):
            values, vectors = space.ritz()
            link = torch.mm(following.t(), rest).to("cpu", torch.float64)
            excess = _excess(operator, values, link @ vectors[-last:], k, tol)
            if exhausted or spent or excess <= 1:
                if _steep(operator, values, k, tol, rough):
                    space.keep_images()
                found = space.triplets(k, (values, vectors), probing)
                converged = _accepts(operator, found, tol, exhausted)
                if not converged and (excess <= 1 or exhausted) and not space.keeps_images:
                    space.keep_images()
                    found = space.triplets(k, (values, vectors))
                    converged = _accepts(operator, found, tol, exhausted)
                rough = rough and not space.keeps_images
                doubt = suspicion(found, block, tol) if converged and not exhausted else None
                if doubt is not None and not spent:
                    most = min(steps, (max_passes - operator.passes) // 2)
                    more = missed_directions(operator, found.right, *doubt, most, random.take)
                    # All of ``following`` goes on: without a part of it the residuals that lie there would stay.
                    more = None if more is None else more[:, : space.capacity - k - following.shape[1]]
                if exhausted or spent or (converged and more is None):
                    accepted = converged and not (spent and doubt)
                    certified = _certify(operator, found, steps, seed) if certify else None
                    return Leading(
                        found.left, found.sigma, found.right, found.residuals, found.next_value, accepted,
                        steps, restarts, operator.passes, tuple(random.fallbacks), certified, began_rough,
                    )  # fmt: skip
                schedule.due = steps + 1
            else:
                schedule.note(steps, excess)
        wanted = min(following.shape[1] + (0 if more is None else more.shape[1]), operator.columns - space.width)
        if space.width + wanted > space.capacity:
            # A quarter more than k: the values next to the wanted ones are what convergence depends on.
            space.restart(min(k + max(block // 2, k // 4), space.capacity - wanted))
            restarts += 1
        q = following if more is None else _wider(space, following, more[:, : wanted - following.shape[1]], random)


def _first_block(operator: Operator, block: int, random: _Random, start: Tensor | None) -> Tensor:
    nothing = torch.empty(operator.columns, 0, dtype=operator.dtype, device=operator.device)
    if start is not None and start.shape[1] >= block:
        q, _, fallback = new_directions(nothing, start, 0.0, random.take)
    else:
        count = block if start is None else block - start.shape[1]
        image, x = operator.both(random.take(count))
        size = float(torch.linalg.vector_norm(image, dim=0).max())
        noise = operator.noise(size / operator.columns**0.5) * size
        if start is not None:
            length = torch.linalg.vector_norm(x, dim=0).max().clamp(min=torch.finfo(x.dtype).tiny)
            x, noise = torch.cat([start, x / length], dim=1), 0.0
        q, _, fallback = new_directions(nothing, x, noise, random.take)
    random.note(fallback)
    return q


def _wider(space: Space, following: Tensor, more: Tensor, random: _Random) -> Tensor:
    """``following`` and what ``more`` adds to it and to the basis."""
    known = torch.cat([space.basis, following], dim=1)
    project_out(known, more)
    random.note("another random block")
    return torch.cat([following, new_directions(known, more, 0.0, random.take)[0]], dim=1)


def _excess(operator: Operator, squares: Tensor, links: Tensor, k: int, tol: float) -> float:
    """The largest estimated residual over the allowed one. An estimate has the rounding error of ``C^T C``, not of C."""
    largest = math.sqrt(max(float(squares[0]), 0.0))
    noise = operator.noise(largest)
    next_value = math.sqrt(max(float(squares[k]), 0.0)) if k < squares.numel() else 0.0
    sigma = squares[:k].clamp(min=max(noise * largest, 1e-300)).sqrt()
    estimates = torch.linalg.vector_norm(links[:, :k], dim=0) / sigma
    allowed = (2 * noise * largest / sigma).clamp(min=max(math.sqrt(tol) * next_value, noise, 1e-300))
    return float((estimates / allowed).max())


def _steep(operator: Operator, squares: Tensor, k: int, tol: float, rough: bool) -> bool:
    """Whether the projection's rounding error alone would be a good part of the residual that is allowed."""
    largest, last = math.sqrt(max(float(squares[0]), 0.0)), math.sqrt(max(float(squares[k - 1]), 0.0))
    next_value = math.sqrt(max(float(squares[k]), 0.0)) if k < squares.numel() else 0.0
    allowed = max(math.sqrt(tol) * next_value, operator.noise(largest))
    unit = ROUGH if rough else torch.finfo(operator.dtype).eps
    return 4 * unit * largest**2 > allowed * last


def _accepts(operator: Operator, found: Ritz, tol: float, exhausted: bool) -> bool:
    noise = operator.noise(float(found.sigma[0]))
    allowed = max(math.sqrt(tol) * found.next_value, noise * (4 if exhausted else 1))
    return bool((found.residuals <= allowed).all())


def _certify(operator: Operator, found: Ritz, steps: int, seed: int) -> Certificate:
    omega, *products = found.probed or (probe(operator, found.right, seed),)
    first = (products[0], products[1]) if products else None
    rest = bound_of_the_rest(operator, found.right, omega, first, 1 + steps // 12, DELTA)
    return certificate(found.sigma, found.coupling, rest, operator.noise(float(found.sigma[0])), DELTA)
