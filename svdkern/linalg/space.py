"""The space that a block Krylov method builds: an orthonormal basis V and the projection of C^T C on it.

The triplets come from one more product with the leading Ritz vectors, so that C V need not be kept. The projection carries
an error of ``eps sigma_1^2``, which moves a Ritz vector of value sigma by a residual of about ``eps sigma_1^2 / sigma``: where
that is too much (a steep spectrum), C V is computed and kept after all, and the vectors come from its Gram matrix in
float64, whose error is that of C itself, ``eps sigma_1``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from svdkern.linalg.exact import few_threads, orthonormal64, small_svd
from svdkern.linalg.operand import Operator
from svdkern.linalg.orthogonal import gram, panel_height, project_out

_COLUMNS_AT_ONCE = 128  # of the basis, multiplied when images are wanted after all


class Ritz(NamedTuple):
    """``C right = left diag(sigma)``, float64 (left: C's dtype is enough), the next Ritz value, and
    ``|C^T left_i - sigma_i right_i|``."""

    left: Tensor
    sigma: Tensor
    right: Tensor
    next_value: float
    residuals: Tensor
    coupling: Tensor
    """(k, k) the Gram matrix of ``C^T left - right diag(sigma)``; the residuals are the roots of its diagonal."""
    probed: tuple[Tensor, Tensor, Tensor] | None = None
    """A probe of what is left of C, and both products with it."""


class Space:
    """V (columns, capacity), of which the first ``width`` columns are filled; C V (rows, capacity) where it is kept."""

    def __init__(self, operator: Operator, capacity: int) -> None:
        self._operator = operator
        self._basis = torch.empty(operator.columns, capacity, dtype=operator.dtype, device=operator.device)
        self._images: Tensor | None = None
        # From the Gram-Schmidt coefficients.
        self._projected = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self.capacity = capacity
        self.width = 0

    @property
    def basis(self) -> Tensor:
        return self._basis[:, : self.width]

    @property
    def keeps_images(self) -> bool:
        return self._images is not None

    def keep_images(self) -> None:
        """From now on C V is kept; one read of C makes it for the basis there is."""
        if self._images is not None:
            return
        operator = self._operator
        self._images = torch.empty(operator.rows, self.capacity, dtype=operator.dtype, device=operator.device)
        for start in range(0, self.width, _COLUMNS_AT_ONCE):
            part = slice(start, min(start + _COLUMNS_AT_ONCE, self.width))
            self._images[:, part] = operator.times(self._basis[:, part].contiguous())

    def append(self, block: Tensor, image: Tensor, gram_image: Tensor) -> float:
        """Takes in ``block`` and ``C block``, and takes the basis out of ``gram_image = C^T C block`` in place; returns the
        largest ``|C v|`` of the block's columns."""
        old, new = self.width, self.width + block.shape[1]
        self._basis[:, old:new] = block
        if self._images is not None:
            self._images[:, old:new] = image
        self.width = new
        column = project_out(self.basis, gram_image).to("cpu", torch.float64)
        projected = torch.zeros(new, new, dtype=torch.float64, device="cpu")
        projected[:old, :old] = self._projected
        projected[:, old:] = column
        projected[old:, :old] = column[:old].t()
        projected[old:, old:] = (column[old:] + column[old:].t()) / 2
        self._projected = projected
        return float(projected.diagonal()[old:].clamp(min=0).max().sqrt())

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Squared Ritz values, descending, and the vectors' coordinates in the basis: on the CPU, in float64."""
        projected = self._projected
        if (
            self._images is not None and self._images.dtype == torch.float32
        ):  # no digits that its Gram matrix would lose
            projected = gram(self._images[:, : self.width]).to("cpu")
        with few_threads(self.width, projected.device):
            values, vectors = torch.linalg.eigh(projected)
        return values.flip(0), vectors.flip(1)

    def restart(self, keep: int) -> None:
        """The ``keep`` leading Ritz vectors become the basis. What comes next must be orthogonal to the old basis."""
        values, vectors = self.ritz()
        chosen = vectors[:, :keep].to(self._basis.device, self._basis.dtype)
        self._basis[:, :keep] = self.basis @ chosen
        if self._images is not None:
            self._images[:, :keep] = self._images[:, : self.width] @ chosen
        self._projected = torch.diag(values[:keep])
        self.width = keep

    def triplets(self, k: int, ritz: tuple[Tensor, Tensor], probe: Callable[[Tensor], Tensor] | None = None) -> Ritz:
        """The k leading Ritz triplets; ``ritz`` is this space's ``ritz()``.

        Args:
            probe: makes more columns to be multiplied, from the right vectors; they share the products where it can be.
        """
        return self._from_images(k) if self.keeps_images else self._from_products(k, *ritz, probe)

    def _from_products(
        self, k: int, squares: Tensor, vectors: Tensor, probe: Callable[[Tensor], Tensor] | None
    ) -> Ritz:
        operator = self._operator
        right = orthonormal64(self.basis @ vectors[:, :k].to(self._basis.device, self._basis.dtype))
        columns = right.to(operator.dtype)
        if probe is not None:
            columns = torch.cat([columns, probe(right)], dim=1)
        images, backs = operator.both(columns)
        probed = None if probe is None else (columns[:, k:], images[:, k:], backs[:, k:])
        image = images[:, :k]
        if operator.dtype == torch.float64:
            q, triangle = torch.linalg.qr(image)
            left, sigma, turn = small_svd(triangle)
            left = q @ left
        else:  # float32 images' values differ by a ratio whose square float64 holds
            squared = gram(image)
            with few_threads(k, operator.device):
                values, turn = torch.linalg.eigh(squared)
            sigma, turn = values.clamp(min=torch.finfo(torch.float64).tiny).sqrt().flip(0), turn.flip(1)
            left = _times64(image, turn / sigma, operator.dtype)
        back = backs[:, :k].to(torch.float64) @ (turn / sigma)
        right = right @ turn
        next_value = float(squares[k].clamp(min=0).sqrt()) if k < squares.numel() else 0.0
        return _with_residuals(left, sigma, right, next_value, back, probed)

    def _from_images(self, k: int) -> Ritz:
        assert self._images is not None
        images = self._images[:, : self.width]
        if images.dtype == torch.float64:
            _, all_values, vectors = small_svd(torch.linalg.qr(images, mode="r")[1])
            coordinates = vectors[:, :k]
        else:  # float32 images have no digits that their Gram matrix in float64 would lose
            with few_threads(self.width, images.device):
                squares, vectors = torch.linalg.eigh(gram(images))
            all_values, coordinates = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)[:, :k]
        next_value = float(all_values[k]) if k < all_values.numel() else 0.0
        right, image = _times64(self.basis, coordinates), _times64(images, coordinates)
        # The basis is orthonormal to its own dtype's rounding; the triplets to float64's.
        triangle = torch.linalg.cholesky(right.t() @ right).t()
        right = torch.linalg.solve_triangular(triangle, right, upper=True, left=False)
        image = torch.linalg.solve_triangular(triangle, image, upper=True, left=False)
        q, triangle = torch.linalg.qr(image)
        with few_threads(k, images.device):
            left, sigma, turn = small_svd(triangle)
        left, right = q @ left, right @ turn
        back = self._operator.transposed(left.to(self._operator.dtype)).to(torch.float64)
        return _with_residuals(left, sigma, right, next_value, back, None)


def _with_residuals(
    left: Tensor,
    sigma: Tensor,
    right: Tensor,
    next_value: float,
    back: Tensor,
    probed: tuple[Tensor, Tensor, Tensor] | None,
) -> Ritz:
    """``back`` is ``C^T left``."""
    rest = back - right * sigma
    coupling = rest.t() @ rest
    return Ritz(left, sigma, right, next_value, coupling.diagonal().sqrt(), coupling, probed)


def _times64(x: Tensor, coordinates: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``x @ coordinates`` in float64, a panel of x upcast at a time, rounded to ``dtype``."""
    out = torch.empty(x.shape[0], coordinates.shape[1], dtype=dtype, device=x.device)
    step = panel_height(x)
    for start in range(0, x.shape[0], step):
        out[start : start + step] = x[start : start + step].to(torch.float64) @ coordinates
    return out
