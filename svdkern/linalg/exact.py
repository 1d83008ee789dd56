"""Exact singular triplets in float64, and what every SVD here does with a weight's panels and signs.

Half and float32 weights go through the float64 Gram matrix of their short side: its eigenvalues carry an error of about
``1e-16 sigma_1^2``, so a singular value carries at most ``1e-8 sigma_1``, which is below what a float32 SVD gives
(``6e-8 sigma_1``), in less time, and ``eigh`` converges on the degenerate matrices where LAPACK's SVD does not. The other
side comes from a QR in float64, which is orthonormal even where singular values are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_PANEL_ELEMENTS = 1 << 21  # float64 elements upcast at a time: 16 MB
# Up to this size LAPACK's eigh is as fast on one thread as on two (25 ms at 576), and on a machine that is otherwise
# busy its many short parallel sections wait for each other (2 to 6 s instead, measured).
_ONE_THREAD = 1024


class Triplets(NamedTuple):
    """``a ~ left @ diag(sigma) @ right.T`` in float64, sigma descending."""

    left: Tensor
    sigma: Tensor
    right: Tensor
    next_value: float
    """The singular value that comes after the last one of these (before the first one, for the smallest)."""


def largest_triplets(a: Tensor, k: int, factor: float) -> Triplets:
    """The k largest of ``factor * a``, without a whole float64 copy of a (unless a is float64 already)."""
    if a.dtype == torch.float64:
        try:
            left, sigma, right_h = torch.linalg.svd(a * factor, full_matrices=False)
            return Triplets(left[:, :k], sigma[:k], right_h[:k].t(), float(sigma[k]) if k < sigma.numel() else 0.0)
        except torch.linalg.LinAlgError:
            pass  # degenerate; the Gram matrix costs half the digits of small singular values, but it converges
    tall = a.shape[0] >= a.shape[1]
    short = min(a.shape)
    gram = torch.zeros(short, short, dtype=torch.float64, device=a.device)
    for panel in upcast(a, tall, factor):  # (rows, short)
        gram.addmm_(panel.t(), panel)
    with few_threads(short, a.device):
        values, vectors = torch.linalg.eigh(gram)
    next_value = float(values[-k - 1].clamp(min=0).sqrt()) if k < short else 0.0
    return on_basis(a, vectors[:, -k:].flip(1), factor, next_value)


def smallest_triplets(a: Tensor, k: int, factor: float) -> Triplets:
    """The k smallest of ``factor * a``, with a whole float64 copy of a.

    From the triangle of a QR: a Gram matrix would lose every singular value below ``1e-8 sigma_1``. Both sides come from the
    triangle's SVD: the image of a right vector under a says nothing about the left one where the value is rounding error.
    """
    tall, short = a.shape[0] >= a.shape[1], min(a.shape)
    reflections, triangle = householder(a if tall else a.t(), factor)
    left, sigma, right = small_svd(triangle)
    long_side, short_side = reflections.times(left[:, -k:]), right[:, -k:]
    next_value = float(sigma[-k - 1]) if k < short else 0.0
    left, right = (long_side, short_side) if tall else (short_side, long_side)
    return Triplets(left, sigma[-k:], right, next_value)


def small_svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``a = left @ diag(sigma) @ right.T`` of a square float64 matrix, also where LAPACK's divide and conquer gives up (many
    equal singular values): a matrix that is turned to be nearly diagonal first is no such case."""
    turn: Tensor | None = None
    for _ in range(3):
        try:
            left, sigma, right_h = torch.linalg.svd(a if turn is None else a @ turn)
            return left, sigma, right_h.t() if turn is None else turn @ right_h.t()
        except torch.linalg.LinAlgError:
            image = a if turn is None else a @ turn
            vectors = torch.linalg.eigh(image.t() @ image)[1].flip(1)
            turn = vectors if turn is None else turn @ vectors
    raise RuntimeError(f"the SVD of a {tuple(a.shape)} matrix does not converge, turned or not")


class Reflections(NamedTuple):
    """The Q (long, short) of a QR, as LAPACK keeps it."""

    packed: Tensor
    tau: Tensor

    def times(self, x: Tensor) -> Tensor:
        """``Q x``, x (short, k)."""
        below = x.new_zeros(self.packed.shape[0] - x.shape[0], x.shape[1])
        return torch.ormqr(self.packed, self.tau, torch.cat([x, below]))


