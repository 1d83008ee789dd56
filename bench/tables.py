"""Tables in markdown, one function a kind, from the rows of a machine.

Layer: reads `measured`; `report` puts what is made here into the documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from bench.cases import MASKS, SETS, Case
from bench.measured import YARDSTICKS, Group, Machine, achieved, ceilings, in_order, layers, steps, title
from bench.results import Row, geometric_mean

NONE = "–"


# ------------------------------------------------------------------------------------------------------- cells


def seconds(value: float | None) -> str:
    """Three significant digits in the unit that suits."""
    if value is None:
        return NONE
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e3, "ms")) if value * s >= 1.0), (1e6, "µs"))
    return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f} {unit}"


def ratio(row: Row) -> str:
    return number(row["ratio_to_frozen"], ".2f")


def number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def share(part: float | None, whole: float) -> str:
    return NONE if part is None else f"{100 * part / whole:.0f} %"


def shape(case: Case) -> str:
    """The case as tables name it."""
    text = f"M={case.M}, {case.K}→{case.N}, r={case.r}" + (f", dropout {case.dropout:g}" if case.dropout else "")
    return text if case.mask == MASKS[0] else f"{text}, gradients of {', '.join(case.mask)}"


# ------------------------------------------------------------------------------------------------------ tables


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column on the left, the others on the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def distinct(values: Iterable[object]) -> str:
    return ", ".join(sorted(set(map(str, values))))


def origin(rows: Sequence[Row]) -> str:
    """One line: machine, instruction set, threads, torch, commits."""
    first = rows[0]
    threads = f", {distinct(row['threads'] for row in rows)} threads" if first["device"] == "cpu" else ""
    torch = distinct(row["versions"]["torch"] for row in rows)
    commits = distinct(str(row["commit"]) + ("+changes" if row["dirty"] else "") for row in rows)
    return f"{first['machine']} · {first['isa']}{threads} · torch {torch} · commit {commits}\n\n"


def side_by_side(
    header: Sequence[str],
    lines: Sequence[tuple[Sequence[str], Mapping[str, Row]]],
    cell: Callable[[Row], str],
    unit: str = "",
) -> str:
    """A column a provider after the cells of `header`; the least of a line is bold, unless it computes no adapter."""
    columns = in_order(name for _, rows in lines for name in rows if name not in YARDSTICKS)
    body = []
    for first, rows in lines:
        cells = {name: cell(rows[name]) if name in rows else NONE for name in columns}
        rivals = [c for name, c in cells.items() if c != NONE and not name.startswith("frozen")]
        best = min(rivals, key=float, default=None)
        bold = (c if c != best or name.startswith("frozen") else f"**{c}**" for name, c in cells.items())
        body.append([*first, *bold])
    return table([*header, *(title(name) + unit for name in columns)], body)


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """By the fields `names`, then by provider."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row["provider"]] = row
    return found


def used(groups: Sequence[Group]) -> list[Row]:
    return [row for group in groups for row in group.rows.values()]


def linear_table(machine: Machine, name: str, mode: str = "fwd_bwd") -> str:
    """Time of the frozen layer, and every provider's ratio to it, over the set `name`."""
    groups = layers(machine, mode, SETS[name].cases)
    return origin(used(groups)) + ratios(groups) if groups else ""


def gpu_table(machine: Machine) -> str:
    """Every layer that was measured on a GPU, as called and as replays of CUDA graphs."""
    if machine.rows["linear"][0]["device"] != "cuda":
        return ""
    modes = {"fwd_bwd": "Forward and backward, as called", "fwd": "Forward, as called"}
    modes |= {f"{mode}_graph": what.replace("as called", "replayed CUDA graphs") for mode, what in modes.items()}
    found = {what: groups for mode, what in modes.items() if (groups := layers(machine, mode))}
    return origin([row for groups in found.values() for row in used(groups)]) + "\n".join(
        f"{what}:\n\n{ratios(groups)}" for what, groups in found.items()
    )


def ratios(groups: Sequence[Group]) -> str:
    lines = []
    for group in groups:
        frozen = seconds(group.yardstick["median_s"]) if group.yardstick else NONE
        if group.yardstick and group.yardstick["provider"] == "frozen_fp32":
            frozen += " (fp32)"
        lines.append(([shape(group.case), group.dtype, frozen], group.rows))
    return side_by_side(["shape", "dtype", "frozen"], lines, ratio)


