"""What the Triton kernels compile to, for GPUs that are not here: registers, spills, shared memory, instructions.

The launchers run as they do on a GPU; a launch is only compiled. `triton_budgets.json` holds registers and shared memory of
each kernel, arch, dtype, R and version of Triton; more than it says fails. SVDKERN_WRITE_BUDGETS=1 writes it anew.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulated import OUTPUTS, emulation, tritons
from operands import cast, fused, operands, present, run
from ptx_emulator import Statistics
from ptx_emulator.compile import Compiled, tool
from ptx_emulator.jit import compile_launch
from svdkern.triton_kernels import gram

pytestmark = pytest.mark.emulator

BUDGETS = Path(__file__).with_name("triton_budgets.json")
WRITE = os.environ.get("SVDKERN_WRITE_BUDGETS") == "1"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MOST_REGISTERS = 255
MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SASS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUICK = [(arch, dtype, r) for arch in (80, 90, 100) for dtype, r in (("bf16", 16), ("bf16", 128), ("fp32", 16))]
SLOW = [(arch, dtype, r) for arch in (80, 90, 100) for dtype in ("bf16", "fp16") for r in (64, 128)]
SLOW += [(90, "bf16", 256), (100, "bf16", 256)]
GRAM = [(arch, dtype, r) for arch in (80, 90, 100) for dtype in DTYPES for r in (16, 128)]


@dataclass
class Gate:
    """One kernel as it would be launched."""

    name: str
    compiled: Compiled

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        text = subprocess.run(
            [tool("cuobjdump"), "-res-usage", self.compiled.cubin], capture_output=True, text=True, check=True
        ).stdout
        return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}

    @functools.cached_property
    def mnemonics(self) -> set[str]:
        text = subprocess.run(
            [tool("nvdisasm"), "-c", self.compiled.cubin], capture_output=True, text=True, check=True
        ).stdout
        return set(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text, re.M))


@contextlib.contextmanager
def compiling(arch: int, version: str) -> Iterator[dict[str, Gate]]:
    """Inside, launches are only compiled; they are found here."""
    found: dict[str, Gate] = {}
    with emulation(arch=arch, version=version, ctas=132) as how, pytest.MonkeyPatch.context() as patch:

        def compile_only(kernel, grid, *arguments, **meta):  # type: ignore[no-untyped-def]
            name = kernel.fn.__name__
            if name in ("forward_kernel", "backward_kernel"):
                name += f" {meta['BM']}x{meta['BN']}"
            found[name] = Gate(name, compile_launch(kernel, arguments, meta, arch, version)[0])

        patch.setattr("svdkern.triton_kernels.launching.launch", compile_only)
        yield found
        assert how.arch == arch


@functools.cache
def gates(arch: int, dtype: str, r: int, version: str) -> dict[str, Gate]:
    """Every kernel of a layer's forward and backward, with many rows and with few."""
    with compiling(arch, version) as found:
        for rows in (256, 16):
            o = cast(operands(rows, 256, 512, r), DTYPES[dtype], (torch.float32,) * 3)
            wanted = tuple(name for name in present(o) if name not in ("weight", "bias", "scale"))
            run(lambda leaves: fused(leaves, backend="triton"), o, torch.randn(rows, 512).to(DTYPES[dtype]), wanted)
    kernels = {"pack_kernel", "forward_kernel", "backward_kernel", "shrink_kernel", "linear_kernel"}
    assert {name.split()[0] for name in found} == kernels
    return found


def budgets() -> dict[str, dict[str, int]]:
    return json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}


def check(arch: int, dtype: str, r: int, version: str) -> None:
    found = gates(arch, dtype, r, version)
    fit(found, arch, dtype, r, version)
    _instructions(arch, dtype, found)


def fit(found: dict[str, Gate], arch: int, dtype: str, r: int, version: str) -> None:
    """No spills, and no more registers and shared memory than the budgets say."""
    seen = {}
    for name, gate in found.items():
        key = f"{name} sm_{arch} {dtype} r={r} triton {version}"
        assert gate.usage["LOCAL"] == 0 and gate.usage["STACK"] == 0, f"{key} spills: {gate.usage}"
        assert not any(m.startswith(("LDL", "STL")) for m in gate.mnemonics), f"{key} uses local memory"
        assert gate.compiled.shared <= SHARED_LIMIT[arch], f"{key} wants {gate.compiled.shared} bytes of shared memory"
        assert gate.usage["REG"] <= MOST_REGISTERS
        seen[key] = {"registers": gate.usage["REG"], "shared": gate.compiled.shared}
    hold(seen)


