"""Floating-point arithmetic and comparisons: one rounding, NaN, signed zeros, subnormals."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from exact import BF16, F16, F32, Format
from programs import lanes, random_bits
from ptx_emulator.errors import UnknownInstruction

pytestmark = pytest.mark.emulator
HALVES = {"bf16": BF16, "f16": F16}
SPECIAL = np.array([0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 2.0**-126], np.float32)


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(values, values)
    return a.reshape(-1), b.reshape(-1)


def same(got: np.ndarray, want: np.ndarray) -> bool:
    """Bit for bit, but for the payload of NaNs."""
    return bool(((got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))).all())


def spread(count: int, seed: int) -> np.ndarray:
    """Finite f32 near each other, near the ends of the range, and anywhere."""
    values = random_bits(count, np.float32, seed)
    values[count // 2 :] = np.random.default_rng(seed).standard_normal(count - count // 2)
    return np.where(np.isfinite(values), values, np.float32(1))


def half_patterns(count: int, form: Format, seed: int) -> np.ndarray:
    """Finite numbers of a 16-bit format, half of them near 1."""
    rng = np.random.default_rng(seed)
    near = form.bias << form.mantissa
    bits = np.where(
        np.arange(count) % 2, rng.integers(0, form.infinity, count), near + rng.integers(-2000, 2000, count)
    )
    return (np.clip(bits, 0, form.infinity - 1) | rng.integers(0, 2, count) << 15).astype(np.uint16)


def value_of(pattern: np.ndarray, form: Format) -> list[Fraction]:
    sign = np.where(pattern >> 15, -1.0, 1.0)
    return [Fraction(float(v)) for v in sign * form.values[pattern & 0x7FFF]]


# ------------------------------------------------------------------------------------------------------ one rounding


def test_fma_rounds_once_where_f64_would_round_twice() -> None:
    """a b is halfway between two f32; c, far below f64's precision, says which is nearer."""
    a = b = np.float32(1 + 2**-12)
    c = np.array([2.0**-100, -(2.0**-100), 0], np.float32)
    got = lanes("fma.rn.f32 %o, %a, %b, %c;", np.full(3, a), np.full(3, b), c, out=np.float32)
    below, above = np.float32(1 + 2**-11), np.float32(1 + 2**-11 + 2**-23)
    assert got.tolist() == [above, below, below]


@pytest.mark.parametrize("instruction", ["fma.rn.f32", "mad.rn.f32"])
def test_fma_against_exact_arithmetic(instruction: str) -> None:
    a, b, c = (spread(1500, seed) for seed in range(3))
    with np.errstate(over="ignore"):
        c[::3] = -(a[::3] * b[::3])  # cancels all but the rounding of the product
    got = lanes(f"{instruction} %o, %a, %b, %c;", a, b, c, out=np.float32)
    finite = np.isfinite(c)
    values = zip(a[finite], b[finite], c[finite], strict=True)
    want = [F32.nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in values]
    assert got[finite].tolist() == want


@pytest.mark.parametrize("kind", HALVES)
def test_halves_round_once(kind: str) -> None:
    form = HALVES[kind]
    bits = [half_patterns(1000, form, seed) for seed in range(3)]
    x, y, z = ([*value_of(b, form)] for b in bits)
    cases: dict[str, Callable[[int], Fraction]] = {
        f"add.rn.{kind} %o, %a, %b;": lambda i: x[i] + y[i],
        f"sub.rn.{kind} %o, %a, %b;": lambda i: x[i] - y[i],
        f"mul.rn.{kind} %o, %a, %b;": lambda i: x[i] * y[i],
        f"fma.rn.{kind} %o, %a, %b, %c;": lambda i: x[i] * y[i] + z[i],
    }
    for instruction, expected in cases.items():
        got = lanes(instruction, *bits, out=np.uint16)
        exact = [expected(i) for i in range(len(got))]
        want = form.round(np.array([form.nearest(v) for v in exact]), "rn")
        zero = np.array([v == 0 for v in exact])  # a zero's sign is not in a Fraction
        wrong = (got != want) & ~(zero & (got & 0x7FFF == 0))
        assert not wrong.any(), (instruction, [b[wrong][0] for b in bits])


def test_fma_of_halves_where_f32_would_round_twice() -> None:
    """c + half a unit of c, more or less by what f32 does not hold: products of two f16 reach that far down."""
    unit = 2.0**-10
    more, less = (1 + 32 * unit, 1 - 31 * unit), (1 + unit, 1 - unit)
    for (x, y), c, want in ((more, 1.0, 1 + unit), (less, 1 + unit, 1 + unit)):
        product = Fraction(x * 2**-5) * Fraction(y * 2**-6)
        assert 0 < abs(product - Fraction(1, 2**11)) < Fraction(1, 2**24)
        a, b, addend = (np.array([v], np.float16) for v in (x * 2**-5, y * 2**-6, c))
        assert lanes("fma.rn.f16 %o, %a, %b, %c;", a, b, addend, out=np.float16).tolist() == [want]


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("instruction", ["add.rn", "mul.rn", "min", "max.NaN", "neg", "abs"])
def test_packed_halves_are_two_of_the_scalar_kind(kind: str, instruction: str) -> None:
    a, b = random_bits(512, np.uint32, 1), random_bits(512, np.uint32, 2)
    operands = "%o, %a;" if instruction in ("neg", "abs") else "%o, %a, %b;"
    packed = lanes(f"{instruction}.{kind}x2 {operands}", a, b)
    halves = [lanes(f"{instruction}.{kind} {operands}", x, y, out=np.uint16) for x, y in zip(
        *([(v & 0xFFFF).astype(np.uint16), (v >> 16).astype(np.uint16)] for v in (a, b)), strict=True)]  # fmt: skip
    assert np.array_equal(packed, halves[0] | halves[1].astype(np.uint32) << 16)


