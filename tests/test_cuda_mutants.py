"""Mutants of the CUDA kernels: a line of a source is damaged, and the emulated tests' kind of run must see it.

Each names what is expected: the emulator's complaint, or "bits" where a mode's bits differ from the sound kernel's, or both where
either may come first. The sound kernel gives the same bits in all of these runs.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulated_cuda import CUDA, CudaEmulation, why_not
from operands import RNG
from ptx_emulator import cuda
from ptx_emulator.errors import PtxError
from torch import Tensor

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

BF16 = torch.bfloat16
SEEDS = range(12)  # every adversary twice


@dataclass(frozen=True)
class Mutant:
    file: str
    sound: str  # stands once in the file
    damaged: str
    seen: str  # what the run says, alternatives apart by spaces
    mode: str = "convergent"


def unset(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def run_pack(how: CudaEmulation) -> list[Tensor]:
    """Two chunks of ranks, tails everywhere."""
    columns, rows = unset(32, 72, dtype=BF16), unset(70, 32, dtype=BF16)
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(66, 19, generator=generator), torch.randn(19, 70, generator=generator).t()
    control = torch.full((200,), 7, dtype=torch.int32)
    how.call("pack", u, columns, False, v, rows, True, control)
    return [columns, rows, control]


def run_shrink(how: CudaEmulation) -> list[Tensor]:
    """Two row tiles, three splits of five, five and three steps over four stages; tails of both, dropout, gaps behind rows."""
    m, k, r, splits = 70, 776, 3, 3
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(m, 784, generator=generator).to(BF16)[:, :k]
    factor = torch.cat([torch.randn(r, k, generator=generator), torch.zeros(16 - r, k)]).to(BF16)
    h, z = unset(m, r), unset(m, 16, dtype=BF16)
    how.call(
        "shrink", a, factor, r, torch.rand(r, generator=generator), None, None, False, None, 0.5, RNG, 6554, h, z,
        unset(splits, m, 16), torch.zeros(2, dtype=torch.int32),
    )  # fmt: skip
    return [h, z]


def run_outer(how: CudaEmulation) -> list[Tensor]:
    """Two tiles of columns, three splits of five, five and three steps over four stages; tails of both, dropout."""
    m, width, r, splits = 776, 70, 3, 3
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(m, 72, generator=generator).to(BF16)[:, :width]
    q = torch.randn(m, 16, generator=generator).to(BF16)
    out = unset(r, width).t()
    counters = torch.zeros(2, dtype=torch.int32)
    how.call("outer", a, q, r, RNG, 6554, out, unset(splits, width, 16), counters)
    return [out.contiguous()]


def run_linear(how: CudaEmulation) -> list[Tensor]:
    """Both orientations of w: two tiles each way, seven steps of K over four stages and the adapter's before them, dropout."""
    m, k, n, r = 70, 392, 72, 17
    generator = torch.Generator().manual_seed(4)
    a, w = torch.randn(m, k, generator=generator).to(BF16), torch.randn(n, k, generator=generator).to(BF16)
    z, factor = (torch.randn(size, 32, generator=generator).to(BF16) for size in (m, n))
    bias, outs = torch.randn(n, generator=generator).to(BF16), []
    for weight, threshold in ((w.t(), 0), (w.t().contiguous(), 6554)):
        outs.append(unset(m, n, dtype=BF16))
        how.call("linear", a, weight, z, factor, r, bias, RNG, threshold, outs[-1])
    return outs


def run_small_shrink(how: CudaEmulation) -> list[Tensor]:
    """Two slices of two parts and of one, two tiles of ranks; tails of all, dropout."""
    generator = torch.Generator().manual_seed(5)
    a, factor = torch.randn(3, 700, generator=generator).to(BF16), torch.randn(700, 19, generator=generator)
    sums, control = unset(2, 3, 19), torch.full((300,), 7, dtype=torch.int32)
    how.call("small_shrink", a, factor, RNG, 6554, sums, control)
    return [sums, control]


