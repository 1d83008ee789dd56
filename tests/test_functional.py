"""svd_linear: values and gradients against float64, for every backend, dtype, mask, layout and feature."""

from __future__ import annotations

import contextlib
import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import RNG, cast, check, fused, operands, present, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from svdkern import SVDLinear, functional, svd_linear
from svdkern.backends.cpu import SMALL_M
from svdkern.backends.philox import keep_mask, keep_scale, philox4x32, threshold_of

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64])
@pytest.mark.parametrize("m", [1, 7, SMALL_M, SMALL_M + 1, 129])
@pytest.mark.parametrize("form", ["sigma", "core", "none"])
def test_values_and_all_gradients(backend: str, dtype: torch.dtype, m: int, form: str) -> None:
    o = operands(m, 65, 48, 17, form=form)
    factor = torch.float64 if dtype == torch.float64 else torch.float32
    check(o, torch.randn(m, 48).double(), backend, dtype, (factor,) * 3, present(o))


@pytest.mark.parametrize("r", [0, 1, 3, 16, 100])
@pytest.mark.parametrize("m", [0, 2, 33])
def test_ranks_and_empty_batches(backend: str, r: int, m: int) -> None:
    """Rank 0 is the frozen linear with empty gradients (huggingface/peft#1539); an empty batch gives zero gradients."""
    o = operands(m, 40, 24, r)
    check(o, torch.randn(m, 24).double(), backend, torch.float32, (torch.float32,) * 3, present(o))


