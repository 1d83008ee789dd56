"""The model of bench/roofline.py: its equations, their order, its command line. Nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import results, roofline
from bench.cases import MODES, SETS, Case  # noqa: E402
from bench.roofline import DEVICES, SHAPES, Device, Pass, device_from_ceilings, floor_s, main, makespan, predict, waves

H100 = DEVICES["h100"]
LAYER = Case(8192, 4096, 4096, 16)
LARGE = [
    LAYER,
    Case(8192, 4096, 4096, 128),
    Case(4096, 5120, 5120, 64),
    Case(8192, 4096, 11008, 16),
    Case(16384, 8192, 8192, 32),
]
CASES = [
    *map(Case.parse, SHAPES),
    *LARGE,
    Case(1000, 1001, 999, 17),
    Case(7, 4097, 63, 5),
    Case(4, 64, 64, 4),
    Case(33, 127, 4001, 400),
]
PROVENANCE = {"device": "cpu", "machine": "A CPU, 2 cores", "isa": "avx2", "clock_mhz": None, "threads": 2,
              "commit": "0", "dirty": False, "versions": {}, "date": "2026-01-01"}  # fmt: skip


def ceiling(provider: str, dtype: str | None, value: float) -> dict[str, Any]:
    unit = "flop/s" if dtype else "bytes/s"
    return results.make(
        "ceilings", provider=provider, dtype=dtype, value=value, unit=unit, **results.outcome(True, None), **PROVENANCE
    )


CEILINGS = [ceiling("fma", "fp32", 200e9), ceiling("matmul", "fp32", 180e9), ceiling("matmul", "bf16", 20e9),
            ceiling("read", None, 33e9), ceiling("copy", None, 20e9)]  # fmt: skip
CPU = device_from_ceilings(CEILINGS)
EVERY = [*DEVICES.values(), CPU]


def seconds(device: Device, case: Case, dtype: str = "bf16", mode: str = "fwd_bwd") -> dict[str, float]:
    return {row["candidate"]: row["predicted_s"] for row in predict(device, case, dtype, mode)}


# ------------------------------------------------------------------------------------- figures worked out by hand


def test_the_frozen_forward_of_a_large_layer() -> None:
    bare = replace(LAYER, r=0, mask="x")
    assert floor_s(H100, bare, "bf16", "fwd") == pytest.approx(0.3445e-3, rel=1e-3)
    assert floor_s(H100, bare, "bf16", "fwd_bwd") == pytest.approx(0.689e-3, rel=1e-3)
    # 1024 tiles of 128 x 256 on 132 SMs are 7.76 waves and cost 8.
    assert seconds(H100, LAYER, mode="fwd")["frozen"] == pytest.approx(0.3445e-3 * 8 / (1024 / 132) + 1.5e-6, rel=1e-3)


@pytest.mark.parametrize(("r", "ratio"), [(16, 1.012), (64, 1.047), (128, 1.094)])
def test_the_arithmetic_floor_over_frozen(r: int, ratio: float) -> None:
    row = predict(H100, replace(LAYER, r=r), "bf16", "fwd_bwd")[0]
    assert row["candidate"] == "floor"
    assert row["ratio_to_frozen"] == pytest.approx(ratio, abs=5e-4)
    assert row["predicted_s"] == row["floor_s"]


def test_separate_kernels_read_x_again_and_y_twice() -> None:
    forward = Pass(H100, "bf16", 8192, 4096, 4096, 16, False)
    assert forward.shrink().bytes / H100.bandwidth == pytest.approx(0.022e-3, rel=0.03)
    assert forward.expand(2).bytes / H100.bandwidth == pytest.approx(0.045e-3, rel=0.03)


def test_one_launch_reads_x_once_less() -> None:
    moved = {row["candidate"]: row["bytes"] for row in predict(H100, LAYER, "bf16", "fwd")}
    assert moved["pdl"] == moved["split"] == moved["persistent"] + 8192 * 4096 * 2


@pytest.mark.parametrize(
    ("case", "ratio"), [(LAYER, 1.42), (Case(8192, 5120, 5120, 16), 1.34), (Case(8192, 8192, 8192, 16), 1.21)]
)
def test_the_traffic_of_the_plain_expression(case: Case, ratio: float) -> None:
    """All its passes over x, y, dy and dx at 3 TB/s, beside products at 650 TFLOP/s."""
    moved = {row["candidate"]: row["bytes"] for row in predict(H100, case, "bf16", "fwd_bwd")}
    extra_s = (moved["eager"] - moved["frozen"]) / H100.bandwidth
    assert 1 + extra_s / (4.0 * case.M * case.K * case.N / 650e12) == pytest.approx(ratio, abs=0.015)


def test_decoding_is_bound_by_one_read_of_the_weight() -> None:
    found = seconds(H100, Case(1, 4096, 4096, 16), mode="fwd")
    assert found["frozen"] == pytest.approx(4096 * 4096 * 2 / H100.bandwidth + H100.launch_s, rel=0.01)


def test_few_rows_cost_two_launches_and_the_factors_in_fp32() -> None:
    bare, case = Case(16, 4096, 4096, 0, mask="x"), Case(16, 4096, 4096, 16)
    frozen, found = (next(row for row in predict(H100, case, "bf16", "fwd") if row["candidate"] == name)
                     for name in ("frozen", "few"))  # fmt: skip
    assert bare.traffic("fwd", 2) == frozen["bytes"]
    # x again, U and V in fp32, h and z in bf16
    assert found["bytes"] - frozen["bytes"] == 16 * 4096 * 2 + 2 * 4096 * 16 * 4 + 2 * 16 * 16 * 2
    assert found["predicted_s"] - frozen["predicted_s"] < 2 * H100.launch_s
    assert seconds(H100, case)["few"] < seconds(H100, case)["split"]
    assert "few" not in seconds(H100, replace(case, M=33))


# ---------------------------------------------------------------------------------------------- waves and schedules


def test_one_tile_more_than_sms_costs_a_second_wave() -> None:
    assert (waves(132, 132), waves(133, 132)) == (1, 2)
    device = replace(H100, tile=(16, 16, 16))
    busy = [Pass(device, "bf16", 16 * tiles, 16, 4096, 16, False).product().busy_s for tiles in (1, 132, 133, 264, 265)]
    assert busy == pytest.approx([busy[0] * count for count in (1, 1, 2, 2, 3)])


def test_a_schedule_of_equal_tiles_is_whole_waves() -> None:
    assert makespan(132, 133, 1, 0.0, 1.0, 0.0) == 2.0
    assert makespan(132, 12, 11, 0.0, 1.0, 0.0) == 1.0


def test_tiles_of_y_wait_for_their_z_and_fillers_take_what_is_left() -> None:
    assert makespan(2, 1, 1, 5.0, 1.0, 0.5) == 5.5
    # Two groups of one tile on two slots: the second z stands behind the first y, which waits for its own z, or ahead of it.
    assert makespan(2, 2, 1, 4.0, 1.0, 0.5) == 8.5
    assert makespan(2, 2, 1, 4.0, 1.0, 0.5, z_first=True) == 5.0
    assert makespan(2, 1, 3, 0.0, 2.0, 0.0) == makespan(2, 1, 3, 0.0, 2.0, 0.0, fillers=[1.0, 1.0]) == 4.0


def test_the_operand_that_fits_half_of_the_l2_is_read_once() -> None:
    size = 8192 * 4096 * 2
    forward = Pass(replace(H100, l2_bytes=2 * size), "bf16", 8192, 8192, 4096, 16, False)
    written = 8192 * 8192 * 2
    assert forward.product().bytes == 2 * size + written
    small = replace(forward, device=replace(H100, l2_bytes=size))
    assert small.product().bytes == (1 + 2) * size + written


# ----------------------------------------------------------------------------------------------- order of the designs


@pytest.mark.parametrize("device", EVERY, ids=lambda device: device.name)
def test_nothing_is_faster_than_the_floor(device: Device) -> None:
    unhindered = replace(device, launch_s=0.0)
    for case in CASES:
        for dtype in device.peak_flops:
            for mode in MODES:
                _, frozen, *adapted = predict(unhindered, case, dtype, mode)
                assert frozen["predicted_s"] >= floor_s(device, replace(case, r=0, mask="x"), dtype, mode) * (1 - 1e-9)
                for row in adapted:
                    assert row["predicted_s"] >= row["floor_s"] * (1 - 1e-9), row


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("device", [H100, DEVICES["a100"]], ids=lambda device: device.name)
def test_fewer_passes_are_faster_at_large_shapes(device: Device, case: Case) -> None:
    found = seconds(device, case)
    ordered = [found[name] for name in ("frozen", "persistent", "split", "unfused", "eager", "peft")]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_a_shrink_beside_the_product_is_hidden(device: Device) -> None:
    found = seconds(device, LAYER)
    assert found["persistent"] < found["pdl"] < found["split"]


def test_where_tiles_fill_their_last_wave_a_large_rank_has_no_room_beside_them() -> None:
    """A forward of this layer is 16 whole waves of the RTX 4090's 128 SMs; a z-tile of rank 128 is as long as a y-tile."""
    device = DEVICES["rtx4090"]
    small, large = (seconds(device, replace(LAYER, r=r), mode="fwd") for r in (16, 128))
    assert small["persistent"] < small["split"] < small["unfused"] < small["eager"]
    assert large["split"] < large["persistent"] < large["unfused"]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_the_packed_product_is_the_fastest_on_a_cpu(case: Case) -> None:
    found = seconds(CPU, case, "fp32")
    assert found["fused"] <= found["steps"] <= found["eager"] <= found["peft"]


