"""The torch-free kernels on every instruction set, against fp64."""

from __future__ import annotations

from types import ModuleType

import exercise
import numpy as np
import pytest
import reference
from reference import to_double, to_storage

# Together: every M, K, N, r that leaves tails of tiles, panels, strips, chunks and units, each with a little of everything.
SHAPES = [
    (1, 64, 64, 4), (2, 129, 65, 17), (3, 5, 1, 1), (4, 17, 129, 3), (7, 1, 5, 16), (8, 65, 64, 100),
    (16, 640, 129, 16), (33, 129, 17, 3), (16, 1100, 70, 33), (5, 96, 1100, 16), (6, 17, 64, 0), (16, 1, 1, 1),
    # many rows: tails of strips, panels, blocks of depth and of columns; both ways of sharing the work
    (17, 1, 1, 1), (29, 345, 290, 16), (64, 31, 33, 100), (43, 97, 15, 0), (530, 33, 47, 17), (601, 5, 300, 3),
    (40, 300, 7, 280),
    # factors of many columns for few rows: used row by row where they lie by rows
    (1, 300, 70, 64), (4, 65, 129, 128), (3, 600, 43, 64), (14, 270, 66, 64), (1, 1, 1, 128),
    # rows as lanes: pieces of columns and of depth, tails of both
    (9, 290, 2100, 3), (16, 2100, 290, 17), (20, 523, 203, 3), (64, 150, 1050, 16),
    # a large weight: up to 1024 rows are packed by columns
    (530, 1100, 2000, 3),
    # few rows beyond one piece of columns, either way; a weight that is packed in several deep pieces
    (3, 40, 4200, 5), (2, 4200, 40, 3), (70, 2100, 40, 3),
]  # fmt: skip
DROP = (2**63 + 77, 2**40 + 1, 20000, 0)


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_layer(kernels: ModuleType, isa: str, dtype: str, shape: tuple[int, int, int, int]) -> None:
    kernels.set_pieces(2)
    turn = SHAPES.index(shape)
    factors, layouts, forms = list(reference.DTYPES), ["rows", "columns", "neither"], ["sigma", "core", "plain"]
    for i in range(3):
        exercise.whole_layer(kernels, isa, dtype, factors[(turn + i) % 3], shape, layouts[(turn // 2 + i) % 3],
                             DROP if (turn + i) % 2 else (), forms[i], gates=(0, 1, shape[0])[i])  # fmt: skip
    exercise.whole_layer(
        kernels, isa, dtype, "float32", shape, "rows", DROP if turn % 2 else (), "sigma", weight_layout="columns"
    )


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("shape", [(1, 1300, 16), (16, 700, 3), (129, 65, 17), (70, 600, 33), (3, 1, 1)], ids=str)
def test_primitives(kernels: ModuleType, isa: str, dtype: str, shape: tuple[int, int, int]) -> None:
    kernels.set_pieces(2)
    for factor, layout, dropout in (("float32", "rows", ()), ("bfloat16", "columns", DROP), ("float16", "neither", ())):
        exercise.primitives(kernels, isa, dtype, factor, shape, layout, dropout)


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_bits_do_not_depend_on_the_split(kernels: ModuleType, isa: str, dtype: str) -> None:
    found = []
    for pieces in (1, 2, 3, 7):
        kernels.set_pieces(pieces)
        results = exercise.primitives(kernels, isa, dtype, "float32", (70, 1300, 16), "rows", ())
        for shape in ((16, 1300, 700, 16), (50, 1300, 300, 16), (520, 70, 90, 5)):
            results += exercise.whole_layer(kernels, isa, dtype, "float32", shape, "rows", DROP, "sigma").values()
        found.append(results)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_comes_through(kernels: ModuleType, isa: str, dtype: str) -> None:
    x = np.arange(65536, dtype=np.uint16).view(reference.DTYPES[dtype]).reshape(64, 1024)
    out = exercise.unwritten(x.shape, x)
    kernels.dropout(isa, x, (0, 0, 0, 0), out)
    nan = np.isnan(to_double(x))
    assert np.array_equal(out.view(np.uint16)[~nan], x.view(np.uint16)[~nan]) and np.isnan(to_double(out)[nan]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_round_to_nearest_even(kernels: ModuleType, isa: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    ties = np.arange(65536, dtype=np.uint32) << 16 | 0x8000  # for bf16 every one halfway
    half_ties = (np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)).view(np.uint32)
    other = rng.integers(0, 2**32, 1 << 16, dtype=np.uint32)
    half_ties = np.concatenate([half_ties + d for d in (0, 0xFFF, 0x1000, 0x1001)])
    values = np.concatenate([ties, other, half_ties]).view(np.float32)
    values = values[np.isfinite(values)][None, :]
    out = exercise.unwritten((values.shape[1], 1), np.empty(0, reference.DTYPES[dtype]))
    kernels.outer(isa, values, np.ones((1, 1), np.float32), (), out)
    assert np.array_equal(to_double(out[:, 0]), to_double(to_storage(values[0], dtype)))


def test_far_apart_rows_are_reached(kernels: ModuleType, isa: str) -> None:
    """Offsets in 32 bits wrap silently (fla-org/flash-linear-attention#1080): rows more than 2^31 elements apart."""
    stride = 2**31 + 64
    try:
        base = np.zeros(stride * 2 + 128, np.uint16)  # zero pages: nothing is committed until it is written
    except MemoryError:
        pytest.skip("needs 9 GB of address space")
    rng = np.random.default_rng(1)
    far = np.lib.stride_tricks.as_strided(base, (3, 64), (2 * stride, 2))
    far[:] = to_storage(rng.standard_normal((3, 64)), "bfloat16")
    near = np.ascontiguousarray(far)
    results, none = [], np.zeros((64, 0), np.float32)
    for a, weight in ((near, near), (far, far)):
        y = exercise.unwritten((3, 3), near)
        kernels.linear(isa, a, weight.T, None, none, None, (), y)
        dx = exercise.unwritten((3, 64), near)
        kernels.linear(isa, to_storage(np.eye(3), "bfloat16"), weight, None, none, None, (), dx)
        f = np.full((64, 3), np.nan, np.float32)
        kernels.outer(isa, a, np.eye(3, dtype=np.float32), (), f)
        h = np.full((3, 3), np.nan, np.float32)
        kernels.shrink(isa, to_storage(np.ones((3, 64)), "bfloat16"), weight.T, (), h)
        results.append((y, dx, f, h))
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("with_sigma", [False, True])
def test_residual_is_the_definition_bit_for_bit(kernels: ModuleType, isa: str, dtype: str, with_sigma: bool) -> None:
    rng = np.random.default_rng(3)
    n, k, r = 37, 1030, 5
    store = (lambda a: a) if dtype == "float64" else (lambda a: to_storage(a, dtype))
    weight = store(rng.standard_normal((n, k)))
    u, v = rng.standard_normal((k, r)).astype(np.float32), rng.standard_normal((r, n)).astype(np.float32).T
    sigma = rng.standard_normal(r).astype(np.float32) if with_sigma else None
    exact = exercise.exact_residual(weight, u, sigma, v, 0.3)
    for pieces in (1, 3):
        kernels.set_pieces(pieces)
        out = exercise.unwritten((n, k), weight)
        kernels.residual(isa, weight, u, sigma, v, 0.3, out)
        if dtype in ("float64", "float32", "float16"):
            assert np.array_equal(out, exact.astype(weight.dtype))
        else:
            assert np.array_equal(to_double(out), _nearest_bf16(exact))


def _nearest_bf16(values: reference.Array) -> reference.Array:
    step = 2.0 ** (np.frexp(values)[1] - 8)  # between neighbours, for 8 significant bits
    return np.rint(values / step) * step


def test_selection(kernels: ModuleType) -> None:
    available = [name for name, runs in kernels.isas() if runs]
    assert kernels.chosen("") == available[0]
    assert [kernels.chosen(name) for name in available] == available
    assert kernels.chosen("mmx") == ""


def test_chunks_depend_on_the_length_alone_and_cover_it(kernels: ModuleType) -> None:
    for length in (0, 1, 511, 512, 513, 4096, 4097, 8192, 8193, 100_000):
        chunk, chunks = kernels.chunk_of(length), kernels.chunks_of(length)
        assert chunk % 256 == 0 and chunks <= 16
        assert chunk * chunks >= length > chunk * (chunks - 1) or length == chunks == 0