def model_step_table(machine: Machine) -> str:
    """Step time and peak memory of every provider; a table a model and dtype."""
    parts = []
    for what, rows in steps(machine).items():
        body = []
        for row in rows:
            note = "" if row["reason"] is None else f" ({row['reason']})"
            memory = NONE if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f} MB"
            body.append([title(row["provider"]) + note, seconds(row["median_s"]), ratio(row), memory])
        parts.append(table([what, "step", "over frozen", "peak memory"], body))
    return origin(machine.rows["model_step"]) + "\n".join(parts)


def methods_table(machine: Machine) -> str:
    """Step time over the frozen model's and peak memory of every method, ours and PEFT's side by side."""
    parts = []
    for (model, dtype, tokens), rows in grouped(machine.rows["methods"], "model", "dtype", "tokens").items():
        frozen = rows.get("frozen")
        body = []
        for name, row in rows.items():
            if name == "frozen" or name.startswith("peft_"):
                continue
            cells = [name, number(row["trainable"], ",d") if row["trainable"] else NONE]
            for one in (row, rows.get(f"peft_{name}")):
                peak = None if one is None else one["peak_memory_mb"]
                cells += [NONE if one is None else ratio(one), NONE if peak is None else f"{peak:.0f} MB"]
            body.append(cells)
        floor = "" if frozen is None else f" (frozen: {seconds(frozen['median_s'])}, {frozen['peak_memory_mb']:.0f} MB)"
        header = [f"{model}, {dtype}, {tokens} tokens a step{floor}", "numbers that train", "step over frozen"]
        parts.append(table([*header, "peak memory", "PEFT: step", "PEFT: memory"], body))
    return origin(machine.rows["methods"]) + "\n".join(parts)


def decode_table(machine: Machine) -> str:
    """Tokens per second of the frozen model, and every provider's time over its."""
    rows = machine.rows["decode"]
    lines = []
    for (model, batch, r, dtype), group in grouped(rows, "model", "batch", "r", "dtype").items():
        frozen = group.get("frozen")
        speed = number(frozen["tokens_per_s"], ".3g") if frozen else NONE
        lines.append(([f"{model}, batch {batch}, r={r}", dtype, speed], group))
    return origin(rows) + side_by_side(["generating", "dtype", "frozen, tokens/s"], lines, ratio)


def memory_table(machine: Machine) -> str:
    """Peak memory of the frozen layer's forward and backward, and what every provider adds to it."""
    rows = machine.rows["memory"]
    lines = []
    for (*sizes, dtype), group in grouped(rows, "M", "K", "N", "r", "dtype").items():
        frozen = number(group["frozen"]["peak_extra_mb"], ".1f") if "frozen" in group else NONE
        lines.append(([shape(Case(*sizes)), dtype, frozen], group))
    header = ["shape", "dtype", "frozen, MB"]
    return origin(rows) + side_by_side(header, lines, lambda row: number(row["over_frozen_mb"], ".1f"), ", + MB")


def accuracy_table(machine: Machine) -> str:
    """Errors against fp64: the largest normwise one beside svdkern's limit, then that of y's worst element."""
    rows = machine.rows["accuracy"]
    normwise, worst = [], []
    for (*sizes, data, dtype), group in grouped(rows, "M", "K", "N", "r", "data", "dtype").items():
        what = [f"{shape(Case(*sizes))}, {data}", dtype]
        limit = number(group["svdkern"]["err_limit"], ".1e") if "svdkern" in group else NONE
        normwise.append(([*what, limit], group))
        worst.append((what, group))
    header = ["largest error of y, dx, dU, dV", "dtype", "svdkern's limit"]
    first = side_by_side(header, normwise, lambda row: number(row["err_vs_fp64"], ".1e"))
    second = side_by_side(["worst element of y", "dtype"], worst, lambda row: number(row["worst_y"], ".1e"))
    return origin(rows) + first + "\n" + second


