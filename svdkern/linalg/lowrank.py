"""Drop-ins for ``torch.svd_lowrank`` and scikit-learn's ``randomized_svd``, on ``topk_svd``.

Both take as many passes as they were asked for and no more, and stop earlier where the triplets have converged.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor

from svdkern.linalg.topk import TopkSVD, index, topk_svd


def svd_lowrank(
    A: Tensor, q: int = 6, niter: int = 2, M: Tensor | None = None, *, seed: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.svd_lowrank``'s arguments and result, ``A - M ~ U @ diag(S) @ V.mT``, without its use of the global RNG.

    Unlike torch's, the result has no gradient, also where A requires one.

    For ``A = linear.weight`` (N, K), U is the output side (``topk_svd``).

    Args:
        A: (..., m, n), dense and real.
        q: number of triplets, 1 <= q <= min(m, n).
        niter: passes as ``torch.svd_lowrank`` makes them, 2 niter + 2, are the limit here (and two that know the residuals;
            never less than 6).
        M: what is taken from A, of a shape that broadcasts to A's; the difference is formed.
        seed: of the random start; None is 0.
    """
    niter = index(niter, "niter")
    if niter < 0:
        raise ValueError(f"niter is {niter!r}, expected an integer >= 0")
    matrix = A if M is None else A - M
    if matrix.dim() <= 2:
        found = _limited(matrix, q, niter, seed)
        return found.U, found.S, found.V
    batch = matrix.shape[:-2]
    parts = [_limited(a, q, niter, seed) for a in matrix.reshape(-1, *matrix.shape[-2:])]
    if not parts:
        raise ValueError(f"A is {tuple(A.shape)}, expected at least one matrix")
    u, s, v = (torch.stack(t) for t in zip(*((part.U, part.S, part.V) for part in parts), strict=True))
    return u.unflatten(0, batch), s.unflatten(0, batch), v.unflatten(0, batch)


def randomized_svd(
    M: Any,
    n_components: int,
    *,
    n_oversamples: int = 10,
    n_iter: int | Literal["auto"] = "auto",
    power_iteration_normalizer: Literal["auto", "QR", "LU", "none"] = "auto",
    transpose: bool | Literal["auto"] = "auto",
    flip_sign: bool = True,
    random_state: int | None = None,
    svd_lapack_driver: Literal["gesdd", "gesvd"] = "gesdd",
) -> tuple[Any, Any, Any]:
    """``sklearn.utils.extmath.randomized_svd``'s arguments and result: ``U, s, Vt`` with ``M ~ U @ diag(s) @ Vt``.

    Args:
        M: (m, n), a dense tensor, or a NumPy array or what makes one; the result is of the same kind.
        n_components: number of triplets.
        n_iter: power iterations, as a limit; "auto" is until convergence.
        random_state: an integer seed; None is 0, so that a call without one gives the same bits every time.
        n_oversamples, power_iteration_normalizer, transpose, flip_sign, svd_lapack_driver: checked, and without effect: the
            Krylov method chooses its block, and signs are always those of ``flip_sign=True``.
    """
    if index(n_oversamples, "n_oversamples") < 0:
        raise ValueError(f"n_oversamples is {n_oversamples!r}, expected an integer >= 0")
    for name, choice, choices in (
        ("power_iteration_normalizer", power_iteration_normalizer, ("auto", "QR", "LU", "none")),
        ("transpose", transpose, ("auto", True, False)),
        ("svd_lapack_driver", svd_lapack_driver, ("gesdd", "gesvd")),
    ):
        if choice not in choices:
            raise ValueError(f"{name} is {choice!r}, expected one of {', '.join(map(repr, choices))}")
    iterations = None if n_iter == "auto" else index(n_iter, "n_iter")
    if iterations is not None and iterations < 0:
        raise ValueError(f"n_iter is {n_iter!r}, expected 'auto' or an integer >= 0")
    if random_state is not None and not hasattr(random_state, "__index__"):
        raise TypeError(f"random_state is a {type(random_state).__name__}, expected an integer or None")
    found = _limited(M if isinstance(M, Tensor) else _tensor(M), n_components, iterations, random_state)
    results = found.U, found.S, found.V.mT
    return results if isinstance(M, Tensor) else tuple(t.numpy() for t in results)  # type: ignore[return-value]


def _tensor(array: Any) -> Tensor:
    """What NumPy makes of it; integers in float64, as its own linear algebra has them."""
    numpy = importlib.import_module("numpy")
    array = numpy.asarray(array)
    return torch.from_numpy(numpy.ascontiguousarray(array, dtype=float if array.dtype.kind in "biu" else None))


def _limited(matrix: Tensor, k: int, iterations: int | None, seed: int | None) -> TopkSVD:
    passes = 200 if iterations is None else 2 * iterations + 4
    return topk_svd(matrix, k, seed=0 if seed is None else seed, max_passes=passes)
