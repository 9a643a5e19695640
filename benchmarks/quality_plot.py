"""The plots of the quality benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.quality_equal_cost import lines_of
from benchmarks.quality_metrics import Pair
from benchmarks.quality_report import RESIDUAL, SIMULATED, Metric, Results, cost, interval_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_NAMES = {
    "steps": "fewer steps", "threshold": "votes", "table": "votes, calibrated", "cached": "attention output cached",
    "residual-int8": "residual, INT8", "residual-fp8": "residual, INT8 and FP8", "sol": "Sol-Attn",
    "mean-keys": "mean keys (simulated)", "maximum": "residual by maxima (simulated)",
}  # fmt: skip


def label_of(line: str) -> str:
    """Return what a line is called in a plot, such as "residual, full every 3" of "residual:*,3"."""
    family, _, value = line.partition(":")
    words = value.split(",")[1:]
    if words and words[0].isdigit() and family in (*RESIDUAL, *SIMULATED) and family != "cached":
        words[0] = f"full every {words[0]}"
    if words and words[0].isdigit() and family == "sol":
        words[0] = f"{words[0]} dense steps"
    return ", ".join([_NAMES.get(family, family), *words])


def draw(
    results: Results, methods: Sequence[str], metrics: Sequence[Metric], pairs: Sequence[Pair], path: Path
) -> Figure:
    """Draw metrics with their intervals over the attention computed, a panel each, with the lines of the methods.

    Args:
        results: of the methods.
        methods: dense and what is no method of saving are left out.
        metrics: those that were not measured are left out.
        pairs: of prompts and seeds.
        path: where to save it.
    """
    from lite_attention.plot import new_figure

    metrics = [m for m in metrics if any(results.values(method, m.name, pairs) for method in methods)]
    lines = lines_of(results, methods, pairs)
    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    width, height = (4 * columns, 3.2 * rows + 0.8) if len(metrics) > 1 else (8, 6)
    figure = new_figure(width, height, "Quality over attention computed, with 95 % intervals")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, metric in zip(panels, metrics, strict=False):
        for number, (line, members) in enumerate(lines.items()):
            points = [(cost(results, m, pairs), interval_of(results, m, metric, pairs)) for m in members]
            known = [(x, interval) for x, interval in points if interval is not None and not math.isnan(x)]
            if known:
                means = [interval.mean for _, interval in known]
                # A percentile interval need not hold the mean, where there are few values.
                reach = [
                    [max(0.0, interval.mean - interval.low) for _, interval in known],
                    [max(0.0, interval.high - interval.mean) for _, interval in known],
                ]
                axes.errorbar(
                    [x for x, _ in known], means, yerr=reach, marker="o", markersize=3, capsize=2, linewidth=1,
                    label=label_of(line), color=f"C{number}", linestyle="-" if number < 10 else "--",  # ten colors
                )  # fmt: skip
        if metric.change:
            axes.axhline(0, color="black", linewidth=0.8, linestyle="dotted")
        better = "more" if metric.better > 0 else "less"
        label = f"{metric.heading}, change" if metric.change else metric.heading
        axes.set(xlabel="attention computed (share of tiles)", ylabel=f"{label} ({better} is better)")
        axes.grid(alpha=0.3)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    if len(metrics) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    else:  # narrower than four columns of names
        panels[0].legend(loc="upper left", frameon=False)
    figure.savefig(path)
    return figure
