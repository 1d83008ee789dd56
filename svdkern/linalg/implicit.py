"""A matrix that is known by its products alone: a weighted, centred or sharded one, or a sum of factors.

What ``Operand`` reads off the entries is estimated here: the scale and the Frobenius norm come from one product with random
columns, ``E |A g|^2 = |A|_F^2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from svdkern.linalg.sketch import sketch

_SCALED = 100  # powers of two by which float32 is scaled directly
_COLUMNS = 16  # of the estimate: the norm is right to about a tenth


@runtime_checkable
class LinearOperator(Protocol):
    """A matrix A (m, n) as its products; the names are those of ``scipy.sparse.linalg.LinearOperator``.

    ``device`` may be missing, which means the CPU.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    """float32 or float64."""

    def matmat(self, x: Tensor, /) -> Tensor:
        """``A x`` (m, b) of x (n, b), contiguous and of ``dtype``."""

    def rmatmat(self, y: Tensor, /) -> Tensor:
        """``A^T y`` (n, b) of y (m, b)."""


class Implicit:
    """The operator a Krylov method needs (``operand.Operator``), the long side its rows: ``A`` or ``A^T``, times ``2^-power``."""

    def __init__(self, operator: LinearOperator, name: str) -> None:
        self._name = name
        m, n = operator.shape
        products = {"matmat": operator.matmat, "rmatmat": operator.rmatmat}
        self._forward, self._backward = list(products.items()) if m >= n else list(products.items())[::-1]
        self.rows, self.columns = max(m, n), min(m, n)
        self.dtype = operator.dtype
        self.device = torch.device(getattr(operator, "device", "cpu"))
        self.passes = 0
        self.has_rough = False
        self.factor, self.power = 1.0, 0
        random = sketch(self.columns, _COLUMNS, seed=0, dtype=self.dtype, device=self.device)
        norm = float(torch.linalg.vector_norm(self.times(random).to(torch.float64))) / math.sqrt(_COLUMNS)
        mantissa, exponent = math.frexp(norm)
        self.power = max(-1000, min(1000, exponent))
        self.norm = math.ldexp(mantissa, exponent - self.power)
        """The estimated Frobenius norm, of the scaled matrix."""
        self.factor = math.ldexp(1.0, -self.power)

    def times(self, x: Tensor) -> Tensor:
        return self._product(self._forward, x, self.rows)

    def transposed(self, y: Tensor) -> Tensor:
        return self._product(self._backward, y, self.columns)

    def both(self, x: Tensor, rough: bool = False) -> tuple[Tensor, Tensor]:
        y = self.times(x)
        return y, self.transposed(y)

    def noise(self, largest: float) -> float:
        return 8 * torch.finfo(self.dtype).eps * self.norm

    def _product(self, product: tuple[str, Callable[[Tensor], Tensor]], x: Tensor, rows: int) -> Tensor:
        self.passes += 1
        name, multiply = product
        out = multiply(x.contiguous())
        if not isinstance(out, Tensor) or out.shape != (rows, x.shape[1]):
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"{self._name}.{name} returned {shape}, expected a tensor {(rows, x.shape[1])}")
        if not bool(out.isfinite().all()):
            raise ValueError(f"{self._name}.{name} returned a NaN or an infinity, expected finite values")
        if abs(self.power) > _SCALED:  # the factor itself may be beyond float32
            return (out.to(torch.float64) * self.factor).to(self.dtype)
        return out.to(self.dtype) * self.factor