def run_small_linear(how: CudaEmulation) -> list[Tensor]:
    """Both orientations of w: two tiles, three splits of K of eight, eight and one steps for four warps, the adapter's; dropout."""
    m, k, n, r = 3, 1032, 72, 9
    generator = torch.Generator().manual_seed(6)
    a, w = torch.randn(m, k, generator=generator).to(BF16), torch.randn(n, k, generator=generator).to(BF16)
    sums, factor = torch.randn(2, m, r, generator=generator), torch.randn(n, r, generator=generator)
    sigma, bias, outs = torch.rand(r, generator=generator), torch.randn(n, generator=generator).to(BF16), []
    for weight, threshold in ((w.t(), 0), (w.t().contiguous(), 6554)):
        outs += [unset(m, n, dtype=BF16), unset(m, r), unset(m, 16, dtype=BF16)]
        y, h, z = outs[-3:]
        how.call(
            "small_linear", a, weight, sums, factor, sigma, None, None, False, None, 0.5, bias, RNG, threshold, h, z, y,
            unset(4, m, n), torch.zeros(2, dtype=torch.int32),
        )  # fmt: skip
    return outs


def run_forward(how: CudaEmulation) -> list[Tensor]:
    """Two row groups of two z-tiles each and three y-tiles, five steps of K over three stages, then two; tails of rows, columns
    and K. Of the ten tiles six CTAs begin with one; no more than four of these are resident under an adversary."""
    generator, outs = torch.Generator().manual_seed(5), []
    how.processors = 3
    for m, k, n, r in ((250, 264, 264, 3), (136, 72, 332, 3)):
        draw = lambda *shape: torch.randn(shape, generator=generator).to(BF16)  # noqa: E731
        x, w, columns, rows = draw(m, k), draw(n, k), draw(16, k), draw(n, 16)
        columns[r:], rows[:, r:] = 0, 0
        h, z, y = unset(m, r), unset(m, 16, dtype=BF16), unset(m, n, dtype=BF16)
        assert how.call("forward", x, columns, r, None, None, None, None, 1.0, None, 0, w.t(), rows, None, h, z,
                        torch.zeros(3, dtype=torch.int32), y)  # fmt: skip
        outs += [h, z, y]
    return outs


RUNS = {
    "forward.cu": ("forward_kernel", run_forward),
    "pack.cu": ("pack_kernel", run_pack),
    "shrink.cu": ("shrink_kernel", run_shrink),
    "outer.cu": ("outer_kernel", run_outer),
    "linear.cu": ("linear_kernel", run_linear),
    "small_shrink.cu": ("small_shrink_kernel", run_small_shrink),
    "small_linear.cu": ("small_linear_kernel", run_small_linear),
}

