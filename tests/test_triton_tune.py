"""The tuner of the Triton kernels' tiles by a clock that is none, and the command that runs it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import emulation
from svdkern.triton_kernels import configs, launching
from svdkern.triton_kernels.configs import Config
from tile_tables import GPU, OTHER, ROW, RULE, chosen

from svdkern import cli, tune
from svdkern.backends import choices, triton, triton_tiles, triton_tune, tuned
from svdkern.backends.eager import EagerBackend
from svdkern.backends.table import Shape

pytestmark = pytest.mark.usefixtures("tile_folder")


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


def test_tune_measures_saves_and_says_so(
    on_a_gpu: list[Any], tile_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_out_adds_rows_to_a_table_and_keeps_nothing_for_the_user(on_a_gpu: list[Any], tile_folder: Path) -> None:
    out = tile_folder / "new.json"
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
    on_a_gpu: list[Any], monkeypatch: pytest.MonkeyPatch, tile_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "--device", "cuda", "--shapes", "64x64x64x4", "--dtypes"]
    assert cli.main([*command, "float16"]) == 1  # no candidate could be run
    (tile_folder / "cache").write_text("")
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
