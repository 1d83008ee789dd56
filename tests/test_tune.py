"""Measuring the paths of a layer by a clock that is none, and the command that does it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import row
from safetensors.torch import save_file

from svdkern import cli, tune
from svdkern.backends import choices, cpu, dispatch, extension, measure, tuned
from svdkern.backends.table import Shape, read_table

pytestmark = [
    pytest.mark.skipif(extension.why_missing is not None, reason="needs the compiled extension"),
    pytest.mark.usefixtures("cache"),
]

SHAPE = Shape(64, 512, 512, 16)
NAMES = {id(backend): path for path, backend in cpu.PATHS.items()}


def clock_of(times: dict[str, float], calls: list[tuple[str, int]] | None = None) -> measure.Clock:
    """A clock by which a path takes so long for the whole layer, and in proportion for a part."""

    def clock(call: Any, first: int, count: int) -> float:
        backend, o = call.args
        path, rows = NAMES[id(backend)], o.x.shape[0]
        if calls is not None:
            calls.append((path, rows))
        if rows <= 64:
            call(first)
        work = rows * o.u.shape[0] * o.v.shape[0]
        return times[path] * work / (SHAPE.M * SHAPE.K * SHAPE.N)

    return clock


def measured(times: dict[str, float], shape: Shape = SHAPE, **options: Any) -> dict[str, float | None]:
    paths = {path: cpu.PATHS[path] for path in times}
    arguments: dict[str, Any] = {"seconds": 0.01, "slowest": 1.0, "cold_bytes": 1 << 20, **options}
    return measure.seconds_of_paths(shape, torch.float32, paths, clock=clock_of(times), **arguments)


def test_the_clock_decides() -> None:
    times = {"fused": 3e-3, "steps": 2e-3, "eager": 1e-3}
    found = measured(times)
    assert found == pytest.approx(times)
    assert choices.measured(SHAPE, torch.float32, found, "steps") == row(SHAPE, "eager", seconds=found)
    assert choices.measured(SHAPE, torch.float32, {"fused": None, "steps": None}, "steps") is None
    near = {"fused": 0.98e-3, "steps": 1e-3}
    for before, path in (
        ("steps", "steps"),
        ("fused", "fused"),
        ("eager", "steps"),
    ):  # eager is steps where it is not timed
        assert choices.measured(SHAPE, torch.float32, near, before).choice == path  # type: ignore[union-attr]


def test_a_path_that_takes_minutes_is_found_out_on_a_part_of_the_layer() -> None:
    shape = Shape(4096, 512, 1024, 16)
    calls: list[tuple[str, int]] = []
    clock = clock_of({"fused": 1e-3, "steps": 1e-3, "eager": 0.3}, calls)
    paths = dict(cpu.PATHS)
    found = measure.seconds_of_paths(shape, torch.float32, paths, seconds=0.01, slowest=1.0, cold_bytes=0, clock=clock)
    assert found["eager"] is None and found["fused"] and found["steps"]
    assert max(rows for path, rows in calls if path == "eager") <= 16


def test_layers_too_large_to_be_timed_have_no_row() -> None:
    calls: list[tuple[str, int]] = []
    times = {"fused": 3.0, "steps": 2.0}
    paths = {path: cpu.PATHS[path] for path in times}
    found = measure.seconds_of_paths(
        SHAPE, torch.float32, paths, seconds=0.01, slowest=1.0, cold_bytes=0, clock=clock_of(times, calls)
    )
    assert found == {"fused": None, "steps": None}
    assert measured({"fused": 3.0, "steps": 0.9})["steps"] == pytest.approx(0.9)


def test_measuring_leaves_the_generator_alone_and_its_weights_take_turns() -> None:
    state = torch.get_rng_state()
    operands = measure._operands(Shape(3, 512, 1024, 4), torch.float32, 8 << 20)
    assert len(operands.weights) == 4 and len({w.data_ptr() for w in operands.weights}) == 4
    measured({"fused": 1e-3, "steps": 1e-3})
    assert torch.equal(state, torch.get_rng_state())


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def by_fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Shape, torch.dtype]]:
    """The layers that the command measures; eager wins for bfloat16, the rule's path elsewhere."""
    found: list[tuple[Shape, torch.dtype]] = []

    def seconds(shape: Shape, dtype: torch.dtype, paths: Any, **_: Any) -> dict[str, float | None]:
        found.append((shape, dtype))
        if dtype == torch.float16:
            return dict.fromkeys(paths)
        return {"fused": 2e-3, "steps": 1.99e-3, "eager": 1e-3 if dtype == torch.bfloat16 else 1.99e-3}

    monkeypatch.setattr(tune, "seconds_of_paths", seconds)
    return found


