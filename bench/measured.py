"""What the result files of a machine say, grouped as tables and plots read it.

The last row of a case counts. Layer: reads what `results` writes; `report` and `plots` stand above it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bench.cases import DTYPES, Case
from bench.results import CASE, Row, latest, read_jsonl

TITLES = {
    "frozen": "frozen",
    "frozen_fp32": "frozen, fp32",
    "frozen_svdkern": "frozen, svdkern's kernels",
    "eager": "eager",
    "addmm": "addmm",
    "materialised": "sum formed",
    "compile": "torch.compile",
    "peft_default": "PEFT default",
    "peft_bf16": "PEFT, adapters in the base's dtype",
    "svdkern_bf16": "svdkern, the whole model in bf16",
    "svdkern-eager": "svdkern-eager",
    "svdkern-cpu": "svdkern-cpu",
    "svdkern-triton": "svdkern-triton",
    "svdkern-cuda": "svdkern-cuda",
    "svdkern": "svdkern",
}
"""Providers as they are called and in the order in which they are shown; others come first, under their own names."""

YARDSTICKS = ("frozen", "frozen_fp32")


@dataclass(frozen=True)
class Machine:
    """Latest rows of every bench that has run on it."""

    folder: Path
    rows: Mapping[str, Sequence[Row]]

    @staticmethod
    def read(folder: Path) -> Machine:
        files = {name: folder / f"{name}.jsonl" for name in CASE}
        return Machine(folder, {name: latest(read_jsonl(path)) for name, path in files.items() if path.exists()})


def machines(results: Path) -> list[Machine]:
    """All that have result files."""
    return [Machine.read(folder) for folder in sorted({path.parent for path in results.glob("*/*.jsonl")})]


def title(provider: str) -> str:
    return TITLES.get(provider, provider)


def in_order(providers: Iterable[str]) -> list[str]:
    """Without repetition, as TITLES orders them."""
    known = list(TITLES)
    return sorted(dict.fromkeys(providers), key=lambda name: known.index(name) if name in known else -1)


# ------------------------------------------------------------------------------------------------------ layers


def case_of(row: Row) -> Case:
    return Case(**{field.name: row[field.name] for field in fields(Case)})


@dataclass(frozen=True)
class Group:
    """What was measured of one case in one dtype, by provider, and the row that ratios are to."""

    case: Case
    dtype: str
    rows: Mapping[str, Row]
    yardstick: Row | None

    def measured(self, provider: str) -> Row | None:
        """The provider's row, if it ran."""
        row = self.rows.get(provider)
        return row if row and row["median_s"] is not None else None


def layers(machine: Machine, mode: str, cases: Sequence[Case] | None = None) -> list[Group]:
    """Groups of `linear` rows in the order of `cases` (of the file without), dtypes as DTYPES orders them.

    Where the frozen layer did not run in a dtype, the yardstick is the frozen layer in fp32.
    """
    found: dict[tuple[Case, str], dict[str, Row]] = {}
    for row in machine.rows.get("linear", ()):
        if row["mode"] == mode:
            found.setdefault((case_of(row), row["dtype"]), {})[row["provider"]] = row
    wanted = dict.fromkeys(case for case, _ in found) if cases is None else cases
    groups = []
    for case in wanted:
        for dtype in DTYPES:
            if rows := found.get((case, dtype)):
                frozen = rows.get("frozen")
                ran = frozen is not None and frozen["median_s"] is not None
                groups.append(Group(case, dtype, rows, frozen if ran else rows.get("frozen_fp32")))
    return groups


# ------------------------------------------------------------------------------------------------------ models


def steps(machine: Machine) -> dict[str, list[Row]]:
    """`model_step` rows that are compared with each other, by what was trained."""
    found: dict[str, list[Row]] = {}
    for row in machine.rows.get("model_step", ()):
        # The model in bf16 is compared with the others in fp32.
        dtype = "fp32" if row["provider"] == "svdkern_bf16" else row["dtype"]
        sequences = f"{row['tokens']} tokens a step in sequences of {row['sequence']}"
        found.setdefault(f"{row['model']}, {dtype}, r={row['r']}, {sequences}", []).append(row)
    return found


# ---------------------------------------------------------------------------------------------------- roofline


@dataclass(frozen=True)
class Ceilings:
    """Measured flop/s by dtype and bytes/s."""

    peaks: Mapping[str, float]
    bandwidth: float


def ceilings(machine: Machine) -> Ceilings | None:
    """None where they were not measured."""
    rows = [row for row in machine.rows.get("ceilings", ()) if row["value"] is not None]
    products = {name: {r["dtype"]: r["value"] for r in rows if r["provider"] == name} for name in ("fma", "matmul")}
    peaks = products["fma"] or products["matmul"]
    bandwidth = next((row["value"] for row in rows if row["provider"] in ("read", "copy")), None)
    return Ceilings(peaks, bandwidth) if peaks and bandwidth else None


@dataclass(frozen=True)
class Achieved:
    """flop/s and bytes/s of a call, both by what its result needs."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


def achieved(row: Row) -> Achieved:
    """By a `linear` row that was measured. The frozen layer has no adapter, and its backward is dx or nothing."""
    case, mode = case_of(row), row["mode"]
    if row["provider"].startswith("frozen"):
        mode = mode if "x" in case.mask else "fwd"
        case = replace(case, r=0, mask="x")
    size = 4 if "fp32" in (row["dtype"], row["provider"].removeprefix("frozen_")) else 2
    return Achieved(case.flops(mode) / row["median_s"], case.traffic(mode, size) / row["median_s"])
