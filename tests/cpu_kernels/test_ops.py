"""The private operators, tensors in and out: dtype mixes, strides, ragged sizes, every mask, threads, refusals."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svdkern.backends import extension
from svdkern.backends.philox import dropped

pytestmark = pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension")

OPS = torch.ops.svdkern
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {
    "M": (0, 1, 2, 7, 16, 17, 33, 70, 530),
    "K": (1, 5, 17, 64, 129),
    "N": (1, 5, 17, 64, 129),
    "r": (0, 1, 3, 16, 17, 100),
}
RNG_STATE = torch.tensor([2**62 + 12345, -3])
NAMES = ("x", "u", "sigma", "v", "bias", "scale", "core", "gate")


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same matrix as a plain tensor, a transposed view, a view at an offset, or with no unit stride."""
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "offset":
        big = values.new_zeros(values.shape[0] + 1, values.shape[1] + 3)
        big[1:, 2 : 2 + values.shape[1]] = values
        return big[1:, 2 : 2 + values.shape[1]]
    if layout == "no unit stride":
        big = values.new_zeros(values.shape[0], 2 * values.shape[1])
        big[:, ::2] = values
        return big[:, ::2]
    if layout == "one row":
        return values[:1].expand_as(values)
    return values


def _halves_products(dtype: torch.dtype, rows: int) -> bool:
    """Whether bf16 is multiplied by bf16, and factors, z and q therefore rounded to it once."""
    return dtype == torch.bfloat16 and rows > 16 and OPS._cpu_isa() in ("avx512_bf16", "amx_bf16")


def _close(found: Tensor, exact: Tensor, scale: Tensor, name: str, rounded: Tensor | None = None) -> None:
    assert found.shape == exact.shape, name
    if found.numel() == 0:
        return
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[found.dtype]
    least = 2.0**-24 if found.dtype == torch.float16 else 0.0
    rounding = 0.0 if rounded is None else 3 * 2.0**-8 * rounded.norm()
    bound = rounding + 4 * 2.0**-24 * scale.norm() + 1.01 * unit * exact.norm() + least * exact.numel()
    assert (found.double() - exact).norm() <= bound, f"{name}: {(found.double() - exact).norm()} beyond {bound}"


def _formula(x: Tensor, w: Tensor | None, u: Tensor, sigma: Tensor | None, v: Tensor, bias: Tensor, g: Tensor, s: float,
             core: Tensor | None, d: Tensor, dy: Tensor) -> dict[str, Tensor]:  # fmt: skip
    h = (d * x) @ u
    z = h @ core if core is not None else h * sigma if sigma is not None else h
    p = dy @ v
    t = s * p * g
    q = t @ core.t() if core is not None else t * sigma if sigma is not None else t
    base, dbase = (0, 0) if w is None else (x @ w.t(), dy @ w)
    branch, dbranch = (s * z * g) @ v.t(), d * (q @ u.t())
    return {
        "y": base + branch + bias, "branch of y": branch, "h": h, "x": dbase + dbranch, "branch of x": dbranch,
        "u": (d * x).t() @ q, "sigma": (h * t).sum(0), "v": dy.t() @ (s * z * g),
        "bias": dy.sum(0), "scale": (p * z * g).sum(), "core": h.t() @ t, "gate": s * p * z,
    }  # fmt: skip


def _cases(count: int) -> list[int]:
    return list(range(count))


