"""What the CUDA kernels of the built extension compile to: registers, spills, shared memory, instructions; and what they move.

`cuda_budgets.json` holds registers and shared memory of each kernel and GPU, wasted sectors and bank conflicts by the emulator's
count; more than it says fails. SVDKERN_WRITE_BUDGETS=1 writes it anew.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ptx_emulator
import pytest
import torch
from emulated_cuda import CudaEmulation, why_not
from ptx_emulator.compile import tool

from svdkern.backends import extension

pytestmark = pytest.mark.emulator

BUDGETS = Path(__file__).with_name("cuda_budgets.json")
WRITE = os.environ.get("SVDKERN_WRITE_BUDGETS") == "1"
BUDGETED = "nvcc 13.0"  # another allocates registers otherwise
SMALLEST_SHARED = 99 << 10  # of a CTA: sm_86, sm_89 and sm_120
LARGE_SHARED = 163 << 10  # sm_80; others have more
TYPES = {"13__nv_bfloat16": "bf16", "6__half": "f16", "f": "f32"}
ENTRY = re.compile(r"Function :? ?(\S*?\d+([a-z_]+_kernel)I(13__nv_bfloat16|6__half|f)((?:L[ib]\d+E)*)E\w+?)(?::|\n)")


@functools.cache
def library() -> str | None:
    if extension.why_missing is not None or not torch.ops.svdkern._cuda_build():
        return None
    spec = importlib.util.find_spec("svdkern._C")
    return spec.origin if spec else None


needs_kernels = pytest.mark.skipif(library() is None, reason="needs an extension that was built with nvcc")


def listed(option: str) -> Iterator[tuple[str, str, str]]:
    """(kernel, its GPU, what cuobjdump says of it) of every kernel in the extension, as "shrink_kernel<bf16, 64>", "80"."""
    told = subprocess.run(
        [tool("cuobjdump"), option, str(library())], capture_output=True, text=True, check=True
    ).stdout
    for part in re.split(r"^Fatbin elf code:$", told, flags=re.M)[1:]:
        arch = re.search(r"^arch = sm_(\d+)", part, re.M).group(1)  # type: ignore[union-attr]
        entries = list(ENTRY.finditer(part))
        for i, entry in enumerate(entries):
            numbers = re.findall(r"L[ib](\d+)E", entry.group(4))
            name = f"{entry.group(2)}<{', '.join([TYPES[entry.group(3)], *numbers])}>"
            yield name, arch, part[entry.end() : entries[i + 1].start() if i + 1 < len(entries) else len(part)]


@functools.cache
def usage() -> dict[tuple[str, str], dict[str, int]]:
    return {
        (name, arch): {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
        for name, arch, text in listed("-res-usage")
    }


@functools.cache
def mnemonics() -> dict[tuple[str, str], frozenset[str]]:
    pattern = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.M)
    return {(name, arch): frozenset(pattern.findall(text)) for name, arch, text in listed("-sass")}


def hold(seen: dict[str, dict[str, int]]) -> None:
    """What was seen is within its budget, or becomes it."""
    allowed = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    if WRITE:
        lines = (f" {json.dumps(key)}: {json.dumps(counts)}" for key, counts in sorted((allowed | seen).items()))
        BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    for key, counts in seen.items():
        assert key in allowed, f"{key} has no budget: run with SVDKERN_WRITE_BUDGETS=1 and look at what it writes"
        for what, most in allowed[key].items():
            assert counts[what] <= most, f"{key}: {what} {counts[what]}, at most {most}"


@needs_kernels
def test_no_kernel_spills_and_each_keeps_to_its_registers() -> None:
    compiler, _, archs = torch.ops.svdkern._cuda_build().partition(": ")
    assert {arch for _, arch in usage()} == set(archs.replace("+ptx", "").split())
    names = {name.partition("<")[0] for name, _ in usage()}
    few = {"small_shrink_kernel", "small_linear_kernel"}
    assert names == few | {"pack_kernel", "shrink_kernel", "outer_kernel", "linear_kernel", "forward_kernel"}
    seen = {}
    for (name, arch), counts in usage().items():
        assert counts["LOCAL"] == 0 and counts["STACK"] == 0, f"{name} sm_{arch} spills: {counts}"
        seen[f"{name} sm_{arch}"] = {"registers": counts["REG"], "static shared": counts["SHARED"]}
    if compiler != BUDGETED:
        pytest.skip(f"the budgets are those of {BUDGETED}, this is {compiler}")
    hold(seen)


@needs_kernels
def test_the_instructions_are_the_intended_ones() -> None:
    """Tensor cores and ldmatrix for 16-bit types, 16-byte copies into shared memory, no local memory."""
    assert mnemonics().keys() == usage().keys()
    for (name, arch), found in mnemonics().items():
        where = f"{name} sm_{arch}"
        assert not [m for m in found if m.startswith(("LDL", "STL"))], where
        if name.startswith("small_shrink_kernel"):
            assert any(m.startswith("FFMA") for m in found) and any(m.startswith("LDG.E.128") for m in found), where
            continue
        if name.startswith("pack_kernel"):
            assert any(m.startswith("STG.E.128") for m in found), where
            continue
        assert any(re.fullmatch(r"LDGSTS\.E(\.\w+)*\.128(\.\w+)*", m) for m in found), where
        if "<f32" in name:
            assert any(m.startswith("FFMA") for m in found), where
            assert not any(m.startswith("HMMA") for m in found), f"{where}: float32 products are IEEE"
        else:
            kind = "HMMA.16816.F32.BF16" if "<bf16" in name else "HMMA.16816.F32"
            assert kind in found, where
            assert any(m.startswith("LDSM") for m in found), where


# --------------------------------------------------------------------------------------------------- what is launched

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def pack(r: int, dtype: torch.dtype, how: CudaEmulation) -> torch.Tensor:
    R = -(-r // 16) * 16
    columns, rows = torch.empty(R, 512, dtype=dtype), torch.empty(256, R, dtype=dtype)
    how.call("pack", torch.ones(512, r), columns, False, torch.ones(256, r), rows, True, None)
    return columns


def shrink(r: int, dtype: torch.dtype, how: CudaEmulation) -> None:
    columns, a = pack(r, dtype, CudaEmulation()), torch.ones(128, 512, dtype=dtype)
    h, z = torch.empty(128, r), torch.empty(128, columns.shape[0], dtype=dtype)
    how.call("shrink", a, columns, r, torch.ones(r), None, None, False, None, 1.0, None, 0, h, z, None, None)


def forward(r: int, dtype: torch.dtype, how: CudaEmulation) -> None:
    columns, x = pack(r, dtype, CudaEmulation()), torch.ones(128, 512, dtype=dtype)
    R, w, h = columns.shape[0], torch.ones(256, 512, dtype=dtype), torch.empty(128, r)
    rows, z, y = torch.ones(256, R, dtype=dtype), torch.empty(128, R, dtype=dtype), torch.empty(128, 256, dtype=dtype)
    how.processors = 1
    assert how.call("forward", x, columns, r, torch.ones(r), None, None, None, 1.0, None, 0, w.t(), rows, None, h, z,
                    torch.zeros(2, dtype=torch.int32), y)  # fmt: skip


def products(r: int, dtype: torch.dtype, how: CudaEmulation) -> None:
    R = -(-r // 16) * 16
    a, q, out = torch.ones(128, 256, dtype=dtype), torch.ones(128, R, dtype=dtype), torch.empty(256, r)
    how.call("outer", a, q, r, None, 0, out, None, None)
    for w in (torch.ones(192, 256, dtype=dtype).t(), torch.ones(256, 192, dtype=dtype)):
        y, factor = torch.empty(128, 192, dtype=dtype), torch.ones(192, R, dtype=dtype)
        how.call("linear", a, w, q, factor, r, torch.ones(192, dtype=dtype), None, 0, y)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [16, 64])
def test_memory_is_moved_in_whole_sectors_and_with_few_bank_conflicts(dtype: str, r: int) -> None:
    statistics: dict[str, ptx_emulator.Statistics] = {}
    how = CudaEmulation(statistics=statistics)
    pack(r, DTYPES[dtype], how)
    shrink(r, DTYPES[dtype], how)
    products(r, DTYPES[dtype], how)
    if dtype != "f32":
        forward(r, DTYPES[dtype], how)
    seen = {}
    for launch in how.launches:
        counts = statistics[launch.kernel]
        seen[f"{launch.kernel} {dtype} r={r}, launched"] = {
            "dynamic shared": launch.shared,
            "wasted sectors": counts.wasted_sectors(),
            "bank conflicts": counts.conflicts(),
        }
        assert launch.shared <= (LARGE_SHARED if launch.threads == 256 else SMALLEST_SHARED)
    assert len(seen) == (4 if dtype == "f32" else 5)
    hold(seen)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 16, 32])
def test_few_rows_read_w_once_in_whole_sectors_without_bank_conflicts(dtype: str, rows: int) -> None:
    """Sectors that the copies move: those of w once, those of a for every 64 columns, and no more."""
    of, r = DTYPES[dtype], 16
    a, sums = torch.ones(rows, 512, dtype=of), torch.empty(2, rows, r)
    for weight in (torch.ones(128, 512, dtype=of).t(), torch.ones(512, 128, dtype=of)):
        for factor in (torch.ones(512, r), torch.ones(r, 512).t()):
            y, partial, counters = torch.empty(rows, 128, dtype=of), torch.empty(3, rows, 128), torch.zeros(2).int()
            how = CudaEmulation(statistics={})
            how.call("small_shrink", a, factor, None, 0, sums, counters)
            how.call(
                "small_linear", a, weight, sums, factor[:128], torch.ones(r), None, None, False, None, 1.0, None, None, 0,
                None, None, y, partial, counters,
            )  # fmt: skip
            assert how.statistics is not None
            for launch in how.launches:
                counts = how.statistics[launch.kernel]
                assert launch.shared <= SMALLEST_SHARED
                assert (counts.wasted_sectors(), counts.conflicts()) == (0, 0), launch.kernel
            accesses = how.statistics["small_linear_kernel"].accesses.values()
            copied = sum(access.sectors for access in accesses if access.text.startswith("cp.async"))
            assert copied == (weight.nbytes + 2 * a.nbytes) // 32
            assert all(access.bytes % 512 == 0 for access in accesses if "cache_hint" in access.text)  # 16 bytes a lane


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize(("rows", "height", "width"), [(70, 64, 64), (90, 128, 128), (256, 128, 256)])
def test_linear_reads_w_once_for_a_tile_of_rows(rows: int, height: int, width: int) -> None:
    """32-byte sectors that its copies move: those of w for every row tile, those of a for every column tile, and no more."""
    statistics: dict[str, ptx_emulator.Statistics] = {}
    columns = max(width, 128)
    a, w, y = (torch.ones(size, dtype=torch.bfloat16) for size in ((rows, 512), (columns, 512), (rows, columns)))
    how = CudaEmulation(statistics=statistics, processors=1 if height > 64 else 9)
    how.call("linear", a, w.t(), None, None, 0, None, None, 0, y)
    copies = [access for access in statistics["linear_kernel"].accesses.values() if access.text.startswith("cp.async")]
    row_tiles, column_tiles = -(-rows // height), columns // width
    assert sum(access.sectors for access in copies) == (row_tiles * w.nbytes + column_tiles * a.nbytes) // 32
    assert torch.equal(y, torch.full_like(y, 512.0))


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("w", ["rows", "columns"])
@pytest.mark.parametrize("columns", [128, 256])
def test_the_main_loop_of_linear_is_bound_by_the_tensor_cores(columns: int, w: str) -> None:
    """What a step of 64 costs a processor: its mma.sync on an H100 (1.64 clocks each, four at once) outlast shared memory's
    wavefronts (one a clock), and there are fewer than two other instructions for each."""
    seen = []
    for depth in (512, 1024):
        statistics: dict[str, ptx_emulator.Statistics] = {}
        a, right, y = (
            torch.ones(size, dtype=torch.bfloat16) for size in ((128, depth), (columns, depth), (128, columns))
        )
        right = right.t() if w == "rows" else right.t().contiguous()
        how = CudaEmulation(statistics=statistics, processors=1)
        how.call("linear", a, right, None, None, 0, None, None, 0, y)
        counts = statistics["linear_kernel"]
        moved = ("ldmatrix", "cp.async.cg")
        passes = sum(access.passes for access in counts.accesses.values() if access.text.startswith(moved))
        seen.append((counts.instructions["mma"], passes, sum(counts.instructions.values()), counts.conflicts()))
    mma, passes, instructions, conflicts = ((b - a) // 8 for a, b in zip(*seen, strict=True))
    assert mma == 128 * columns * 64 // (16 * 8 * 16)
    assert passes == (64 + 64) * 64 * 2 // 128 * (columns // 32) + (128 + columns) * 64 * 2 // 128
    assert passes < 1.64 * mma
    assert instructions < 3 * mma
    assert conflicts == 0
