"""What the kernels behind the SVD compile to: registers, spills, shared memory, instructions, and how they read memory."""

from __future__ import annotations

import re

import pytest
import torch
from emulated import emulation, tritons
from svdkern.triton_kernels import normal, residual, sketch
from test_triton_gates import DTYPES, SASS, compiling, fit, hold, traffic

pytestmark = pytest.mark.emulator

CPU = torch.device("cpu")
WIDE_LOAD = r"LDGSTS\.E(\.\w+)*\.128(\.\w+)*"


@pytest.mark.parametrize("version", tritons())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_sketch_and_residual_fit_the_part(arch: int, dtype: str, version: str) -> None:
    weight = torch.ones(64, 128, dtype=DTYPES[dtype])
    v, a = (torch.ones(16, size, dtype=torch.float64) for size in weight.shape)
    with compiling(arch, version) as found:
        sketch.sketch(64, 64, seed=0, first=0, dtype=DTYPES[dtype], device=CPU)
        residual.residual(weight, v, a)
    fit(found, arch, dtype, 16, version)
    mnemonics = found["residual_kernel"].mnemonics
    assert not any(m.startswith("DFMA") for m in mnemonics), "a step of the residual is rounded twice"
    assert {"DMUL", "DADD"} <= mnemonics
    assert "mul.rn.f64" in found["residual_kernel"].compiled.ptx


@pytest.mark.parametrize("version", tritons())
@pytest.mark.parametrize("b", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_products_fit_the_part(arch: int, dtype: str, b: int, version: str) -> None:
    if (arch, dtype, b, version) == (100, "bf16", 16, "3.6.0"):
        pytest.xfail("8 bytes on the stack, outside the loop or not: not looked into")
    for rows_contiguous in (True, False):
        a = torch.ones(4096, 4096, dtype=DTYPES[dtype])
        with compiling(arch, version) as found:
            normal.both(a if rows_contiguous else a.t(), torch.ones(4096, b), 1.0)
        gate = found["normal_kernel"]  # the second product's: each order of the strides is one of the two
        assert gate.compiled.shared <= 99 << 10  # of 8.6, 8.9 and 12.0 too
        name = f"normal_kernel{' transposed' if rows_contiguous else ''}"
        fit({name: gate, "parts_kernel": found["parts_kernel"]}, arch, dtype, b, version)
        tensor_cores = SASS[arch] if dtype == "bf16" else "HMMA"
        assert any(m.startswith(tensor_cores) for m in gate.mnemonics), sorted(gate.mnemonics)
        assert any(re.fullmatch(WIDE_LOAD, m) for m in gate.mnemonics), sorted(gate.mnemonics)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, 90])
def test_sectors_and_bank_conflicts(arch: int, dtype: str) -> None:
    """Whole sectors, but for the residual's v: a warp's few rows of it, which stay in the L1."""
    statistics: dict = {}
    weight = torch.ones(128, 512, dtype=DTYPES[dtype])
    v, a = (torch.ones(4, size, dtype=torch.float64) for size in weight.shape)
    with emulation(arch=arch, statistics=statistics):
        sketch.sketch(64, 64, seed=0, first=0, dtype=DTYPES[dtype], device=CPU)
        residual.residual(weight, v, a)
        normal.both(weight, torch.ones(512, 16), 1.0)
    hold(
        {
            f"{name} sm_{arch} {dtype} b=16": traffic(counts)
            for name, counts in statistics.items()
            if name != "reduce_kernel"
        }
    )