@pytest.mark.parametrize("m", [0, 3, 40])
@pytest.mark.parametrize(("k", "n"), [(8, 0), (0, 8), (0, 0)])
def test_layers_without_width(backend: str, m: int, k: int, n: int) -> None:
    x, u, v = (torch.randn(*size, requires_grad=True) for size in ((m, k), (k, 2), (n, 2)))
    y = svd_linear(x, torch.randn(n, k), u, None, v, backend=backend)
    assert torch.equal(y, torch.zeros(m, n))
    for leaf, gradient in zip((x, u, v), torch.autograd.grad(y, (x, u, v), torch.ones(m, n)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("dtype", HALF)
def test_factor_dtypes_mix(backend: str, m: int, dtype: torch.dtype) -> None:
    """Half-precision activations and upstream gradients, factors of any dtype each (unslothai/unsloth#320)."""
    o = operands(m, 48, 33, 8)
    for mix in ((torch.float32,) * 3, (dtype, torch.float32, torch.float32), (torch.float32, dtype, torch.bfloat16)):
        check(o, torch.randn(m, 33).double(), backend, dtype, mix, ("x", "u", "sigma", "v", "bias"))


@pytest.mark.parametrize("m", [4, 20])
@pytest.mark.parametrize("form", ["sigma", "core"])
def test_every_gradient_mask(backend: str, m: int, form: str) -> None:
    o = operands(m, 12, 9, 3, form=form)
    low = cast(o, torch.float32, (torch.float32,) * 3)
    dy = torch.randn(m, 9)
    names = present(o)
    everything = dict(zip(names, run(lambda leaves: fused(leaves, backend=backend), low, dy, names)[1:], strict=True))
    for size in range(1, len(names)):
        for wanted in itertools.combinations(names, size):
            for name, gradient in zip(
                wanted, run(lambda leaves: fused(leaves, backend=backend), low, dy, wanted)[1:], strict=True
            ):
                torch.testing.assert_close(gradient, everything[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m", [5, 37])
@pytest.mark.parametrize(("weight", "bias"), [(False, True), (False, False), (True, False)])
def test_without_weight_or_bias(backend: str, m: int, weight: bool, bias: bool) -> None:
    o = operands(m, 31, 18, 4, weight=weight, bias=bias)
    check(o, torch.randn(m, 18).double(), backend, torch.float32, (torch.float32,) * 3, present(o))


def test_core_on_a_layer_that_is_not_square(backend: str) -> None:
    """``z = h R`` with R as it stands, not transposed (MohammadrezaBanaei/LoRA-XS#1)."""
    x, w, u, v, core = (torch.randn(s) for s in ((5, 48), (80, 48), (48, 6), (80, 6), (6, 6)))
    y = svd_linear(x, w, u, None, v, core=core, scale=0.5, backend=backend)
    torch.testing.assert_close(y, x @ w.t() + 0.5 * ((x @ u) @ core) @ v.t())


def _layouts(t: Tensor) -> list[Tensor]:
    """The same matrix under other strides."""
    wide = torch.zeros(t.shape[0], 2 * t.shape[1], dtype=t.dtype)
    wide[:, ::2] = t
    offset = torch.empty(t.numel() + 3, dtype=t.dtype)[3:].view(t.shape).copy_(t)
    return [t, t.t().contiguous().t(), wide[:, ::2], offset]


@pytest.mark.parametrize("m", [4, 21])
def test_strided_operands(backend: str, m: int) -> None:
    """Views of every operand equal their contiguous copies (pytorch/pytorch#30303)."""
    o = cast(operands(m, 24, 16, 5), torch.float32, (torch.float32,) * 3)
    dy = torch.randn(m, 16)
    names = present(o)
    expected = run(lambda leaves: fused(leaves, backend=backend), o, dy, names)
    for name in ("x", "weight", "u", "v"):
        for view in _layouts(o[name]):
            got = run(lambda leaves: fused(leaves, backend=backend), o | {name: view}, dy, names)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    sigma = torch.diag(o["sigma"]).diagonal()
    assert sigma.stride() == (6,)
    for upstream in (dy.t().contiguous().t(), torch.randn(1, 16).expand(m, 16)):
        strided = run(lambda leaves: fused(leaves, backend=backend), o | {"sigma": sigma}, upstream, names)
        dense = run(lambda leaves: fused(leaves, backend=backend), o, upstream.contiguous(), names)
        for a, b in zip(strided, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [5, 30])
def test_expanded_and_permuted_activations(backend: str, m: int) -> None:
    """A stride-0 input gets the summed gradient; a permuted 3-D input is read as it stands (pytorch/pytorch#30303)."""
    o = cast(operands(m, 24, 16, 5), torch.float32, (torch.float32,) * 3)
    row = torch.randn(24, requires_grad=True)
    svd_linear(row.expand(m, 24), o["weight"], o["u"], o["sigma"], o["v"], backend=backend).sum().backward()
    other = row.detach().clone().requires_grad_()
    svd_linear(other.repeat(m, 1), o["weight"], o["u"], o["sigma"], o["v"], backend=backend).sum().backward()
    torch.testing.assert_close(row.grad, other.grad, rtol=1e-5, atol=1e-4)
    x = torch.randn(3, m, 24)
    permuted = x.transpose(0, 1).contiguous().transpose(0, 1)
    a, b = (svd_linear(t, o["weight"], o["u"], o["sigma"], o["v"], backend=backend) for t in (x, permuted))
    torch.testing.assert_close(a, b)
    assert a.shape == (3, m, 16)
    assert svd_linear(x[0, 0], o["weight"], o["u"], o["sigma"], o["v"], backend=backend).shape == (16,)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40), k=st.integers(1, 70), n=st.integers(1, 70), r=st.integers(0, 24), seed=st.integers(0, 2**31)
)
def test_any_shape(m: int, k: int, n: int, r: int, seed: int) -> None:
    torch.manual_seed(seed)
    o = operands(m, k, n, r)
    check(o, torch.randn(m, n).double(), None, torch.float32, (torch.float32,) * 3, present(o))


def test_the_same_bits_every_time(backend: str) -> None:
    """The first call at a shape equals the later ones, also where gradients accumulate (jmschrei/cherimoya#50)."""
    for m in (6, 50):
        o = cast(operands(m, 70, 60, 9), torch.bfloat16, (torch.float32,) * 3)
        dy = torch.randn(m, 60)
        first = run(lambda leaves: fused(leaves, backend=backend), o, dy, present(o))
        for _ in range(3):
            again = run(lambda leaves: fused(leaves, backend=backend), o, dy, present(o))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_gradcheck_in_float64() -> None:
    o = {name: t.requires_grad_() for name, t in operands(4, 5, 6, 3).items() if t is not None}
    args = tuple(o[name] for name in ("x", "weight", "u", "sigma", "v", "bias"))
    assert torch.autograd.gradcheck(lambda *t: svd_linear(*t, scale=0.5), args)


def snippet(documented: object) -> list[str]:
    """The lines of the docstring's "Equivalent to" block."""
    text = inspect.cleandoc(documented.__doc__ or "").partition("Equivalent to::\n\n")[2]
    lines = list(itertools.takewhile(lambda line: line.startswith("    ") or not line, text.splitlines()))
    return [line.strip() for line in lines if line.strip()]


def test_the_documented_equivalents_are_true() -> None:
    o = cast(operands(5, 24, 16, 4), torch.float32, (torch.float32,) * 3)
    scope = dict(o) | {"torch": torch}
    lines = snippet(svd_linear)
    assert len(lines) == 3
    exec("\n".join(lines), scope)
    torch.testing.assert_close(scope["y"], fused(o))
    layer = SVDLinear.from_linear(torch.nn.Linear(24, 16), 4, "sorsa")
    lines = snippet(SVDLinear)
    assert len(lines) == 2
    for line in lines:
        left, right = (eval(side, {"torch": torch, "layer": layer, "x": o["x"]}) for side in line.split("=="))
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("m", [4, 40])
def test_weight_and_bias_of_another_dtype(backend: str, m: int) -> None:
    """They are cast to x's dtype, as the factors are; their gradients come back in their own."""
    o = cast(operands(m, 24, 16, 4), torch.bfloat16, (torch.float32,) * 3)
    wide = o | {"weight": o["weight"].float(), "bias": o["bias"].float()}
    dy = torch.randn(m, 16)
    names = ("x", "weight", "u", "bias")
    got = run(lambda leaves: fused(leaves, backend=backend), wide, dy, names)
    want = run(lambda leaves: fused(leaves, backend=backend), o, dy, names)
    assert [t.dtype for t in got[1:]] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)


# ---- dropout -------------------------------------------------------------------------------------------------------


def test_philox_known_answers() -> None:
    """Vectors of the Random123 library, 7 and 10 rounds."""

    def words(*values: int) -> tuple[Tensor, ...]:
        return tuple(torch.tensor([value], dtype=torch.int64) for value in values)

    def answer(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> list[int]:
        return [int(word) for word in philox4x32(words(*counter), words(*key), rounds)]

    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert answer((0,) * 4, (0, 0), 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert answer((ones,) * 4, (ones, ones), 7) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]
    assert answer(*pi, 7) == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]
    assert answer((0,) * 4, (0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert answer((ones,) * 4, (ones, ones), 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert answer(*pi, 10) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_mask_is_addressed_by_position() -> None:
    """Element (row, col) depends on nothing but rng_state and its place; the rate is the asked one."""
    whole = keep_mask(40, 37, RNG, threshold_of(0.3))
    assert torch.equal(keep_mask(10, 37, RNG, threshold_of(0.3), row0=30), whole[30:])
    assert torch.equal(keep_mask(40, 20, RNG, threshold_of(0.3)), whole[:, :20])
    assert keep_mask(0, 37, RNG, threshold_of(0.3)).shape == (0, 37)
    dropped = 1 - keep_mask(2000, 500, RNG, threshold_of(0.3)).double().mean()
    assert abs(float(dropped) - 0.3) < 5 * (0.3 * 0.7 / 1e6) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("m", [3, 40, 300])
def test_dropout_is_the_masked_formula(backend: str, dtype: torch.dtype, m: int) -> None:
    """The mask falls on the branch's input and on dx, the same bits on every backend."""
    o = operands(m, 75, 24, 5)
    t = threshold_of(0.4)
    mask = keep_mask(m, 75, RNG, t).double() * keep_scale(t)
    check(
        o, torch.randn(m, 24).double(), backend, dtype, (torch.float32,) * 3, ("x", "u", "sigma", "v"),
        mask=mask, dropout_p=0.4, rng_state=RNG,
    )  # fmt: skip


def test_dropout_gradcheck_and_edges(backend: str) -> None:
    """gradcheck with the mask held; p = 1 leaves the frozen layer, p = 0 no trace (foundation-model-stack/fms-acceleration#97)."""
    o = {name: None if t is None else t.requires_grad_(name != "scale") for name, t in operands(4, 9, 6, 3).items()}
    args = tuple(o[name] for name in ("x", "u", "sigma", "v"))
    assert torch.autograd.gradcheck(
        lambda x, u, s, v: svd_linear(x, o["weight"], u, s, v, dropout_p=0.4, rng_state=RNG), args
    )
    low = cast(operands(6, 24, 16, 4), torch.float32, (torch.float32,) * 3)
    dy = torch.randn(6, 16)
    y, dx, du, dv = run(lambda leaves: fused(leaves, backend=backend, dropout_p=1.0), low, dy, ("x", "u", "v"))
    torch.testing.assert_close(y, torch.nn.functional.linear(low["x"], low["weight"], low["bias"]))
    assert torch.equal(dx, dy @ low["weight"]) or torch.allclose(dx, dy @ low["weight"], rtol=1e-6, atol=1e-5)
    assert not du.any() and not dv.any()
    assert torch.equal(fused(low, backend=backend, dropout_p=0.0), fused(low, backend=backend))
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"dropout_p is"):
            fused(low, dropout_p=p)


def test_dropout_draws_from_torchs_generator(backend: str) -> None:
    low = cast(operands(6, 24, 16, 4), torch.float32, (torch.float32,) * 3)
    torch.manual_seed(5)
    a, b = (fused(low, backend=backend, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(a, fused(low, backend=backend, dropout_p=0.5))
    assert not torch.equal(a, b)


# ---- gates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sigma", "core", "none"])
@pytest.mark.parametrize("kind", ["table", "shared", "top-k"])
@pytest.mark.parametrize("m", [20, 70])
def test_gates(backend: str, form: str, kind: str, m: int) -> None:
    o = operands(m, 16, 12, 6, form=form)
    if kind == "top-k":
        index = torch.rand(m, 6).argsort(-1)[:, :2]
        value = torch.randn(m, 2).double()
        rows = lambda g: torch.zeros(m, 6, dtype=g.dtype).scatter_add(1, index, g)  # noqa: E731
        options = lambda g: {"gate": (index, g)}  # noqa: E731
    else:
        group = torch.randint(0, 4, (m,)) if kind == "table" else None
        value = torch.randn(4 if kind == "table" else 1, 6).double()
        rows = lambda g: g if group is None else g[group]  # noqa: E731
        options = lambda g: {"gate": g, "group": group}  # noqa: E731
    dy = torch.randn(m, 12).double()

    def expected(leaves):  # type: ignore[no-untyped-def]
        h = leaves["x"] @ leaves["u"]
        z = h @ leaves["core"] if form == "core" else h * leaves["sigma"] if form == "sigma" else h
        return (
            leaves["x"] @ leaves["weight"].t()
            + leaves["bias"]
            + leaves["scale"] * (z * rows(leaves["gate"])) @ leaves["v"].t()
        )

    names = (*(n for n in ("x", "u", "sigma", "v", "scale", "core") if o[n] is not None), "gate")
    truth = run(expected, o | {"gate": value}, dy, names)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        low = {name: None if t is None else t.to(dtype) for name, t in (o | {"gate": value}).items()}
        name = "eager" if dtype == torch.float64 else backend
        got = run(lambda leaves, b=name: fused(leaves, backend=b, **options(leaves["gate"])), low, dy.to(dtype), names)
        for result, a, b in zip(("y", *names), got, truth, strict=True):
            bound = 1e-6 if result == "scale" and dtype == torch.float64 else tolerance  # the scale is float32 inside
            torch.testing.assert_close(a.double(), b, rtol=bound, atol=20 * bound)


def test_bad_gates_are_refused() -> None:
    o = cast(operands(5, 16, 12, 6), torch.float32, (torch.float32,) * 3)
    table, group = torch.ones(3, 6), torch.tensor([0, 1, 2, 3, 0])
    for options, message in (
        ({"gate": table, "group": group}, r"group has values from 0 to 3, expected 0 <= group < G=3"),
        ({"gate": table}, r"gate has 3 rows but group is None"),
        ({"group": group}, r"gate is None"),
        ({"gate": torch.ones(3, 5), "group": group}, r"gate is \(3, 5\), expected \(G, r=6\)"),
        ({"gate": table, "group": group[:4]}, r"group is \(4,\), expected \(5,\)"),
        ({"gate": (torch.full((5, 1), 6), torch.ones(5, 1))}, r"gate index has values from 6 to 6"),
        ({"gate": (torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))}, r"expected both \(5,\) \+ \(k,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fused(o, **options)


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.ones(7, 3)}, ValueError, r"u has 7 rows, expected K=8 \(weight is \(6, 8\)\)"),
        ({"x": torch.ones(4, 9)}, ValueError, r"x is \(4, 9\), expected \(\.\.\., K=8\)"),
        ({"x": torch.ones(())}, ValueError, r"x is \(\)"),
        ({"v": torch.ones(5, 3)}, ValueError, r"v has 5 rows, expected N=6 \(weight is \(6, 8\)\)"),
        ({"v": torch.ones(6, 2)}, ValueError, r"v has rank 2, expected r=3"),
        ({"u": torch.ones(3)}, ValueError, r"u and v must be matrices"),
        ({"weight": torch.ones(6, 9)}, ValueError, r"weight is \(6, 9\), expected \(N, K=8\)"),
        ({"sigma": torch.ones(4)}, ValueError, r"sigma is \(4,\), expected \(r=3,\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias is \(5,\), expected \(N=6,\)"),
        ({"core": torch.ones(3, 3)}, ValueError, r"sigma and core exclude each other"),
        ({"sigma": None, "core": torch.ones(3, 2)}, ValueError, r"core is \(3, 2\), expected \(r=3, r=3\)"),
        ({"scale": torch.ones(2)}, ValueError, r"scale is \(2,\), expected a float or a 0-d tensor"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, TypeError, r"x is torch.int64"),
        ({"u": torch.ones(8, 3, device="meta")}, ValueError, r"u is on meta, expected x's device cpu"),
    ],
)
def test_errors_name_the_value_and_the_expectation(change, error, message) -> None:  # type: ignore[no-untyped-def]
    o = cast(operands(4, 8, 6, 3), torch.float32, (torch.float32,) * 3) | change
    with pytest.raises(error, match=message):
        fused(o)


def test_unknown_backend_lists_them() -> None:
    o = cast(operands(4, 8, 6, 3), torch.float32, (torch.float32,) * 3)
    with pytest.raises(
        ValueError, match=r"backend is 'egaer', expected one of eager, cpu, triton, cuda; did you mean 'eager'\?"
    ):
        fused(o, backend="egaer")


@pytest.mark.parametrize("first", ["inference", "fake", "grad", "functionalize"])
def test_a_remembered_scale_serves_a_training_step(first: str) -> None:
    """It must be none that inference mode made, which a backward cannot have, nor one without numbers."""
    functional._scales.clear()
    x, w, u, v = torch.randn(3, 4), torch.randn(5, 4), torch.randn(4, 2), torch.randn(5, 2)
    if first == "inference":
        with torch.inference_mode():
            svd_linear(x, w, u, None, v, scale=0.375)
    elif first == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            svd_linear(x, w, u, None, v, scale=0.375)
    elif first == "grad":
        torch.func.grad(lambda t: svd_linear(t, w, u, None, v, scale=0.375).sum())(x)
    else:
        with contextlib.suppress(RuntimeError, NotImplementedError):  # it has no rule for the operators
            torch.func.functionalize(lambda t: svd_linear(t, w, u, None, v, scale=0.375))(x)
    u.requires_grad_()
    y = svd_linear(x, w, u, None, v, scale=0.375)
    y.sum().backward()
    assert torch.allclose(y, x @ w.t() + 0.375 * (x @ u) @ v.t(), atol=1e-5) and u.grad is not None
    assert list(functional._scales) == [0.375]