MUTANTS = {
    # pack.cu
    "pack: no barrier between write and read of the tile": Mutant(
        "pack.cu", "  __syncthreads();\n  for (int i = threadIdx.x; i < rows * ranks / per_chunk<T>",
        "  for (int i = threadIdx.x; i < rows * ranks / per_chunk<T>", "Race Uninitialised", "race"),
    "pack: no barrier before the next chunk of ranks": Mutant(
        "pack.cu", "__syncthreads();  // the tile is read to its end", "", "Race", "race"),
    "pack: the tail of r is not masked": Mutant("pack.cu", " && rank0 + rank < r)", ")", "bits BadAddress"),
    "pack: the tail of the length is not masked": Mutant(
        "pack.cu", "if (row0 + row < f.length && ", "if (", "bits BadAddress"),
    "pack: the second factor begins a tile late": Mutant("pack.cu", "blockIdx.x - first :", "blockIdx.x - first + 1 :", "bits"),
    "pack: a counter is left over": Mutant("pack.cu", "i < p.counters; i", "i < p.counters - 1; i", "bits"),
    # shrink_tile.h: the pipeline
    "shrink: no barrier in the main loop": Mutant(
        "shrink_tile.h", "__syncthreads(); // this step", "// this step", "Race Uninitialised StillInFlight", "race"),
    "shrink: a copy is waited for one group late": Mutant(
        "shrink_tile.h", "cp_async_wait_group<S::stages - 2>", "cp_async_wait_group<S::stages - 1>",
        "StillInFlight Uninitialised", "late"),
    "shrink: the stage that is read is one off": Mutant(
        "shrink_tile.h", "unsigned char* stage = shared + step % S::stages * S::stage_bytes;\n    if",
        "unsigned char* stage = shared + (step + 1) % S::stages * S::stage_bytes;\n    if", "bits Uninitialised"),
    "shrink: one stage too few for the copies": Mutant(
        "shrink_tile.h", "unsigned char* stage = shared + step % S::stages * S::stage_bytes;\n      copy",
        "unsigned char* stage = shared + step % (S::stages - 1) * S::stage_bytes;\n      copy", "bits Race Uninitialised"),
    "shrink: the stages are overwritten with sums before all have read them": Mutant(
        "shrink_tile.h", "__syncthreads();  // the stages are free", "", "Race", "race"),
    "shrink: no barrier between the sums and who reads them": Mutant(
        "shrink_tile.h", "  __syncthreads();\n}\n", "}\n", "Race Uninitialised", "race"),
    # shrink: tails, splits, dropout
    "shrink: the tail of the rows is not masked": Mutant(
        "tile.h", "i * apart < rows ? left", "true ? left", "BadAddress"),
    "shrink: the tail of K is not masked": Mutant(
        "tile.h", "min(from.columns - column, per_chunk<T>)", "min(from.columns - column + 1, per_chunk<T>)", "bits BadAddress"),
    "shrink: the last steps of K belong to no split": Mutant(
        "shrink.cu", "each = ceil_div(all, p.splits.splits)", "each = all / p.splits.splits", "bits"),
    "shrink: a split is summed twice": Mutant("shrink.cu", "blockIdx.z * each;", "blockIdx.z * (each - 1);", "bits"),
    "shrink: the mask is that of the tile's own rows": Mutant(
        "tile.h", "philox.drop<T>(elements, row0 + row,", "philox.drop<T>(elements, row,", "bits"),
    "shrink: the mask is that of the split's own columns": Mutant(
        "shrink_tile.h", "(stage, philox, row0, (first + step) *", "(stage, philox, row0, step *", "bits"),
    "shrink: the mask comes behind the barrier": Mutant(
        "shrink_tile.h", "multiply_ranks<S::ranks / 8, T>(acc",
        "mask_tile<S::lines, row_chunks, S::threads, T>(stage, philox, row0, step), multiply_ranks<S::ranks / 8, T>(acc",
        "Race bits", "race"),
    "shrink: six rounds of Philox": Mutant("philox.h", "round < 7", "round < 6", "bits"),
    "shrink: D has no factor": Mutant("shrink_tile.h", "acc, p.keep_scale)", "acc, 1.0f)", "bits"),
    "shrink: ranks past r are not zeroed in z": Mutant(
        "shrink_tile.h", "rank < p.r ? modulated", "rank < padded(p.r) ? modulated", "BadAddress bits"),
    # outer.cu
    "outer: no barrier in the main loop": Mutant(
        "outer.cu", "__syncthreads(); // this step", "// this step", "Race Uninitialised StillInFlight", "race"),
    "outer: a copy is waited for one group late": Mutant(
        "outer.cu", "cp_async_wait_group<S::stages - 2>", "cp_async_wait_group<S::stages - 1>",
        "StillInFlight Uninitialised", "late"),
    "outer: the mask is that of the split's own rows": Mutant(
        "outer.cu", "philox, (first + step) * S::depth,\n", "philox, step * S::depth,\n", "bits"),
    "outer: columns past the width are stored": Mutant(
        "outer.cu", "if (line0 + line < p.width && rank0 + rank < p.r)", "if (rank0 + rank < p.r)", "BadAddress"),
    "outer: ranks past r are stored": Mutant(
        "outer.cu", "if (line0 + line < p.width && rank0 + rank < p.r)", "if (line0 + line < p.width)", "BadAddress bits"),
    "outer: the last steps belong to no split": Mutant(
        "outer.cu", "each = ceil_div(all, p.splits.splits)", "each = all / p.splits.splits", "bits"),
    "outer: the stages are overwritten with sums before all have read them": Mutant(
        "outer.cu", "__syncthreads();  // the stages are free", "", "Race", "race"),
    # linear_tile.h: the pipeline
    "linear: no barrier between the steps of K": Mutant(
        "linear_tile.h", "__syncthreads(); // it has come", "// it has come", "Race Uninitialised StillInFlight", "race"),
    "linear: no barrier before the first step of K": Mutant(
        "linear_tile.h", "__syncthreads(); // the first step", "// the first step", "Race Uninitialised StillInFlight", "race"),
    "linear: no barrier between the last steps": Mutant(
        "linear_tile.h", "__syncthreads(); // this step", "// this step", "Race Uninitialised StillInFlight", "race"),
    "linear: a copy of K is waited for one group late": Mutant(
        "linear_tile.h", "cp_async_wait_group<S::stages - 3>", "cp_async_wait_group<S::stages - 2>",
        "StillInFlight Uninitialised", "late"),
    "linear: a copy of the last steps is waited for one group late": Mutant(
        "linear_tile.h", "cp_async_wait_group<S::stages - 2>();\n    __syncthreads(); // this step",
        "cp_async_wait_group<S::stages - 1>();\n    __syncthreads(); // this step", "StillInFlight Uninitialised", "late"),
    "linear: a copy of the first step of K is waited for one group late": Mutant(
        "linear_tile.h", "cp_async_wait_group<S::stages - 2>();\n  __syncthreads(); // the first step",
        "cp_async_wait_group<S::stages - 1>();\n  __syncthreads(); // the first step", "StillInFlight Uninitialised", "late"),
    "linear: copies over the stage that is read": Mutant(
        "linear_tile.h", "of_base<k, S::slices>(step + S::stages - 1)", "of_base<k, S::slices>(step + S::stages)",
        "Race bits Uninitialised", "race"),
    "linear: the next slice over the one that is multiplied": Mutant(
        "linear_tile.h", "slices[(k + 1) % 2]", "slices[k % 2]", "bits Uninitialised"),
    "linear: the first slice of the step before": Mutant(
        "linear_tile.h", "slices[0], (step + 1) % S::stages", "slices[0], step % S::stages", "bits"),
    "linear: chunks added instead of permuted": Mutant(
        "linear_tile.h", "+ stage) ^ (j << 5)", "+ stage) + (j << 5)",
        "bits Uninitialised"),
    "linear: a quarter of a copy is left out": Mutant(
        "tile.h", "count * (Part + 1) / Parts;", "count * (Part + 1) / Parts - (Part == 2);",
        "bits Uninitialised"),
    "linear: rows that are copied lie half as far apart": Mutant(
        "tile.h", "to + i * apart * row_bytes", "to + i * apart / 2 * row_bytes", "bits Uninitialised Race"),
    # linear_tile.h: the adapter, tails
    "linear: the mask falls before the adapter's last step": Mutant(
        "linear_tile.h", "copies, 0, copies.first, at", "copies, 0, copies.first - 1, at", "bits"),
    "linear: K begins with the adapter's last step again": Mutant(
        "linear_tile.h", "int step = copies.first;", "int step = copies.first - (copies.first > 0);", "bits"),
    "linear: the adapter's step is K's first again": Mutant(
        "linear_tile.h", "step < first ? step : step - base)", "step - base)", "bits BadAddress"),
    "linear: one slice of R too few": Mutant(
        "linear_tile.h", "copies.rank(step)) / S::slice)", "copies.rank(step)) / S::slice - 1)", "bits"),
    "linear: the steps of K begin a step early": Mutant(
        "linear_tile.h", "k = (step - first) *", "k = (step - first - 1) *", "bits BadAddress"),
    "linear: a panel of w is one off": Mutant(
        "linear_tile.h", "w, k, column0 + i * S::panel", "w, k, column0 + (i + 1) * S::panel", "bits"),
    "linear: the words of a quad go to the wrong lane": Mutant("philox.h", "pick(got, t ^ j)", "pick(got, j)", "bits"),
    "linear: rows past the last are stored": Mutant("linear_tile.h", "if (row >= p.rows) break;", "", "BadAddress"),
    "linear: columns past the last are stored": Mutant(
        "linear_tile.h", "aligned && column + per_chunk<T> <= p.columns", "aligned && column < p.columns + 8", "BadAddress bits"),
    "linear: no barrier between the sums and the store": Mutant(
        "linear_tile.h", "  __syncthreads();\n  const bool aligned", "  const bool aligned", "Race Uninitialised", "race"),
    "linear: tiles beyond a group of rows": Mutant(
        "params.h", "first + within % rows", "first + within % height", "bits BadAddress"),
    # small_shrink.cu
    "small_shrink: no barrier before the tiles are read": Mutant(
        "small_shrink.cu", "    __syncthreads();\n#pragma unroll\n    for (int k", "#pragma unroll\n    for (int k",
        "Race Uninitialised", "race"),
    "small_shrink: the tiles are overwritten before all have read them": Mutant(
        "small_shrink.cu", "__syncthreads();  // the tiles are read to their end", "", "Race", "race"),
    "small_shrink: no barrier between warps' sums and who adds them": Mutant(
        "small_shrink.cu", "  __syncthreads();\n  for (int i = threadIdx.x; i < p.rows * ranks",
        "  for (int i = threadIdx.x; i < p.rows * ranks", "Race Uninitialised", "race"),
    "small_shrink: a slice reads into the next": Mutant("small_shrink.cu", "min(begin + each, p.width)", "p.width", "bits"),
    "small_shrink: the mask is that of the slice's own columns": Mutant(
        "small_shrink.cu", "drop<T>(chunk.bits, row, k0 + k)", "drop<T>(chunk.bits, row, k)", "bits"),
    "small_shrink: ranks past r are read": Mutant("small_shrink.cu", " && rank0 + rank < f.cols;", ";", "BadAddress bits"),
    "small_shrink: half of a rank's threads": Mutant(
        "small_shrink.cu", "acc[row] + __shfl_xor_sync(~0u, acc[row], ranks)", "acc[row]", "bits"),
    "small_shrink: D has no factor": Mutant("small_shrink.cu", "sum * p.keep_scale", "sum", "bits"),
    "small_shrink: a counter is left over": Mutant("small_shrink.cu", "i < p.counters; i", "i < p.counters - 1; i", "bits"),
    # small_linear.cu
    "small_linear: a copy is waited for one group late": Mutant(
        "small_linear.cu", "cp_async_wait_group<stages - 1>", "cp_async_wait_group<stages>",
        "StillInFlight Uninitialised", "late"),
    "small_linear: the stage that is read is one off": Mutant(
        "small_linear.cu", "const unsigned char* stage = ring + step % stages",
        "const unsigned char* stage = ring + (step + 1) % stages", "bits Uninitialised StillInFlight"),
    "small_linear: a warp takes its neighbour's steps": Mutant(
        "small_linear.cu", "(first + step * warps) * depth", "(first + step) * depth", "bits"),
    "small_linear: the last steps belong to no split": Mutant(
        "small_linear.cu", "each = ceil_div(all, pieces)", "each = all / pieces", "bits"),
    "small_linear: no barrier between warps' sums and who adds them": Mutant(
        "small_linear.cu", "warp_bytes), acc);\n  __syncthreads();", "warp_bytes), acc);", "Race Uninitialised", "race"),
    "small_linear: no barrier between h and z": Mutant(
        "small_linear.cu", "    __syncthreads();\n    for (int row = warp", "    for (int row = warp",
        "Race Uninitialised", "race"),
    "small_linear: no barrier between z and its product": Mutant(
        "small_linear.cu", "    __syncthreads();\n    const int mine", "    const int mine", "Race Uninitialised", "race"),
    "small_linear: a slice of h too few": Mutant("small_linear.cu", "slice < p.slices;", "slice < p.slices - 1;", "bits"),
    "small_linear: a slice of R too few": Mutant(
        "small_linear.cu", "row_elements<T>;\n    if (mine", "row_elements<T> - 1;\n    if (mine", "bits"),
    "small_linear: the adapter is a piece of K too": Mutant(
        "small_linear.cu", "split - adapter, p.splits", "split, p.splits", "bits"),
    "small_linear: the mask falls on K's sums too": Mutant(
        "small_linear.cu", "if (split < adapter && philox.threshold)", "if (philox.threshold)", "bits"),
    "small_linear: the mask takes the wrong half": Mutant("small_linear.cu", "column % 2 ? word", "column % 2 == 0 ? word", "bits"),
    "small_linear: columns past the last are stored": Mutant(
        "small_linear.cu", "if (column0 + column < p.columns) what", "what", "BadAddress bits"),
    "small_linear: columns past the last are read": Mutant(
        "small_linear.cu", "row0 + row < from.rows ? left", "true ? left", "BadAddress"),
    "small_linear: h is written by no tile": Mutant(
        "small_linear.cu", "p.h && blockIdx.x == 0", "p.h && blockIdx.x == 1000", "bits"),
    # forward.cu, flags.h: what stands between tiles
    "forward: no barrier before the release": Mutant(
        "flags.h", "__syncthreads(); // all of the CTA's stores", "// all of the CTA's stores", "bits", "adversarial"),
    "forward: the counter releases nothing": Mutant("ptx/flag.h", "red.release.gpu", "red.relaxed.gpu", "bits", "adversarial"),
    "forward: the look acquires nothing": Mutant("ptx/flag.h", "ld.acquire.gpu", "ld.relaxed.gpu", "bits", "adversarial"),
    "forward: nobody looks before the last step but the stages": Mutant(
        "linear_tile.h", "if (step == to - 1) awaited.look();", "", "bits", "adversarial"),
    "forward: nobody looks where there are few steps": Mutant(
        "linear_tile.h", "    awaited.look();\n    __syncthreads();", "    __syncthreads();", "bits", "adversarial"),
    "forward: no barrier behind the look of one thread": Mutant(
        "linear_tile.h", "__syncthreads(); // one thread looked", "", "bits", "adversarial"),
    "forward: a y-tile waits for one z-tile too few": Mutant(
        "forward.cu", "{counters + group, of_z}", "{counters + group, of_z - 1}", "bits", "adversarial"),
    "forward: a z-tile raises the next group's counter": Mutant(
        "forward.cu", "publish(counters + group);", "publish(counters + (group + 1) % row_groups);", "bits", "adversarial"),
    "forward: tiles by an order of the CTAs, of which not all are there": Mutant(
        "forward.cu", """int next = 0;
  const auto draw = [&] { next = ptx::atom_add_relaxed_gpu(ticket, 1, threadIdx.x == 0); };""", """int next = 0, round = 0;
  const auto draw = [&] { next = round++ * gridDim.x + blockIdx.x; };""", "EndlessLoop Deadlock", "adversarial"),
    "forward: no barrier behind the ticket": Mutant(
        "forward.cu", "__syncthreads(); // the ticket is there", "//", "Race bits Uninitialised", "race"),
    "forward: K's copies go on over the adapter's": Mutant(
        "linear_tile.h", "copies.base - (S::stages - 1) : 0", "copies.base - (S::stages - 2) : 0", "bits"),
    "forward: rows past the last are stored": Mutant(
        "shrink_tile.h", "if (row < p.rows && rank < padded(p.r))", "if (rank < padded(p.r))", "BadAddress"),
    # splits.h: what stands between CTAs
    "splits: the counter releases nothing": Mutant(
        "ptx/atom.h", "atom.acq_rel.gpu", "atom.relaxed.gpu", "bits", "adversarial"),
    "splits: the counter releases to its own CTA": Mutant("ptx/atom.h", "acq_rel.gpu", "acq_rel.cta", "bits", "adversarial"),
    "splits: no barrier before the release": Mutant(
        "splits.h", "__syncthreads();  // all of the CTA's stores", "// all of the CTA's stores", "bits Race", "adversarial"),
    "splits: no barrier behind the acquire": Mutant(
        "splits.h", "count - 1;\n  __syncthreads();\n", "count - 1;\n", "Race Uninitialised bits", "race"),
    "splits: the last but one believes to be the last": Mutant("splits.h", "== count - 1;", "== count - 2;", "bits", "adversarial"),
    "splits: the last one's own piece first, and not from memory": Mutant(
        "splits.h", "float sum = 0.0f;\n    for (int s = 0; s < splits.splits; ++s) sum +=",
        "float sum = value;\n    for (int s = 0; s < splits.splits; ++s) if (s != split) sum +=",
        "bits", "adversarial"),
}  # fmt: skip


