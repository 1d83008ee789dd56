"""A matrix as a Krylov method reads it: by products, at a scale near 1, and without a copy in another dtype.

On the CPU both products of a step come from one read of the matrix (``csrc/cpu/normal.h``) where that is faster than the
BLAS: always for half precision, for float32 up to a width that was measured. Wider blocks, float64 and other devices go to
the BLAS as they are; the scale, a power of two, is applied to the product, which is exact. What is left (two strides, values
near the ends of the range) is read panel by panel: a few MB at a time are cast, scaled and multiplied. On a GPU the
products are those of ``triton_kernels/normal.py`` under ``SVDKERN_BACKEND=triton``, for any dtype but float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from svdkern.backends import extension, triton_svd

_MEASURE_ELEMENTS = 1 << 15  # float64 elements: 256 KB, one core's cache (12 ms at 4096 x 4096; 20 ms with 2 MB)
_PANEL_ELEMENTS = 1 << 20  # elements of the working dtype: 4 MB of float32
_DEVICE_ELEMENTS = 1 << 24
# Powers of two between which products of the unscaled matrix neither overflow nor lose digits to subnormals.
_PLAIN = {torch.float32: 40, torch.float64: 400}
_SCALED = 100  # and between which a float32 factor brings every normal number to a normal one
# Columns up to which one read of a float32 matrix beats two BLAS products: at 4096 x 4096 with AVX-512, CPU time of one thread,
# 0.63 of theirs at 16 columns, 0.70 at 32, 0.93 at 64, 1.02 at 128. A matrix that is stored by columns is turned on its way
# into the cache.
_KERNEL_COLUMNS_BY_ROWS, _KERNEL_COLUMNS_BY_COLUMNS = 64, 32
# On AMX, products of bfloat16 parts take 0.7 of the time of the float32 ones at 32 columns, 0.55 at 64, 0.45 at 128.
ROUGH = 2.0**-16
ROUGH_COLUMNS, _ROUGH_ELEMENTS = 32, 1 << 20


class Operator(Protocol):
    """What a Krylov method needs of a matrix C (rows, columns)."""

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    passes: int
    """Products with the matrix or its transpose."""
    has_rough: bool
    """Whether ``both`` has a faster way that is rough."""

    def times(self, x: Tensor) -> Tensor:
        """``C x``."""

    def transposed(self, y: Tensor) -> Tensor:
        """``C^T y``."""

    def both(self, x: Tensor, rough: bool = False) -> tuple[Tensor, Tensor]:
        """``C x`` and ``C^T C x``; rough: relative errors of ``ROUGH`` may be made where that is faster."""

    def noise(self, largest: float) -> float:
        """The norm of a product's rounding error, for a vector of norm 1, where ``largest`` is the largest value."""


