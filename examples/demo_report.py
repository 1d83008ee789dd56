"""The picture and the text that the demo ends with, from the numbers in its summary.json."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

AVERAGED = 16
"""Steps that the smoothed training loss averages."""

COLOURS = {
    "frozen": "0.7",
    "svdkern": "tab:blue",
    "svdkern_bf16": "tab:cyan",
    "peft_default": "tab:orange",
    "peft_bf16": "tab:red",
}


def plot(summary: dict[str, Any], path: Path) -> None:
    """Loss over steps; step time and peak memory of each provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(1.6, 1, 1), layout="constrained")
    losses = summary["losses"]
    steps = range(1, len(losses) + 1)
    smooth = [statistics.fmean(losses[max(0, i - AVERAGED) : i]) for i in steps]
    left.plot(steps, losses, color="tab:blue", alpha=0.25, label="training, one step")
    left.plot(steps, smooth, color="tab:blue", label=f"training, mean of {AVERAGED} steps")
    held_out = summary["held_out_losses"]
    left.plot([int(step) for step in held_out], list(held_out.values()), color="black", marker="o", label="held out")
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    left.set(xlabel="step", ylabel="loss", title=f"held-out perplexity {before:.2f} → {after:.2f}")
    left.legend()
    for axes, key, title, form in (
        (middle, "step_ratio_to_frozen", f"step time over frozen ({summary['dtype']})", "{:.2f}×"),
        (right, "peak_memory_mb", "peak memory, MB", "{:.0f}"),
    ):
        values = summary[key]
        labels = [name.replace("_", "\n") for name in values]
        bars = axes.bar(labels, [v or 0.0 for v in values.values()], color=[COLOURS[name] for name in values])
        axes.bar_label(bars, [form.format(value) if value else "skipped" for value in values.values()])
        axes.set_title(title)
        axes.margins(y=0.12)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def readable(summary: dict[str, Any], out: Path) -> str:
    """The summary as a person reads it."""
    s = summary
    speed = f"{s['steps']} steps of {s['tokens']} tokens, {s['tokens_per_second']:.0f} tokens/s"
    merged = f"{s['merge_max_abs_diff']:.3g} at most ({s['merge_max_abs_diff_fp32']:.2g} in fp32)"
    merged += f"; they reach {s['logits_max_abs']:.3g}"
    lines = [
        "",
        f"SmolLM2-135M in {s['dtype']} ({s['dtype_reason']})",
        f"{s['machine']}, {s['isa']}",
        f"trained {s['trainable']:,} of {s['parameters']:,} parameters: {speed}",
        "",
        f"held-out perplexity   {s['perplexity_before']:.3f} → {s['perplexity_after']:.3f}",
        f"reloaded adapter      logits differ by {s['reload_max_abs_diff']} at most",
        f"merged model          logits differ by {merged}",
        "",
        f"{'one step':14}{'time':>10}{'over frozen':>14}{'peak memory':>14}",
    ]
    for name, seconds in s["step_seconds"].items():
        ratio, memory = s["step_ratio_to_frozen"][name], s["peak_memory_mb"][name]
        cells = (
            f"{seconds * 1e3:.0f} ms" if seconds else "–",
            f"{ratio:.3f} ×" if ratio else "–",
            f"{memory:.0f} MB" if memory else "–",
        )
        note = f"   {s['skipped'][name]}" if name in s["skipped"] else ""
        lines.append(f"{name:14}{cells[0]:>10}{cells[1]:>14}{cells[2]:>14}{note}")
    lines += ["", f"{s['seconds_total']:.0f} s in all. In {out}: summary.json, plot.png, adapter/, model_step.jsonl"]
    return "\n".join(lines)
