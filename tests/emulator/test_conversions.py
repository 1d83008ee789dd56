"""cvt: every rounding, over all 2^16 patterns of the narrow types; order of halves; clamping; NaN."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from exact import BF16, F16, F32, TF32, Format
from programs import lanes, random_bits
from ptx_emulator.errors import UnknownInstruction

pytestmark = pytest.mark.emulator
PATTERNS = np.arange(1 << 16, dtype=np.uint16)
HALVES = {"bf16": BF16, "f16": F16}


def halves(form: Format) -> np.ndarray:
    """The value of every 16-bit pattern, in float64."""
    magnitude = PATTERNS & 0x7FFF
    values = form.values[np.minimum(magnitude, form.infinity)]
    values = np.where(magnitude == form.infinity, np.inf, np.where(magnitude > form.infinity, np.nan, values))
    return np.where(PATTERNS >> 15, -values, values)


def around(form: Format) -> np.ndarray:
    """f32 at every number of a 16-bit format, a little beside it, and halfway to the next: all roundings are decided here."""
    near = np.concatenate([form.values, (form.values[1:] + form.values[:-1]) / 2])
    exact = near[near < 2.0**128].astype(np.float32)
    bits = exact.view(np.uint32)
    beside = [(bits + np.uint32(1)).view(np.float32), (np.maximum(bits, 1) - np.uint32(1)).view(np.float32)]
    values = np.concatenate([exact, *beside, np.array([3e38, np.inf], np.float32)])
    return np.concatenate([values, -values])


@pytest.mark.parametrize("kind", HALVES)
def test_widening_is_exact(kind: str) -> None:
    got = lanes(f"cvt.f32.{kind} %o, %a;", PATTERNS, out=np.float32)
    assert np.array_equal(got, halves(HALVES[kind]).astype(np.float32), equal_nan=True)
    number = ~np.isnan(got)
    assert np.array_equal(np.signbit(got[number]), PATTERNS[number] >> 15 == 1)


@pytest.mark.parametrize("rounding", ["rn", "rz"])
@pytest.mark.parametrize("kind", HALVES)
def test_narrowing_to_halves(kind: str, rounding: str) -> None:
    form = HALVES[kind]
    values = around(form)
    got = lanes(f"cvt.{rounding}.{kind}.f32 %o, %a;", values, out=np.uint16)
    assert np.array_equal(got, form.round(values, rounding))


@pytest.mark.parametrize("kind", HALVES)
def test_every_half_survives_a_round_trip(kind: str) -> None:
    number = PATTERNS[~np.isnan(halves(HALVES[kind]))]
    body = f".reg .b32 %w; cvt.f32.{kind} %w, %a; cvt.rn.{kind}.f32 %o, %w;"
    assert np.array_equal(lanes(body, number, out=np.uint16), number)


@pytest.mark.parametrize("kind", [*HALVES, "tf32"])
def test_nan_becomes_the_canonical_one(kind: str) -> None:
    """Also a NaN whose payload lies only in the bits that are dropped."""
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF801000, 0x7FFFFFFF], np.uint32)
    got = lanes(f"cvt.rn.{kind}.f32 %o, %a;", nan, out=np.uint32 if kind == "tf32" else np.uint16)
    assert set(got.tolist()) == {0x7FFFFFFF if kind == "tf32" else 0x7FFF}


@pytest.mark.parametrize("rounding", ["rn", "rz", "rna"])
def test_tf32(rounding: str) -> None:
    values = np.concatenate([random_bits(4096, np.float32), around(BF16)])
    bits = values.view(np.uint32)
    ties = (bits & np.uint32(0xFFFFE000) | np.uint32(0x1000)).view(np.float32)
    values = np.concatenate([values, ties])
    values = values[~np.isnan(values)]
    got = lanes(f"cvt.{rounding}.tf32.f32 %o, %a;", values)
    want = TF32.round(values, rounding)
    assert np.array_equal(got, want << 13)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("rounding", ["rn", "rz"])
def test_the_first_operand_of_a_pair_is_its_upper_half(kind: str, rounding: str) -> None:
    a, b = (np.random.default_rng(seed).standard_normal(512).astype(np.float32) for seed in range(2))
    got = lanes(f"cvt.{rounding}.{kind}x2.f32 %o, %a, %b;", a, b)
    form = HALVES[kind]
    assert np.array_equal(got, form.round(a, rounding) << 16 | form.round(b, rounding))


@pytest.mark.parametrize("rounding", ["rn", "rz"])
def test_f64_to_f32(rounding: str) -> None:
    values = random_bits(4096, np.float64)
    values[1000:3000] = np.random.default_rng(0).standard_normal(2000) * np.exp(np.linspace(-110, 100, 2000))
    values[3000:3500] = np.float32(1.25).astype(np.float64) + 2.0**-24  # a tie
    values = values[~np.isnan(values)]
    got = lanes(f"cvt.{rounding}.f32.f64 %o, %a;", values)
    want = np.array([_f32(v, rounding) for v in values])
    assert np.array_equal(got.view(np.float32), want)


def _f32(value: float, rounding: str) -> np.float32:
    with np.errstate(over="ignore"):
        near = np.float32(value)
    if rounding == "rz" and abs(float(near)) > abs(value):
        return np.nextafter(near, np.float32(0))
    return near


@pytest.mark.parametrize("kind", HALVES)
def test_f64_to_halves_rounds_once(kind: str) -> None:
    """Halfway plus what f32 cannot hold."""
    form = HALVES[kind]
    half = 2.0 ** (-form.mantissa - 1)
    values = np.array([1 + half + 2.0**-40, 1 + half - 2.0**-40, 1 + 3 * half - 2.0**-40, 1 + half])
    one = form.bias << form.mantissa
    assert lanes(f"cvt.rn.{kind}.f64 %o, %a;", values, out=np.uint16).tolist() == [one + 1, one, one + 1, one]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64", "s16", "u8"])
def test_integers_to_floats(kind: str) -> None:
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    values = random_bits(2048, dtype)
    source = values.astype(f"{dtype.kind}2") if kind == "u8" else values  # a register of 8 bits there is not
    got = lanes(f"cvt.rn.f32.{kind} %o, %a;", source, out=np.float32)
    assert got.tolist() == [F32.nearest(Fraction(int(v))) for v in values]
    if kind in ("u64", "s64", "u8"):  # of 64 bits it is refused, of 8 there is no such instruction
        return
    got = lanes(f"cvt.rz.f32.{kind} %o, %a;", source, out=np.float32)
    assert got.tolist() == [float(_f32(float(v), "rz")) for v in values]
    got = lanes(f"cvt.rn.bf16.{kind} %o, %a;", source, out=np.uint16)
    assert np.array_equal(got, BF16.round(values.astype(np.float64), "rn"))


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("rounding", ROUND)
@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_floats_to_integers_clamp(kind: str, rounding: str) -> None:
    width = int(kind[1:])
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if kind[0] == "s" else (0, 2**width - 1)
    edges = [0.5, 1.5, 2.5, -0.5, -1.5, 0.49, 2.0**31, -(2.0**31), 2.0**63, 2.0**64, 1e30, -1e30, np.inf, -np.inf]
    values = np.array([*edges, *np.linspace(-300, 300, 77), float(low), float(high)], np.float32)
    got = lanes(f"cvt.{rounding}.{kind}.f32 %o, %a;", values, out=np.dtype(f"u{max(width, 16) // 8}"))
    rounded = [float(ROUND[rounding](np.float64(v))) for v in values]
    want = [low if r < low else high if r > high else int(r) for r in rounded]
    register = max(width, 16)  # narrower results are extended, by their sign where they have one
    assert got.tolist() == [w & ((1 << register) - 1) for w in want]


@pytest.mark.parametrize(
    ("instruction", "want"),
    [("s32.f32", 0), ("u32.f32", 0), ("u16.f32", 0), ("s64.f32", 1 << 63), ("u64.f32", 1 << 63),
     ("s32.f64", 1 << 31), ("u32.f64", 1 << 31), ("s64.f64", 1 << 63)],
)  # fmt: skip
def test_nan_to_integer(instruction: str, want: int) -> None:
    """0, unless one of the two types has 64 bits: then the top bit alone."""
    to, source = instruction.split(".")
    nan = np.full(32, np.nan, np.float32 if source == "f32" else np.float64)
    got = lanes(f"cvt.rni.{instruction} %o, %a;", nan, out=np.dtype(f"u{int(to[1:]) // 8}"))
    assert set(got.tolist()) == {want}


@pytest.mark.parametrize("rounding", ROUND)
def test_rounding_to_integral_f32(rounding: str) -> None:
    values = np.array([0.5, 1.5, -0.5, -1.5, 2.5, 1e30, -0.0, 8388609.0, np.inf], np.float32)
    got = lanes(f"cvt.{rounding}.f32.f32 %o, %a;", values, out=np.float32)
    assert np.array_equal(got.view(np.uint32), ROUND[rounding](values).view(np.uint32))


@pytest.mark.parametrize(
    ("instruction", "values", "want"),
    [
        ("cvt.sat.u8.s32", [-1, 0, 255, 256, 2**31 - 1], [0, 0, 255, 255, 255]),
        ("cvt.sat.s8.s32", [-129, -128, 127, 128], [2**32 - 128, 2**32 - 128, 127, 127]),
        ("cvt.sat.s16.u32", [0, 32767, 32768, 2**32 - 1], [0, 32767, 32767, 32767]),
        ("cvt.u8.u32", [255, 256, 0x1FE], [255, 0, 254]),
        ("cvt.s8.s32", [127, 128, 0x1FF], [127, 2**32 - 128, 2**32 - 1]),
    ],
)
def test_integers_to_integers(instruction: str, values: Sequence[int], want: Sequence[int]) -> None:
    """Chopped, or clamped with `.sat`; then extended to the register by the sign of the type."""
    bits = np.array([v & 0xFFFFFFFF for v in values], np.uint32)
    assert lanes(f"{instruction} %o, %a;", bits).tolist() == list(want)


def test_sat_and_ftz_of_floats() -> None:
    values = np.array([-1, 0.25, 3, np.nan, 1e-40], np.float32)
    small = float(np.float32(1e-40))
    assert lanes("cvt.sat.f32.f32 %o, %a;", values, out=np.float32).tolist() == [0, 0.25, 1, 0, small]
    assert lanes("cvt.ftz.sat.f32.f32 %o, %a;", values, out=np.float32).tolist() == [0, 0.25, 1, 0, 0]
    assert lanes("cvt.rn.sat.f16.f32 %o, %a;", values, out=np.uint16).tolist() == [0, 0x3400, 0x3C00, 0, 0]
    assert lanes("cvt.rpi.ftz.s32.f32 %o, %a;", values, out=np.int32).tolist() == [-1, 1, 3, 0, 0]
    assert lanes("cvt.rn.ftz.f32.f64 %o, %a;", values.astype(np.float64), out=np.float32).tolist()[-1] == 0


def test_bf16_keeps_subnormals() -> None:
    """bf16 has f32's exponents: its subnormals are rounded to, and never flushed without `.ftz`."""
    values = np.array([2.0**-133, 1.5 * 2.0**-133, 2.0**-134, 1.01 * 2.0**-134, 2.0**-140], np.float32)
    assert lanes("cvt.rn.bf16.f32 %o, %a;", values, out=np.uint16).tolist() == [1, 2, 0, 1, 0]
    assert lanes("cvt.rn.ftz.bf16.f32 %o, %a;", values, out=np.uint16).tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "instruction",
    ["cvt.rm.f32.f64", "cvt.rp.f16.f32", "cvt.rn.relu.bf16.f32", "cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.f16.s64",
     "cvt.s32.f32", "cvt.rn.sat.bf16.f32", "cvt.rna.satfinite.tf32.f32", "cvt.rs.f16x2.f32"],
)  # fmt: skip
def test_forms_that_are_not_there_are_refused(instruction: str) -> None:
    with pytest.raises(UnknownInstruction, match=instruction):
        lanes(f"{instruction} %o, %a;", np.zeros(32, np.float64), out=np.uint64)
