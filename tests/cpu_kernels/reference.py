"""What the kernels compute, in numpy and fp64 or in plain Python; storage types as the tests' module takes them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DTYPES = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def to_storage(values: Array, dtype: str) -> Array:
    """Rounds to nearest even; bf16 comes as its bits in uint16."""
    single = values.astype(np.float32)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return single.astype(DTYPES[dtype])
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint32(0x7FC0), rounded).astype(np.uint16)


def to_double(stored: Array) -> Array:
    """The stored numbers, exactly."""
    if stored.dtype == np.uint16:
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        return stored.astype(np.float64)


def philox(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Philox4x32 as its paper writes it."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low = 0xFFFFFFFF
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


@cache
def bits(seed: int, offset: int, row: int, columns: int) -> list[int]:
    """The 16 random bits of the first columns of a row."""
    low = 0xFFFFFFFF
    halves: list[int] = []
    for octet in range((columns + 7) // 8):
        words = philox((row & low, octet, offset & low, offset >> 32), (seed & low, seed >> 32), 7)
        halves += [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return halves[:columns]


def mask(dropout: tuple[int, int, int, int] | tuple[()], rows: int, columns: int) -> Array:
    """D in fp64; ``dropout`` = (seed, offset, threshold, row0), or () for none."""
    if not dropout or dropout[2] == 0:
        return np.ones((rows, columns))
    seed, offset, threshold, row0 = dropout
    drawn = np.array([bits(seed, offset, row0 + m, columns) for m in range(rows)]).reshape(rows, columns)
    return (drawn >= threshold) / (1 - threshold / 65536)


def forward(x: Array, w: Array, u: Array, sigma: Array | None, v: Array, b: Array, s: float, core: Array | None,
            g: Array, d: Array, sign: int) -> dict[str, Array]:  # fmt: skip
    """The formula of the design; with sign = 0 on absolute values, the scale that rounding errors are measured in."""
    if sign == 0:
        x, w, u, v, b, s, g = abs(x), abs(w), abs(u), abs(v), abs(b), abs(s), abs(g)
        sigma, core = (None if f is None else abs(f) for f in (sigma, core))
    h = (d * x) @ u
    z = h @ core if core is not None else h * sigma if sigma is not None else h
    branch = (s * z * g) @ v.T
    return {"h": h, "y": x @ w.T + branch + b} | ({"branch of h": h, "branch of y": branch} if sign == 0 else {})


def backward(dy: Array, x: Array, w: Array, u: Array, sigma: Array | None, v: Array, s: float, core: Array | None, g: Array,
             h: Array, d: Array, sign: int) -> dict[str, Array]:  # fmt: skip
    """Likewise, all gradients."""
    if sign == 0:
        dy, x, w, u, v, s, g, h = abs(dy), abs(x), abs(w), abs(u), abs(v), abs(s), abs(g), abs(h)
        sigma, core = (None if f is None else abs(f) for f in (sigma, core))
    p = dy @ v
    t = s * p * g
    q = t @ core.T if core is not None else t * sigma if sigma is not None else t
    z = h @ core if core is not None else h * sigma if sigma is not None else h
    branch = d * (q @ u.T)
    return {
        "dx": dy @ w + branch,
        "du": (d * x).T @ q,
        "dsigma": (h * t).sum(0),
        "dv": dy.T @ (s * z * g),
        "dbias": dy.sum(0),
        "dscale": np.array([(p * z * g).sum()]),
        "dcore": h.T @ t,
        "dgate": s * p * z,
    } | ({"branch of dx": branch} if sign == 0 else {})


def halves_products(isa: str, dtype: str, rows: int) -> bool:
    """Whether these kernels multiply bf16 by bf16: then what is fp32 (factors, z, q) is rounded to bf16 once."""
    return dtype == "bfloat16" and rows > 16 and isa in ("avx512_bf16", "amx_bf16")


def close(found: Array, exact: Array, scale: Array, name: str, rounded: Array | None = None) -> None:
    """Normwise and at the worst element: a few fp32 roundings of the sums' absolute values and one of the result's type.

    ``rounded``: the absolute values of the sums whose fp32 operands are rounded to bf16, up to three in one product.
    """
    dtype = {np.dtype(t): n for n, t in DTYPES.items()}[found.dtype]
    values = to_double(found)
    assert np.isfinite(values).all(), f"{name} was not fully written"
    sums = 4 * ROUNDOFF["float32"]
    scale = scale if rounded is None else scale + 3 * ROUNDOFF["bfloat16"] / sums * rounded
    result = ROUNDOFF[dtype] if dtype != "float32" else 0.0
    smallest = 2.0**-24 if dtype == "float16" else 0.0  # half of fp16's least step, twice over
    error = np.linalg.norm(values - exact)
    bound = sums * np.linalg.norm(scale) + 1.01 * result * np.linalg.norm(exact) + smallest * exact.size
    assert error <= bound, f"{name}: error {error:.3g} beyond {bound:.3g}"
    worst = np.abs(values - exact).max(initial=0.0)
    limit = 2 * sums * scale.max(initial=0.0) + 1.01 * result * np.abs(exact).max(initial=0.0) + smallest
    assert worst <= limit, f"{name}: worst element off by {worst:.3g}, beyond {limit:.3g}"
