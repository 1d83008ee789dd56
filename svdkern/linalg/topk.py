"""``topk_svd``: a few singular triplets of a large matrix, with what is known about their error."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from svdkern.linalg.certificate import Certificate, certificate
from svdkern.linalg.crossovers import takes_krylov
from svdkern.linalg.exact import Triplets, largest_triplets, residual_norms, smallest_triplets, with_signs
from svdkern.linalg.implicit import Implicit, LinearOperator
from svdkern.linalg.krylov import leading
from svdkern.linalg.operand import Operand
from svdkern.linalg.precision import full_precision
from svdkern.linalg.smallest import smallest

Which = Literal["largest", "smallest"]
Method = Literal["auto", "krylov", "exact"]
Preset = Literal["fast", "balanced", "accurate"]
TOLERANCES: dict[str, float] = {"fast": 5e-2, "balanced": 1e-3, "accurate": 1e-6}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OPERATOR_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SVDInfo:
    """What ``topk_svd`` did, and what is known about the error."""

    method: str
    """"krylov" or "exact"."""
    which: str
    tol: float
    seed: int
    block: int
    """Columns of a block; 0 for the exact method."""
    steps: int
    restarts: int
    passes: int
    """Products with the matrix or its transpose (smallest: with its inverse); 0 for the exact method."""
    residuals: Tensor
    """(k,) float64 on the CPU. Some singular value of A lies within ``residuals[i]`` of ``S[i]``, up to rounding. That it is
    the i-th supposes that no direction was missed, which a random start makes likely and a residual cannot prove."""
    next_value: float
    """An estimate of the nearest singular value that is not among these; 0 (smallest: inf) where there is none."""
    tail: float
    """``|A - U diag(S) V^T|_F``, from the energies ``|A|^2 - |S|^2`` in float64."""
    converged: bool
    """Whether every residual is at most ``sqrt(tol) * next_value``, or rounding error."""
    fallbacks: tuple[str, ...]
    rough: bool
    """Whether the space was built with products of bfloat16 parts, good to 2^-16 (AMX). Triplets and residuals never are."""
    certificate: Certificate | None
    """With ``certify=True``: bounds, and the probability that they are wrong."""


class TopkSVD(NamedTuple):
    """``A ~ U @ diag(S) @ V.T``."""

    U: Tensor
    S: Tensor
    V: Tensor
    info: SVDInfo


@torch.no_grad()
def topk_svd(
    A: Tensor | LinearOperator,
    k: int,
    *,
    which: Which = "largest",
    tol: float | Preset = 1e-4,
    method: Method = "auto",
    seed: int = 0,
    max_passes: int = 200,
    v0: Tensor | None = None,
    certify: bool = False,
) -> TopkSVD:
    """The k largest or smallest singular triplets: ``A ~ U @ diag(S) @ V.T``.

    **Names**: the usual ones. For ``A = linear.weight`` (N, K), U is the *output* side and V the input side, as in
    ``torch.linalg.svd``; ``svdkern.linalg.factors`` and the layers call them the other way round.

    Equivalent to (up to signs, rotations among equal singular values, and ``info.residuals``)::

        U, S, Vh = torch.linalg.svd(A.float(), full_matrices=False)
        selected = slice(0, k)  # or slice(-k, None): "smallest" is in descending order too
        U, S, V = U[:, selected], S[selected], Vh[selected].T

    Algorithm: a block Krylov method (``krylov.py``), on the inverse for the smallest (``smallest.py``); for a short
    side or many triplets the exact method (``exact.py``; by a measured table, ``crossovers.py``). Products are made in float32
    (float64 for a float64 A),
    never in TF32 and never under autocast; half precision is read panel by panel, without a copy of A. On AMX, steps of blocks
    from 32 columns on are made of bfloat16 parts, good to 2^-16, where ``tol`` allows it (``info.rough``); the triplets and
    their residuals are not. The smallest triplets need a factorisation of A's size in float32, or in float64 where that does
    not do.

    Args:
        A: (m, n); float32, bfloat16, float16 or float64, any strides, any device. Or an operator (``LinearOperator``), of which the
            largest triplets can be had, by the Krylov method, with ``info.tail`` from an estimate of its norm.
        k: number of triplets, 1 <= k <= min(m, n).
        which: "largest" or "smallest".
        tol: the Krylov method stops when every ``residuals[i]^2 <= tol * next_value^2``, or when a residual is rounding error.
            A singular value's relative error is then of the order of ``tol``: less where a gap follows, a few times more in the
            middle of a dense spectrum. "fast" is 5e-2, "balanced" 1e-3,
            "accurate" 1e-6.
        method: "auto", "krylov" or "exact".
        seed: of the random start. The same seed gives the same bits on the same machine and number of threads.
        max_passes: products with A or its transpose after which the Krylov method gives what it has (``info.converged``
            says so), once it has k triplets at all. For the smallest, products with the inverse, of each precision tried;
            after them the exact method takes over, at the cost of a dense SVD (``info.fallbacks`` has "exact").
        v0: (n, p), columns near the wanted right singular vectors, to start from.
        certify: fills ``info.certificate``: a random probe of ``A (I - V V^T)`` bounds what may have been missed, and the residuals
            bound the rest; takes a few more products. "largest" alone.

    Returns:
        U (m, k), S (k,) descending and >= 0, V (n, k), info: float32, or float64 for a float64 A. U and V have orthonormal
        columns also where S is 0; the entry of largest magnitude of each column of U is positive. None of them has a gradient.

    Raises:
        TypeError: A is not a dense floating-point tensor, v0 not a floating-point one, or k, seed or max_passes no integer.
        ValueError: A is not a matrix or has a NaN, an infinity or a singular value beyond S's dtype, or an argument is out of
            its range.
    """
    tolerance = _check(A, which, tol, method, v0)
    k, seed, max_passes = index(k, "k"), index(seed, "seed"), index(max_passes, "max_passes")
    if not 1 <= k <= min(A.shape):
        raise ValueError(f"k is {k}, expected 1 <= k <= {min(A.shape)} (A is {tuple(A.shape)})")
    if max_passes < 1:
        raise ValueError(f"max_passes is {max_passes}, expected at least 1")
    if certify and which != "largest":
        raise ValueError(f"certify is True with which={which!r}, expected the largest: the inverse is not probed")
    if not isinstance(A, Tensor) and (which != "largest" or method == "exact"):
        raise ValueError(f"which is {which!r} and method {method!r} of an operator, expected 'largest' by 'krylov'")
    tall = A.shape[0] >= A.shape[1]
    with full_precision(A.device if isinstance(A, Tensor) else torch.device(getattr(A, "device", "cpu"))):
        operand = Operand(A if tall else A.t(), "A") if isinstance(A, Tensor) else Implicit(A, "A")
        if method == "auto":
            exact = isinstance(A, Tensor) and not takes_krylov(operand.columns, k, which)
            method = "exact" if exact else "krylov"
        if method == "exact":
            assert isinstance(operand, Operand)
            found, info = _exact(operand, k, which, tolerance, seed, certify)
        else:
            start = None if v0 is None else _start(operand, v0, tall)
            found, info = _krylov(operand, k, which, tolerance, seed, max_passes, start, certify)
    u, v = (found.left, found.right) if tall else (found.right, found.left)
    u, v = with_signs(u.to(operand.dtype), v.to(operand.dtype))
    sigma = in_range(found.sigma * math.ldexp(1.0, operand.power), operand.dtype, "A")
    return TopkSVD(u.contiguous(), sigma, v.contiguous(), info)


def index(value: object, name: str) -> int:
    """An integer of any type (NumPy's), but not a bool."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    return operator.index(value)


def check_dense(matrix: Tensor, name: str) -> None:
    if matrix.layout != torch.strided:
        raise TypeError(f"{name} is {matrix.layout}, expected a dense tensor (an operator, for topk_svd)")
    if matrix.is_meta:
        raise ValueError(f"{name} is on the meta device, expected a tensor that has values")


def in_range(sigma: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``sigma``, descending, in ``dtype``."""
    largest = float(sigma[0])
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"{name} has the singular value {largest:g}, beyond {dtype}: scale {name}, or give it in float64"
        )
    return sigma.to(dtype)


def _exact(operand: Operand, k: int, which: str, tol: float, seed: int, certify: bool) -> tuple[Triplets, SVDInfo]:
    find = largest_triplets if which == "largest" else smallest_triplets
    found = find(operand.matrix, k, operand.factor)
    if which == "smallest" and k == operand.columns:
        found = found._replace(next_value=math.inf)
    residuals = residual_norms(operand.matrix, found, operand.factor)
    certified = None
    if certify:  # nothing is left to chance: the Gram matrix's rounding error is all
        noise = max(operand.noise(0), 1e-7 * operand.norm)
        certified = certificate(found.sigma, torch.diag(residuals.square()), found.next_value, noise, 0.0)
    return found, _info(operand, found, residuals, "exact", which, tol, seed, True, (), certified)


def _krylov(
    operand: Operand | Implicit,
    k: int,
    which: str,
    tol: float,
    seed: int,
    max_passes: int,
    start: Tensor | None,
    certify: bool,
) -> tuple[Triplets, SVDInfo]:
    block = _block(k, operand)
    if start is not None:
        block = min(max(block, start.shape[1]), operand.columns)
    capacity = min(operand.columns, max(6 * k, 12 * block))
    if which == "largest":
        got = leading(
            operand, k, block=block, capacity=capacity, tol=tol, max_passes=max_passes, seed=seed, start=start,
            certify=certify,
        )  # fmt: skip
        found = Triplets(got.left, got.sigma, got.right, got.next_value)
    else:
        assert isinstance(operand, Operand)
        found, got = smallest(
            operand.matrix, k, operand.factor, operand.norm,
            block=block, capacity=capacity, tol=tol, max_passes=max_passes, seed=seed, start=start,
        )  # fmt: skip
    return found, _info(
        operand, found, got.residuals, "krylov", which, tol, seed, got.converged, got.fallbacks, got.certificate, got.rough,
        block=block, steps=got.steps, restarts=got.restarts, passes=got.passes,
    )  # fmt: skip


def _info(
    operand: Operand | Implicit,
    found: Triplets,
    residuals: Tensor,
    method: str,
    which: str,
    tol: float,
    seed: int,
    converged: bool,
    fallbacks: tuple[str, ...],
    certified: Certificate | None,
    rough: bool = False,
    *,
    block: int = 0,
    steps: int = 0,
    restarts: int = 0,
    passes: int = 0,
) -> SVDInfo:
    scale = math.ldexp(1.0, operand.power)
    tail = math.sqrt(max(0.0, operand.norm**2 - float(found.sigma.square().sum())))
    return SVDInfo(
        method=method, which=which, tol=tol, seed=seed, block=block, steps=steps, restarts=restarts, passes=passes,
        residuals=residuals.to("cpu") * scale, next_value=found.next_value * scale, tail=tail * scale,
        converged=converged, fallbacks=fallbacks, rough=rough,
        certificate=None if certified is None else certified.scaled(scale),
    )  # fmt: skip


def _block(k: int, operand: Operand | Implicit) -> int:
    """Narrow blocks cost more a column in the BLAS, wide ones more columns: from 16 (64 on a GPU) to 64 (96)."""
    least, most = (16, 64) if operand.device.type == "cpu" else (64, 96)
    return min(max(least, min(most, -(-k // 16) * 16)), operand.columns)


def _start(operand: Operand | Implicit, v0: Tensor, tall: bool) -> Tensor:
    """v0 on the short side, where the basis lives, its columns of length 1."""
    start = v0.to(operand.device, torch.float64)
    largest = start.abs().amax(0)
    start = (start / torch.where(largest > 0, largest, 1.0)).to(operand.dtype)
    start = start if tall else operand.transposed(start)
    length = torch.linalg.vector_norm(start, dim=0)
    start = start[:, length > 0] / length[length > 0]
    if start.shape[1] == 0:
        raise ValueError("v0 has no column that A does not map to zero, expected columns near right singular vectors")
    return start


def _check(
    A: Tensor | LinearOperator,
    which: str,
    tol: float | str,
    method: str,
    v0: Tensor | None,
) -> float:
    if not isinstance(A, (Tensor, LinearOperator)):
        raise TypeError(
            f"A is a {type(A).__name__}, expected a tensor, or an operator with shape, dtype, matmat and rmatmat"
        )
    if isinstance(A, Tensor) and A.dtype not in _DTYPES:
        raise TypeError(f"A is {A.dtype}, expected float32, bfloat16, float16 or float64")
    if not isinstance(A, Tensor) and A.dtype not in _OPERATOR_DTYPES:
        raise TypeError(f"A is an operator of {A.dtype}, expected torch.float32 or torch.float64")
    if isinstance(A, Tensor):
        check_dense(A, "A")
    if len(A.shape) != 2:
        raise ValueError(f"A is {tuple(A.shape)}, expected a matrix (m, n)")
    for name, choice, kind in (("which", which, Which), ("method", method, Method)):
        if choice not in get_args(kind):
            raise ValueError(f"{name} is {choice!r}, expected one of {', '.join(get_args(kind))}")
    if isinstance(tol, str):
        if tol not in TOLERANCES:
            raise ValueError(f"tol is {tol!r}, expected a number or one of {', '.join(TOLERANCES)}")
        tol = TOLERANCES[tol]
    if not isinstance(tol, (int, float)):
        raise TypeError(f"tol is {tol!r}, expected a number or one of {', '.join(TOLERANCES)}")
    if not 0 < tol < 1:
        raise ValueError(f"tol is {tol!r}, expected 0 < tol < 1")
    if v0 is not None:
        if not isinstance(v0, Tensor) or not v0.is_floating_point():
            found = str(v0.dtype) if isinstance(v0, Tensor) else f"a {type(v0).__name__}"
            raise TypeError(f"v0 is {found}, expected a tensor of floating-point numbers")
        if v0.dim() != 2 or v0.shape[0] != A.shape[1] or not 1 <= v0.shape[1] <= min(A.shape):
            raise ValueError(f"v0 is {tuple(v0.shape)}, expected ({A.shape[1]}, p) with 1 <= p <= {min(A.shape)}")
        if not bool(v0.isfinite().all()):
            raise ValueError("v0 has a NaN or an infinity, expected finite values")
    return tol