@pytest.mark.parametrize("device", EVERY, ids=lambda device: device.name)
@pytest.mark.parametrize("mode", MODES)
def test_more_rank_is_never_faster(device: Device, mode: str) -> None:
    for case in CASES:
        before: dict[str, float] = {}
        for r in (1, 16, 17, 64, 128, 240, 512):
            now = seconds(device, replace(case, r=r), mode=mode)
            slower = {
                name: (value, now[name])
                for name, value in before.items()
                if name in now and now[name] < value * (1 - 1e-9)
            }
            assert not slower, (case, r)
            before = now


@pytest.mark.parametrize("device", EVERY, ids=lambda device: device.name)
def test_a_faster_device_is_never_slower(device: Device) -> None:
    faster = {
        "bandwidth": replace(device, bandwidth=2 * device.bandwidth),
        "peak": replace(device, peak_flops={name: 2 * value for name, value in device.peak_flops.items()}),
        "l2": replace(device, l2_bytes=2 * device.l2_bytes),
        "sm_bandwidth": replace(device, sm_bandwidth=2 * device.sm_bandwidth),
    }
    for case in CASES:
        now = seconds(device, case)
        for what, better in faster.items():
            then = seconds(better, case)
            assert all(then[name] <= now[name] * (1 + 1e-9) for name in now), (what, case)


