"""Integer arithmetic and bits, against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from programs import lanes, random_bits
from ptx_emulator.errors import UnknownInstruction

pytestmark = pytest.mark.emulator
COUNT = 512


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def numbers(kind: str, seed: int, count: int = COUNT) -> np.ndarray:
    return random_bits(count, np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}"), seed)


def check(instruction: str, expected: Callable[..., int], *inputs: np.ndarray, out: int = 32) -> None:
    """`instruction` is written with the operands; what it gives is `expected` of Python integers, cut to `out` bits."""
    got = lanes(instruction, *inputs, out=np.dtype(f"u{out // 8}"))
    want = [expected(*(int(v) for v in values)) & ((1 << out) - 1) for values in zip(*inputs, strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_sums_and_products_wrap(kind: str) -> None:
    bits = int(kind[1:])
    a, b, c = (numbers(kind, seed) for seed in range(3))
    check(f"add.{kind} %o, %a, %b;", lambda x, y: x + y, a, b, out=bits)
    check(f"sub.{kind} %o, %a, %b;", lambda x, y: x - y, a, b, out=bits)
    check(f"mul.lo.{kind} %o, %a, %b;", lambda x, y: x * y, a, b, out=bits)
    check(f"mul.hi.{kind} %o, %a, %b;", lambda x, y: (x * y) >> bits, a, b, out=bits)
    check(f"mad.lo.{kind} %o, %a, %b, %c;", lambda x, y, z: x * y + z, a, b, c, out=bits)
    check(f"mad.hi.{kind} %o, %a, %b, %c;", lambda x, y, z: ((x * y) >> bits) + z, a, b, c, out=bits)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products_are_whole(kind: str) -> None:
    bits = int(kind[1:])
    a, b, c = numbers(kind, 0), numbers(kind, 1), numbers(f"{kind[0]}{2 * bits}", 2)
    check(f"mul.wide.{kind} %o, %a, %b;", lambda x, y: x * y, a, b, out=2 * bits)
    check(f"mad.wide.{kind} %o, %a, %b, %c;", lambda x, y, z: x * y + z, a, b, c, out=2 * bits)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_division_is_towards_zero(kind: str) -> None:
    bits = int(kind[1:])
    a, b = numbers(kind, 3), numbers(kind, 4)
    b[b == 0] = 7
    b[2] = -1 if kind[0] == "s" else 1
    a[2] = np.iinfo(a.dtype).min  # whose quotient by -1 wraps

    def quotient(x: int, y: int) -> int:
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    check(f"div.{kind} %o, %a, %b;", quotient, a, b, out=bits)
    check(f"rem.{kind} %o, %a, %b;", lambda x, y: x - y * quotient(x, y), a, b, out=bits)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_min_max(kind: str) -> None:
    a, b = numbers(kind, 5), numbers(kind, 6)
    check(f"min.{kind} %o, %a, %b;", min, a, b, out=int(kind[1:]))
    check(f"max.{kind} %o, %a, %b;", max, a, b, out=int(kind[1:]))


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_neg_abs(kind: str) -> None:
    a = numbers(kind, 7)
    check(f"neg.{kind} %o, %a;", lambda x: -x, a, out=int(kind[1:]))
    check(f"abs.{kind} %o, %a;", abs, a, out=int(kind[1:]))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int) -> None:
    a, b = numbers(f"u{bits}", 8), numbers(f"u{bits}", 9)
    check(f"and.b{bits} %o, %a, %b;", lambda x, y: x & y, a, b, out=bits)
    check(f"or.b{bits} %o, %a, %b;", lambda x, y: x | y, a, b, out=bits)
    check(f"xor.b{bits} %o, %a, %b;", lambda x, y: x ^ y, a, b, out=bits)
    check(f"not.b{bits} %o, %a;", lambda x: ~x, a, out=bits)
    check(f"cnot.b{bits} %o, %a;", lambda x: x == 0, a, out=bits)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_clamp_their_count(bits: int) -> None:
    a = numbers(f"u{bits}", 10)
    n = np.resize(np.array([0, 1, bits - 1, bits, bits + 1, 255, 2**32 - 1], np.uint32), COUNT)
    check(f"shl.b{bits} %o, %a, %b;", lambda x, k: x << min(k, bits), a, n, out=bits)
    check(f"shr.u{bits} %o, %a, %b;", lambda x, k: x >> min(k, bits), a, n, out=bits)
    check(f"shr.b{bits} %o, %a, %b;", lambda x, k: x >> min(k, bits), a, n, out=bits)
    check(f"shr.s{bits} %o, %a, %b;", lambda x, k: signed(x, bits) >> min(k, bits), a, n, out=bits)


@pytest.mark.parametrize(("mode", "shift"), [("wrap", lambda k: k & 31), ("clamp", lambda k: min(k, 32))])
def test_funnel_shift(mode: str, shift: Callable[[int], int]) -> None:
    low, high = numbers("u32", 11), numbers("u32", 12)
    n = np.resize(np.array([0, 1, 13, 31, 32, 33, 64, 2**32 - 1], np.uint32), COUNT)
    check(f"shf.l.{mode}.b32 %o, %a, %b, %c;", lambda a, b, k: ((b << 32 | a) << shift(k)) >> 32, low, high, n)
    check(f"shf.r.{mode}.b32 %o, %a, %b, %c;", lambda a, b, k: (b << 32 | a) >> shift(k), low, high, n)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind: str) -> None:
    """The loop of the ISA's description, for fields that reach past the top bit too."""
    bits = int(kind[1:])
    top = bits - 1

    def extract(a: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        sign = 0 if kind[0] == "u" or length == 0 else a >> min(start + length - 1, top) & 1
        return sum((a >> start + i & 1 if i < length and start + i <= top else sign) << i for i in range(bits))

    a = numbers(f"u{bits}", 13)
    rng = np.random.default_rng(0)
    start, length = (rng.integers(0, bits + 8, COUNT).astype(np.uint32) for _ in range(2))
    start[::7] += 256  # only the low byte counts
    length[::5] = 0
    check(f"bfe.{kind} %o, %a, %b, %c;", extract, a, start, length, out=bits)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    def insert(a: int, b: int, start: int, length: int) -> int:
        for i in range(length & 255):
            if (start & 255) + i < bits:
                place = 1 << (start & 255) + i
                b = b & ~place | (place if a >> i & 1 else 0)
        return b

    a, b = numbers(f"u{bits}", 14), numbers(f"u{bits}", 15)
    rng = np.random.default_rng(1)
    start, length = (rng.integers(0, bits + 8, COUNT).astype(np.uint32) for _ in range(2))
    start[::7] += 256
    check(f"bfi.b{bits} %o, %a, %b, %c, %e;", insert, a, b, start, length, out=bits)


@pytest.mark.parametrize("table", [0x00, 0x01, 0x1A, 0x80, 0xE8, 0x96, 0xFF, 0x2D])
def test_lop3_reads_its_table(table: int) -> None:
    """Bit 4 a + 2 b + c of the table, for every bit of the inputs."""

    def logic(a: int, b: int, c: int) -> int:
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))

    check(f"lop3.b32 %o, %a, %b, %c, {table};", logic, *(numbers("u32", s, 64) for s in (16, 17, 18)))


