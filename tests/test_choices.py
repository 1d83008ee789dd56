"""Which path a layer takes: the tables, the nearest row, the rule; and that no choice changes a result beyond its rounding."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operands import RNG, cast, check, fused, operands, plain, present, run
from paths import row
from test_autograd import layer, trainable
from test_compile import assert_as_eager
from torch.fx.experimental.proxy_tensor import make_fx

from svdkern import cli, svd_linear
from svdkern.backends import choices, cpu, dispatch, extension, tuned
from svdkern.backends.table import NEAR, Row, Shape, Table, distance, fastest, read_table, write_table

pytestmark = [
    pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension"),
    pytest.mark.usefixtures("cache"),
]

F32, BF16 = torch.float32, torch.bfloat16
Install = Callable[..., None]


@pytest.fixture
def shipped(cache: Path) -> Install:
    """Make these rows the shipped table."""

    def install(*rows: Row) -> None:
        write_table(choices.SHIPPED, Table(rows))
        dispatch.read_environment()

    return install


def chosen(m: int, k: int, n: int, r: int, dtype: torch.dtype = F32, name: str | None = None, dropout: int = 0) -> str:
    """The path that a call takes."""
    backend = dispatch.choose_path(torch.empty(m, k, dtype=dtype), torch.empty(n, r), name, dropout)
    return next(path for path, candidate in cpu.PATHS.items() if candidate is backend)


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_shipped_table_is_one() -> None:
    for found in read_table(Path(choices.__file__).with_name("choices.json")):
        assert found.seconds.get(found.choice) is not None
        assert found.choice == fastest(found.seconds, found.choice), (
            f"{found} is not the fastest by more than the margin"
        )


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    rows = [
        row((64, 32, 32, 4), "eager", "bfloat16", {"fused": 2e-3, "steps": None, "eager": 1.5e-3}),
        row((1, 32, 32, 4), "steps"),
        row((1, 32, 32, 4), "fused"),  # the same layer: the last counts
    ]
    write_table(tmp_path / "t.json", Table(rows))
    found = read_table(tmp_path / "t.json")
    assert list(found) == [rows[2], rows[0]] and len(found) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choices.json", "t.json"]
    write_table(tmp_path / "t.json", Table())
    assert json.loads((tmp_path / "t.json").read_text()) == {"version": 1, "rows": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"M": 0}, "positive integers"),
        ({"M": True}, "positive integers"),
        ({"K": 2.5}, "positive integers"),
        ({"r": None}, "positive integers"),
        ({"threads": "2"}, "positive integers"),
        ({"dtype": "float64"}, "dtype"),
        ({"isa": 5}, "isa"),
        ({"choice": "fast"}, "expected one of fused, steps, eager"),
        ({"choice": ["fused"]}, "expected one of"),
        ({"seconds": [1, 2]}, "expected times"),
        ({"seconds": {"fused": -1.0}}, "expected times"),
        ({"seconds": {"fused": float("inf")}}, "expected times"),
        ({"seconds": {"fused": float("nan")}}, "expected times"),
        ({"seconds": {"other": 1.0}}, "expected times"),
    ],
)
def test_a_row_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row.from_json(row((1, 2, 3, 4), "fused").to_json() | change)


def test_what_is_no_row_at_all_is_refused() -> None:
    found = row((1, 2, 3, 4), "fused").to_json()
    del found["choice"], found["K"]
    with pytest.raises(ValueError, match="lacks K, choice"):
        Row.from_json(found)
    for other in ([], "row", None, 1):
        with pytest.raises(ValueError, match="a row is an object"):
            Row.from_json(other)


def test_a_choice_changes_only_beyond_the_noise() -> None:
    assert fastest({"fused": 1.0, "steps": 0.98}, "fused") == "fused"
    assert fastest({"fused": 1.0, "steps": 0.96}, "fused") == "steps"
    assert fastest({"fused": 1.0, "steps": 0.98}) == "steps"
    assert fastest({"fused": None, "steps": 0.98}, "fused") == "steps"
    assert fastest({"fused": None}, "fused") is None and fastest({}) is None


# ---- the nearest row -----------------------------------------------------------------------------------------------

SIZES = st.tuples(*[st.integers(1, 1 << 14)] * 3, st.integers(1, 512)).map(lambda sizes: Shape(*sizes))


@given(SIZES, SIZES)
def test_distance_is_one(a: Shape, b: Shape) -> None:
    assert distance(a, a) == 0.0 and distance(a, b) == distance(b, a) >= 0.0
    assert distance(a, b) <= sum(NEAR) - NEAR[3] / 2 or distance(a, b) == float("inf")


def test_the_nearest_row_serves_within_an_octave() -> None:
    table = Table([row((m, 1024, 1024, 16), "steps") for m in (1, 64, 256)])

    def found(*sizes: int) -> Shape | None:
        nearest = table.find(cpu.isa(), "float32", Shape(*sizes))
        return nearest and nearest.shape

    assert found(64, 1024, 1024, 16) == (64, 1024, 1024, 16)
    assert found(100, 1024, 1024, 16) == (64, 1024, 1024, 16)
    assert found(200, 700, 1500, 64) == (256, 1024, 1024, 16)
    assert found(128, 1024, 1024, 16) == (64, 1024, 1024, 16)  # as far from 256: the smaller one, always
    assert found(513, 1024, 1024, 16) is None
    assert found(64, 511, 1024, 16) is None and found(64, 1024, 2049, 16) is None
    assert found(64, 512, 2048, 4) and found(64, 512, 2048, 64)
    assert found(64, 1024, 1024, 3) is None and found(64, 1024, 1024, 65) is None
    assert found(2, 1024, 1024, 16) is None  # one row is no measure for several
    assert found(1, 1024, 1024, 8) == (1, 1024, 1024, 16)
    for empty in ((0, 1024, 1024, 16), (64, 0, 1024, 16), (64, 1024, 0, 16), (64, 1024, 1024, 0)):
        assert found(*empty) is None
    assert table.find(cpu.isa(), "bfloat16", Shape(64, 1024, 1024, 16)) is None
    assert table.find("other/ISA", "float32", Shape(64, 1024, 1024, 16)) is None


# ---- what counts before what ---------------------------------------------------------------------------------------


def test_tuned_then_shipped_then_the_rule(shipped: Install) -> None:
    assert chosen(64, 512, 512, 16) == "steps"
    assert choices.choose(Shape(64, 512, 512, 16), F32) == ("steps", "rule")
    shipped(row((64, 512, 512, 16), "fused"))
    assert chosen(64, 512, 512, 16) == "fused"
    assert choices.choose(Shape(64, 512, 512, 16), F32) == ("fused", "shipped table")
    near = choices.choose(Shape(80, 512, 400, 16), F32)
    assert near == ("fused", "shipped table, nearest row M=64 K=512 N=512 r=16")
    assert tuned.save(row((64, 512, 512, 16), "eager"))
    assert chosen(64, 512, 512, 16) == "fused"  # read when a program starts
    dispatch.read_environment()
    assert chosen(64, 512, 512, 16) == "eager"
    assert choices.choose(Shape(64, 512, 512, 16), F32) == ("eager", "tuned here")
    assert choices.choose(Shape(80, 512, 400, 16), F32).source == "tuned here, nearest row M=64 K=512 N=512 r=16"
    assert choices.choose(Shape(64, 512, 512, 16), F32, use_tuned=False).path == "fused"


def test_rows_of_other_machines_do_not_count(shipped: Install) -> None:
    shipped(row((64, 512, 512, 16), "fused", isa="avx9/AVX9"), row((64, 512, 512, 16), "fused", "float16"))
    assert chosen(64, 512, 512, 16) == "steps"


def test_eager_is_not_chosen_for_dropout_or_when_cpu_was_asked_for(
    shipped: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(row((64, 512, 512, 16), "eager", seconds={"fused": 2e-3, "steps": 3e-3, "eager": 1e-3}))
    assert chosen(64, 512, 512, 16) == "eager"
    assert chosen(64, 512, 512, 16, dropout=100) == "fused"
    assert chosen(64, 512, 512, 16, name="cpu") == "fused"
    assert chosen(64, 512, 512, 16, name="eager", dropout=100) == "eager"
    monkeypatch.setenv("SVDKERN_BACKEND", "cpu")
    dispatch.read_environment()
    assert chosen(64, 512, 512, 16) == "fused"
    monkeypatch.delenv("SVDKERN_BACKEND")
    shipped(row((64, 512, 512, 16), "eager", seconds={"eager": 1e-3}))
    assert chosen(64, 512, 512, 16) == "eager"
    assert chosen(64, 512, 512, 16, name="cpu") == "steps"  # neither was measured: the rule


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"version": 2, "rows": []}', '{"version": 1, "rows": [{}]}'])
def test_a_broken_shipped_table_costs_one_line(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if text is not None:
        (tmp_path / "broken.json").write_text(text)
    monkeypatch.setattr(choices, "SHIPPED", tmp_path / "broken.json")
    dispatch.read_environment()
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert chosen(64, 512, 512, 16) == "steps" and chosen(8, 512, 512, 16) == "fused"
    assert len(caplog.records) == 1 and "ignoring the shipped table of choices" in caplog.text


# ---- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["environment", "process group"])
def test_ranks_choose_alike_whatever_their_disks_say(
    how: str, shipped: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shipped(row((64, 512, 512, 16), "fused"))
    tuned.save(row((64, 512, 512, 16), "eager"))
    tuned.save(row((256, 512, 512, 16), "eager"))
    if how == "environment":
        monkeypatch.setenv("WORLD_SIZE", "2")
    dispatch.read_environment()
    if how == "process group":  # which begins after the first call
        assert chosen(64, 512, 512, 16) == "eager"
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert chosen(256, 512, 512, 16) == "steps"
        assert chosen(64, 512, 512, 16) == "fused"
        assert chosen(65, 512, 512, 16) == "fused"
    assert len(caplog.records) == 1 and "a distributed job" in caplog.text


def test_a_job_of_one_rank_is_none(shipped: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.save(row((64, 512, 512, 16), "eager"))
    for size in ("1", "", "many"):
        monkeypatch.setenv("WORLD_SIZE", size)
        dispatch.read_environment()
        assert chosen(64, 512, 512, 16) == "eager"


# ---- remembering ---------------------------------------------------------------------------------------------------


def test_choices_are_remembered_and_not_without_end(shipped: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[Shape] = []
    inner = choices.choose
    monkeypatch.setattr(
        choices, "choose", lambda shape, *rest, **more: looked_up.append(shape) or inner(shape, *rest, **more)
    )
    monkeypatch.setattr(dispatch, "MOST_KEPT", 8)
    for _ in range(3):
        for m in range(1, 9):
            chosen(m, 16, 16, 2)
    assert len(looked_up) == 8
    for m in range(1, 100):
        chosen(m, 16, 16, 2)
        assert len(dispatch._paths) <= 8


def test_both_ways_of_a_layer_find_the_same_row(shipped: Install) -> None:
    shipped(row((256, 512, 128, 16), "fused"))
    u, v = torch.empty(512, 16), torch.empty(128, 16)
    forward = dispatch.choose_path(torch.empty(2, 128, 512), v, "", 0)
    backward = dispatch.choose_path(torch.empty(2, 128, 128), u, "", 0, backward=True)
    assert forward is backward is cpu.PATHS["fused"]
    assert dispatch.choose_path(torch.empty(2, 128, 128), u, "", 0) is cpu.PATHS["steps"]  # K = 128, N = 512


def test_an_unknown_name_is_refused_with_its_hint() -> None:
    with pytest.raises(ValueError, match="did you mean 'eager'"):
        chosen(3, 4, 5, 2, name="eagre")
    with pytest.raises(TypeError):
        chosen(3, 4, 5, 2, name=["eager"])  # type: ignore[arg-type]


# ---- results -------------------------------------------------------------------------------------------------------

PATH = st.sampled_from(["fused", "steps", "eager"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_chosen_is_accurate(data: st.DataObject, shipped: Install) -> None:
    m, k, n = (data.draw(st.integers(1, most), name) for name, most in (("M", 80), ("K", 90), ("N", 90)))
    r, choice = data.draw(st.integers(1, 20), "r"), data.draw(PATH, "choice")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    shipped(row((m, k, n, r), choice, str(dtype).removeprefix("torch.")))
    o = operands(m, k, n, r, form=data.draw(st.sampled_from(["sigma", "core", "none"]), "form"))
    assert chosen(m, k, n, r, dtype) == choice
    check(o, torch.randn(m, n).double(), None, dtype, (torch.float32,) * 3, present(o))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_backward_may_take_another_path_than_the_forward(data: st.DataObject, shipped: Install) -> None:
    """As it does through the operators, if the tables change in between."""
    m, n = data.draw(st.integers(1, 70), "M"), data.draw(st.integers(1, 40), "N")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    there, back = data.draw(PATH, "forward"), data.draw(PATH, "backward")
    o, name = operands(m, 33, n, 5), str(dtype).removeprefix("torch.")
    names = tuple(key for key in present(o) if key != "scale")

    dy, low = torch.randn(m, n).to(dtype), cast(o, dtype, (torch.float32,) * 3)

    shipped(row((m, 33, n, 5), there, name))
    y, pull = torch.func.vjp(
        lambda *leaves: fused(low | dict(zip(names, leaves, strict=True))), *[low[key] for key in names]
    )
    shipped(row((m, 33, n, 5), back, name))
    got = [y, *pull(dy)]

    exact = {key: None if t is None else t.double() for key, t in low.items()}
    sizes = {key: None if t is None else t.abs() for key, t in exact.items()}
    assert_accurate(
        got,
        run(plain, exact, dy, names),
        run(plain, sizes, dy.abs(), names),
        run(plain, low, dy, names),
        dtype,
        ("y", *names),
    )


@pytest.mark.parametrize("choice", ["fused", "steps", "eager"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiled_layers_take_the_same_path(choice: str, dtype: torch.dtype, shipped: Install) -> None:
    """To the bit; also where a gradient needs no weight, so that the backward does not see one."""
    shipped(row((40, 24, 16, 4), choice, str(dtype).removeprefix("torch.")))
    for names in (("x", "u", "sigma", "v"), ("u", "v")):
        t = trainable(layer(40, dtype=dtype), *names)
        m, (k, r), n = t["x"].shape[0], t["u"].shape, t["v"].shape[0]
        shipped(row((m, k, n, r), choice, str(dtype).removeprefix("torch.")))
        assert chosen(m, k, n, r, dtype) == choice
        assert_as_eager(lambda s: svd_linear(s["x"], s["weight"], s["u"], s["sigma"], s["v"]), t, names)


def test_dropout_is_the_same_on_every_path(shipped: Install) -> None:
    found = []
    o = cast(operands(40, 24, 16, 4), F32, (F32,) * 3)
    for choice in ("fused", "steps", "eager"):
        shipped(row((40, 24, 16, 4), choice))
        found.append(fused(o, dropout_p=0.5, rng_state=RNG))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("m", [4, 40])
def test_a_tracer_with_symbolic_sizes_gets_one_graph_for_any_number_of_rows(m: int, shipped: Install) -> None:
    shipped(row((m, 24, 16, 4), "eager"))
    rest = torch.randn(16, 24), torch.randn(24, 4), torch.randn(4), torch.randn(16, 4)
    graph = make_fx(lambda x, w, u, s, v: svd_linear(x, w, u, s, v), tracing_mode="symbolic")(torch.randn(m, 24), *rest)
    assert torch.ops.svdkern._cpu_forward.default in {node.target for node in graph.graph.nodes}
    for rows in (2, 3, 33, 100):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(graph(x, *rest), svd_linear(x, *rest))


# ---- what a person sees --------------------------------------------------------------------------------------------


def test_doctor_says_where_a_choice_comes_from(
    shipped: Install, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(row((64, 512, 512, 16), "fused"), row((64, 512, 512, 16), "eager", "float16"))
    tuned.save(row((64, 512, 512, 16), "steps", "bfloat16"))
    dispatch.read_environment()

    def path_lines(shape: str) -> list[str]:
        assert cli.main(["doctor", "--shape", shape]) == 0
        said = capsys.readouterr().out
        assert f"measured choices for {cpu.isa()}\n  shipped table: 2 layers\n" in said
        assert f"1 layers, in {cache / 'choices'}" in said
        lines = said.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("path of M="))
        return [" ".join(line.split()) for line in lines[start : start + 5]]

    head, f32, bf16, f16, f64 = path_lines("64x512x512")
    assert head == "path of M=64 K=512 N=512 r=16"
    assert f32.startswith("float32 fused") and f32.endswith("(shipped table)")
    assert bf16.startswith("bfloat16 steps") and bf16.endswith("(tuned here)")
    assert f16.startswith("float16 eager") and f16.endswith("(shipped table)")
    assert f64.startswith("float64 eager")
    _, f32, bf16, *_ = path_lines("70x512x512x8")
    assert f32.endswith("(shipped table, nearest row M=64 K=512 N=512 r=16)")
    assert bf16.endswith("(tuned here, nearest row M=64 K=512 N=512 r=16)")
    _, f32, *_ = path_lines("4096x512x512x8")
    assert f32.startswith("float32 steps") and f32.endswith("(rule)")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert path_lines("64x512x512")[2].endswith("(rule)")