def source_of(mutant: Mutant, name: str) -> str:
    """The kernel that is to see it; a header's is named by the mutant's name."""
    kernel = name.partition(":")[0]
    return mutant.file if mutant.file.endswith(".cu") else f"{kernel if kernel != 'splits' else 'shrink'}.cu"


@functools.cache
def mutated(mutant: Mutant, main: str) -> str:
    """The PTX of the damaged source, for bf16 and the smallest bucket of ranks alone."""
    folder = cuda.BUILD / "mutants" / hashlib.sha256(repr(mutant).encode()).hexdigest()[:16] / "csrc" / "cuda"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CUDA, folder)
    shutil.copy(CUDA.parent / "svdkern.h", folder.parent)
    path = folder / mutant.file
    text, sound = (re.sub(" +//", " //", t) for t in (path.read_text(), mutant.sound))  # comments are aligned
    assert text.count(sound) == 1, f"{sound!r} is {text.count(sound)} times in {mutant.file}"
    path.write_text(text.replace(sound, mutant.damaged))
    only_bf16 = re.sub(r"case DType::f(?:16|32):\n\s*return what\(\w+\(\)\);", "", (folder / "element.h").read_text())
    (folder / "element.h").write_text(only_bf16)
    fewer = (
        r"if \((?:p\.linear\.)?r <= (?:32|64)\) return .*;|return what\(\S+ tile_ranks>\(\)\);|"
        r"return launch_\w+<T, .*\b(?:128, 256|128, 128|256|tile_ranks)>.*;|"
        r"if \(p\.rows <= 16\) .*;|return launch_as<T, small_rows>.*;"
    )
    for name in (main, "launch.h"):
        (folder / name).write_text(re.sub(fewer, "", (folder / name).read_text()))
    source = folder / main
    return cuda.compile_ptx(source)


