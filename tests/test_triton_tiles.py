"""Tiles of the Triton kernels: the table and its files, and the candidates."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import emulation, tritons
from operands import cast, fused, operands, present, run
from ptx_emulator.jit import compile_launch
from svdkern.triton_kernels import configs, launching
from svdkern.triton_kernels.configs import Config
from test_triton_gates import Gate
from tile_tables import GPU, OTHER, ROW, RULE, SHAPE, chosen

from svdkern.backends import dispatch, triton, triton_tiles
from svdkern.backends.table import Shape
from svdkern.backends.triton_tiles import Row

pytestmark = pytest.mark.usefixtures("tile_folder")


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


def test_the_nearest_row_and_the_tuned_one_of_two_as_near(tile_folder: Path) -> None:
    shipped = replace(ROW, config=RULE)
    triton_tiles.write_rows(tile_folder / "shipped.json", [shipped])
    triton_tiles.forget()
    assert chosen() == RULE
    triton_tiles.save([ROW], GPU)
    assert chosen() == OTHER
    triton_tiles.save([replace(ROW, shape=SHAPE._replace(M=4096), config=OTHER)], GPU)
    triton_tiles.write_rows(tile_folder / "shipped.json", [replace(shipped, shape=SHAPE._replace(M=6000))])
    triton_tiles.forget()
    assert chosen(shape=SHAPE._replace(M=6000)) == RULE


def test_in_a_distributed_job_only_the_shipped_rows_count(monkeypatch: pytest.MonkeyPatch, tile_folder: Path) -> None:
    triton_tiles.save([ROW], GPU)
    triton_tiles.write_rows(tile_folder / "shipped.json", [replace(ROW, config=RULE)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    triton_tiles.forget()
    assert chosen() == RULE


@pytest.mark.parametrize(
    ("family", "rows", "kernel"),
    [("forward", 20, "forward_kernel"), ("backward", 20, "backward_kernel"), ("decode", 4, "linear_kernel")],
)
def test_a_row_decides_what_is_launched(tile_folder: Path, family: str, rows: int, kernel: str) -> None:
    """Not beside a core, whose ranks all stand in one tile."""
    tiles = Config(16, 16, 16, 16, 1, 32, 16, 4, 2) if family == "decode" else Config(32, 32, 32, 16, 2, 32, 32, 4, 2)
    shape = Shape(rows, 64, 48, 16)
    triton_tiles.write_rows(tile_folder / "shipped.json", [replace(ROW, family=family, shape=shape, config=tiles)])
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


def test_rows_are_added_and_replaced(tile_folder: Path) -> None:
    path = triton_tiles.save([ROW], GPU)
    assert path.parent == tile_folder / "cache" / "tiles" and [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600
    more = replace(ROW, family="decode", shape=SHAPE._replace(M=4), config=Config(16, 32, 64, 16, 1, 64, 32, 4, 2))
    triton_tiles.save([more], GPU)
    triton_tiles.save([replace(ROW, config=RULE, rule_s=None)], GPU)
    assert triton_tiles.read_rows(path) == [replace(ROW, config=RULE, rule_s=None), more]
    assert triton_tiles.user_file("Another GPU") != path
    assert triton_tiles.clear() == 1 and not path.exists() and chosen() is None


def test_other_sources_are_another_file(monkeypatch: pytest.MonkeyPatch, tile_folder: Path) -> None:
    before = triton_tiles.user_file(GPU)
    copy = tile_folder / "configs.py"
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
    content: str, whose: str, tile_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = triton_tiles.save([ROW], GPU)
    if whose == "shipped":
        if content == "another user's":
            pytest.skip("what is installed is another user's as a rule")
        path = path.rename(tile_folder / "shipped.json")
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


def test_the_unbroken_row_is_read(tile_folder: Path) -> None:
    (tile_folder / "shipped.json").write_text(json.dumps(_changed()))
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
