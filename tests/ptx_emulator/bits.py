"""PTX types as numpy types, and the conversions that numpy does not have.

A register is an array of bit patterns (uint16, uint32, uint64; bool for predicates); a type is a view of them.
bf16 and tf32 have no numpy type: bf16 lives in uint16, tf32 in the upper 19 bits of an f32.
"""

import numpy as np

STORAGE = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {f"{kind}{bits}": STORAGE[bits] for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in (8, 16, 32, 64)}
TYPES |= {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16, "tf32": np.float32}
TYPES |= {"f16x2": np.uint32, "bf16x2": np.uint32, "pred": np.bool_}


def size_of(name: str) -> int:
    """Bytes of a value of PTX type `name`."""
    return np.dtype(TYPES[name]).itemsize


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f64_to_f32(values: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """Round to nearest even ("rn"), towards zero ("rz"), or to odd ("odd").

    Rounding what was rounded to odd once more, to 22 bits or fewer, gives what one rounding would have given.
    """
    single = np.ascontiguousarray(values.astype(np.float32))
    if rounding == "rn":
        return single
    bits, wide = single.view(np.uint32), single.astype(np.float64)
    away = np.abs(wide) > np.abs(values)  # an infinity included
    towards = (np.abs(wide) < np.abs(values)) & (rounding == "odd")
    odd = (bits & np.uint32(rounding == "odd")) != 0  # it is the odd one of the two neighbours already
    bits = np.where(odd, bits, bits - away.astype(np.uint32) + towards.astype(np.uint32))
    return bits.view(np.float32)


def f32_to_bf16(values: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """Round to nearest even ("rn") or towards zero ("rz"); every NaN becomes 0x7fff, as the ISA has it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if rounding == "rn":
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:
        rounded = bits >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f32_to_f16(values: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """float16; past the range rn gives an infinity, rz the largest finite number; every NaN becomes 0x7fff."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).view(np.uint16)
    if rounding == "rz":
        away = np.abs(half.view(np.float16).astype(np.float32)) > np.abs(values)  # an infinity included
        half = half - away.astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), half).view(np.float16)


def f32_to_tf32(values: np.ndarray, rounding: str) -> np.ndarray:
    """10 bits of mantissa kept in an f32: nearest, ties away ("rna") or to even ("rn"); "rz" drops the rest.

    Every NaN becomes 0x7fffffff: its upper 19 bits alone, which is what a tensor core sees, are a NaN as well.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    up = {"rz": 0, "rna": np.uint32(0x1000), "rn": np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))}[
        rounding
    ]
    kept = np.where(np.isinf(values), bits, (bits + up) & np.uint32(0xFFFFE000))
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), kept).view(np.float32)


def flush(values: np.ndarray) -> np.ndarray:
    """Subnormal f32 become zeros of their sign (`.ftz`)."""
    return np.where(np.abs(values) < np.float32(2**-126), np.copysign(np.float32(0), values), values)


def as_type(bits: np.ndarray, name: str) -> np.ndarray:
    """Bit patterns seen as PTX type `name`: wider registers give their low bits, narrower ones are extended by zeros."""
    dtype = np.dtype(TYPES[name])
    if bits.dtype == dtype:
        return bits
    if bits.dtype.itemsize == dtype.itemsize:
        return bits.view(dtype)
    return bits.astype(STORAGE[8 * dtype.itemsize]).view(dtype)


def as_bits(values: np.ndarray) -> np.ndarray:
    """The bit patterns of `values` (predicates stay as they are)."""
    if values.dtype == np.bool_:
        return values
    return np.ascontiguousarray(values).view(STORAGE[8 * values.dtype.itemsize])


def extend(values: np.ndarray, bits: int) -> np.ndarray:
    """An integer extended to `bits`, by its sign where it has one: what a load into a wider register does."""
    kind = "i" if values.dtype.kind == "i" else "u"
    return as_bits(values.astype(f"{kind}{bits // 8}"))