@pytest.mark.parametrize("case", _cases(120))
def test_layer(case: int) -> None:
    """A drawn corner of dtypes x factor dtypes x layouts x sizes x forms; together they hold every value many times."""
    draw = random.Random(case)
    m, k, n, r = (draw.choice(SIZES[name]) for name in ("M", "K", "N", "r"))
    dtype = draw.choice(DTYPES)
    generator = torch.Generator().manual_seed(case)

    def normal(*shape: int, to: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(to)

    layouts = ("plain", "transposed", "offset", "no unit stride")
    x = _laid_out(normal(m, k, to=dtype), draw.choice((*layouts, "one row")) if m else "plain")
    dy = _laid_out(normal(m, n, to=dtype), draw.choice((*layouts, "one row")) if m else "plain")
    w = None if draw.random() < 0.1 else _laid_out(normal(n, k, to=dtype), draw.choice(layouts))
    u = _laid_out(normal(k, r, to=draw.choice(DTYPES)), draw.choice(layouts))
    v = _laid_out(normal(n, r, to=draw.choice(DTYPES)), draw.choice(layouts))
    form = draw.choice(("plain", "sigma", "core"))
    sigma = normal(2 * r, to=draw.choice(DTYPES))[::2] if form == "sigma" else None
    core = _laid_out(normal(r, r, to=draw.choice(DTYPES)), draw.choice(layouts)) if form == "core" else None
    bias, scale = normal(n, to=dtype), torch.tensor(draw.choice((1.0, -0.5)))
    threshold = draw.choice((0, 0, 6554, 40000))
    rng_state = RNG_STATE if threshold else None
    gate_rows = draw.choice((0, 1, m))
    gate = _laid_out(normal(gate_rows, r, to=torch.float32), draw.choice(layouts)) if gate_rows else None

    y, h = OPS._cpu_forward(x, w, u, sigma, v, bias, scale, core, gate, rng_state, threshold)
    absent = {name for name, given in (("sigma", sigma), ("core", core), ("gate", gate)) if given is None}
    available = [name for name in NAMES if name not in absent]
    asked = [name for name in available if draw.random() < 0.7]
    mask = sum(1 << NAMES.index(name) for name in asked)
    found = OPS._cpu_backward(
        dy, x if "u" in asked else None, w, u, sigma, v, scale, core, gate,
        h if {"v", "sigma", "core", "scale", "gate"} & set(asked) else None, rng_state, threshold, mask,
    )  # fmt: skip
    assert len(found) == len(asked)

    d = torch.ones(m, k, dtype=torch.float64)
    if threshold and m and k:
        d = dropped(d, RNG_STATE, threshold)
    operands = [None if a is None else a.double() for a in (x, w, u, sigma, v, bias)]
    operands.append(torch.ones(1, r).double() if gate is None else gate.double())
    last = (None if core is None else core.double(), d, dy.double())
    exact = _formula(*operands, scale.item(), *last)  # type: ignore[arg-type]
    absolute = _formula(*(None if a is None else a.abs() for a in operands), abs(scale.item()),  # type: ignore[arg-type]
                        *(None if a is None else a.abs() for a in last))  # fmt: skip
    assert y.dtype == dtype and h.dtype == torch.float32
    inputs = {"x": dy, "u": u, "sigma": sigma, "v": v, "bias": dy, "scale": scale, "core": core, "gate": gate}
    for name, gradient in zip(("y", "h", *asked), (y, h, *found), strict=True):
        branch = absolute.get(f"branch of {name}", absolute[name])
        _close(gradient, exact[name], absolute[name], name,
               branch if _halves_products(dtype, m) and name != "bias" else None)  # fmt: skip
    for name, gradient in zip(asked, found, strict=True):
        assert gradient.dtype == inputs[name].dtype  # type: ignore[union-attr]
        if name in ("u", "v") and gradient.numel() > gradient.shape[0] > 1:
            factor = inputs[name]
            assert factor is not None
            by_columns = factor.stride(0) == 1 and factor.stride(1) != 1
            assert gradient.stride() == ((1, gradient.shape[0]) if by_columns else (gradient.shape[1], 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    m, k, n, r = 16, 1537, 1030, 17
    x, dy, w = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n, k).to(dtype)
    u, v, sigma, s = torch.randn(k, r), torch.randn(n, r), torch.randn(r), torch.tensor(0.5)
    many, q = torch.randn(150, k).to(dtype), torch.randn(150, r)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, h = OPS._cpu_forward(x, w, u, sigma, v, None, s, None, None, RNG_STATE, 6554)
            grads = OPS._cpu_backward(dy, x, w, u, sigma, v, s, None, None, h, RNG_STATE, 6554, 0b0111111)
            residual = OPS._cpu_residual(w, u, sigma, v, 0.5)
            for rows in (40, 1100):
                args = torch.ones(rows, k).to(dtype), w, u
                y2, h2 = OPS._cpu_forward(*args, sigma, v, None, s, None, None, RNG_STATE, 6554)
                grads += [y2, *OPS._cpu_backward(y2, *args, sigma, v, s, None, None, h2, RNG_STATE, 6554, 0b0111111)]
            results.append([y, h, *grads, residual, OPS._cpu_shrink(many, u, None, 0), OPS._cpu_outer(many, q, u, None, 0),
                            OPS._cpu_linear(x, w.t(), h, v, None, None, 0),
                            OPS._cpu_linear(dy, w, h, u, None, RNG_STATE, 6554)])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("dtype", "threshold"), list(itertools.product(DTYPES, (0, 13107))))
def test_shrink_and_outer_of_many_rows(dtype: torch.dtype, threshold: int) -> None:
    a, f, q = torch.randn(77, 300).to(dtype), torch.randn(17, 300).bfloat16().t(), torch.randn(17, 77).t()
    d = (
        dropped(torch.ones(77, 300, dtype=torch.float64), RNG_STATE, threshold)
        if threshold
        else torch.ones(77, 300).double()
    )
    masked = d * a.double()
    halves, scale = _halves_products(dtype, 77), masked.abs() @ f.double().abs()
    _close(OPS._cpu_shrink(a, f, RNG_STATE, threshold), masked @ f.double(), scale, "shrink", scale if halves else None)
    found, scale = OPS._cpu_outer(a, q, f, RNG_STATE, threshold), masked.abs().t() @ q.double().abs()
    _close(found, masked.t() @ q.double(), scale, "outer", scale if halves else None)
    assert found.dtype == f.dtype and found.stride() == f.stride()


def test_dropout_starts_at_any_row() -> None:
    x = torch.randn(9, 70)
    whole = OPS._cpu_dropout(x, RNG_STATE, 20000, 0)
    assert torch.equal(OPS._cpu_dropout(x[4:], RNG_STATE, 20000, 4), whole[4:])
    assert torch.allclose(whole, dropped(x, RNG_STATE, 20000))


def _frozen(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return OPS._cpu_linear(a, w, None, w.new_empty(w.shape[1], 0), None, None, 0)


def test_rows_and_columns_far_apart() -> None:
    """Strides beyond 2^31 elements: fla-org/flash-linear-attention#1080, without the memory."""
    step = 2**30 + 8
    storage = torch.empty(2 * step + 64, dtype=torch.bfloat16)  # pages that nobody touches are not there
    far = storage.as_strided((3, 64), (step, 1))
    far.copy_(torch.randn(3, 64))
    w, u, v = torch.randn(5, 64).bfloat16(), torch.randn(64, 3), torch.randn(5, 3)
    s = torch.tensor(1.0)
    for a, b in zip(
        OPS._cpu_forward(far, w, u, None, v, None, s, None, None, None, 0),
        OPS._cpu_forward(far.contiguous(), w, u, None, v, None, s, None, None, None, 0),
        strict=True,
    ):
        assert torch.equal(a, b)
    dy = torch.randn(2, 3).bfloat16()
    assert torch.equal(_frozen(dy, far), _frozen(dy, far.contiguous()))
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(_frozen(x, far.t()), _frozen(x, far.contiguous().t()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(12),
        lambda: torch.randn(2, 3, 4, 12),
        lambda: torch.randn(2, 3, 4, 20)[..., 5:17],
        lambda: torch.randn(4, 3, 2, 12)[:, :, 1],
        lambda: torch.randn(3, 2, 12).transpose(0, 1),
        lambda: torch.randn(12, 2, 3).permute(1, 2, 0),
        lambda: torch.randn(1, 3, 12).expand(2, 3, 12),
        lambda: torch.randn(12).expand(2, 3, 12),
        lambda: torch.randn(2, 1, 3, 12).as_strided((2, 1, 3, 12), (36, 7, 12, 1)),
        lambda: torch.randn(2, 0, 12),
        lambda: torch.randn(6, 24)[::2, ::2].unflatten(0, (3, 1)),
    ],
)
def test_any_leading_shape_and_stride_is_rows(make: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    x, w, u, v, s = make(), torch.randn(5, 12), torch.randn(12, 3), torch.randn(5, 3), torch.tensor(0.5)
    rows, lead = x.reshape(-1, 12).clone() if x.numel() else x.new_zeros(0, 12), x.shape[:-1]
    y, h = OPS._cpu_forward(x, w, u, None, v, None, s, None, None, None, 0)
    wanted_y, wanted_h = OPS._cpu_forward(rows, w, u, None, v, None, s, None, None, None, 0)
    assert y.shape == (*lead, 5) and y.is_contiguous() and torch.equal(y.reshape(wanted_y.shape), wanted_y)
    assert torch.equal(h, wanted_h)
    found = OPS._cpu_backward(y, x, w, u, None, v, s, None, None, h, None, 0, 0b0111011)
    wanted = OPS._cpu_backward(wanted_y, rows, w, u, None, v, s, None, None, h, None, 0, 0b0111011)
    assert found[0].shape == x.shape and found[0].is_contiguous()
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


def test_inputs_are_left_alone() -> None:
    tensors = [torch.randn(4, 64), torch.randn(32, 64), torch.randn(64, 4), torch.randn(4), torch.randn(32, 4)]
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    x, w, u, sigma, v = tensors
    s = torch.tensor(1.0)
    y, h = OPS._cpu_forward(x, w, u, sigma, v, None, s, None, None, None, 0)
    OPS._cpu_backward(y, x, w, u, sigma, v, s, None, None, h, None, 0, 0b0111111)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert versions == [t._version for t in tensors]


def test_refusals_name_the_value() -> None:
    x, w, u, v, s = torch.randn(2, 8), torch.randn(6, 8), torch.randn(8, 3), torch.randn(6, 3), torch.tensor(1.0)

    def refused(match: str, **changed: object) -> None:
        given = {"x": x, "weight": w, "u": u, "sigma": None, "v": v, "bias": None, "scale": s, "core": None,
                 "gate": None, "rng_state": None, "threshold": 0} | changed  # fmt: skip
        with pytest.raises(RuntimeError, match=match):
            OPS._cpu_forward(**given)

    refused("rows of u is 7, expected 8", u=torch.randn(7, 3))
    refused("columns of v is 2, expected 3", v=torch.randn(6, 2))
    refused("rows of weight is 5, expected 6", weight=torch.randn(5, 8))
    refused("columns of weight is 9, expected 8", weight=torch.randn(6, 9))
    refused("size of sigma is 4, expected 3", sigma=torch.randn(4))
    refused("size of bias is 1, expected 6", bias=torch.randn(1))
    refused("rows of core is 2, expected 3", core=torch.randn(2, 3))
    refused("rows of gate is 3, expected 2", gate=torch.randn(3, 3))
    refused("columns of gate is 2, expected 3", gate=torch.randn(2, 2))
    refused("gate must have the dtype", gate=torch.randn(2, 3).bfloat16())
    refused("exclude each other", core=torch.randn(3, 3), sigma=torch.randn(3))
    refused("weight must have the dtype of x", weight=w.bfloat16())
    refused("u has a dtype without kernels", u=u.double())
    refused("x has 0 dimensions", x=torch.tensor(1.0))
    refused("u has 3 dimensions, expected 2", u=u[None])
    refused("threshold is 65536", threshold=65536, rng_state=RNG_STATE)
    refused("rng_state is None", threshold=1)
    refused("rng_state must be", threshold=1, rng_state=torch.tensor([1]))
    refused("scale must be", scale=torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="x is None"):
        OPS._cpu_backward(torch.randn(2, 6), None, w, u, None, v, s, None, None, None, None, 0, 2)
    with pytest.raises(RuntimeError, match="h is None"):
        OPS._cpu_backward(torch.randn(2, 6), None, w, u, None, v, s, None, None, None, None, 0, 8)
    with pytest.raises(RuntimeError, match="gradient of sigma, which is None"):
        OPS._cpu_backward(torch.randn(2, 6), None, w, u, None, v, s, None, None, torch.randn(2, 3), None, 0, 4)
    with pytest.raises(RuntimeError, match="gradient of gate, which is None"):
        OPS._cpu_backward(torch.randn(2, 6), None, w, u, None, v, s, None, None, torch.randn(2, 3), None, 0, 128)


def test_the_isa_is_one_that_is_compiled_in() -> None:
    assert OPS._cpu_isa() in OPS._cpu_isas().split(",")


# ------------------------------------------------------------------------------------------ the products of the SVD


@pytest.mark.parametrize("layout", ["plain", "transposed", "offset", "no unit stride", "one row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_product_and_energy(dtype: torch.dtype, layout: str) -> None:
    """y = s a x, z = s a^T y, both from one read of a; the sum of squares in float64."""
    generator = torch.Generator().manual_seed(3)
    for m, length, b in itertools.product((0, 1, 29, 300), (1, 17, 33, 200), (0, 1, 16, 37, 64)):
        a = _laid_out(torch.randn(m, length, generator=generator).to(dtype), layout if m else "plain")
        x = torch.randn(length, b, generator=generator)
        y, z = OPS._cpu_normal(a, x, 0.25, False)
        wide = 0.25 * a.double()
        image = wide @ x.double()
        assert y.dtype == z.dtype == torch.float32
        _close(y, image, wide.abs() @ x.double().abs(), f"y of {m} {length} {b}")
        chain = 16 if layout == "one row" else 2  # y is rounded, too; equal terms are all rounded the same way
        terms = chain * wide.abs().t() @ (wide.abs() @ x.double().abs())  # y is rounded, too
        _close(z, wide.t() @ image, terms, f"z of {m} {length} {b}")
        rough_y, rough_z = OPS._cpu_normal(a, x, 0.25, True)
        largest = wide.abs() @ x.double().abs()
        assert bool(((rough_y - image).abs() <= 2.0**-15 * largest + 1e-30).all())
        assert bool(((rough_z - wide.t() @ image).abs() <= 2.0**-14 * (wide.abs().t() @ largest) + 1e-30).all())
    exact = float(wide.square().sum())
    assert OPS._cpu_energy(a, 0.25) == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("rough", [False, True])
def test_normal_product_has_the_same_bits_with_any_number_of_threads(rough: bool) -> None:
    a, x = torch.randn(3000, 1500), torch.randn(1500, 20)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((*OPS._cpu_normal(a, x, 1.0, rough), torch.tensor(OPS._cpu_energy(a, 1.0))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(s, t) for other in found[1:] for s, t in zip(found[0], other, strict=True))


def test_normal_product_refuses_what_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match="the number of rows of x is 3, expected 4"):
        OPS._cpu_normal(torch.zeros(5, 4), torch.zeros(3, 2), 1.0, False)
    with pytest.raises(RuntimeError, match="x must have the dtype of the accumulators, float32"):
        OPS._cpu_normal(torch.zeros(5, 4), torch.zeros(4, 2).bfloat16(), 1.0, False)
    with pytest.raises(RuntimeError, match="a has a dtype without kernels"):
        OPS._cpu_normal(torch.zeros(5, 4).double(), torch.zeros(4, 2), 1.0, False)
    assert OPS._cpu_energy(torch.tensor([[1.0, float("nan")]]), 1.0) != 0


@pytest.mark.skipif("amx_bf16" not in OPS._cpu_isas(), reason="needs a CPU with amx_bf16")
@pytest.mark.parametrize("layout", ["plain", "transposed", "offset", "no unit stride", "one row"])
def test_gram_matrix(layout: str) -> None:
    """a^T a: symmetric to the bit, the same with any number of threads."""
    generator = torch.Generator().manual_seed(4)
    before = torch.get_num_threads()
    for m, length in itertools.product((0, 1, 29, 700, 1024), (1, 31, 32, 100, 257)):
        a = _laid_out(torch.randn(m, length, generator=generator).bfloat16(), layout if m else "plain")
        found = OPS._cpu_gram(a)
        wide = a.double()
        _close(found, wide.t() @ wide, (1 + m / 64) * wide.abs().t() @ wide.abs(), f"{m} {length}")
        assert torch.equal(found, found.t())
        try:
            torch.set_num_threads(1)
            assert torch.equal(OPS._cpu_gram(a), found)
        finally:
            torch.set_num_threads(before)
    with pytest.raises(RuntimeError, match="a must have the dtype of the units, bfloat16"):
        OPS._cpu_gram(torch.zeros(5, 4))