@pytest.mark.parametrize("instruction", ["add", "sub", "mul", "div"])
def test_f32_arithmetic(instruction: str) -> None:
    a, b = spread(800, 3), spread(800, 4)
    b[b == 0] = 1
    got = lanes(f"{instruction}.rn.f32 %o, %a, %b;", a, b, out=np.float32)
    operation = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}[instruction]
    want = [F32.nearest(operation(Fraction(float(x)), Fraction(float(y)))) for x, y in zip(a, b, strict=True)]
    assert got.tolist() == want


# ------------------------------------------------------------------------------------------- NaN, zeros, subnormals


@pytest.mark.parametrize("instruction", ["min", "max"])
def test_min_max_of_nan_and_zeros(instruction: str) -> None:
    """The number beats the NaN, unless `.NaN`; -0 is below +0; `.ftz` makes zeros of subnormals first."""

    def pick(x: float, y: float, nan: bool) -> float:
        if math.isnan(x) or math.isnan(y):
            return math.nan if nan or (math.isnan(x) and math.isnan(y)) else (y if math.isnan(x) else x)
        return (min if instruction == "min" else max)((x, y), key=lambda v: (v, math.copysign(1, v)))

    a, b = pairs(SPECIAL)
    flushed = [np.where(np.abs(v) < 2.0**-126, np.copysign(np.float32(0), v), v) for v in (a, b)]
    for modifiers, (x, y) in {"": (a, b), ".NaN": (a, b), ".ftz": flushed, ".ftz.NaN": flushed}.items():
        got = lanes(f"{instruction}{modifiers}.f32 %o, %a, %b;", a, b, out=np.float32)
        want = [pick(float(p), float(q), "NaN" in modifiers) for p, q in zip(x, y, strict=True)]
        assert same(got, np.array(want, np.float32)), modifiers


@pytest.mark.parametrize("kind", HALVES)
def test_min_max_of_halves_keeps_the_pattern(kind: str) -> None:
    nan, one = (0x7FC0, 0x3F80) if kind == "bf16" else (0x7E00, 0x3C00)
    a, b = np.array([0x8000, 0, nan, one], np.uint16), np.array([0, 0x8000, one, nan], np.uint16)
    assert lanes(f"min.{kind} %o, %a, %b;", a, b, out=np.uint16).tolist() == [0x8000, 0x8000, one, one]
    assert lanes(f"max.{kind} %o, %a, %b;", a, b, out=np.uint16).tolist() == [0, 0, one, one]
    assert lanes(f"max.NaN.{kind} %o, %a, %b;", a, b, out=np.uint16).tolist()[2:] == [0x7FFF, 0x7FFF]


def test_ftz_flushes_inputs_and_results() -> None:
    small, least = np.float32(1e-40), np.float32(2.0**-126)
    a = np.array([small, -small, least, -least], np.float32)
    b = np.array([least, least, 0.5, 0.5], np.float32)
    assert same(lanes("add.ftz.f32 %o, %a, %b;", a, b, out=np.float32)[:2], np.array([least, least], np.float32))
    assert same(lanes("mul.ftz.f32 %o, %a, %b;", a, b, out=np.float32), np.array([0, -0.0, 0, -0.0], np.float32))
    assert same(lanes("mul.f32 %o, %a, %b;", a, b, out=np.float32)[2:], np.array([2.0**-127, -(2.0**-127)], np.float32))


def test_sat_clamps_to_one_and_makes_zero_of_nan() -> None:
    a = np.array([2, -2, 0.25, np.nan, np.inf, -np.inf], np.float32)
    got = lanes("add.sat.f32 %o, %a, %b;", a, np.zeros(6, np.float32), out=np.float32)
    assert got.tolist() == [1, 0, 0.25, 0, 1, 0]


