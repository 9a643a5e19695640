"""Methods compared where they compute as many tiles, and by the one thing in which they differ.

A line is methods that differ in one number, such as "threshold:-3" and "threshold:-1". Between two of them figures are
interpolated, video by video, by the methods' mean costs: so differences are paired, and intervals mean what they say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tabulate import tabulate

from benchmarks.quality_metrics import Interval, Pair, bootstrap, difference
from benchmarks.quality_report import DENSE, FIDELITY, RESIDUAL, SIMULATED, TRUTH, Metric, Results, cost, text_of

COSTS = (0.4, 0.5, 0.6, 0.7)
STEPS, VOTES = "steps", "threshold"  # lines that all others are held against
_RIVALS = {STEPS: "fewer steps", VOTES: "votes"}
_BEYOND = 0.02  # of the cost: so far beyond its ends a line has the figures of its ends
_FLICKER = next(metric for metric in TRUTH if metric.name == "flicker")
METRICS = (*(metric for metric in FIDELITY if metric.name != "vmaf"), _FLICKER)

_NOTES = {
    "Over fewer steps and votes of the same cost": "What a method has more than dense generations of fewer steps, and "
    "than votes at one threshold, of the same cost: both are interpolated, video by video, and the intervals are those "
    "of paired differences. Of distances and flicker less is better.",
    "At equal cost": "Lines of methods that differ in one number, interpolated to each cost; `*` is that number. "
    "Flicker is the change to the dense video's.",
    "Ablations": "By pairs of videos; `mean-keys` and `maximum` are simulated in PyTorch.",
}


def line_of(method: str) -> str:
    """Return the name of a method's line: "threshold" of "threshold:-3", "residual:*,3" of "residual:0.2,3"."""
    family, _, value = method.partition(":")
    _, comma, rest = value.partition(",")
    return f"{family}:*,{rest}" if comma else family