def householder(tall: Tensor, factor: float, dtype: torch.dtype = torch.float64) -> tuple[Reflections, Tensor]:
    """Q and the triangle (columns, columns) of ``factor * tall = Q R``."""
    packed, tau = torch.geqrf(tall.to(dtype) * factor)
    return Reflections(packed, tau), packed[: tall.shape[1]].triu()


def on_basis(a: Tensor, basis: Tensor, factor: float, next_value: float) -> Triplets:
    """The triplets of ``factor * a`` on the span of ``basis`` (short, k), orthonormal columns of its short side."""
    tall = a.shape[0] >= a.shape[1]
    image = torch.cat([panel @ basis for panel in upcast(a, tall, factor)])  # (long, k)
    with few_threads(min(a.shape), a.device):
        q, triangle = torch.linalg.qr(image)
        left, sigma, right = small_svd(triangle)
    long_side, short_side = q @ left, basis @ right
    if tall:
        return Triplets(long_side, sigma, short_side, next_value)
    return Triplets(short_side, sigma, long_side, next_value)


def between(a: Tensor, left: Tensor, right: Tensor, factor: float, next_value: float) -> tuple[Triplets, Tensor]:
    """The triplets of ``factor * a`` between two orthonormal bases, those of the small matrix ``left^T a right``, and their
    residual norms (``residual_norms``): one read of a."""
    tall = a.shape[0] >= a.shape[1]
    long_side, short_side = (left, right) if tall else (right, left)
    image = torch.empty_like(long_side)
    back = torch.zeros_like(short_side)
    start = 0
    for panel in upcast(a, tall, factor):
        part = slice(start, start + panel.shape[0])
        torch.mm(panel, short_side, out=image[part])
        back.addmm_(panel.t(), long_side[part])
        start += panel.shape[0]
    p, sigma, q = small_svd(long_side.t() @ image)
    long_side, short_side = long_side @ p, short_side @ q
    forward = torch.linalg.vector_norm(image @ q - long_side * sigma, dim=0)
    backward = torch.linalg.vector_norm(back @ p - short_side * sigma, dim=0)
    left, right = (long_side, short_side) if tall else (short_side, long_side)
    return Triplets(left, sigma, right, next_value), torch.maximum(forward, backward)


def residual_norms(a: Tensor, found: Triplets, factor: float) -> Tensor:
    """(k,) float64: the larger one of ``|a v_i - sigma_i u_i|`` and ``|a^T u_i - sigma_i v_i|`` for ``factor * a``."""
    tall = a.shape[0] >= a.shape[1]
    long_side, short_side = (found.left, found.right) if tall else (found.right, found.left)
    forward = torch.zeros_like(found.sigma)
    backward = short_side * -found.sigma
    start = 0
    for panel in upcast(a, tall, factor):
        part = long_side[start : start + panel.shape[0]]
        forward += (panel @ short_side - part * found.sigma).square().sum(0)
        backward.addmm_(panel.t(), part)
        start += panel.shape[0]
    return torch.maximum(forward.sqrt(), torch.linalg.vector_norm(backward, dim=0))


def upcast(a: Tensor, tall: bool, factor: float) -> Iterator[Tensor]:
    """Panels (rows, short side) of ``factor * a`` in float64, along the long side."""
    length, short = max(a.shape), min(a.shape)
    step = max(1, _PANEL_ELEMENTS // short)
    for start in range(0, length, step):
        part = a[start : start + step] if tall else a[:, start : start + step].t()
        yield part.to(torch.float64) * factor


def orthonormal64(x: Tensor) -> Tensor:
    """Nearly orthonormal columns made orthonormal in float64."""
    x = x.to(torch.float64)
    triangle = torch.linalg.cholesky(x.t() @ x).t()
    return torch.linalg.solve_triangular(triangle, x, upper=True, left=False)


@contextmanager
def few_threads(short: int, device: torch.device) -> Iterator[None]:
    """One thread for LAPACK's small problems, where more only wait for each other.

    PyTorch has a number for each thread, and the last one set is that of threads that begin to compute later: one that first
    does while another is in here computes with one thread until it sets its own.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or short > _ONE_THREAD or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def with_signs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with the entry of largest magnitude of each column of ``first`` made positive."""
    top = first.gather(0, first.abs().argmax(0, keepdim=True))
    signs = torch.where(top < 0, -1.0, 1.0).to(first.dtype)
    return first * signs, second * signs