def test_prmt_picks_bytes_and_signs() -> None:
    def permute(a: int, b: int, selector: int) -> int:
        data, result = (b << 32 | a).to_bytes(8, "little"), 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = data[nibble & 7]
            result |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
        return result

    check("prmt.b32 %o, %a, %b, %c;", permute, *(numbers("u32", s) for s in (19, 20, 21)))


def test_counts_of_bits() -> None:
    a = numbers("u32", 22)
    check("popc.b32 %o, %a;", int.bit_count, a)
    check("clz.b32 %o, %a;", lambda x: 32 - x.bit_length(), a)
    check("brev.b32 %o, %a;", lambda x: int(f"{x:032b}"[::-1], 2), a)
    check("bfind.u32 %o, %a;", lambda x: x.bit_length() - 1, a)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_dp4a(kind: str) -> None:
    def dot(a: int, b: int, c: int) -> int:
        pairs = zip(a.to_bytes(4, "little"), b.to_bytes(4, "little"), strict=True)
        return c + sum(signed(x, 8) * signed(y, 8) if kind == "s32" else x * y for x, y in pairs)

    check(f"dp4a.{kind}.{kind} %o, %a, %b, %c;", dot, *(numbers("u32", s) for s in (23, 24, 25)))


def test_packing_keeps_the_low_half_first() -> None:
    a = numbers("u64", 26)
    halves = ".reg .b32 %lo, %hi; mov.b64 {%lo, %hi}, %a;"
    check(halves + "mov.b64 %o, {%hi, %lo};", lambda x: (x & 0xFFFFFFFF) << 32 | x >> 32, a, out=64)
    check(halves + "mov.b32 %o, %hi;", lambda x: x >> 32, a)
    quarters = ".reg .b16 %q<4>; mov.b64 {%q0, %q1, %q2, %q3}, %a;"
    check(quarters + "mov.b32 %o, {%q3, %q1};", lambda x: x >> 48 | (x >> 16 & 0xFFFF) << 16, a)
    check(".reg .b32 %hi; mov.b64 {_, %hi}, %a; mov.b32 %o, %hi;", lambda x: x >> 32, a)


@pytest.mark.parametrize(
    "instruction",
    ["add.sat.s32 %o, %a, %b", "mul.hi.s8 %o, %a, %b", "add.cc.u32 %o, %a, %b", "max.relu.s32 %o, %a, %b",
     "max.s32 %o, %a, %b, %a", "bfind.shiftamt.u32 %o, %a", "prmt.b32.f4e %o, %a, %b, %a"],
)  # fmt: skip
def test_forms_that_are_not_there_are_refused(instruction: str) -> None:
    """A modifier that was ignored would give a wrong number."""
    with pytest.raises(UnknownInstruction, match=instruction.split()[0].replace(".", r"\.")):
        lanes(instruction + ";", np.arange(32, dtype=np.uint32), np.arange(32, dtype=np.uint32))
