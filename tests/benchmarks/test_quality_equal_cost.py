"""Methods compared at equal cost: figures that are made up, so that what must come out is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import quality_equal_cost as equal
from benchmarks import quality_report as reporting
from benchmarks.quality_plot import draw, label_of
from tests.support.quality import ABOUT

PAIRS = [(prompt, 0) for prompt in range(12)]
PSNR, FLICKER = equal.METRICS[0], equal.METRICS[-1]


def psnr_of_steps(cost: float, prompt: int) -> float:
    """A straight line over the cost, another one for each prompt."""
    return 20 + 10 * cost + 5 * math.sin(prompt) * cost


def results_of(folder: Path) -> reporting.Results:
    results = reporting.Results(folder / "results.jsonl", ABOUT)

    def add(method: str, cost: float, more: float, flicker: float = 0.1) -> None:
        results.add(
            {"method": method, "prompt": p, "seed": 0, "attention": cost, "psnr": psnr_of_steps(cost, p) + more,
             "flicker": flicker}
            for p, _ in PAIRS
        )  # fmt: skip

    for steps in (8, 10, 12, 14):
        add(f"steps:{steps}", steps / 20, 0.0)
    add("threshold:-1", 0.5, -5.0)
    add("threshold:-2", 0.625, -5.0)
    add("residual:0.2,3", 0.52, 3.0, flicker=0.13)
    add("residual:0.3,3", 0.58, 4.0)
    add("residual:0.3,3,no-forecast", 0.58, 1.0)
    add("residual-int8:0.3,3", 0.58, 3.5)
    add("residual:0.9,2", 0.95, 9.0)
    results.add({"method": "dense", "prompt": p, "seed": 0, "attention": 1.0, "flicker": 0.1} for p, _ in PAIRS)
    return results


METHODS = [
    "dense", "residual:0.3,3", "steps:14", "steps:8", "threshold:-2", "threshold:-1", "steps:10", "steps:12",
    "residual:0.2,3", "residual:0.3,3,no-forecast", "residual-int8:0.3,3", "residual:0.9,2", "cached:3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("steps:10", "steps"),
        ("threshold:-3", "threshold"),
        ("threshold:-3,4", "threshold:*,4"),
        ("residual:0.2,3", "residual:*,3"),
        ("residual:0.2,3,no-forecast", "residual:*,3,no-forecast"),
        ("cached:3", "cached"),
        ("random:threshold:-3", "random"),
        ("radial", "radial"),
    ],
)
def test_lines_leave_one_number_open(method: str, line: str) -> None:
    assert equal.line_of(method) == line


def test_lines_are_in_the_order_of_their_costs(tmp_path: Path) -> None:
    lines = equal.lines_of(results_of(tmp_path), METHODS, PAIRS)
    assert lines["steps"] == ["steps:8", "steps:10", "steps:12", "steps:14"]
    assert lines["threshold"] == ["threshold:-1", "threshold:-2"]
    assert "dense" not in lines
    assert "cached" not in lines  # no records


@pytest.mark.parametrize("cost", [0.4, 0.47, 0.5, 0.58, 0.7])
def test_straight_lines_are_met_between_their_points(tmp_path: Path, cost: float) -> None:
    results = results_of(tmp_path)
    steps = equal.lines_of(results, METHODS, PAIRS)["steps"]
    found = equal.at_cost(results, steps, PSNR, PAIRS, cost)
    assert found == pytest.approx({pair: psnr_of_steps(cost, pair[0]) for pair in PAIRS})


@pytest.mark.parametrize(("cost", "at"), [(0.39, 0.4), (0.71, 0.7), (0.3, None), (0.8, None)])
def test_little_beyond_its_end_a_line_is_as_there(tmp_path: Path, cost: float, at: float | None) -> None:
    results = results_of(tmp_path)
    steps = equal.lines_of(results, METHODS, PAIRS)["steps"]
    found = equal.at_cost(results, steps, PSNR, PAIRS, cost)
    assert found == ({} if at is None else pytest.approx({pair: psnr_of_steps(at, pair[0]) for pair in PAIRS}))
    assert equal.at_cost(results, [], PSNR, PAIRS, cost) == {}


def test_differences_are_paired(tmp_path: Path) -> None:
    """Prompts differ by dB, what a method is better by does not: so its interval has no width."""
    results = results_of(tmp_path)
    steps = equal.lines_of(results, METHODS, PAIRS)["steps"]
    over = equal.over_rival(results, "residual:0.3,3", steps, PSNR, PAIRS)
    assert over == pytest.approx((4, 4, 4))
    assert equal.over_rival(results, "residual:0.9,2", steps, PSNR, PAIRS) is None  # no such cost
    assert equal.over_rival(results, "cached:3", steps, PSNR, PAIRS) is None


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_tables_say_it(tmp_path: Path) -> None:
    results = results_of(tmp_path)
    rivals = {row[0]: row[1:] for row in rows_of(equal.rivals_table(results, METHODS, PAIRS))}
    assert rivals["`residual:0.3,3`"][:2] == ["0.580", "+4.0 (+4.0 to +4.0)"]
    assert rivals["`residual:0.3,3`"][-1] == "+9.0 (+9.0 to +9.0)"
    assert rivals["`residual:0.2,3`"][-2] == "+0.0300 (+0.0300 to +0.0300)"
    assert rivals["`threshold:-1`"][1] == "-5.0 (-5.0 to -5.0)"
    assert rivals["`threshold:-1`"][-1] == "-"
    assert not {"`steps:10`", "`residual:0.9,2`", "`cached:3`"} & rivals.keys()

    at_cost = {(row[0], row[1]): row[2:] for row in rows_of(equal.equal_cost_table(results, METHODS, PAIRS))}
    assert at_cost.keys() == {
        *((cost, "`steps`") for cost in ("0.40", "0.50", "0.60", "0.70")),
        *((cost, "`threshold`") for cost in ("0.50", "0.60")),
        *((cost, "`residual:*,3`") for cost in ("0.50", "0.60")),
        ("0.60", "`residual:*,3,no-forecast`"), ("0.60", "`residual-int8:*,3`"),
    }  # fmt: skip
    assert at_cost["0.50", "`residual:*,3`"][0] == "12"
    assert at_cost["0.50", "`residual:*,3`"][-1] == "+0.0300 (+0.0300 to +0.0300)"

    ablations = {(row[0], row[1]): row[2:] for row in rows_of(equal.ablation_table(results, METHODS, PAIRS))}
    assert ablations.keys() == {
        ("`residual:0.3,3`", "`residual:0.3,3,no-forecast`"), ("`residual:0.3,3`", "`residual-int8:0.3,3`")
    }  # fmt: skip
    assert ablations["`residual:0.3,3`", "`residual:0.3,3,no-forecast`"][:3] == [
        "0.580",
        "0.580",
        "-3.0 (-3.0 to -3.0)",
    ]


@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("residual:0.3,3,tile3d", "residual:0.3,3"),
        ("residual:0.3,3,no-forecast,tile3d", "residual:0.3,3,tile3d"),
        ("residual-int8:0.3,3", "residual:0.3,3"),
        ("maximum:0.3,3", "residual:0.3,3"),
        ("cached:3,no-forecast", "cached:3"),
        ("residual:0.3,3", None),
        ("residual:0.2,3,bf16", None),
        ("threshold:-3,4", None),
        ("steps:10", None),
    ],
)
def test_ablations_differ_by_one_thing(method: str, base: str | None) -> None:
    there = ["residual:0.3,3", "residual:0.3,3,tile3d", "cached:3", "threshold:-3", "steps:10", "steps:8", method]
    assert equal.base_of(method, there) == base


def test_nothing_measured_makes_no_table(tmp_path: Path) -> None:
    results = reporting.Results(tmp_path / "results.jsonl", ABOUT)
    for table in (equal.rivals_table, equal.equal_cost_table, equal.ablation_table):
        assert table(results, METHODS, PAIRS) == ""


def test_a_plot_has_each_line_at_its_costs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = results_of(tmp_path)
    figure = draw(results, METHODS, [PSNR], PAIRS, tmp_path / "cost.png")
    (axes,) = figure.axes
    drawn = {bars.get_label(): bars.lines[0].get_xdata().tolist() for bars in axes.containers}
    assert drawn["fewer steps"] == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert drawn["residual, full every 3"] == pytest.approx([0.52, 0.58])
    assert drawn["votes"] == pytest.approx([0.5, 0.625])
    assert label_of("residual-int8:*,3") == "residual, INT8, full every 3"
    assert label_of("sol:*,4,no-tail") == "Sol-Attn, 4 dense steps, no-tail"
    box = (axes.get_legend() or figure.legends[0]).get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1  # no name is cut off
    assert (tmp_path / "cost.png").stat().st_size > 500
