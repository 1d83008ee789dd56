"""The space that a block Krylov method builds: an orthonormal basis V, its images C V, and C^T C on it."""

from __future__ import annotations

import torch
from torch import Tensor

from svdkern.linalg.exact import few_threads, small_svd
from svdkern.linalg.operand import Operator
from svdkern.linalg.orthogonal import gram, project_out

_PANEL_ELEMENTS = 1 << 20  # float64 elements


class Space:
    """V (columns, capacity) and C V (rows, capacity), of which the first ``width`` columns are filled."""

    def __init__(self, operator: Operator, capacity: int) -> None:
        self._operator = operator
        self._basis = torch.empty(operator.columns, capacity, dtype=operator.dtype, device=operator.device)
        self._images = torch.empty(operator.rows, capacity, dtype=operator.dtype, device=operator.device)
        # The projection of C^T C, from the Gram-Schmidt coefficients: good enough to schedule by, not to compute from.
        self._projected = torch.zeros(0, 0, dtype=torch.float64)
        self.capacity = capacity
        self.width = 0

    @property
    def basis(self) -> Tensor:
        return self._basis[:, : self.width]

    @property
    def images(self) -> Tensor:
        return self._images[:, : self.width]

    def append(self, block: Tensor, image: Tensor, gram_image: Tensor) -> None:
        """Takes in ``block`` and ``C block``, and takes the basis out of ``gram_image = C^T C block`` in place."""
        old, new = self.width, self.width + block.shape[1]
        self._basis[:, old:new] = block
        self._images[:, old:new] = image
        self.width = new
        column = project_out(self.basis, gram_image).to("cpu", torch.float64)
        projected = torch.zeros(new, new, dtype=torch.float64)
        projected[:old, :old] = self._projected
        projected[:, old:] = column
        projected[old:, :old] = column[:old].t()
        projected[old:, old:] = (column[old:] + column[old:].t()) / 2
        self._projected = projected

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Squared Ritz values, descending, and the vectors' coordinates in the basis: on the CPU, in float64."""
        with few_threads(self.width, self._projected.device):
            values, vectors = torch.linalg.eigh(self._projected)
        return values.flip(0), vectors.flip(1)

    def restart(self, keep: int) -> None:
        """The ``keep`` leading Ritz vectors become the basis. What comes next must be orthogonal to the old basis."""
        values, vectors = self.ritz()
        chosen = vectors[:, :keep].to(self._basis.device, self._basis.dtype)
        self._basis[:, :keep] = self.basis @ chosen
        self._images[:, :keep] = self.images @ chosen
        self._projected = torch.diag(values[:keep])
        self.width = keep

    def triplets(self, k: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """The k leading Ritz triplets (left, sigma, right) in float64, with ``C right = left diag(sigma)``, and the next
        Ritz value."""
        if self._basis.dtype == torch.float64:
            triangle = torch.linalg.qr(self.images, mode="r")[1]
            _, all_values, vectors = small_svd(triangle)
            coordinates = vectors[:, :k]
        else:  # float32 images have no digits that their Gram matrix in float64 would lose
            with few_threads(self.width, self._basis.device):
                squares, vectors = torch.linalg.eigh(gram(self.images))
            all_values, coordinates = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)[:, :k]
        next_value = float(all_values[k]) if k < all_values.numel() else 0.0
        right, image = _times64(self.basis, coordinates), _times64(self.images, coordinates)
        # The basis is orthonormal to its own dtype's rounding; the triplets to float64's.
        triangle = torch.linalg.cholesky(right.t() @ right).t()
        right = torch.linalg.solve_triangular(triangle, right, upper=True, left=False)
        image = torch.linalg.solve_triangular(triangle, image, upper=True, left=False)
        q, triangle = torch.linalg.qr(image)
        with few_threads(k, self._basis.device):
            left, sigma, turn = small_svd(triangle)
        return q @ left, sigma, right @ turn, next_value


def _times64(x: Tensor, coordinates: Tensor) -> Tensor:
    """``x @ coordinates`` in float64, a panel of x upcast at a time."""
    out = torch.empty(x.shape[0], coordinates.shape[1], dtype=torch.float64, device=x.device)
    step = max(1, _PANEL_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, x.shape[0], step):
        torch.mm(x[start : start + step].to(torch.float64), coordinates, out=out[start : start + step])
    return out