def hold(seen: dict[str, dict[str, int]]) -> None:
    """What was seen is within its budget, or becomes it."""
    allowed = budgets()
    if WRITE:
        BUDGETS.write_text(json.dumps(dict(sorted((allowed | seen).items())), indent=1) + "\n")
        return
    for key, counts in seen.items():
        assert key in allowed, f"{key} has no budget: run with SVDKERN_WRITE_BUDGETS=1 and look at what it writes"
        for what, most in allowed[key].items():
            assert counts[what] <= most, f"{key}: {what} {counts[what]}, at most {most}"


def _instructions(arch: int, dtype: str, found: dict[str, Gate]) -> None:
    """Tensor cores where the dtype has them, and wide or bulk loads of the operands."""
    for name in (n for n in found if n.startswith(("forward_kernel", "backward_kernel"))):
        ptx, sass = found[name].compiled.ptx, found[name].mnemonics
        if dtype != "fp32":
            assert MMA[arch] in ptx
            assert any(m.startswith(SASS[arch]) for m in sass)
        if arch < 90:
            assert any(re.fullmatch(r"LDGSTS\.E(\.\w+)*\.128(\.\w+)*", m) for m in sass)
        elif dtype != "fp32":
            assert any(m.startswith("UTMALDG") for m in sass)


@pytest.mark.parametrize(("arch", "dtype", "r"), QUICK)
def test_kernels_fit_the_part(arch: int, dtype: str, r: int) -> None:
    check(arch, dtype, r, tritons()[0])


@pytest.mark.parametrize(
    ("arch", "dtype", "r"), [(80, "bf16", 16), (90, "bf16", 16), (90, "bf16", 128), (100, "bf16", 16)]
)
def test_kernels_fit_the_part_by_the_oldest_triton(arch: int, dtype: str, r: int) -> None:
    if len(tritons()) < 2:
        pytest.skip("needs a second Triton: pip install --no-deps --target <environment>/triton-3.6.0 triton==3.6.0")
    check(arch, dtype, r, tritons()[1])


@pytest.mark.parametrize("rows", [256, 16])
@pytest.mark.parametrize("arch", [80, 90])
def test_memory_is_read_in_whole_sectors_and_without_bank_conflicts(arch: int, rows: int) -> None:
    """Sectors of global memory beyond what the bytes need, and passes over shared memory that conflicts cost."""
    o = cast(operands(rows, 256, 512, 16), torch.bfloat16, (torch.float32,) * 3)
    statistics: dict = {}
    with emulation(arch=arch, statistics=statistics):
        run(
            lambda leaves: fused(leaves, backend="triton"),
            o,
            torch.randn(rows, 512).bfloat16(),
            ("x", "u", "sigma", "v"),
        )
    hold({f"{name} sm_{arch} bf16 r=16 rows={rows}": traffic(counts) for name, counts in statistics.items()})


def traffic(counts: Statistics) -> dict[str, int]:
    return {"wasted sectors": counts.wasted_sectors(), "bank conflicts": counts.conflicts()}


@pytest.mark.slow
@pytest.mark.parametrize("version", tritons())
@pytest.mark.parametrize(("arch", "dtype", "r"), SLOW)
def test_more_ranks_fit_the_part(arch: int, dtype: str, r: int, version: str) -> None:
    check(arch, dtype, r, version)


# ---------------------------------------------------------------------------------------------------------- the Gram matrix


@pytest.mark.parametrize("version", tritons())
@pytest.mark.parametrize(("arch", "dtype", "r"), GRAM)
def test_the_gram_kernel_fits_the_part(arch: int, dtype: str, r: int, version: str) -> None:
    with compiling(arch, version) as found:
        gram.gram(torch.ones(4096, r, dtype=DTYPES[dtype]))
    gate = found["gram_kernel"]
    fit({"gram_kernel": gate}, arch, dtype, r, version)
    if dtype != "fp32":  # a tile of 16 ranks is too small for more than mma.sync
        assert any(m.startswith(SASS[arch] if r > 16 else "HMMA") for m in gate.mnemonics), sorted(gate.mnemonics)
    assert any(re.fullmatch(r"LDGSTS\.E(\.\w+)*\.128(\.\w+)*", m) for m in gate.mnemonics), sorted(gate.mnemonics)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, 90])
def test_the_gram_kernel_reads_whole_sectors(arch: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OUTPUTS, "gram_kernel", ("partial",))
    statistics: dict = {}
    with emulation(arch=arch, statistics=statistics):
        gram.gram(torch.ones(512, 128, dtype=DTYPES[dtype]))
    hold({f"gram_kernel sm_{arch} {dtype} r=128 rows=512": traffic(statistics["gram_kernel"])})