def test_ranks_are_padded_to_16_on_a_gpu_alone() -> None:
    assert seconds(H100, replace(LAYER, r=17))["persistent"] == seconds(H100, replace(LAYER, r=32))["persistent"]
    assert seconds(CPU, replace(LAYER, r=17))["fused"] < seconds(CPU, replace(LAYER, r=32))["fused"]


def test_a_rank_as_wide_as_a_tile_cannot_be_recomputed() -> None:
    assert "recompute" in seconds(H100, replace(LAYER, r=240))
    assert "recompute" not in seconds(H100, replace(LAYER, r=256))


def test_what_the_model_does_not_know_is_refused() -> None:
    for case in (replace(LAYER, dropout=0.1), replace(LAYER, mask="uv")):
        with pytest.raises(ValueError, match="neither dropout nor partial gradients"):
            predict(H100, case, "bf16", "fwd")
    with pytest.raises(ValueError, match="no rate for tf32, only for fp32, bf16, fp16"):
        predict(CPU, LAYER, "tf32", "fwd")


# --------------------------------------------------------------------------------------------------------- devices


def test_a_cpu_from_its_ceilings() -> None:
    assert (CPU.kind, CPU.bandwidth, CPU.name) == ("cpu", 33e9, "a-cpu-2-cores-avx2")
    assert (CPU.peak("fp32"), CPU.peak("bf16"), CPU.peak("fp16")) == (200e9, 200e9, 200e9)
    assert (CPU.matmul("fp32"), CPU.matmul("bf16"), CPU.matmul("fp16")) == (180e9, 20e9, 200e9)
    # The library's bf16 is ten times slower than what the packed product can do with the same storage.
    found = seconds(CPU, Case(2048, 2048, 2048, 16))
    assert found["fused"] < found["frozen"] / 8
    with pytest.raises(ValueError, match="need a row of fma or matmul in fp32"):
        device_from_ceilings([ceiling("read", None, 33e9)])


