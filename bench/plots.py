"""Plots of a machine's results, as SVG for the documents and PNG: bench/results/<machine>/plots/.

The same rows and the same matplotlib give the same SVG, byte for byte. A plot whose bench has not run is left out.
Layer: reads `measured`; `report` writes what is drawn here.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.cases import DTYPES, SETS, Case
from bench.measured import Machine, achieved, ceilings, in_order, layers, steps, title
from bench.results import Row

STYLE: dict[str, Any] = {
    "svg.hashsalt": "svdkern",  # the ids in an SVG are random without it
    "figure.dpi": 110,
    **dict.fromkeys(("font.size", "axes.titlesize", "figure.titlesize", "figure.labelsize"), 9),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
COLOURS = {  # that colour-blind readers tell apart (Okabe and Ito)
    "frozen": "0.45",
    "eager": "#e69f00",
    "addmm": "#009e73",
    "peft_default": "#cc79a7",
    "peft_bf16": "#d55e00",
    "svdkern": "#0072b2",
    "svdkern_bf16": "#56b4e9",
}
OTHER_COLOURS = ("#999933", "#882255", "#332288", "#117733", "#aa4499", "#661100", "0.7", "0.2")
MARKERS = "o^Dsv*PX<>"
RIVALS = ("eager", "addmm", "peft_default", "svdkern")
RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 7, 10, 20, 50, 100, 200, 500)


def colours(providers: Iterable[str]) -> dict[str, str]:
    """By provider, in the order in which they are shown."""
    others = cycle(OTHER_COLOURS)
    return {name: COLOURS.get(name) or next(others) for name in in_order(providers)}


def grid(keys: Sequence[Any], height: float = 3.2) -> tuple[Figure, dict[Any, Axes]]:
    """A panel a key, three in a line; they share their y axis."""
    columns, lines = min(len(keys), 3), -(-len(keys) // 3)
    figure = Figure(figsize=(3.6 * columns + 1.8, height * lines + 0.6), layout="constrained")
    axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for ax in axes[len(keys) :]:
        ax.remove()
    return figure, dict(zip(keys, axes, strict=False))


def headed(figure: Figure, what: str, rows: Sequence[Row]) -> Figure:
    """With a title, what is shown and the machine, and a legend for all panels beside them."""
    machine = textwrap.fill(f"{rows[0]['machine']} · {rows[0]['isa']}", int(12 * figure.get_figwidth()))
    figure.suptitle(f"{what}\n{machine}")
    found = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if found:
        figure.legend(found.values(), [textwrap.fill(label, 22) for label in found], loc="outside right center")
    return figure


def plain(axis: Axis, ticks: Iterable[float]) -> None:
    """Ticks of a logarithmic axis at these values, written as plain numbers."""
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


# ------------------------------------------------------------------------------------------------------ layers


def against(machine: Machine, name: str, size: Callable[[Case], int], label: str) -> Figure | None:
    """Every rival's time over the frozen layer's, over the set `name`; a panel a dtype."""
    groups = [group for group in layers(machine, "fwd_bwd", SETS[name].cases) if group.yardstick]
    if len({size(group.case) for group in groups}) < 2:
        return None
    figure, panels = grid([dtype for dtype in DTYPES if any(group.dtype == dtype for group in groups)])
    for dtype, ax in panels.items():
        chosen = [group for group in groups if group.dtype == dtype]
        for provider, marker in zip(RIVALS, MARKERS, strict=False):
            points = [(size(g.case), row["ratio_to_frozen"]) for g in chosen if (row := g.measured(provider))]
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(x, y, color=COLOURS[provider], marker=marker, ms=4, label=title(provider))
        ax.axhline(1.0, color=COLOURS["frozen"], ls="--", lw=1, label="frozen")
        ax.set(xscale="log", yscale="log", xlabel=label, title=dtype)
        if any(group.yardstick and group.yardstick["provider"] == "frozen_fp32" for group in chosen):
            ax.set_title(f"{dtype}, over the frozen layer in fp32")
        plain(ax.xaxis, sorted({size(group.case) for group in chosen}))
        ax.tick_params(axis="x", labelrotation=45, labelsize=8)
    plain(ax.yaxis, (value for value in RATIOS if ax.get_ylim()[0] <= value <= ax.get_ylim()[1]))
    figure.supylabel("time over the frozen layer")
    case = SETS[name].cases[0]
    fixed = f"M={case.M}" if name == "ranks" else f"r={case.r}"
    return headed(figure, f"Forward and backward, {case.K}→{case.N}, {fixed}", machine.rows["linear"])


def roofline(machine: Machine) -> Figure | None:
    """GFLOP/s over intensity, both by what the result needs, beside the measured ceilings; a panel a dtype."""
    tops, groups = ceilings(machine), layers(machine, "fwd_bwd")
    dtypes = [dtype for dtype in DTYPES if tops and dtype in tops.peaks and any(g.dtype == dtype for g in groups)]
    if tops is None or not dtypes:
        return None
    figure, panels = grid(dtypes)
    for dtype, ax in panels.items():
        peak, ridge = tops.peaks[dtype], tops.peaks[dtype] / tops.bandwidth
        ends = [ridge]
        for provider, marker, inside in (("frozen", "s", "none"), ("svdkern", "o", COLOURS["svdkern"])):
            rows = [row for group in groups if group.dtype == dtype and (row := group.measured(provider))]
            done = [achieved(row) for row in rows]
            x, y = [one.intensity for one in done], [one.flops / 1e9 for one in done]
            ax.scatter(x, y, s=20, facecolors=inside, edgecolors=COLOURS[provider], marker=marker, label=provider)
            ends += x
        left, right = min(ends) / 2, max(ends) * 2
        roof = [left * tops.bandwidth / 1e9, peak / 1e9, peak / 1e9]
        ax.plot([left, ridge, right], roof, color="black", lw=1, label="measured ceilings")
        ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity, flop/byte")
        ax.set_title(f"{dtype}: {peak / 1e9:.0f} GFLOP/s, {tops.bandwidth / 1e9:.3g} GB/s")
    figure.supylabel("GFLOP/s")
    return headed(figure, "Layers beside the measured ceilings, forward and backward", machine.rows["linear"])


def memory(machine: Machine) -> Figure | None:
    """What every provider's peak is above the frozen layer's; a panel a dtype, bars in groups a shape."""
    measured = {}
    for row in machine.rows.get("memory", ()):
        if row["over_frozen_mb"] is not None and row["provider"] != "frozen":
            case = Case(row["M"], row["K"], row["N"], row["r"])
            measured[str(case), row["dtype"], row["provider"]] = row["over_frozen_mb"]
    if not measured:
        return None
    shapes = list(dict.fromkeys(shape for shape, _, _ in measured))
    shown = colours(provider for _, _, provider in measured)
    thick = 0.8 / len(shown)
    dtypes = [dtype for dtype in DTYPES if any(dtype == found for _, found, _ in measured)]
    figure, panels = grid(dtypes, height=0.8 + 0.2 * len(shapes) * (len(shown) + 1))
    for dtype, ax in panels.items():
        for i, (provider, colour) in enumerate(shown.items()):
            values = [measured.get((shape, dtype, provider), float("nan")) for shape in shapes]
            where = [place - 0.4 + (i + 0.5) * thick for place in range(len(shapes))]
            bars = ax.barh(where, values, 0.9 * thick, color=colour, label=title(provider))
            ax.bar_label(bars, ["–" if value != value else f"{value:.1f}" for value in values], padding=2, fontsize=7)
        ax.set(xlabel="MB above the frozen layer's peak", title=dtype, yticks=range(len(shapes)), yticklabels=shapes)
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    figure.supylabel("M x K x N x r")
    return headed(figure, "Peak memory of forward and backward", machine.rows["memory"])


# ------------------------------------------------------------------------------------- initialisation and model


def init(machine: Machine) -> Figure | None:
    """Error over time of the leading singular triplets; a panel a size, a colour a provider, a marker a matrix."""
    rows = [row for row in machine.rows.get("init", ()) if None not in (row["median_s"], row["err_vs_best"])]
    if not rows:
        return None
    shown = colours(row["provider"] for row in rows)
    markers = dict(zip(dict.fromkeys(row["matrix"] for row in rows), cycle(MARKERS), strict=False))
    figure, panels = grid(list(dict.fromkeys((row["N"], row["K"], row["r"]) for row in rows)))
    for row in rows:
        ax = panels[row["N"], row["K"], row["r"]]
        look = {"color": shown[row["provider"]], "marker": markers[row["matrix"]]}
        ax.scatter(row["median_s"], row["err_vs_best"], s=26, alpha=0.8, **look)
    for (n, k, r), ax in panels.items():
        ax.set(xscale="log", xlabel="seconds", title=f"{n}×{k}, r={r}")
        ax.set_yscale("symlog", linthresh=1e-8)  # an error may be zero
    for provider, colour in shown.items():
        ax.plot([], [], color=colour, lw=5, label=title(provider))
    for matrix, marker in markers.items():
        ax.plot([], [], color="0.3", ls="", marker=marker, mfc="none", label=matrix)
    figure.supylabel("error beyond the best rank-r approximation's")
    return headed(figure, "Singular value decomposition, time to accuracy", rows)


def topk(machine: Machine) -> Figure | None:
    """Error against seconds of a few singular values, a line a way, a point a setting of it; a panel a matrix and rank."""
    rows = [row for row in machine.rows.get("topk", ()) if None not in (row["median_s"], row["err_sigma"])]
    if not rows:
        return None
    ways = {row["provider"]: row["provider"].split(",")[0] for row in rows}
    shown = colours(ways.values())
    names = ("which", "matrix", "N", "K", "r")
    figure, panels = grid(list(dict.fromkeys(tuple(row[name] for name in names) for row in rows)))
    for (which, matrix, n, k, r), ax in panels.items():
        here = [row for row in rows if tuple(row[name] for name in names) == (which, matrix, n, k, r)]
        for way, marker in zip(shown, cycle(MARKERS), strict=False):
            points = sorted((row["median_s"], row["err_sigma"]) for row in here if ways[row["provider"]] == way)
            if points:
                x, y = zip(*points, strict=True)
                ax.plot(x, y, color=shown[way], marker=marker, ms=5, label=title(way))
        ax.set(xscale="log", yscale="log", xlabel="seconds", title=f"{which} {r} of {matrix}, {n}×{k}")
    figure.supylabel("largest relative error of a singular value")
    return headed(figure, "A few singular triplets, time to accuracy", rows)


def model_step(machine: Machine) -> Figure | None:
    """Step time over frozen, and peak memory; two panels a model and dtype."""
    groups = {what: [row for row in rows if row["ratio_to_frozen"]] for what, rows in steps(machine).items()}
    groups = {what: rows for what, rows in groups.items() if rows}
    if not groups:
        return None
    heights = [0.8 + 0.3 * len(rows) for rows in groups.values()]
    figure = Figure(figsize=(8.8, sum(heights) + 0.8), layout="constrained")
    pairs = figure.subplots(len(groups), 2, squeeze=False, sharex="col", sharey="row", height_ratios=heights)
    for (left, right), (what, rows) in zip(pairs, groups.items(), strict=True):
        names = [textwrap.fill(title(row["provider"]), 24) for row in rows]
        shown = colours(row["provider"] for row in rows)
        for ax, field, form in ((left, "ratio_to_frozen", ".2f"), (right, "peak_memory_mb", ".0f")):
            values = [row[field] for row in rows]
            bars = ax.barh(names, [v or 0.0 for v in values], 0.7, color=[shown[row["provider"]] for row in rows])
            ax.bar_label(bars, ["–" if v is None else format(v, form) for v in values], padding=2, fontsize=8)
            ax.margins(x=0.15)
            ax.grid(axis="y", visible=False)
        left.set_title(what, loc="left")
        left.invert_yaxis()
    left.set_xlabel("step time over the frozen model's")
    right.set_xlabel("peak memory, MB")
    return headed(figure, "A training step of a model", machine.rows["model_step"])


PLOTS: Mapping[str, Callable[[Machine], Figure | None]] = {
    "rows": lambda machine: against(machine, "rows", lambda case: case.M, "rows M"),
    "ranks": lambda machine: against(machine, "ranks", lambda case: case.r, "rank r"),
    "roofline": roofline,
    "memory": memory,
    "init": init,
    "topk": topk,
    "model_step": model_step,
}


def drawn(machine: Machine) -> dict[str, bytes]:
    """Files by name: NAME.svg and NAME.png of every plot that the machine has results for."""
    files: dict[str, bytes] = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(STYLE)
        for name, draw in PLOTS.items():
            if figure := draw(machine):
                for kind, metadata in (("svg", {"Date": None}), ("png", {})):
                    file = io.BytesIO()
                    figure.savefig(file, format=kind, metadata=metadata)
                    files[f"{name}.{kind}"] = file.getvalue()
    return files


def write(machine: Machine) -> list[Path]:
    """Draws what the machine has results for, and removes what it has none for any more."""
    folder, files = machine.folder / "plots", drawn(machine)
    for path in [*folder.glob("*.svg"), *folder.glob("*.png")]:
        if path.name not in files:
            path.unlink()
    for name, content in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return [folder / name for name in files]