def lines_of(results: Results, methods: Sequence[str], pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Return the methods of each line that were measured, in the order of their costs."""
    found: dict[str, list[str]] = {}
    for method in methods:
        if method != DENSE and results.values(method, "psnr", pairs):
            found.setdefault(line_of(method), []).append(method)
    return {line: sorted(members, key=lambda m: cost(results, m, pairs)) for line, members in found.items()}


def at_cost(
    results: Results, members: Sequence[str], metric: Metric, pairs: Sequence[Pair], wanted: float
) -> dict[Pair, float]:
    """Return a figure of a line at a cost, by pair; empty where the line does not reach there.

    Args:
        results: of the members.
        members: of the line, in the order of their costs.
        metric: which figure.
        pairs: of prompts and seeds.
        wanted: share of dense attention's tiles.
    """
    costs = [cost(results, method, pairs) for method in members]
    within = min(max(wanted, costs[0]), costs[-1]) if costs else math.nan
    if not round(abs(within - wanted), 6) <= _BEYOND:  # NaN is none
        return {}
    after = next(i for i, at in enumerate(costs) if at >= within)
    before = max(0, after - 1)
    width = costs[after] - costs[before]
    weight = (within - costs[before]) / width if width else 1.0
    low, high = (results.values(members[i], metric.name, pairs) for i in (before, after))
    return {pair: low[pair] * (1 - weight) + high[pair] * weight for pair in low if pair in high}


def _measured(results: Results, methods: Sequence[str], pairs: Sequence[Pair]) -> list[Metric]:
    return [metric for metric in METRICS if any(results.values(m, metric.name, pairs) for m in methods if m != DENSE)]


# ---- tables --------------------------------------------------------------------------------------------------------


def equal_cost_table(
    results: Results, methods: Sequence[str], pairs: Sequence[Pair], costs: Sequence[float] = COSTS
) -> str:
    """Return a markdown table: at each cost a row for each line that reaches there; "" if none does.

    What counts of flicker is how far it is from dense, so its interval is one of the difference.
    """
    lines, metrics = lines_of(results, methods, pairs), _measured(results, methods, pairs)
    rows = []
    for wanted in costs:
        for line, members in lines.items():
            found = [at_cost(results, members, metric, pairs, wanted) for metric in metrics]
            if found[0]:
                texts = [_figure(results, of, metric, pairs) for of, metric in zip(found, metrics, strict=True)]
                rows.append([f"{wanted:.2f}", f"`{line}`", str(len(found[0])), *texts])
    header = ["cost", "line", "videos", *(metric.heading for metric in metrics)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True) if rows else ""


def _figure(results: Results, values: dict[Pair, float], metric: Metric, pairs: Sequence[Pair]) -> str:
    if not values:
        return "-"
    if not metric.change:
        return text_of(bootstrap(values), metric, signed=False)
    change = difference(values, results.values(DENSE, metric.name, pairs))
    return text_of(change, metric, signed=True)


def over_rival(
    results: Results, method: str, rival: Sequence[str], metric: Metric, pairs: Sequence[Pair]
) -> Interval | None:
    """Return by how much a method's figure is above a line's at the same cost, paired; None where there is no such."""
    values = results.values(method, metric.name, pairs)
    others = at_cost(results, rival, metric, pairs, cost(results, method, pairs)) if values and rival else {}
    return difference(values, others) if values.keys() & others.keys() else None


def rivals_table(results: Results, methods: Sequence[str], pairs: Sequence[Pair]) -> str:
    """Return a markdown table: how far methods are above fewer steps, and above votes, of the same cost; "" if none."""
    lines = lines_of(results, methods, pairs)
    compared = [*((STEPS, metric) for metric in _measured(results, methods, pairs)), (VOTES, METRICS[0])]
    rows = []
    for method in (method for line, members in lines.items() if line != STEPS for method in members):
        found = [
            None if line_of(method) == rival else over_rival(results, method, lines.get(rival, []), metric, pairs)
            for rival, metric in compared
        ]
        if any(found):
            cells = [
                text_of(interval, metric, signed=True) if interval else "-"
                for interval, (_, metric) in zip(found, compared, strict=True)
            ]
            rows.append([f"`{method}`", f"{cost(results, method, pairs):.3f}", *cells])
    header = ["method", "cost", *(f"{metric.heading} over {_RIVALS[rival]}" for rival, metric in compared)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True) if rows else ""


# ---- ablations -----------------------------------------------------------------------------------------------------


def base_of(method: str, methods: Sequence[str]) -> str | None:
    """Return the method that differs from one in an option less, or in the name before the colon; None = not there."""
    family, _, value = method.partition(":")
    words = value.split(",")
    bases = [f"residual:{value}"] if family in (*RESIDUAL, *SIMULATED) else []
    if family in (*RESIDUAL, *SIMULATED):
        first = 1 if family == "cached" else 2  # the numbers that all have
        bases += [f"{family}:{','.join(words[:i] + words[i + 1 :])}" for i in range(first, len(words))]
    return next((base for base in bases if base != method and base in methods), None)


def ablation_table(results: Results, methods: Sequence[str], pairs: Sequence[Pair]) -> str:
    """Return a markdown table: what one option, or another way of choosing tiles, changes; "" if nothing was tried."""
    rows, metrics = [], _measured(results, methods, pairs)
    for method in methods:
        base = base_of(method, methods)
        if base is None or not results.values(method, "psnr", pairs):
            continue
        changes = []
        for metric in metrics:
            mine, other = (results.values(name, metric.name, pairs) for name in (method, base))
            both = mine.keys() & other.keys()
            changes.append(text_of(difference(mine, other), metric, signed=True) if both else "-")
        costs = [f"{cost(results, name, pairs):.3f}" for name in (base, method)]
        rows.append([f"`{base}`", f"`{method}`", *costs, *changes])
    header = ["from", "to", "cost from", "to", *(f"{metric.heading}, change" for metric in metrics)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True) if rows else ""


def comparisons(results: Results, methods: Sequence[str], pairs: Sequence[Pair]) -> list[str]:
    """Return the tables of this file as lines of markdown under their headings, those that there are."""
    lines = []
    tables = (rivals_table, equal_cost_table, ablation_table)
    for (heading, note), table in zip(_NOTES.items(), tables, strict=True):
        found = table(results, methods, pairs)
        lines += ["", f"## {heading}", "", note, "", found] if found else []
    return lines
