"""Tiles of the Triton kernels: the table and its files, the candidates, and the tuner by a clock that is none."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import emulation, tritons
from operands import cast, fused, operands, present, run
from ptx_emulator.jit import compile_launch
from svdkern.triton_kernels import configs, launching
from svdkern.triton_kernels.configs import Config
from test_triton_gates import Gate

from svdkern import cli, tune
from svdkern.backends import choices, dispatch, triton, triton_tiles, triton_tune, tuned
from svdkern.backends.eager import EagerBackend
from svdkern.backends.table import Shape
from svdkern.backends.triton_tiles import Row

GPU = "Some GPU"
SHAPE = Shape(8192, 4096, 4096, 16)
RULE = Config(128, 128, 64, 16, 8, 128, 64, 8, 3)
OTHER = Config(64, 128, 64, 16, 8, 64, 64, 4, 3)
ROW = Row(80, "bfloat16", "forward", SHAPE, OTHER, 1e-3, 1.2e-3, GPU, "3.9.0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's own tables, both empty."""
    import bench  # noqa: F401 (the command line imports it, and it sets the variable that is set next)

    monkeypatch.setenv("SVDKERN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_tiles, "SHIPPED", tmp_path / "shipped.json")
    triton_tiles.forget()
    yield tmp_path
    triton_tiles.forget()


def chosen(family: str = "forward", shape: Shape = SHAPE, arch: int = 80, dtype: str = "bfloat16") -> Config | None:
    found = triton_tiles._find(GPU, arch, dtype, family, shape)
    return None if found is None else found.config


# ------------------------------------------------------------------------------------------------------------- look-up


def test_the_shipped_table_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in triton_tiles.read_rows(Path(triton_tiles.__file__).with_name("triton_tiles.json")):
        assert configs.staged(row.config, getattr(torch, row.dtype)) <= configs.shared_memory(row.arch)


def test_nothing_measured_means_the_rule() -> None:
    device = torch.device("cpu")
    with emulation(arch=90, ctas=132):
        for core in (False, True):
            expected = configs.training(90, torch.bfloat16, 16, core, 8192, 4096, 132)
            assert triton_tiles.choose("forward", device, torch.bfloat16, core, SHAPE) == expected
        few = SHAPE._replace(M=4)
        assert triton_tiles.choose("decode", device, torch.bfloat16, False, few) == configs.decoding(torch.bfloat16, 16)
        wide = Shape(17, 100_000, 64, 16)  # the forward's tiles are of y, the backward's of dx
        assert triton_tiles.choose("forward", device, torch.bfloat16, False, wide).BN == 64
        assert triton_tiles.choose("backward", device, torch.bfloat16, False, wide).BN == 256


def test_a_row_serves_its_neighbours_and_nobody_else() -> None:
    triton_tiles.save([ROW], GPU)
    for near in (SHAPE, SHAPE._replace(M=4097), Shape(16000, 8192, 2048, 16)):
        assert chosen(shape=near) == OTHER
    for far in (SHAPE._replace(M=4000), SHAPE._replace(K=8200), SHAPE._replace(r=32), Shape(1, 4096, 4096, 16)):
        assert chosen(shape=far) is None
    assert chosen("backward") is None and chosen(arch=90) is None and chosen(dtype="float16") is None


def test_the_nearest_row_and_the_tuned_one_of_two_as_near(folder: Path) -> None:
    shipped = replace(ROW, config=RULE)
    triton_tiles.write_rows(folder / "shipped.json", [shipped])
    triton_tiles.forget()
    assert chosen() == RULE
    triton_tiles.save([ROW], GPU)
    assert chosen() == OTHER
    triton_tiles.save([replace(ROW, shape=SHAPE._replace(M=4096), config=OTHER)], GPU)
    triton_tiles.write_rows(folder / "shipped.json", [replace(shipped, shape=SHAPE._replace(M=6000))])
    triton_tiles.forget()
    assert chosen(shape=SHAPE._replace(M=6000)) == RULE


def test_in_a_distributed_job_only_the_shipped_rows_count(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    triton_tiles.save([ROW], GPU)
    triton_tiles.write_rows(folder / "shipped.json", [replace(ROW, config=RULE)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    triton_tiles.forget()
    assert chosen() == RULE


@pytest.mark.parametrize(
    ("family", "rows", "kernel"),
    [("forward", 20, "forward_kernel"), ("backward", 20, "backward_kernel"), ("decode", 4, "linear_kernel")],
)
def test_a_row_decides_what_is_launched(folder: Path, family: str, rows: int, kernel: str) -> None:
    """Not beside a core, whose ranks all stand in one tile."""
    tiles = Config(16, 16, 16, 16, 1, 32, 16, 4, 2) if family == "decode" else Config(32, 32, 32, 16, 2, 32, 32, 4, 2)
    shape = Shape(rows, 64, 48, 16)
    triton_tiles.write_rows(folder / "shipped.json", [replace(ROW, family=family, shape=shape, config=tiles)])
    launched: dict[str, dict[str, Any]] = {}

    def note(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
        launched[kernel.fn.__name__] = meta

    for form in ("sigma", "core"):
        o = cast(operands(rows, 64, 48, 5, form=form), torch.bfloat16, (torch.float32,) * 3)
        with emulation(arch=80), pytest.MonkeyPatch.context() as patch:
            patch.setattr(launching, "launch", note)
            run(lambda leaves: fused(leaves, backend="triton"), o, torch.randn(rows, 48).bfloat16(), ("x", "u", "v"))
        meta = launched[kernel]
        found = tuple(meta[name] for name in ("BM", "BN", "BK", "num_warps", "num_stages"))
        assert (found == (*tiles[:3], 4, 2)) == (form == "sigma")


# --------------------------------------------------------------------------------------------------------------- files


def test_rows_are_added_and_replaced(folder: Path) -> None:
    path = triton_tiles.save([ROW], GPU)
    assert path.parent == folder / "cache" / "tiles" and [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600
    more = replace(ROW, family="decode", shape=SHAPE._replace(M=4), config=Config(16, 32, 64, 16, 1, 64, 32, 4, 2))
    triton_tiles.save([more], GPU)
    triton_tiles.save([replace(ROW, config=RULE, rule_s=None)], GPU)
    assert triton_tiles.read_rows(path) == [replace(ROW, config=RULE, rule_s=None), more]
    assert triton_tiles.user_file("Another GPU") != path
    assert triton_tiles.clear() == 1 and not path.exists() and chosen() is None


def test_other_sources_are_another_file(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    before = triton_tiles.user_file(GPU)
    copy = folder / "configs.py"
    copy.write_text("")
    monkeypatch.setattr(configs, "__file__", str(copy))
    triton_tiles._version.cache_clear()
    try:
        assert triton_tiles.user_file(GPU) != before
    finally:
        monkeypatch.undo()
        triton_tiles._version.cache_clear()


def _changed(**change: Any) -> dict[str, Any]:
    return {"version": 1, "rows": [ROW.to_json() | change]}


def _tiles(**change: int) -> dict[str, Any]:
    return _changed(config=OTHER._asdict() | change)


BROKEN: dict[str, Any] = {
    "empty": "",
    "truncated": json.dumps(_changed())[:60],
    "nested without end": "[" * 100_000,
    "no text": b"\xff\xfe\x00\x80",
    "no object": [1, 2],
    "another version": {"version": 2, "rows": []},
    "no rows": {"version": 1},
    "a row that is none": {"version": 1, "rows": [3]},
    "a field less": {"version": 1, "rows": [{"arch": 80}]},
    "dtype": _changed(dtype="float64"),
    "family": _changed(family="sideways"),
    "size": _changed(M=0),
    "time": _changed(seconds="fast"),
    "no number": _changed(rule_s=math.nan),
    "no config": _changed(config=[64, 64, 64]),
    "no power of two": _tiles(BM=96),
    "too small": _tiles(BK=8),
    "ranks that do not divide R": _tiles(RT=32),
    "stages": _tiles(num_stages=20),
    "a size that is true": _tiles(HEIGHT=True),
    "decoding in several pieces": {
        "version": 1, "rows": [ROW.to_json() | {"family": "decode", "R": 32}],
    },
}  # fmt: skip


@pytest.mark.parametrize("content", [*BROKEN, "folder", "pipe", "another user's"])
@pytest.mark.parametrize("whose", ["shipped", "ours"])
def test_a_file_that_is_no_table_is_ignored_with_one_line(
    content: str, whose: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = triton_tiles.save([ROW], GPU)
    if whose == "shipped":
        if content == "another user's":
            pytest.skip("what is installed is another user's as a rule")
        path = path.rename(folder / "shipped.json")
    if content in BROKEN:
        text = BROKEN[content]
        text = text if isinstance(text, (str, bytes)) else json.dumps(text)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    elif content == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    else:
        path.unlink()
        path.mkdir() if content == "folder" else os.mkfifo(path)
    triton_tiles.forget()
    with caplog.at_level(logging.WARNING, "svdkern"):
        assert [chosen(), chosen("backward")] == [None, None]
    lines = [record.getMessage() for record in caplog.records if record.name == "svdkern"]
    assert len(lines) == 1 and "ignoring a table of tiles" in lines[0] and str(path) in lines[0]


def test_the_unbroken_row_is_read(folder: Path) -> None:
    (folder / "shipped.json").write_text(json.dumps(_changed()))
    assert chosen() == OTHER


# ---------------------------------------------------------------------------------------------------------- candidates

ARCHS = [80, 86, 90, 100, 120]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("family", configs.FAMILIES)
def test_candidates_are_such_as_a_table_may_hold(family: str, R: int, dtype: torch.dtype, arch: int) -> None:
    found = configs.candidates(family, arch, dtype, R)
    assert 2 <= len(found) == len(set(found)) <= 10
    for config in found:
        row = replace(ROW, family=family, shape=SHAPE._replace(r=R), config=config)
        assert Row.from_json(row.to_json()) == row
        assert configs.staged(config, dtype) <= configs.shared_memory(arch)


def test_large_tiles_only_where_they_have_room() -> None:
    large = {arch: max(c.BM * c.BN for c in configs.candidates("forward", arch, torch.bfloat16, 16)) for arch in ARCHS}
    assert large == {80: 128 * 128, 86: 128 * 128, 90: 128 * 256, 100: 128 * 256, 120: 128 * 128}
    four = [
        arch
        for arch in ARCHS
        if any(c[:3] == (128, 128, 64) and c.num_stages == 4 for c in configs.candidates("forward", arch, torch.bfloat16, 16))
    ]  # fmt: skip
    assert four == [80, 90, 100]


def compiled(family: str, config: Config, arch: int, dtype: torch.dtype, r: int) -> dict[str, Gate]:
    """Each kernel of a layer with these tiles."""
    rows, found = 4 if family == "decode" else 256, {}
    o = cast(operands(rows, 256, 512, r), dtype, (torch.float32,) * 3)
    wanted = tuple(name for name in present(o) if name in ("x", "u", "sigma", "v"))
    with emulation(arch=arch, ctas=132), pytest.MonkeyPatch.context() as patch:

        def compile_only(kernel, grid, *arguments, **meta):  # type: ignore[no-untyped-def]
            mine = kernel.fn.__name__.startswith("backward") == (family == "backward")
            if mine and kernel.fn.__name__ not in ("pack_kernel", "reduce_kernel"):
                name = kernel.fn.__name__
                found[name] = Gate(name, compile_launch(kernel, arguments, meta, arch, tritons()[0])[0])

        def tiles(asked: str, *rest: Any) -> Config:
            return config if asked == family else triton_tiles.choose(asked, *rest)

        patch.setattr(launching, "launch", compile_only)
        patch.setitem(dispatch.BACKENDS, "triton", triton.TritonBackend(pytest.fail, tiles))
        run(lambda leaves: fused(leaves, backend="triton"), o, torch.randn(rows, 512).to(dtype), wanted)
    return found


def check_candidates(family: str, arch: int, dtype: torch.dtype, r: int, some: slice) -> None:
    tried = [triton_tiles.rule(family, arch, dtype, False, SHAPE._replace(r=r), 132)]
    tried += configs.candidates(family, arch, dtype, r)
    for config in tried[some]:
        found = compiled(family, config, arch, dtype, r)
        assert found, "nothing was compiled"
        for kernel, gate in found.items():
            shared, limit = gate.compiled.shared, configs.shared_memory(arch)
            assert shared <= limit, f"{kernel} wants {shared} bytes with {config}, sm_{arch} has {limit}"
            if config == tried[0]:  # the rule's large tiles: test_triton_gates.py compiles a small layer's
                assert gate.usage["LOCAL"] == gate.usage["STACK"] == 0, f"{kernel} spills with {config}: {gate.usage}"


@pytest.mark.emulator
@pytest.mark.parametrize(("family", "arch"), [("forward", 80), ("forward", 90), ("backward", 80), ("decode", 90)])
def test_a_candidate_compiles_and_fits(family: str, arch: int) -> None:
    check_candidates(family, arch, torch.bfloat16, 16, slice(2, 3))


@pytest.mark.slow
@pytest.mark.emulator
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "r"), [(torch.bfloat16, 16), (torch.bfloat16, 64), (torch.float32, 16)])
@pytest.mark.parametrize("family", configs.FAMILIES)
def test_every_candidate_compiles_and_fits(family: str, dtype: torch.dtype, r: int, arch: int) -> None:
    check_candidates(family, arch, dtype, r, slice(None))


# --------------------------------------------------------------------------------------------------------------- tuner

THIRD = OTHER._replace(num_stages=4)
CPU = torch.device("cpu")


def a_layer(family: str, rows: int = 24) -> triton_tune.Operands:
    return triton_tune.operands(Shape(rows, 48, 40, 5), torch.bfloat16, CPU, 1 << 20)


class Calls:
    """Runs candidates by the eager backend; some break, some are wrong, and the clock says what it is told."""

    def __init__(self, family: str, times: dict[Config, float], wrong: dict[Config, Any] | None = None) -> None:
        self.family, self.times, self.wrong = family, times, wrong or {}
        self.o = a_layer(family)
        self.timed: set[Config] = set()

    def run(self, config: Config) -> triton_tune.Call:
        what = self.wrong.get(config)
        if isinstance(what, Exception):
            raise what

        def call(number: int) -> dict[str, torch.Tensor]:
            got = triton_tune.results(self.family, EagerBackend(), self.o, number)
            if what is not None:
                got[what] = got[what].clone()
                got[what][0] += 0.3 * got[what].abs().max()
            return got

        call.config = config  # type: ignore[attr-defined]
        return call

    def clock(self, call: Any, first: int, count: int) -> float:
        self.timed.add(call.config)
        return self.times[call.config]

    def fastest(self, **options: Any) -> triton_tune.Found:
        bounds = triton_tune.bounds(self.family, self.o)
        return triton_tune.fastest(list(self.times), self.run, bounds, seconds=0.01, clock=self.clock, **options)


@pytest.mark.parametrize("family", ["forward", "backward"])
def test_the_clock_decides(family: str) -> None:
    times = {RULE: 2e-3, OTHER: 1e-3, THIRD: 1.5e-3}
    found = Calls(family, times).fastest()
    assert found.best == OTHER and found.seconds == pytest.approx(times) and found.problems == {}


def test_noise_does_not_replace_the_rule() -> None:
    assert Calls("forward", {RULE: 1e-3, OTHER: 0.98e-3}).fastest().best == RULE
    assert Calls("forward", {RULE: 1e-3, OTHER: 0.96e-3}).fastest().best == OTHER


@pytest.mark.parametrize(
    ("family", "result"), [("forward", "y"), ("forward", "h"), *(("backward", n) for n in ("x", "u", "sigma", "v"))]
)
def test_what_is_wrong_cannot_win_and_is_not_timed(family: str, result: str) -> None:
    calls = Calls(family, {RULE: 2e-3, OTHER: 1e-3, THIRD: 1.5e-3}, {OTHER: result})
    found = calls.fastest()
    assert found.best == THIRD and OTHER not in found.seconds and OTHER not in calls.timed
    assert found.problems[OTHER].startswith(f"wrong: {result} has a")


def test_a_result_that_is_not_a_number_is_wrong() -> None:
    bounds = triton_tune.bounds("forward", a_layer("forward"))
    got = triton_tune.results("forward", EagerBackend(), a_layer("forward"))
    assert triton_tune.why_wrong(got, bounds) is None
    got["y"][3, 3] = math.nan
    assert "wrong: y" in str(triton_tune.why_wrong(got, bounds))


def test_what_does_not_compile_or_fit_is_left_out() -> None:
    found = Calls(
        "forward", {RULE: 2e-3, OTHER: 1e-3}, {OTHER: RuntimeError("out of resource: shared\nmore")}
    ).fastest()
    assert found.best == RULE and found.problems == {OTHER: "RuntimeError: out of resource: shared"}
    found = Calls("forward", {RULE: 1e-3, OTHER: 2e-3}, {RULE: RuntimeError("no")}).fastest()
    assert found.best == OTHER and RULE not in found.seconds
    assert Calls("forward", {RULE: 1e-3}, {RULE: RuntimeError("no")}).fastest().best is None


def test_after_the_deadline_only_the_rule_is_measured() -> None:
    found = Calls("forward", {RULE: 2e-3, OTHER: 1e-3}).fastest(deadline=-math.inf)
    assert found.best == RULE and found.problems == {OTHER: "no time was left"}


@pytest.mark.emulator
@pytest.mark.parametrize(("family", "rows"), [("forward", 24), ("backward", 24), ("decode", 4)])
def test_the_kernels_themselves_are_measured(monkeypatch: pytest.MonkeyPatch, family: str, rows: int) -> None:
    """The whole of it, from the candidates to a row, on the emulated kernels."""
    asked: list[tuple[str, int, int]] = []

    def few(family: str, arch: int, dtype: torch.dtype, R: int) -> list[Config]:
        asked.append((family, arch, R))
        return [triton_tiles.rule(family, arch, dtype, False, Shape(rows, 48, 40, 16), 3)._replace(num_stages=2)]

    monkeypatch.setattr(configs, "candidates", few)
    times = iter(range(1, 10_000))
    stages: dict[str, set[int]] = {}
    with emulation(arch=80), pytest.MonkeyPatch.context() as patch:
        emulate = launching.launch

        def launch(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
            stages.setdefault(kernel.fn.__name__, set()).add(meta.get("num_stages", 0))
            emulate(kernel, grid, *arguments, **meta)

        patch.setattr(launching, "launch", launch)
        found, row = triton_tune.measure(
            family, Shape(rows, 48, 40, 5), torch.bfloat16, CPU, seconds=0.01, cold_bytes=1 << 20,
            clock=lambda call, first, count: 1e-3 / next(times),
        )  # fmt: skip
    kernel = {"forward": "forward_kernel", "backward": "backward_kernel", "decode": "linear_kernel"}[family]
    assert stages[kernel] == {config.num_stages for config in found.seconds} and len(stages[kernel]) == 2
    assert asked == [(family, 80, 16)] and found.problems == {} and len(found.seconds) == 2
    assert row is not None and row.shape == (rows, 48, 40, 16) and row.config == found.best
    assert (row.arch, row.dtype, row.family, row.seconds) == (80, "bfloat16", family, found.seconds[found.best])


def test_measuring_leaves_the_generator_alone_and_its_weights_take_turns() -> None:
    state = torch.get_rng_state()
    o = triton_tune.operands(Shape(3, 512, 1024, 4), torch.float32, CPU, 8 << 20)
    assert len(o.weights) == 4 and len({w.data_ptr() for w in o.weights}) == 4
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Shape, torch.dtype]]:
    """The layers that the command measures on a GPU that is none."""
    found: list[tuple[str, Shape, torch.dtype]] = []

    def measure(family: str, shape: Shape, dtype: torch.dtype, device: torch.device, **_: Any) -> Any:
        found.append((family, shape, dtype))
        if dtype == torch.float16:
            return triton_tune.Found({}, {RULE: "wrong: y"}, None), None
        row = replace(ROW, family=family, shape=shape._replace(r=16), dtype=str(dtype).removeprefix("torch."))
        row = replace(row, config=Config(16, 32, 64, 16, 1, 64, 32, 4, 2) if family == "decode" else OTHER)
        return triton_tune.Found({row.config: 1e-3}, {RULE: "does not fit"}, row.config), row

    monkeypatch.setattr(triton_tune, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(triton_tiles, "gpu_name", lambda device: GPU)
    return found


def test_tune_measures_saves_and_says_so(on_a_gpu: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "--device", "cuda", "--shapes", "8192x4096x4096x16", "4x64x64x4"]
    assert cli.main([*command, "--dtypes", "bfloat16", "--dry-run"]) == 0
    assert not on_a_gpu and "decode" in capsys.readouterr().out
    assert cli.main([*command, "--dtypes", "bfloat16", "float16"]) == 0
    assert [(family, shape.M) for family, shape, _ in on_a_gpu[:4]] == [
        ("forward", 8192), ("backward", 8192), ("decode", 4), ("backward", 4),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert (
        "rule   1.2 ms  best     1 ms  64x128x64" in said
        and "left out: 128x128x64x16x8x128x64x8x3: does not fit" in said
    )
    assert "no candidate could be run" in said
    assert f"saved tiles for 4 of 8 layers and families in {triton_tiles.user_file(GPU)}" in said
    assert chosen() == chosen("backward") == OTHER
    assert not tuned.load()  # nothing of it is a path of the CPU's
    assert cli.main(["tune", "--device", "cuda", "--clear"]) == 0
    assert "forgot 1 tables of tiles" in capsys.readouterr().out and chosen() is None


def test_out_adds_rows_to_a_table_and_keeps_nothing_for_the_user(on_a_gpu: list[Any], folder: Path) -> None:
    out = folder / "new.json"
    for shape in ("8192x4096x4096x16", "4096x4096x4096x16", "8192x4096x4096x16"):
        assert cli.main(["tune", "--device", "cuda", "--shapes", shape, "--dtypes", "bfloat16", "--out", str(out)]) == 0
    assert sorted((row.family, row.shape.M) for row in triton_tiles.read_rows(out)) == [
        ("backward", 4096), ("backward", 8192), ("forward", 4096), ("forward", 8192),
    ]  # fmt: skip
    assert out.stat().st_mode & 0o777 == 0o644 and chosen() is None


def test_what_was_measured_before_the_time_was_up_is_kept(
    on_a_gpu: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 1.0, 11.0])
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: next(now)))
    command = [
        "tune",
        "--device",
        "cuda",
        "--shapes",
        "8192x4096x4096x16",
        "--dtypes",
        "bfloat16",
        "--stop-after",
        "10",
    ]
    assert cli.main(command) == 0
    assert len(on_a_gpu) == 1 and chosen() == OTHER
    assert "stopped after 10 s" in capsys.readouterr().out


def test_where_nothing_can_be_measured_the_status_says_so(
    on_a_gpu: list[Any], monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "--device", "cuda", "--shapes", "64x64x64x4", "--dtypes"]
    assert cli.main([*command, "float16"]) == 1  # no candidate could be run
    (folder / "cache").write_text("")
    assert cli.main([*command, "bfloat16"]) == 1
    assert "tiles could not be saved" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "bfloat16", "--grid"])
    assert stopped.value.code == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "bfloat16", "--out", __file__])
    assert stopped.value.code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([*command, "bfloat16"]) == 1
    assert "there is no CUDA device" in capsys.readouterr().out


def test_one_of_several_ranks_does_not_measure(on_a_gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choices.distributed()
    with pytest.raises(SystemExit):
        cli.main(["tune", "--device", "cuda", "--shapes", "64x64x64x4"])
    assert not on_a_gpu