def test_tune_measures_saves_and_says_so(
    by_fake_clock: list[Any], capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    assert cli.main(["tune", "--shapes", "8x64x64x4", "1x64x64x4", "8x64x64x4"]) == 0
    assert len(by_fake_clock) == 6
    said = capsys.readouterr().out
    assert f"{cpu.isa()}, {torch.get_num_threads()} threads" in said
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "float32 8 64 64 4 2 ms 1.99 ms 1.99 ms fused, as before (rule)" in lines
    assert "bfloat16 8 64 64 4 2 ms 1.99 ms 1 ms eager instead of fused (rule)" in lines
    assert "float16 1 64 64 4 – – – not measured: every path takes more than 1 s" in lines
    assert f"saved 4 choices in {tuned.folder()}" in lines
    assert len(tuned.load()) == 4
    dispatch.read_environment()
    assert choices.choose(Shape(8, 64, 64, 4), torch.bfloat16) == ("eager", "tuned here")
    assert cli.main(["tune", "--shapes", "8x64x64x4", "--dtypes", "bfloat16", "--dry-run"]) == 0
    assert "eager (tuned here)" in capsys.readouterr().out and len(by_fake_clock) == 6
    assert cli.main(["tune", "--clear"]) == 0
    assert f"forgot 4 choices in {cache}" in capsys.readouterr().out and not tuned.load()


def test_out_adds_rows_to_a_table_and_keeps_nothing_for_the_user(
    by_fake_clock: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.json"
    assert cli.main(["tune", "--shapes", "8x64x64x4", "--dtypes", "float32", "--out", str(out)]) == 0
    assert cli.main(["tune", "--shapes", "8x64x64x4", "--dtypes", "bfloat16", "float32", "--out", str(out)]) == 0
    assert f"{out}: 2 rows of this run, 2 altogether" in capsys.readouterr().out
    assert [(found.dtype, found.choice) for found in read_table(out)] == [("float32", "fused"), ("bfloat16", "eager")]
    assert not tuned.load()


def test_the_grid_is_the_documented_one(by_fake_clock: list[Any], tmp_path: Path) -> None:
    assert cli.main(["tune", "--grid", "--out", str(tmp_path / "grid.json")]) == 0
    assert len(by_fake_clock) == len(set(by_fake_clock)) == 8 * 7 * 2 * 3
    assert len(read_table(tmp_path / "grid.json")) == 8 * 7 * 2 * 2


def test_what_was_measured_before_an_interrupt_is_kept(
    by_fake_clock: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tune.seconds_of_paths

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if len(by_fake_clock) == 2:
            raise KeyboardInterrupt
        return inner(*arguments, **options)

    monkeypatch.setattr(tune, "seconds_of_paths", interrupted)
    shapes = ["1x64x64x4", "8x64x64x4", "16x64x64x4"]
    assert cli.main(["tune", "--dtypes", "float32", "--out", str(tmp_path / "t.json"), "--shapes", *shapes]) == 130
    assert len(read_table(tmp_path / "t.json")) == 2
    assert "what was measured until now is kept" in capsys.readouterr().out


def test_a_model_is_its_linear_layers(tmp_path: Path, by_fake_clock: list[Any]) -> None:
    one = {
        "model.embed_tokens.weight": (50, 16),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.1.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.self_attn.q_proj.bias": (16,),
        "model.layers.0.mlp.up_proj.weight": (40, 16),
        "model.norm.weight": (16,),
        "wpe.weight": (24, 16),
    }
    two = {"model.layers.0.mlp.down_proj.weight": (16, 40), "conv.weight": (4, 4, 3), "head.weight": (50, 16)}
    folder = tmp_path / "model"
    folder.mkdir()
    for name, tensors in (("model-00001.safetensors", one), ("model-00002.safetensors", two)):
        save_file({key: torch.zeros(size, dtype=torch.bfloat16) for key, size in tensors.items()}, folder / name)
    save_file({"packed.weight": torch.zeros(8, 8, dtype=torch.uint8)}, folder / "x.safetensors")
    (folder / "config.json").write_text('{"vocab_size": 50}')
    assert sorted(tune.weights_of_model(folder)) == [(16, 16), (16, 40), (40, 16)]
    arguments = ["--model", str(folder), "--rows", "8", "2", "--rank", "4", "--dtypes", "float32"]
    assert cli.main(["tune", *arguments]) == 0
    assert sorted(shape for shape, _ in by_fake_clock) == [
        (m, k, n, 4) for m in (2, 8) for k, n in ((16, 16), (16, 40), (40, 16))
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--shapes", "1x2x3"], "'1x2x3' is not MxKxNxr"),
        (["--shapes", "1x2x3x0"], "is not MxKxNxr"),
        (["--shapes", "axbxcxd"], "is not MxKxNxr"),
        (["--shapes", "1x2x3x4", "--seconds", "0"], "'0' is not a time"),
        (["--shapes", "1x2x3x4", "--seconds", "nan"], "is not a time"),
        (["--shapes", "1x2x3x4", "--dtypes", "float64"], "invalid choice"),
        (["--shapes", "1x2x3x4", "--out", "/nowhere/t.json"], "there is no such folder"),
        (["--shapes", "1x2x3x4", "--out", __file__], "--out"),
        (["--model", "/nowhere"], "no *.safetensors file"),
        (["--model", "/nowhere", "--rows", "-1"], "not a positive integer"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], message: str, by_fake_clock: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err and not by_fake_clock


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.safetensors": b"broken"}, "a.safetensors"),
        ({"a.safetensors": None}, "no linear layer"),
        ({"a.safetensors": None, "config.json": b"{"}, "--model"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(
    files: dict[str, bytes | None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        if content is None:
            save_file({"norm.weight": torch.zeros(4)}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        cli.main(["tune", "--model", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_one_of_several_ranks_does_not_measure(
    by_fake_clock: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        cli.main(["tune", "--shapes", "1x2x3x4"])
    assert "one of several ranks" in capsys.readouterr().err and not by_fake_clock


def test_a_choice_that_cannot_be_saved_is_an_error(
    by_fake_clock: list[Any], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("")
    assert cli.main(["tune", "--shapes", "8x64x64x4", "--dtypes", "float32"]) == 1
    assert "1 of 1 choices could not be saved" in capsys.readouterr().out


def test_without_the_extension_there_is_nothing_to_choose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "why_missing", "not built")
    assert cli.main(["tune", "--shapes", "1x2x3x4"]) == 1
    assert "the compiled extension is missing (not built)" in capsys.readouterr().out


def test_the_command_keeps_what_it_measures(tmp_path: Path) -> None:
    """In a process of its own, where no benchmark has been imported, which would keep nothing."""
    command = [
        sys.executable,
        "-m",
        "svdkern",
        "tune",
        "--shapes",
        "4x64x64x4",
        "--dtypes",
        "float32",
        "--seconds",
        "0.01",
    ]
    environment = os.environ | {"SVDKERN_CACHE_DIR": str(tmp_path / "kept")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.suffix for path in (tmp_path / "kept").rglob("*") if path.is_file()] == [".json"], done.stdout