def test_signs_alone_change() -> None:
    """neg and abs of every f16 and bf16, infinities and zeros included."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    number = bits[(bits & 0x7FFF) <= 0x7F80]
    assert np.array_equal(lanes("neg.bf16 %o, %a;", number, out=np.uint16), number ^ 0x8000)
    assert np.array_equal(lanes("abs.bf16 %o, %a;", number, out=np.uint16), number & 0x7FFF)
    assert np.array_equal(lanes("neg.f16 %o, %a;", bits, out=np.uint16), bits ^ 0x8000)


@pytest.mark.parametrize(
    ("instruction", "function"),
    [("rcp.approx.f32", lambda x: 1 / x), ("rsqrt.approx.f32", lambda x: x**-0.5), ("sqrt.rn.f32", lambda x: x**0.5),
     ("ex2.approx.f32", lambda x: 2**x), ("lg2.approx.f32", np.log2), ("tanh.approx.f32", np.tanh)],
)  # fmt: skip
def test_approximations_are_near(instruction: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    x = np.exp(np.linspace(-5, 3, 512)).astype(np.float32)
    got = lanes(f"{instruction} %o, %a;", x, out=np.float32)
    assert np.allclose(got, function(x.astype(np.float64)), rtol=3e-7, atol=1e-7)


# ------------------------------------------------------------------------------------------------------- comparisons

ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ORDERED)
def test_comparisons_of_nan(kind: str, name: str) -> None:
    """The plain comparisons are false of a NaN, `ne` too; those with a u are true."""
    patterns = {"f32": SPECIAL, "bf16": np.array([0, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0x7FC0], np.uint16),
                "f16": np.array([0, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0x7E00], np.uint16)}[kind]  # fmt: skip
    values = patterns if kind == "f32" else np.array([0, -0.0, 1, -1, np.inf, np.nan])
    a, b = pairs(patterns)
    x, y = pairs(values)
    nan = np.isnan(x) | np.isnan(y)
    for suffix, of_nan in (("", False), ("u", True)):
        got = lanes(f"setp.{name}{suffix}.{kind} %p, %a, %b; selp.u32 %o, 1, 0, %p;", a, b)
        assert np.array_equal(got.astype(bool), np.where(nan, of_nan, ORDERED[name](x, y))), suffix


def test_num_nan_and_ftz() -> None:
    a, b = pairs(SPECIAL)
    nan = np.isnan(a) | np.isnan(b)
    assert np.array_equal(lanes("setp.nan.f32 %p, %a, %b; selp.u32 %o, 1, 0, %p;", a, b), nan)
    assert np.array_equal(lanes("setp.num.f32 %p, %a, %b; selp.u32 %o, 1, 0, %p;", a, b), ~nan)
    small = np.array([1e-40, -1e-40], np.float32)
    zero = np.zeros(2, np.float32)
    assert lanes("setp.eq.ftz.f32 %p, %a, %b; selp.u32 %o, 1, 0, %p;", small, zero).tolist() == [1, 1]
    assert lanes("setp.eq.f32 %p, %a, %b; selp.u32 %o, 1, 0, %p;", small, zero).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "compare"), {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}.items()
)
def test_unsigned_names(name: str, compare: Callable[[int, int], bool]) -> None:
    a, b = pairs(np.array([0, 1, 2**31, 2**32 - 1], np.uint32))
    got = lanes(f"setp.{name}.u32 %p, %a, %b; selp.u32 %o, 1, 0, %p;", a, b)
    assert got.tolist() == [compare(int(x), int(y)) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("join", ["and", "or", "xor"])
@pytest.mark.parametrize("third", ["%q", "!%q"])
def test_setp_joins_a_predicate(join: str, third: str) -> None:
    """p = (a < b) op c, q = !(a < b) op c; c may be one of the targets."""
    a, b, c = (np.array(v, np.int32) for v in zip(*itertools.product([-1, 0], [0, -1], [0, 1]), strict=True))
    body = f"""
    setp.ne.s32 %q, %c, 0;
    setp.lt.{join}.s32 %p|%q, %a, %b, {third};
    selp.u32 %o, 1, 0, %p;
    @%q or.b32 %o, %o, 2;
    """
    operation = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[join]
    third_value = c == (1 if third == "%q" else 0)
    want = operation(a < b, third_value) + 2 * operation(~(a < b), third_value)
    assert lanes(body, a, b, c).tolist() == want.tolist()


def test_selp() -> None:
    a, b, c = random_bits(64, np.uint64, 1), random_bits(64, np.uint64, 2), np.arange(64, dtype=np.uint32) % 3
    got = lanes("setp.eq.u32 %p, %c, 0; selp.b64 %o, %a, %b, %p;", a, b, c, out=np.uint64)
    assert np.array_equal(got, np.where(c == 0, a, b))


@pytest.mark.parametrize(
    "instruction",
    ["add.rz.f32 %o, %a, %b", "add.rm.f32 %o, %a, %b", "mul.rp.f32 %o, %a, %b", "fma.rz.f32 %o, %a, %b, %a",
     "min.xorsign.abs.f32 %o, %a, %b", "fma.rn.relu.bf16x2 %o, %a, %b, %a", "setp.lt.f16x2 %p, %a, %b"],
)  # fmt: skip
def test_forms_that_are_not_there_are_refused(instruction: str) -> None:
    with pytest.raises(UnknownInstruction, match=instruction.split()[0]):
        lanes(instruction + ";", np.ones(32, np.float32), np.ones(32, np.float32), out=np.float32)
