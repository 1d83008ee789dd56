"""Bugs planted in the PTX of Triton's kernels, each of which must be caught by name; and the undamaged kernels, which are right.

A damage is an edit of the text, of a kind that a compiler, an inline instruction or a person may make. Where the symptom is not
an exception it is "bits": other bits than the undamaged kernel's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from damage import COPIED, DEALT, FORWARD, PRODUCT, SUMS, Case, edited
from ptx_emulator.compile import Compiled, versions
from ptx_emulator.errors import PtxError

pytestmark = pytest.mark.emulator
SEEDS = 6  # one of each adversary


@dataclass(frozen=True)
class Damage:
    case: Case
    arch: int
    edit: Callable[[str], str]
    symptom: str  # an exception's name, or "bits"
    mode: str  # in which it shows; the adversarial one in at least one of SEEDS
    options: dict[str, Any] = field(default_factory=dict)


def change(pattern: str, replacement: str = "", **where: Any) -> Callable[[str], str]:
    """The edit that replaces one match, or takes it out."""
    return lambda ptx: edited(ptx, pattern, replacement, **where)


BAR, LOOP = r"bar\.sync\s+0;", "Inner Loop Header"  # of the first pipelined loop
RELEASE, ACQUIRE = r"atom\.global\.gpu\.release\.exch", r"atom\.global\.gpu\.acquire\.or"
READ_Z = r"ld\.global\.cg\.v4"
STAGE, WRAP_SOONER = r"(setp\.gt\.s32\s+%p\d+, %r\d+), 2;", r"\1, 1;"  # of three stages, the third is never used
WGMMA_WAIT_1, WGMMA_WAIT_0 = r"wgmma\.wait_group\S*\s+1;", r"wgmma\.wait_group\S*\s+0;"
PROXY_FENCE, TENSOR_STORE = r"fence\.proxy\.async\S*;", r"cp\.async\.bulk\.tensor\.2d\.global"
BYTES = {"pattern": "16384;", "every": True}


def no_barriers_before_release(ptx: str) -> str:
    """Both: that of the source, and that which Triton puts before an atomic."""
    return edited(edited(ptx, BAR, "", before=RELEASE), BAR, "", before=RELEASE)


PIPELINE = {
    "no barrier between the wait and the first use of a tile": Damage(PRODUCT, 80, change(BAR, before=LOOP), "Race", "race"),
    "no barrier before a stage is filled again": Damage(PRODUCT, 80, change(BAR, after=LOOP, nth=1), "Race", "race"),
    "the same for wgmma": Damage(PRODUCT, 90, change(BAR, after=LOOP, nth=1), "Race", "race"),
    "cp.async.wait_group loosened by one": Damage(
        PRODUCT, 80, change(r"(cp\.async\.wait_group)\s+2;", r"\1 3;", before=LOOP), "StillInFlight", "late"
    ),
    "the same for wgmma's tiles": Damage(
        PRODUCT, 90, change(r"(cp\.async\.wait_group)\s+2;", r"\1 3;", after=LOOP), "StillInFlight", "late"
    ),
    "the result takes the place of a tile that is in flight": Damage(
        PRODUCT, 80, change(r"cp\.async\.wait_group\s+0;"), "StillInFlight", "late"
    ),
    "a tile is read from the wrong stage": Damage(PRODUCT, 90, change(STAGE, WRAP_SOONER, after=LOOP), "bits", "convergent"),
    "a tile is written to the wrong stage": Damage(
        PRODUCT, 90, change(STAGE, WRAP_SOONER, after=LOOP, nth=1), "StillInFlight", "late"
    ),
    "no wgmma.wait_group before a stage is filled again": Damage(PRODUCT, 90, change(WGMMA_WAIT_1), "StillInFlight", "late"),
    "no wgmma.wait_group before the result": Damage(PRODUCT, 90, change(WGMMA_WAIT_0), "StillInFlight", "late"),
    "no wgmma.fence": Damage(PRODUCT, 90, change(r"wgmma\.fence\S*;"), "MissingFence", "convergent"),
    "no fence.proxy.async": Damage(PRODUCT, 90, change(PROXY_FENCE), "MissingFence", "late"),
    "stores without masks": Damage(
        PRODUCT, 80, change(r"@%p\d+ (st\.global)", r"\1", every=True), "BadAddress", "convergent"
    ),
    "loads without masks": Damage(
        PRODUCT, 80, change(r"(cp\.async\.cg[^;]*0x10), %r\d+;", r"\1;", every=True), "BadAddress", "convergent"
    ),
}  # fmt: skip
TENSOR_COPIES = {
    "an mbarrier's parity never flips": Damage(
        COPIED, 90, change(r"(selp\.b32\s+%r\d+), 1, 0,", r"\1, 0, 0,", after=LOOP), "StillInFlight", "late"
    ),
    "an mbarrier is looked at once": Damage(COPIED, 90, change("@!complete bra.uni waitLoop;"), "StillInFlight", "late"),
    "an mbarrier expects half of the bytes": Damage(COPIED, 90, change(replacement="8192;", **BYTES), "StillInFlight", "late"),
    "an mbarrier expects nothing": Damage(COPIED, 90, change(replacement="0;", **BYTES), "StillInFlight", "late"),
    "an mbarrier expects twice the bytes": Damage(
        COPIED, 90, change(replacement="32768;", **BYTES), "EndlessLoop", "convergent", {"budget": 8000}
    ),
    "no barriers before a copy fills a stage again": Damage(
        COPIED, 90, change(BAR, after=WGMMA_WAIT_1, before="_crit_edge", every=True), "Race", "race"
    ),
    "no wgmma.wait_group before a copy fills a stage again": Damage(COPIED, 90, change(WGMMA_WAIT_1), "StillInFlight", "late"),
    "no fence.proxy.async before a tensor store": Damage(
        COPIED, 90, change(PROXY_FENCE, before=TENSOR_STORE), "MissingFence", "late"
    ),
    "a tensor store is not waited for": Damage(
        COPIED, 90, change(r"cp\.async\.bulk\.wait_group\S*\s+0;"), "StillInFlight", "late"
    ),
}  # fmt: skip
FLAGS = {
    "no barrier before a flag is raised": Damage(FORWARD, 80, no_barriers_before_release, "bits", "adversarial"),
    "the same on sm_90": Damage(FORWARD, 90, no_barriers_before_release, "bits", "adversarial"),
    "a flag is raised without release": Damage(
        FORWARD, 80, change(RELEASE, "atom.global.gpu.relaxed.exch"), "bits", "adversarial"
    ),
    "a flag is raised for the CTA alone": Damage(
        FORWARD, 90, change(RELEASE, "atom.global.cta.release.exch"), "bits", "adversarial"
    ),
    "a flag is awaited without acquire": Damage(
        FORWARD, 80, change(ACQUIRE, "atom.global.gpu.relaxed.or"), "bits", "adversarial"
    ),
    "no barrier behind the acquire of one thread": Damage(
        FORWARD, 80, change(BAR, after=ACQUIRE, before=READ_Z, every=True), "Race", "race"
    ),
    "z is read by the read-only path": Damage(FORWARD, 80, change(READ_Z, "ld.global.nc.v4"), "bits", "adversarial"),
    "the epoch is an argument, that of the first launch": Damage(
        FORWARD, 80, change(r"add\.s32(\s+%r\d+), %r\d+, 1;", r"mov.b32\1, 1;", after=r"ld\.volatile"), "bits", "adversarial"
    ),
    "tiles are dealt, not drawn, and not all CTAs fit": Damage(
        DEALT, 80, lambda ptx: ptx, "EndlessLoop", "adversarial", {"resident": 1}
    ),
}  # fmt: skip
REDUCTIONS = {
    "a shuffle's mask names half of the warp": Damage(
        SUMS, 80, change(r"(shfl\.sync\.bfly\.b32[^;]*), -1;", r"\1, 65535;"), "PartialWarp", "convergent"
    ),
    "a sum through shared memory without its barrier": Damage(SUMS, 80, change(BAR), "Race", "race"),
}
DAMAGES = PIPELINE | TENSOR_COPIES | FLAGS | REDUCTIONS


def symptom(found: Damage, compiled: Compiled, ptx: str, right: torch.Tensor, seed: int) -> str:
    """The exception's name, or "bits" where they differ from the right ones, or ""."""
    try:
        got = found.case.run(compiled, ptx, mode=found.mode, seed=seed, **found.options)
    except PtxError as problem:
        return type(problem).__name__
    return "" if torch.equal(got.view(torch.int16), right.view(torch.int16)) else "bits"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_caught(name: str) -> None:
    found = DAMAGES[name]
    compiled = found.case.compile(found.arch, None)
    right = found.case.run(compiled, compiled.ptx)
    damaged, seen = found.edit(compiled.ptx), []
    assert damaged != compiled.ptx or found.case is DEALT
    for seed in range(SEEDS if found.mode == "adversarial" else 1):
        seen.append(symptom(found, compiled, damaged, right, seed))
        if seen[-1]:
            break
    assert seen[-1] == found.symptom, seen


