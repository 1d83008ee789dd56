"""The dropout stream against published vectors and plain Python, on every instruction set."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import reference

# Random123's kat_vectors: rounds, counter, key, output.
PUBLISHED = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), PUBLISHED)
def test_known_answers(kernels: ModuleType, rounds: int, counter: tuple[int, ...], key: tuple[int, int],
                       expected: tuple[int, ...]) -> None:  # fmt: skip
    assert reference.philox(counter, key, rounds) == expected
    assert tuple(kernels.philox(list(counter), list(key), rounds)) == expected


@pytest.mark.parametrize("octets", [1, 3, 8, 21])
def test_bits_are_the_reference_s(kernels: ModuleType, isa: str, octets: int) -> None:
    seed, offset, row = 0x9E3779B97F4A7C15, 0xDEADBEEF12345678, 7
    assert kernels.philox_bits(isa, seed, offset, row, 0, octets) == reference.bits(seed, offset, row, 8 * octets)


def test_any_part_of_a_row_is_the_same_stream(kernels: ModuleType, isa: str) -> None:
    whole = kernels.philox_bits(isa, 5, 6, 2**31 + 3, 0, 40)
    assert kernels.philox_bits(isa, 5, 6, 2**31 + 3, 11, 13) == whole[88:192]
    assert kernels.philox_bits(isa, 5, 6, 2**31 + 3, 2**28 + 1, 1) != whole[8:16]


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535])
def test_dropout_keeps_and_rescales(kernels: ModuleType, isa: str, dtype: str, threshold: int) -> None:
    rng = np.random.default_rng(threshold)
    x = reference.to_storage(rng.standard_normal((3, 77)), dtype)
    out = np.full_like(x, 0x7FC0) if dtype == "bfloat16" else np.full_like(x, np.nan)
    drop = (123456789012345678, 2**63 + 5, threshold, 2**31 - 1)
    kernels.dropout(isa, x, drop, out)
    factor = np.float32(1 / (1 - threshold / 65536))
    kept = reference.mask(drop, 3, 77) != 0
    with np.errstate(over="ignore"):
        expected = np.where(kept, reference.to_double(x).astype(np.float32) * factor, np.float32(0))
    assert np.array_equal(out, reference.to_storage(expected, dtype))


def test_a_dropped_infinity_is_zero(kernels: ModuleType, isa: str) -> None:
    x = np.full((1, 64), np.inf, np.float32)
    out = np.empty_like(x)
    drop = (1, 2, 30000, 0)
    kernels.dropout(isa, x, drop, out)
    assert np.array_equal(out == 0, reference.mask(drop, 1, 64) == 0) and not np.isnan(out).any()
