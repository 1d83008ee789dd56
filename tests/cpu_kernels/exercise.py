"""One run of every kernel on one shape, checked against fp64: what the ordinary and the sanitized tests share."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import reference
from reference import Array, to_double, to_storage


def strided(values: Array, layout: str) -> Array:
    """The same matrix, stored by rows, by columns, or with no unit stride."""
    if layout == "columns":
        return np.ascontiguousarray(values.T).T
    if layout == "neither":
        wide = np.zeros((values.shape[0], 2 * values.shape[1] + 1), values.dtype)
        wide[:, : 2 * values.shape[1] : 2] = values
        return wide[:, : 2 * values.shape[1] : 2]
    return values


def unwritten(shape: tuple[int, ...], like: Array) -> Array:
    """NaN everywhere, in the storage type of ``like``."""
    return np.full(shape, 0x7FC0 if like.dtype == np.uint16 else np.nan, like.dtype)


def whole_layer(kernels: ModuleType, isa: str, dtype: str, factor: str, shape: tuple[int, int, int, int], layout: str,
                dropout: tuple[Any, ...], form: str, weight_layout: str = "rows", gates: int = 0) -> dict[str, Array]:  # fmt: skip
    """Forward and backward of a layer, each output checked; all are returned.

    ``form``: plain, sigma or core; ``gates``: rows of the gate, 0 for none.
    """
    m, k, n, r = shape
    rng = np.random.default_rng(abs(hash(shape)) % 2**32)
    normal = rng.standard_normal
    x, dy = to_storage(normal((m, k)), dtype), to_storage(normal((m, n)), dtype)
    w = strided(to_storage(normal((n, k)) / max(k, 1) ** 0.5, dtype), weight_layout)
    bias = to_storage(normal(n), dtype)
    u = strided(to_storage(normal((k, r)), factor), layout)
    v = strided(to_storage(normal((n, r)), factor), layout)
    sigma = to_storage(normal(r), factor) if form == "sigma" else None
    core = strided(to_storage(normal((r, r)), factor), layout) if form == "core" else None
    gate = strided(normal((gates, r)).astype(np.float32), layout) if gates else None
    g = np.ones((1, r)) if gate is None else to_double(gate)
    s = 0.75
    d = reference.mask(dropout, m, k)
    out = {"y": unwritten((m, n), x), "h": unwritten((m, r), np.empty(0, np.float32))}
    kernels.forward(isa, x, w, u, sigma, v, bias, s, core, gate, dropout, out["y"], out["h"])
    exact = [None if a is None else to_double(a) for a in (x, w, u, sigma, v, bias)]
    dcore = None if core is None else to_double(core)
    truth = reference.forward(*exact, s, dcore, g, d, 1)  # type: ignore[arg-type]
    scale = reference.forward(*exact, s, dcore, g, d, 0)  # type: ignore[arg-type]
    halves = reference.halves_products(isa, dtype, m)
    for name in ("y", "h"):
        reference.close(out[name], truth[name], scale[name], name, scale[f"branch of {name}"] if halves else None)

    grads: dict[str, Array | None] = {
        "dx": unwritten((m, k), x),
        "du": strided(unwritten((k, r), u), layout),
        "dsigma": None if sigma is None else unwritten((r,), sigma),
        "dv": strided(unwritten((n, r), v), layout),
        "dbias": unwritten((n,), dy),
        "dscale": unwritten((1,), np.empty(0, np.float32)),
        "dcore": None if core is None else unwritten((r, r), core),
        "dgate": None if gate is None else unwritten((m, r), np.empty(0, np.float32)),
    }
    kernels.backward(isa, dy, x, w, u, sigma, v, s, core, gate, out["h"], dropout, *grads.values())
    given = [None if a is None else to_double(a) for a in (dy, x, w, u, sigma, v)]
    h = to_double(out["h"])
    truth = reference.backward(*given, s, dcore, g, h, d, 1)  # type: ignore[arg-type]
    scale = reference.backward(*given, s, dcore, g, h, d, 0)  # type: ignore[arg-type]
    for name, found in grads.items():
        if found is not None:
            branch = scale.get(f"branch of {name}", scale[name]) if halves and name != "dbias" else None
            reference.close(found, truth[name], scale[name], name, branch)
            out[name] = found
    return out


def primitives(kernels: ModuleType, isa: str, dtype: str, factor: str, shape: tuple[int, int, int], layout: str,
               dropout: tuple[Any, ...]) -> list[Array]:  # fmt: skip
    """shrink, outer and linear, any number of rows."""
    m, length, r = shape
    rng = np.random.default_rng(m + length + r)
    a = to_storage(rng.standard_normal((m, length)), dtype)
    f = strided(to_storage(rng.standard_normal((length, r)), factor), layout)
    q = rng.standard_normal((m, r)).astype(np.float32)
    d = reference.mask(dropout, m, length)
    halves = reference.halves_products(isa, dtype, m)
    short = np.full((m, r), np.nan, np.float32)
    kernels.shrink(isa, a, f, dropout, short)
    masked, factors = d * to_double(a), to_double(f)
    scale = abs(masked) @ abs(factors)
    reference.close(short, masked @ factors, scale, "shrink", scale if halves else None)
    long = strided(unwritten((length, r), f), layout)
    kernels.outer(isa, a, q, dropout, long)
    scale = abs(masked).T @ abs(q.astype(np.float64))
    reference.close(long, masked.T @ q, scale, "outer", scale if halves else None)
    results = [short, long]
    b = to_storage(rng.standard_normal((m, r)), dtype)  # y (M, length) = b w + D*(q f^T) + bias
    w = to_storage(rng.standard_normal((r, length)), dtype)
    bias = to_storage(rng.standard_normal(length), dtype)
    for weight, z in ((strided(w, "columns"), q), (w, None), (None, q)):
        y = unwritten((m, length), a)
        kernels.linear(isa, b, weight, z, f, bias, dropout, y)
        base = 0 if weight is None else to_double(b) @ to_double(weight)
        size = 0 if weight is None else abs(to_double(b)) @ abs(to_double(weight))
        branch = np.zeros((m, length)) if z is None else d * (q.astype(np.float64) @ factors.T)
        absolute = np.zeros((m, length)) if z is None else d * (abs(q.astype(np.float64)) @ abs(factors).T)
        reference.close(y, base + branch + to_double(bias), size + absolute + abs(to_double(bias)), "linear",
                        absolute if halves else None)  # fmt: skip
        results.append(y)
    return results


def exact_residual(weight: Array, u: Array, sigma: Array | None, v: Array, s: float) -> Array:
    """The definition of the exact residual, one rounding at a time, before the last one."""
    total = to_double(weight)
    for i in range(u.shape[1]):
        a = (s * (1.0 if sigma is None else to_double(sigma)[i])) * to_double(u)[:, i]
        total = total - to_double(v)[:, i : i + 1] * a[None, :]
    return total
