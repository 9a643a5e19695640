"""The results are kept, and the report says what they show."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import quality_report as reporting
from tests.support.quality import ABOUT


def test_results_come_back_and_what_an_interrupt_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = reporting.Results(path, ABOUT)
    results.add({"method": "dense", "prompt": p, "seed": 0, "shape": p / 2} for p in range(3))
    path.write_text(path.read_text()[:-5])
    again = reporting.Results(path, ABOUT)
    assert again.values("dense", "shape", [(0, 0), (1, 0), (2, 0)]) == {(0, 0): 0.0, (1, 0): 0.5}
    assert again.missing("dense", [(0, 0), (2, 0)]) == [(2, 0)]
    again.add([{"method": "dense", "prompt": 2, "seed": 0, "shape": 1.0}])
    assert len(reporting.Results(path, ABOUT).of("dense")) == 3
    with pytest.raises(ValueError, match="steps 4, not 5"):
        reporting.Results(path, {**ABOUT, "steps": 5})


def made_up(path: Path, **figures: Callable[[int], float]) -> reporting.Results:
    """Results of 20 prompts by method: its PSNR by prompt."""
    results = reporting.Results(path, ABOUT)
    for method, figure in figures.items():
        name = method.replace("_", ":")
        results.add(
            {"method": name, "prompt": p, "seed": 0, "attention": 0.75, "psnr": figure(p), "shape": p % 2}
            for p in range(20)
        )
    return results


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (-1.0, "Random skipping is distinguishable from `threshold:-3` at equal sparsity, 25.0%: worse by PSNR (dB)."),
        (0.0, "Random skipping is **not** distinguishable from `threshold:-3` at equal sparsity, 25.0%."),
        (1.0, "Random skipping is **not** distinguishable"),
    ],
)
def test_report_says_whether_random_skipping_can_be_told(tmp_path: Path, change: float, wanted: str) -> None:
    def wave(prompt: int) -> float:
        return 30 + 10 * math.sin(prompt)

    def near(prompt: int) -> float:
        return wave(prompt) + change + 0.5 * math.cos(7 * prompt)

    results = made_up(tmp_path / "results.jsonl", **{"threshold:-3": wave, "random:threshold:-3": near})
    twins = [("random:threshold:-3", "threshold:-3")]
    pairs = [(p, 0) for p in range(20)]
    found = reporting.verdicts(results, twins, (*reporting.FIDELITY, *reporting.TRUTH), pairs)
    (sentence,) = reporting.sentences(found)
    assert sentence.startswith(wanted)
    told = "shape" if change else "PSNR (dB), shape"
    assert f"Not told apart by {told}: these show nothing here." in sentence
    assert ("Random is better by PSNR (dB)" in sentence) == (change > 0)


def test_less_is_better_where_it_is(tmp_path: Path) -> None:
    results = reporting.Results(tmp_path / "results.jsonl", ABOUT)
    for method, jitter in {"steps:2": 0.2, "threshold:-3": 0.1}.items():
        results.add({"method": method, "prompt": p, "seed": 0, "jitter": jitter} for p in range(3))
    pairs = [(p, 0) for p in range(3)]
    found = reporting.verdicts(results, [("steps:2", "threshold:-3")], reporting.TRUTH, pairs)
    assert [(verdict.metric.name, verdict.sign) for verdict in found] == [("jitter", 1)]