UNDAMAGED = [(PRODUCT, 80), (PRODUCT, 90), (FORWARD, 80), (FORWARD, 90), (COPIED, 90), (SUMS, 80), (DEALT, 80)]
NAMES = [
    "product, sm_80",
    "product, sm_90",
    "forward, sm_80",
    "forward, sm_90",
    "copied, sm_90",
    "sums, sm_80",
    "dealt, sm_80",
]


def has_the_known_fault(case: Case, arch: int, version: str, mode: str, seed: int) -> bool:
    """What cp.async wrote, wgmma reads with no proxy fence between: Triton 3.6 leaves it out, 3.7 and later put it in."""
    late = mode == "late" or (mode == "adversarial" and seed % 2 == 1)
    return late and arch == 90 and version == "3.6.0" and case in (PRODUCT, FORWARD)


@pytest.mark.parametrize("version", versions())
@pytest.mark.parametrize(("case", "arch"), UNDAMAGED, ids=NAMES)
def test_undamaged_kernels_are_right_in_every_mode(case: Case, arch: int, version: str) -> None:
    compiled = case.compile(arch, version)
    right = case.run(compiled, compiled.ptx)
    assert torch.allclose(right.double(), case.truth(), rtol=2**-6, atol=2**-6)
    options = {"resident": 3} if case is DEALT else {}  # tiles that are dealt need a place for each CTA
    for mode, seed in [("late", 0), ("race", 0), *(("adversarial", s) for s in range(SEEDS))]:
        if not has_the_known_fault(case, arch, version, mode, seed):
            assert symptom(Damage(case, arch, str, "", mode, options), compiled, compiled.ptx, right, seed) == "", (
                mode,
                seed,
            )


@pytest.mark.skipif("3.6.0" not in versions(), reason="needs Triton 3.6.0 beside the interpreter's own")
@pytest.mark.parametrize("case", [PRODUCT, FORWARD], ids=["product", "forward"])
def test_triton_3_6_leaves_out_a_proxy_fence(case: Case) -> None:
    compiled = case.compile(90, "3.6.0")
    right = case.run(compiled, compiled.ptx)
    assert symptom(Damage(case, 90, str, "", "late"), compiled, compiled.ptx, right, 0) == "MissingFence"