def init_table(machine: Machine) -> str:
    """Time and error of the leading singular triplets; of a whole model, a row without a size, the time.

    Nothing is bold: a time says nothing without its error.
    """
    rows = machine.rows["init"]
    body = []
    for (matrix, n, k, r, dtype), group in grouped(rows, "matrix", "N", "K", "r", "dtype").items():
        what = f"{matrix}, {n}×{k}, r={r}" if n else f"{matrix}, every linear layer, r={r}"
        for name, row in group.items():
            errors = [number(row[error], ".1e") for error in ("err_vs_best", "err_sigma")]
            again = {True: "yes", False: "no", None: NONE}[row["same_again"]]
            body.append([what, dtype, title(name), seconds(row["median_s"]), *errors, again])
    header = ["matrix", "dtype", "provider", "time", "error over the best", "error of σ", "same bits again"]
    return origin(rows) + table(header, body)


def init_model_table(machine: Machine) -> str:
    """The decompositions alone, and whole calls, which have no error of their own."""
    rows = machine.rows["init_model"]
    body = []
    for (model, r, dtype), group in grouped(rows, "model", "r", "dtype").items():
        for name, row in group.items():
            what = f"{model}, {row['layers']} layers, r={r}, {dtype}"
            body.append([what, title(name), seconds(row["median_s"]), number(row["err_sigma"], ".1e")])
    return origin(rows) + table(["model", "provider", "time", "relative error of σ"], body)


def init_memory_table(machine: Machine) -> str:
    """Blocks of a model on disk, in a process of their own."""
    rows = machine.rows["init_memory"]
    body = []
    for (model, blocks, r), group in grouped(rows, "model", "blocks", "r").items():
        for name, row in group.items():
            cells = [
                seconds(row["median_s"]),
                seconds(row["extrapolated_s"]),
                number(row["peak_memory_mb"], ".0f") + " MB",
            ]
            body.append([f"{model}, {blocks} of its blocks, r={r}", title(name), *cells])
    return origin(rows) + table(["model", "provider", "time", "of all blocks", "peak memory"], body)


def topk_table(machine: Machine) -> str:
    """Time and error of a few singular values; each provider is one way at one setting."""
    rows = machine.rows["topk"]
    body = []
    for (which, matrix, n, k, r), group in grouped(rows, "which", "matrix", "N", "K", "r").items():
        for name, row in group.items():
            note = "" if row["reason"] is None else f" ({row['reason']})"
            found = [seconds(row["median_s"]), number(row["err_sigma"], ".1e")]
            body.append([f"{which}, {matrix}, {n}×{k}, r={r}", title(name) + note, *found])
    return origin(rows) + table(["matrix", "provider", "time", "relative error of σ"], body)


def svd_methods_table(machine: Machine) -> str:
    """Times of the methods side by side; the fastest of each case stands out."""
    rows = machine.rows["svd_methods"]
    body = []
    for (n, r, dtype, matrix), group in grouped(rows, "N", "r", "dtype", "matrix").items():
        times = {name: group[name]["median_s"] for name in ("exact", "krylov", "filter") if name in group}
        least = min((t for t in times.values() if t is not None), default=None)
        cells = [seconds(times.get(name)) for name in ("exact", "krylov", "filter")]
        body.append([f"{matrix}, {n}×{n}", str(r), dtype, *(
            f"**{cell}**" if times.get(name) == least and least is not None else cell
            for name, cell in zip(("exact", "krylov", "filter"), cells, strict=True)
        )])  # fmt: skip
    return origin(rows) + table(["matrix", "r", "dtype", "exact", "Krylov", "filter"], body)


def roofline_table(machine: Machine) -> str:
    """What share of the measured ceilings the frozen layer and svdkern reach, and how near their floor they come."""
    tops = ceilings(machine)
    if tops is None:
        return ""
    groups = [group for group in layers(machine, "fwd_bwd", SETS["readme"].cases) if group.dtype in tops.peaks]
    if not groups:
        return ""
    body = []
    for group in groups:
        cells = []
        for name in ("frozen", "svdkern"):
            row = group.measured(name)
            if row is None:
                cells += [NONE] * 3
                continue
            done = achieved(row)
            cells.append(f"{done.flops / 1e9:.3g} ({share(done.flops, tops.peaks[group.dtype])})")
            cells.append(f"{done.bytes / 1e9:.3g} ({share(done.bytes, tops.bandwidth)})")
            cells.append(share(row["floor_s"], row["median_s"]))
        body.append([shape(group.case), group.dtype, *cells])
    peaks = ", ".join(f"{dtype} {peak / 1e9:.4g} GFLOP/s" for dtype, peak in tops.peaks.items())
    measured = f"Measured ceilings: {peaks}; {tops.bandwidth / 1e9:.3g} GB/s. In brackets the share of them.\n\n"
    columns = [f"{name}, {unit}" for name in ("frozen", "svdkern") for unit in ("GFLOP/s", "GB/s", "floor / time")]
    rows = [*used(groups), *machine.rows["ceilings"]]
    return origin(rows) + measured + table(["shape", "dtype", *columns], body)