class Operand:
    """``matrix * 2^-power``; the largest singular value is at most 1."""

    def __init__(self, matrix: Tensor, name: str) -> None:
        self.matrix = matrix
        self.rows, self.columns = matrix.shape
        self.device = matrix.device
        self.dtype = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        self._by_rows = matrix.stride(0) >= matrix.stride(1)
        across, down = sorted(matrix.stride())
        dense = across == 1 and down >= matrix.shape[1 if self._by_rows else 0]
        self._has_kernel = (
            dense
            and matrix.device.type == "cpu"
            and self.dtype == torch.float32
            and extension.why_missing is None
            and hasattr(torch.ops.svdkern, "_cpu_normal")
        )
        norm, self.power = _measure(matrix if self._by_rows else matrix.t(), name, self._has_kernel)
        self.norm = norm
        """The Frobenius norm, of the scaled matrix."""
        self.factor = math.ldexp(1.0, -self.power)
        self.passes = 0
        self._plain = matrix.dtype == self.dtype and dense and abs(self.power) <= _PLAIN[self.dtype]
        self._has_kernel = self._has_kernel and abs(self.power) <= _SCALED
        self._by_triton = (
            dense and self.dtype == torch.float32 and abs(self.power) <= _SCALED and triton_svd.takes_products(matrix)
        )
        self.has_rough = (
            self._has_kernel
            and matrix.dtype != torch.float16
            and matrix.stride(1) == 1
            and matrix.numel() >= _ROUGH_ELEMENTS
            and torch.ops.svdkern._cpu_isa() == "amx_bf16"
        )
        """Whether products of bfloat16 parts are faster (``csrc/cpu/normal_amx.h``)."""

    def times(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self._by_triton:
            return triton_svd.product(self.matrix, x, self.factor)
        if self._plain:
            return self._product(self.matrix, x)
        out = x.new_zeros(self.rows, x.shape[1])
        for part, panel in self._panels():
            if self._by_rows:
                torch.mm(panel, x, out=out[part])
            else:
                out.addmm_(panel, x[part])
        return out

    def transposed(self, y: Tensor) -> Tensor:
        self.passes += 1
        if self._by_triton:
            return triton_svd.product(self.matrix.t(), y, self.factor)
        if self._plain:
            return self._product(self.matrix.t(), y)
        out = y.new_zeros(self.columns, y.shape[1])
        for part, panel in self._panels():
            if self._by_rows:
                out.addmm_(panel.t(), y[part])
            else:
                torch.mm(panel.t(), y, out=out[part])
        return out

    def both(self, x: Tensor, rough: bool = False) -> tuple[Tensor, Tensor]:
        if rough and self.has_rough and x.shape[1] >= ROUGH_COLUMNS:
            self.passes += 2
            return torch.ops.svdkern._cpu_normal.default(self.matrix, x, self.factor, True)
        most = _KERNEL_COLUMNS_BY_ROWS if self._by_rows else _KERNEL_COLUMNS_BY_COLUMNS
        if self._has_kernel and (not self._plain or x.shape[1] <= most):
            self.passes += 2
            return torch.ops.svdkern._cpu_normal.default(self.matrix, x, self.factor, False)
        if self._by_triton:
            self.passes += 2
            return triton_svd.both(self.matrix, x, self.factor)
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

    def _product(self, a: Tensor, x: Tensor) -> Tensor:
        if (
            a.stride(1) != 1 and self.device.type == "cpu"
        ):  # MKL is up to twice as fast with a matrix that lies along its rows
            return torch.mm(x.t(), a.t()).mul_(self.factor).t()
        return torch.mm(a, x).mul_(self.factor)

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


def _measure(by_rows: Tensor, name: str, has_kernel: bool) -> tuple[float, int]:
    """The Frobenius norm of ``by_rows * 2^-power``, and power, the exponent that brings it between 1/2 and 1."""
    norm = _norm(by_rows, 1.0, has_kernel)
    if not math.isfinite(norm) or norm < 1e-140:  # squares may have overflowed or vanished
        largest = max(abs(float(by_rows.amin())), abs(float(by_rows.amax())))
        if not math.isfinite(largest):
            raise ValueError(f"{name} has a NaN or an infinity, expected finite values")
        if largest == 0:
            return 0.0, 0
        shift = max(-1000, min(1000, math.frexp(largest)[1]))
        mantissa, exponent = math.frexp(_norm(by_rows, math.ldexp(1.0, -shift), False))
        power = max(-1000, min(1000, exponent + shift))
        return math.ldexp(mantissa, exponent + shift - power), power
    mantissa, power = math.frexp(norm)
    return mantissa, power


def _norm(by_rows: Tensor, factor: float, has_kernel: bool) -> float:
    if has_kernel:
        energy: float = torch.ops.svdkern._cpu_energy.default(by_rows, factor)
        return math.sqrt(energy) if energy >= 0 else math.nan
    elements = _MEASURE_ELEMENTS if by_rows.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, elements // max(1, by_rows.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=by_rows.device)
    for start in range(0, by_rows.shape[0], step):
        panel = by_rows[start : start + step].to(torch.float64)
        flat = (panel if factor == 1.0 else panel * factor).reshape(-1)
        total += torch.dot(flat, flat)
    return math.sqrt(float(total)) if float(total) >= 0 else math.nan
