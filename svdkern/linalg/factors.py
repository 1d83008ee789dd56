"""The leading singular triplets of a weight, in this package's convention.

Exact, not randomized. Half and float32 weights go through the float64 Gram matrix of their short side: its eigenvalues
carry an error of about ``1e-16 sigma_1^2``, so a singular value carries at most ``1e-8 sigma_1``, which is below what a
float32 SVD gives (``6e-8 sigma_1``), in less time, and ``eigh`` converges on the degenerate matrices where LAPACK's SVD
does not. The other side comes from a QR in float64, which is orthonormal even where singular values are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from svdkern.autocast import without_autocast

_PANEL_ELEMENTS = 1 << 21  # float64 elements upcast at a time: 16 MB
# Up to this size LAPACK's eigh is as fast on one thread as on two (25 ms at 576), and on a machine that is otherwise
# busy its many short parallel sections wait for each other (2 to 6 s instead, measured).
_ONE_THREAD = 1024


@torch.no_grad()
def factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading singular triplets of ``weight``: ``weight ~ v @ diag(sigma) @ u.T``.

    **Names**: this returns the package's convention, ``u`` on the *input* side, for a weight stored as ``nn.Linear``
    stores it. ``torch.linalg.svd(weight)`` calls the output side U; on square weights a swap would go unnoticed.

    Equivalent to (up to signs, and rotations among equal singular values)::

        p, s, qh = torch.linalg.svd(weight.float(), full_matrices=False)
        u, sigma, v = qh[:r].t(), s[:r], p[:, :r]

    Args:
        weight: (N, K); float32, bfloat16, float16 or float64, any strides, any device.
        r: number of triplets, 1 <= r <= min(N, K).

    Returns:
        u (K, r), sigma (r,), v (N, r): float32, or float64 for a float64 weight. sigma is sorted and >= 0; u and v have
        orthonormal columns also where sigma is 0; the entry of largest magnitude of each column of u is positive.

    Raises:
        TypeError: weight is not floating-point.
        ValueError: weight is not a matrix, r is out of range, or weight has a NaN or an infinity.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight is {tuple(weight.shape)}, expected a matrix (N, K)")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}, expected float32, bfloat16, float16 or float64")
    if not 1 <= r <= min(weight.shape):
        raise ValueError(f"r is {r}, expected 1 <= r <= {min(weight.shape)} (weight is {tuple(weight.shape)})")
    largest = max(abs(float(weight.amin())), abs(float(weight.amax())))
    if not math.isfinite(largest):
        raise ValueError("weight has a NaN or an infinity")
    # A power of two brings the largest entry near 1, so that neither squares overflow nor small matrices vanish.
    power = max(-1000, min(1000, math.frexp(largest)[1])) if largest else 0
    with without_autocast(weight.device):
        u, sigma, v = _triplets(weight, r, math.ldexp(1.0, -power))
    u, v = _with_signs(u, v)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return u.to(dtype).contiguous(), (sigma * math.ldexp(1.0, power)).to(dtype), v.to(dtype).contiguous()


def _triplets(weight: Tensor, r: int, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dtype == torch.float64:
        try:
            p, s, qh = torch.linalg.svd(weight * factor, full_matrices=False)
            return qh[:r].t(), s[:r], p[:, :r]
        except torch.linalg.LinAlgError:
            pass  # degenerate; the Gram matrix costs half the digits of small singular values, but it converges
    tall = weight.shape[0] >= weight.shape[1]
    panels = list(_panel_slices(weight, tall))
    short = min(weight.shape)
    gram = torch.zeros(short, short, dtype=torch.float64, device=weight.device)
    for panel in _upcast(weight, panels, tall, factor):  # (rows, short)
        gram.addmm_(panel.t(), panel)
    with _few_threads(short, weight.device):
        basis = torch.linalg.eigh(gram)[1][:, -r:].flip(1)  # (short, r), largest first
    image = torch.cat([panel @ basis for panel in _upcast(weight, panels, tall, factor)])  # (long, r)
    with _few_threads(short, weight.device):
        q, triangle = torch.linalg.qr(image)
        left, sigma, right = torch.linalg.svd(triangle)
    long_side, short_side = q @ left, basis @ right.t()
    return (short_side, sigma, long_side) if tall else (long_side, sigma, short_side)


@contextmanager
def _few_threads(short: int, device: torch.device) -> Iterator[None]:
    threads = torch.get_num_threads()
    if device.type != "cpu" or short > _ONE_THREAD or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _panel_slices(weight: Tensor, tall: bool) -> Iterator[slice]:
    length, short = max(weight.shape), min(weight.shape)
    step = max(1, _PANEL_ELEMENTS // short)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _upcast(weight: Tensor, panels: list[slice], tall: bool, factor: float) -> Iterator[Tensor]:
    for panel in panels:
        part = weight[panel] if tall else weight[:, panel].t()
        yield part.to(torch.float64) * factor


def _with_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    top = u.gather(0, u.abs().argmax(0, keepdim=True))
    signs = torch.where(top < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, v * signs