def summary_line(machine: Machine) -> list[str] | None:
    """Machine, number of groups, then mean, worst and its case: over the faster of eager and addmm, and over frozen."""
    over_best: list[tuple[float, str]] = []
    over_frozen: list[tuple[float, str]] = []
    groups = layers(machine, "fwd_bwd")
    for group in groups:
        row, where = group.measured("svdkern"), f"{shape(group.case)}, {group.dtype}"
        if row is None or row["ratio_to_frozen"] is None:
            continue
        over_frozen.append((row["ratio_to_frozen"], where))
        # by their ratios, each to the frozen layer of its own run: rows may come from different ones
        rivals = [
            rival["ratio_to_frozen"]
            for name in ("eager", "addmm")
            if (rival := group.measured(name)) and rival["ratio_to_frozen"] is not None
        ]
        if rivals:
            over_best.append((row["ratio_to_frozen"] / min(rivals), where))
    if not over_best and not over_frozen:
        return None
    cells = []
    for found in (over_best, over_frozen):
        worst, where = max(found, default=(None, ""))
        cells.append(number(geometric_mean([value for value, _ in found]) if found else None, ".2f"))
        cells.append(NONE if worst is None else f"{worst:.2f} ({where})")
    first = machine.rows["linear"][0]
    return [f"{first['machine']} · {first['isa']}", str(len(groups)), *cells]


def summary(found: Sequence[Machine]) -> str:
    """One line a machine."""
    header = [
        "machine",
        "layers × dtypes",
        "svdkern over the faster of eager and addmm",
        "worst",
        "over frozen",
        "worst",
    ]
    lines = [line for machine in found if (line := summary_line(machine))]
    return table(header, lines) if lines else ""


def blocks_table(machine: Machine) -> str:
    """A line a block size and dtype: every value that was tried, its time over the shipped one's for each layer."""
    rows = machine.rows["blocks"]
    body: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        value = f"**{row['value']}**" if row["shipped"] else str(row["value"])
        tried = body.setdefault((f"{row['provider']}: {row['what']}", row["dtype"]), {})
        tried.setdefault(value, []).append(number(row["ratio_to_shipped"], ".2f"))
    lines = [
        [
            what,
            dtype,
            "; ".join(value if "*" in value else f"{value}: {' '.join(ratios)}" for value, ratios in tried.items()),
        ]
        for (what, dtype), tried in body.items()
    ]
    names = distinct(f"{row['M']}x{row['K']}x{row['N']}x{row['r']}" for row in rows)
    said = f"Forward and backward over the shipped value (bold), for the layers {names}, in the order of the file.\n\n"
    return origin(rows) + said + table(["block size", "dtype", "tried"], lines)


def each(bench: str, render: Callable[[Machine], str]) -> Callable[[Sequence[Machine]], str]:
    """A table for each machine that has rows of `bench`."""

    def tables(found: Sequence[Machine]) -> str:
        return "\n".join(part for machine in found if machine.rows.get(bench) and (part := render(machine)))

    return tables


TABLES: Mapping[str, Callable[[Sequence[Machine]], str]] = {
    "linear": each("linear", partial(linear_table, name="readme")),
    "linear-gpu": each("linear", gpu_table),
    "linear-fwd": each("linear", partial(linear_table, name="readme", mode="fwd")),
    **{name: each("linear", partial(linear_table, name=name)) for name in SETS if name != "readme"},
    "decode": each("decode", decode_table),
    "memory": each("memory", memory_table),
    "accuracy": each("accuracy", accuracy_table),
    "init": each("init", init_table),
    "init_model": each("init_model", init_model_table),
    "init_memory": each("init_memory", init_memory_table),
    "topk": each("topk", topk_table),
    "svd_methods": each("svd_methods", svd_methods_table),
    "model_step": each("model_step", model_step_table),
    "methods": each("methods", methods_table),
    "blocks": each("blocks", blocks_table),
    "roofline-position": each("linear", roofline_table),
    "summary": summary,
}