@functools.cache
def sound(source: str) -> list[Tensor]:
    return RUNS[source][1](CudaEmulation())


def symptom(source: str, ptx: str | None, mode: str, seed: int) -> str:
    """The complaint's name, or "bits" where they differ from the sound ones, or ""."""
    kernel, run = RUNS[source]
    how = CudaEmulation(mode=mode, seed=seed, ptx={kernel: ptx} if ptx else {})
    try:
        got = run(how)
    except PtxError as problem:
        return type(problem).__name__
    same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, sound(source), strict=True))
    return "" if same else "bits"


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name: str) -> None:
    mutant = MUTANTS[name]
    source = source_of(mutant, name)
    seen = []
    for seed in SEEDS if mutant.mode == "adversarial" else (0,):
        seen.append(symptom(source, mutated(mutant, source), mutant.mode, seed))
        if seen[-1]:
            break
    assert seen[-1] in mutant.seen.split(), seen


@pytest.mark.parametrize("source", RUNS)
def test_the_sound_kernel_has_one_result_in_all_of_these_runs(source: str) -> None:
    modes = [("late", 0), ("race", 0), ("adversarial", 1), ("adversarial", 4)]
    assert [symptom(source, None, mode, seed) for mode, seed in modes] == [""] * len(modes)


def test_the_mutants_are_of_files_that_are_there() -> None:
    assert {Path(CUDA, mutant.file).is_file() for mutant in MUTANTS.values()} == {True}
