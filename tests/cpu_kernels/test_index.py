"""Every index of the packed products and of the small kernels: small whole numbers, whose sums no rounding can hide.

Every element of W and x is exact in bfloat16 and every sum in float32, so a row, column or k that is read twice, missed or put in
the wrong place changes a whole number. Sizes run over every remainder of the register tiles and of a block of k.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from exercise import strided, unwritten
from reference import Array, to_double, to_storage

NONE: tuple[int, ...] = ()
COLUMNS = (*range(1, 36), 63, 64, 65, 96, 97)
DEPTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 95, 96, 97, 127, 128, 129, 256, 257, 320, 321)


def whole(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return to_storage(rng.integers(-2, 3, shape).astype(np.float64), dtype)


def check(kernels: ModuleType, isa: str, dtype: str, m: int, k: int, n: int, r: int, layout: str) -> None:
    rng = np.random.default_rng(m * 7919 + k * 104729 + n * 31 + r)
    x, dy = whole(rng, (m, k), dtype), whole(rng, (m, n), dtype)
    w, u, v = whole(rng, (n, k), dtype), whole(rng, (k, r), "float32"), whole(rng, (n, r), "float32")
    # Few nonzeros in a column of U and V, spread over rows and columns: the rank-r products stay below 256 in size, whole
    # numbers that bfloat16 holds.
    for factor, length in ((u, k), (v, n)):
        for j in range(r):
            keep = {(j * 7 + i * max(1, length // 4)) % length for i in range(4)}
            factor[[i for i in range(length) if i not in keep], j] = 0
    y, h = unwritten((m, n), x), unwritten((m, r), np.empty(0, np.float32))
    kernels.forward(isa, x, strided(w, layout), u, None, v, None, 1.0, None, None, NONE, y, h)
    dx, du, dv = unwritten((m, k), x), unwritten((k, r), u), unwritten((n, r), v)
    kernels.backward(isa, dy, x, strided(w, layout), u, None, v, 1.0, None, None, h, NONE,
                     dx, du, None, dv, None, None, None, None)  # fmt: skip
    a, g, b, p, q = (to_double(t) for t in (x, dy, w, u, v))
    exact = {
        "h": a @ p,
        "y": a @ b.T + a @ p @ q.T,
        "dx": g @ b + g @ q @ p.T,
        "du": a.T @ (g @ q),
        "dv": g.T @ (a @ p),
    }
    for name, found in (("h", h), ("y", y), ("dx", dx), ("du", du), ("dv", dv)):
        wanted = to_double(to_storage(exact[name], "float32" if found.dtype == np.float32 else dtype))
        assert np.array_equal(to_double(found), wanted), f"{name} of M={m} K={k} N={n} r={r} {layout}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_number_of_rows(kernels: ModuleType, isa: str, dtype: str) -> None:
    for m in range(1, 130):
        check(kernels, isa, dtype, m, 33, 35, 3, "rows")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3, 5, 16, 33, 70, 530])
def test_every_width_and_depth(kernels: ModuleType, isa: str, dtype: str, rows: int) -> None:
    for i, n in enumerate(COLUMNS):
        k = DEPTHS[i % len(DEPTHS)]
        check(kernels, isa, dtype, rows, k, n, (0, 1, 5, 16, 17)[i % 5], ("rows", "columns")[i % 2])
        check(kernels, isa, dtype, rows, n, k, (1, 8, 0, 3, 33)[i % 5], ("columns", "rows")[i % 2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rows", [3, 5, 16, 33, 70])
def test_what_is_not_finite_stays_where_it_belongs(kernels: ModuleType, isa: str, dtype: str, rows: int) -> None:
    """A NaN in a row of x spoils that row of y alone, an infinity in a row of W its column of y; the other way round for dx."""
    k, n = 67, 45
    rng = np.random.default_rng(rows)
    x, dy, w = (whole(rng, shape, dtype) for shape in ((rows, k), (rows, n), (n, k)))
    for tensor in (x, dy):
        tensor[...] = whole(rng, tensor.shape, dtype)
        tensor[tensor == 0] = to_storage(np.ones(()), dtype)  # 0 times infinity would be a NaN of its own
    x[rows // 2, k - 1] = to_storage(np.full((), np.nan), dtype)
    dy[rows - 1, 0] = to_storage(np.full((), np.nan), dtype)
    w[n - 1, k - 1] = to_storage(np.full((), np.inf), dtype)
    u, v = np.empty((k, 0), np.float32), np.empty((n, 0), np.float32)
    for layout in ("rows", "columns"):
        y, h = unwritten((rows, n), x), np.empty((rows, 0), np.float32)
        kernels.forward(isa, x, strided(w, layout), u, None, v, None, 1.0, None, None, NONE, y, h)
        dx = unwritten((rows, k), x)
        kernels.backward(isa, dy, x, strided(w, layout), u, None, v, 1.0, None, None, h, NONE,
                         dx, None, None, None, None, None, None, None)  # fmt: skip
        for found, row, column in ((y, rows // 2, n - 1), (dx, rows - 1, k - 1)):
            bad = ~np.isfinite(to_double(found))
            wanted = np.zeros_like(bad)
            wanted[row], wanted[:, column] = True, True
            assert np.array_equal(bad, wanted), layout
