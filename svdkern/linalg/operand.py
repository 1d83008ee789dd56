"""A matrix as a Krylov method reads it: by products, at a scale near 1, and without a copy in another dtype.

A float32 or float64 matrix with one unit stride goes to the BLAS as it is; the scale, a power of two, is applied to the
product, which is exact. Everything else (half precision, two strides, values near the ends of the range) is read panel
by panel: a few MB at a time are cast, scaled and multiplied, both ways where both products are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

_MEASURE_ELEMENTS = 1 << 15  # float64 elements: 256 KB, one core's cache (12 ms at 4096 x 4096; 20 ms with 2 MB)
_PANEL_ELEMENTS = 1 << 20  # elements of the working dtype: 4 MB of float32
_DEVICE_ELEMENTS = 1 << 24
# Powers of two between which products of the unscaled matrix neither overflow nor lose digits to subnormals.
_PLAIN = {torch.float32: 40, torch.float64: 400}


class Operator(Protocol):
    """What a Krylov method needs of a matrix C (rows, columns)."""

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    passes: int
    """How often the matrix was read."""

    def times(self, x: Tensor) -> Tensor:
        """``C x``."""

    def transposed(self, y: Tensor) -> Tensor:
        """``C^T y``."""

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``C x`` and ``C^T C x``."""

    def noise(self, largest: float) -> float:
        """The norm of a product's rounding error, for a vector of norm 1, where ``largest`` is the largest value."""


class Operand:
    """``matrix * 2^-power``; the largest singular value is at most 1."""

    def __init__(self, matrix: Tensor, name: str) -> None:
        self.matrix = matrix
        self.rows, self.columns = matrix.shape
        self.device = matrix.device
        self.dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        norm, self.power = _measure(matrix, name)
        self.norm = norm
        """The Frobenius norm, of the scaled matrix."""
        self.factor = math.ldexp(1.0, -self.power)
        self.passes = 0
        down, across = matrix.stride()
        dense = (across == 1 and down >= self.columns) or (down == 1 and across >= self.rows)
        self._plain = matrix.dtype == self.dtype and dense and abs(self.power) <= _PLAIN[self.dtype]
        self._by_rows = matrix.stride(0) >= matrix.stride(1)

    def times(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self._plain:
            return torch.mm(self.matrix, x).mul_(self.factor)
        out = x.new_zeros(self.rows, x.shape[1])
        for part, panel in self._panels():
            if self._by_rows:
                torch.mm(panel, x, out=out[part])
            else:
                out.addmm_(panel, x[part])
        return out

    def transposed(self, y: Tensor) -> Tensor:
        self.passes += 1
        if self._plain:
            return torch.mm(self.matrix.t(), y).mul_(self.factor)
        out = y.new_zeros(self.columns, y.shape[1])
        for part, panel in self._panels():
            if self._by_rows:
                out.addmm_(panel.t(), y[part])
            else:
                torch.mm(panel.t(), y, out=out[part])
        return out

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._plain or not self._by_rows:
            y = self.times(x)
            return y, self.transposed(y)
        self.passes += 2
        image = x.new_empty(self.rows, x.shape[1])
        out = x.new_zeros(self.columns, x.shape[1])
        for part, panel in self._panels():
            torch.mm(panel, x, out=image[part])
            out.addmm_(panel.t(), image[part])
        return image, out

    def noise(self, largest: float) -> float:
        return 8 * torch.finfo(self.dtype).eps * self.norm

    def _panels(self) -> Iterator[tuple[slice, Tensor]]:
        length, width = (self.rows, self.columns) if self._by_rows else (self.columns, self.rows)
        elements = _PANEL_ELEMENTS if self.device.type == "cpu" else _DEVICE_ELEMENTS
        step = max(1, elements // width)
        for start in range(0, length, step):
            part = slice(start, start + step)
            piece = self.matrix[part] if self._by_rows else self.matrix[:, part]
            if abs(self.power) <= _PLAIN[torch.float32]:
                yield part, piece.to(self.dtype) * self.factor
            else:  # float64 on the way, where every factor and every scaled value is a normal number
                yield part, (piece.to(torch.float64) * self.factor).to(self.dtype)


def _measure(matrix: Tensor, name: str) -> tuple[float, int]:
    """The Frobenius norm of ``matrix * 2^-power``, and power, the exponent that brings it between 1/2 and 1."""
    norm = _norm(matrix, 1.0)
    if not math.isfinite(norm) or norm < 1e-140:  # squares may have overflowed or vanished
        largest = max(abs(float(matrix.amin())), abs(float(matrix.amax())))
        if not math.isfinite(largest):
            raise ValueError(f"{name} has a NaN or an infinity, expected finite values")
        if largest == 0:
            return 0.0, 0
        shift = max(-1000, min(1000, math.frexp(largest)[1]))
        mantissa, exponent = math.frexp(_norm(matrix, math.ldexp(1.0, -shift)))
        power = max(-1000, min(1000, exponent + shift))
        return math.ldexp(mantissa, exponent + shift - power), power
    mantissa, power = math.frexp(norm)
    return mantissa, power


def _norm(matrix: Tensor, factor: float) -> float:
    by_rows = matrix.stride(0) >= matrix.stride(1)
    across = matrix if by_rows else matrix.t()
    elements = _MEASURE_ELEMENTS if matrix.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, elements // max(1, across.shape[1]))
    energy = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, across.shape[0], step):
        panel = across[start : start + step].to(torch.float64)
        flat = (panel if factor == 1.0 else panel * factor).reshape(-1)
        energy += torch.dot(flat, flat)
    return math.sqrt(float(energy)) if float(energy) >= 0 else math.nan
