"""Rounding to a binary floating-point format, by looking for the neighbours: what conversions and sums are held against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Format:
    """exponent and mantissa: bits of each field."""

    exponent: int
    mantissa: int

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def infinity(self) -> int:
        """Its pattern."""
        return ((1 << self.exponent) - 1) << self.mantissa

    @cached_property
    def values(self) -> np.ndarray:
        """Of the patterns 0, 1, ... in float64; the last is the infinity's, with the value that a wider range would give it."""
        pattern = np.arange(self.infinity + 1)
        exponent, mantissa = pattern >> self.mantissa, pattern & ((1 << self.mantissa) - 1)
        significand = np.where(exponent == 0, mantissa, mantissa + (1 << self.mantissa)).astype(np.float64)
        return np.ldexp(significand, np.maximum(exponent, 1) - self.bias - self.mantissa)

    def round(self, values: np.ndarray, rounding: str) -> np.ndarray:
        """The pattern of each float32 or float64 after "rn", "rz" or "rna"; infinities stay, NaNs are not for here."""
        magnitude = np.abs(values).astype(np.float64)
        low = np.minimum(np.searchsorted(self.values, magnitude, side="right") - 1, self.infinity - 1)
        below, above = magnitude - self.values[low], self.values[low + 1] - magnitude
        up = {
            "rz": np.zeros(low.shape, np.bool_),
            "rn": (below > above) | ((below == above) & (low % 2 == 1)),
            "rna": below >= above,
        }[rounding]
        pattern = np.where(np.isinf(values), self.infinity, low + up)
        return pattern + (np.signbit(values).astype(np.int64) << (self.exponent + self.mantissa))

    def nearest(self, value: Fraction) -> float:
        """The nearest number of the format, ties to even."""
        if value == 0:
            return 0.0
        top = abs(value).numerator.bit_length() - value.denominator.bit_length()
        top -= abs(value) < Fraction(2) ** top
        unit = Fraction(2) ** (max(top, 1 - self.bias) - self.mantissa)
        rounded = round(value / unit) * unit
        overflows = abs(rounded) >= Fraction(2) ** (self.bias + 1)
        return math.copysign(math.inf if overflows else float(rounded), value)


F32 = Format(8, 23)
F16 = Format(5, 10)
BF16 = Format(8, 7)
TF32 = Format(8, 10)