def test_a_device_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, ceilings = tmp_path / "mine.json", tmp_path / "ceilings.jsonl"
    path.write_text(json.dumps({**asdict(H100), "name": "mine"}))
    ceilings.write_text(results.to_jsonl(CEILINGS))
    for given, name in ((path, "mine"), (ceilings, "a-cpu-2-cores-avx2")):
        assert main(["--device", str(given), "--shapes", "64x64x64x4", "--json", "-"]) == 0
        assert {json.loads(line)["device"] for line in capsys.readouterr().out.splitlines()} == {name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tpu"}, "expected a-z, 0-9, _, +, -, and gpu or cpu"),
        ({"name": "../up"}, "expected a-z, 0-9"),
        ({"bandwidth": 0.0}, "rates and sizes above 0"),
        ({"tile": [8, 8, 8]}, "at least 16 wide"),
        ({"cores": 8}, "unexpected keyword argument 'cores'"),
    ],
)
def test_a_wrong_description_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**asdict(H100), **change}))
    assert message in refused(["--device", str(path)], capsys)


# ---------------------------------------------------------------------------------------------------- command line


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_default_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("h100, bf16, fwd_bwd: predicted, not measured")
    assert [line.split()[0] for line in out.splitlines() if " floor " in line] == list(SHAPES)
    assert out.count("\n") == 2 + len(SHAPES) * 9 + 2  # two are of few rows


def test_rows_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "a100", "--shapes", "64x128x256x4", "1x4096x4096x16", "--dtype", "tf32", "--mode", "fwd"]
    assert main([*arguments, "--json", "-"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    every = ["floor", *roofline.CANDIDATES["gpu"]]
    assert [row["candidate"] for row in rows] == [
        name for name in every if name != "few"
    ] + every  # that is for few rows
    assert list(rows[0]) == ["bench", "device", "model", "M", "K", "N", "r", "dropout", "mask", "mode", "dtype", "candidate",
                             "flops", "bytes", "floor_s", "predicted_s", "ratio_to_frozen"]  # fmt: skip
    assert {(row["device"], row["dtype"], row["mode"]) for row in rows} == {("a100", "tf32", "fwd")}
    assert rows[1]["ratio_to_frozen"] == 1.0


def test_store_adds_to_the_device_s_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for mode in MODES:
        assert main(["--store", "--shapes", "64x64x64x4", "--mode", mode]) == 0
    rows = results.read_jsonl(tmp_path / "h100" / "roofline.jsonl")
    assert [(row["mode"], row["model"]) for row in rows] == [(mode, roofline.MODEL) for mode in MODES for _ in range(9)]


def test_an_unknown_device_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'h200' is no device; expected h100, a100, rtx4090, or a .json or .jsonl file" in refused(
        ["--device", "h200"], capsys
    )
    assert "No such file" in refused(["--device", "absent.json"], capsys)


@pytest.mark.parametrize("shape", ["1024x576x16", "0x4x4x1", "axbxcxd"])
def test_a_bad_shape_is_refused(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shape in refused(["--shapes", shape], capsys)


@pytest.mark.parametrize("name", ["readme", "ranks"])
def test_a_set_of_cases_is_predicted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--set", name, "--json", "-"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["M"], row["K"], row["N"], row["r"]) for row in rows if row["candidate"] == "floor"] == [
        (case.M, case.K, case.N, case.r) for case in SETS[name].cases
    ]
