"""The quality benchmarks: is what methods did measured, and said?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import lite_attention
from benchmarks import (
    calibration,
    quality,
    quality_bench,
    quality_methods,
    quality_patterns,
    quality_pretrained,
    quality_simulation,
)
from benchmarks import quality_report as reporting
from benchmarks.quality_metrics import Pair, psnr, ssim
from benchmarks.quality_setup import Setup
from tests.support import pipelines
from tests.support.quality import ABOUT, STEPS, Counting, bench_of

# ---- whole runs ----------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pair, ...]]:
    """Return a list that all later sampling is noted in."""
    calls: list[tuple[Pair, ...]] = []
    original = quality_bench.sample

    def sample(setup: Setup, pairs: Any, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(tuple(pairs))
        return original(setup, pairs, *args, **options)

    for module in (quality, quality_bench, quality_patterns):
        monkeypatch.setattr(module, "sample", sample)
    return calls


def test_first_steps_without_votes(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    for method in ("threshold:-1", "threshold:-1,2"):
        bench.run(method, [(0, 0)])
    at_once, later = (
        torch.tensor(bench.results.of(method)[0, 0]["shares"]).mean(0) for method in ("threshold:-1", "threshold:-1,2")
    )
    assert bool((at_once[1:] > 0).all())
    assert later[:3].tolist() == [0, 0, 0]
    assert float(later[3]) > 0


def test_nothing_is_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    pairs = [(0, 0), (1, 0)]
    bench_of(tmp_path).run("threshold:-1", pairs)
    assert calls == [tuple(pairs)] * 2  # dense first
    before = reporting.Results(tmp_path / "results.jsonl", ABOUT).of("threshold:-1")
    calls.clear()
    bench = bench_of(tmp_path)
    bench.run("threshold:-1", pairs)
    assert not calls
    bench.run("threshold:-1", [*pairs, (2, 0)])
    assert calls == [((2, 0),)] * 2
    assert {pair: bench.results.of("threshold:-1")[pair] for pair in pairs} == before
    # A dense video that was lost is made again when it is needed, and not its record.
    calls.clear()
    bench.videos.path("dense", (1, 0)).unlink()
    bench.run("threshold:-2", pairs)
    assert calls == [((1, 0),), tuple(pairs)]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1 + 3 + 3 + 2
    assert not bench.videos.has("threshold:-1", (1, 0))
    assert bench.videos.has("threshold:-1", (0, 0))


@pytest.mark.slow
def test_records_say_what_was_measured(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    ran, twins = quality_bench.run_all(bench, ["steps:3", "random:threshold:-1"], [(0, 0), (0, 1)])
    record = bench.results.of("threshold:-1")[0, 1]
    shares = torch.tensor(record["shares"])
    assert shares.shape == (2, STEPS)
    assert record["attention"] == pytest.approx(1 - float(shares.mean()), abs=1e-4)
    video, dense = (bench.videos.load(method, (0, 1)) for method in ("threshold:-1", "dense"))
    assert record["psnr"] == psnr(video, dense) < 60
    assert record["ssim"] == pytest.approx(ssim(video, dense))
    assert 0 < record["features"] < 1
    assert bench.results.of("steps:3")[0, 0]["attention"] == 0.75
    random = bench.results.of("random:threshold:-1")[0, 1]
    assert random["skipped"] == pytest.approx(record["skipped"], abs=0.5 / 14**2)
    assert random["psnr"] != record["psnr"]
    assert ran == ["dense", "steps:3", "threshold:-1", "random:threshold:-1"]
    assert twins == [("random:threshold:-1", "threshold:-1")]


def test_a_run_ends_before_its_budget_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of our own: each batch takes 10 s."""
    now = 0.0
    monkeypatch.setattr(quality_bench.time, "monotonic", lambda: now)
    run = quality_bench.Bench._run

    def slow(self: Any, method: str, batch: Any) -> None:
        nonlocal now
        run(self, method, batch)
        now += 10

    monkeypatch.setattr(quality_bench.Bench, "_run", slow)
    pairs = [(prompt, 0) for prompt in range(4)]
    bench = bench_of(tmp_path)  # two videos at a time
    bench.budget = quality_bench.Budget(55)
    ran, _ = quality_bench.run_all(bench, ["steps:2", "random:threshold:-1"], pairs)
    assert now == 50
    assert [len(bench.results.of(method)) for method in ran] == [4, 4, 2, 0]
    bench.budget = quality_bench.Budget()
    quality_bench.run_all(bench, ["steps:2", "random:threshold:-1"], pairs)
    assert [len(bench.results.of(method)) for method in ran] == [4] * 4
    assert now == 80  # nothing is made again


@pytest.mark.parametrize("names", [quality.METHODS, quality_pretrained.METHODS], ids=["quality", "pretrained"])
def test_the_methods_that_run_unless_told_are_some(names: tuple[str, ...]) -> None:
    for method in names:
        quality_methods.check(method, {})
    assert len(set(names)) == len(names)


TRIED = (  # one of a kind
    "steps:3", "residual:0.3,3", "residual:0.2,3", "residual:0.3,2", "cached:3", "residual:0.3,3,no-forecast",
    "residual:0.3,3,tile3d", "residual-fp8:0.3,3", "residual:0.2,2,steps=8", "maximum:0.3,3", "mean-keys:0.3,3",
    "preset:fast", "threshold:-inf", "threshold:-6", "threshold:-3", "int8:-inf", "fp8:-inf", "random:threshold:-1",
    "radial", "window:12,16,16", "rendered",
)  # fmt: skip


@pytest.mark.slow
def test_tiny_run_of_all_kinds_of_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "out"), "--prompts", "2", "--random-of-tables"]
    command += ["--methods", *TRIED]
    command += ["--calibrate", "error=0.1", "--calibration-prompts", "1"]
    ends = {"markdown": "md", "json": "json", "plot": "png", "cost-plot": "svg", "frames": "jpg"}
    outputs = {name: tmp_path / f"{name}.{end}" for name, end in ends.items()}
    command += [part for name, path in outputs.items() for part in (f"--{name}", str(path))]
    quality.main(command)
    report = outputs["markdown"].read_text()
    found = json.loads(outputs["json"].read_text())["methods"]
    names = {"dense", "threshold:-1", *TRIED}
    assert found.keys() == names | {"table:error-0.1", "random:table:error-0.1"}
    assert found["threshold:-inf"]["psnr"]["mean"] > 90
    assert found["threshold:-6"]["psnr"]["mean"] >= found["threshold:-3"]["psnr"]["mean"]
    assert 20 < found["int8:-inf"]["psnr"]["mean"] < found["threshold:-inf"]["psnr"]["mean"]
    assert found["int8:-inf"]["cost"] == 1
    assert 15 < found["fp8:-inf"]["psnr"]["mean"] < found["int8:-inf"]["psnr"]["mean"]
    assert found["table:error-0.1"]["cost"] == pytest.approx(found["random:table:error-0.1"]["cost"], abs=0.01)
    assert found["table:error-0.1"]["cost"] < 0.98
    assert found["radial"]["cost"] < 0.9
    assert found["residual:0.3,3"]["cost"] == pytest.approx((3 + 0.3) / 4, abs=0.03)
    assert found["preset:fast"]["cost"] == pytest.approx((3 + 0.5) / 4, abs=0.03)  # of so few steps
    assert found["cached:3"]["cost"] < found["residual:0.2,3"]["cost"] < found["residual:0.3,2"]["cost"]
    assert found["residual:0.2,2,steps=8"]["cost"] > 1
    assert found["rendered"]["shape"]["videos"] == 2
    assert "psnr" not in found["rendered"]
    assert "Random skipping is distinguishable from `threshold:-1` at equal sparsity, " in report
    assert all(path.stat().st_size > 500 for path in outputs.values())

    calls = counted(monkeypatch)
    quality.main(command)
    assert not calls
    assert outputs["markdown"].read_text() == report
    # On another machine, and with a method that was never run there.
    path = tmp_path / "out" / "results.jsonl"
    path.write_text(path.read_text().replace('"device": "CPU"', '"device": "another"', 1))
    with pytest.raises(ValueError, match="device another, not CPU"):
        quality.main(command)
    quality.main([*command, "--report-only", "--methods", "threshold:-1", "random:threshold:-1", "threshold:-0.5"])
    assert not calls
    again = outputs["markdown"].read_text()
    assert "float32, another, torch" in again
    rows = [
        [line.split() for line in text.splitlines() if line.startswith("| `threshold:-1`")] for text in (report, again)
    ]
    assert len(rows[0]) > 0
    assert rows[0] == rows[1]


# ---- real weights --------------------------------------------------------------------------------------------------


def test_pretrained_weights_are_measured_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pipeline of Wan, read from its folder; its parts are tiny and random."""
    pipelines.wan().save_pretrained(tmp_path / "Wan")
    calls: list[dict[str, Any]] = []
    call = WanPipeline.__call__
    monkeypatch.setattr(WanPipeline, "__call__", lambda self, **o: calls.append(o) or call(self, **o))
    enable = lite_attention.enable  # with tiles small enough for 96 tokens
    monkeypatch.setattr(lite_attention, "enable", lambda *a, **o: enable(*a, tile_shape=(16, 16), **o))
    monkeypatch.setattr(quality_simulation, "tile_shape", lambda *_: (16, 16))
    (tmp_path / "prompts.txt").write_text("a fox\n\na tram at night\n")
    command = f"""
        --pipeline {tmp_path}/Wan --out {tmp_path}/out --prompts {tmp_path}/prompts.txt --json {tmp_path}/report.json
        --plot {tmp_path}/report.png --methods threshold:-inf threshold:-1 steps:3 residual:0.3,3 mean-keys:0.3,3
        --steps 5 --height 32 --width 16 --frames 5
        --device cpu --dtype float32
    """.split()
    quality_pretrained.main(command)
    found = json.loads((tmp_path / "report.json").read_text())["methods"]
    assert list(found) == ["dense", "threshold:-inf", "threshold:-1", "steps:3", "residual:0.3,3", "mean-keys:0.3,3"]
    assert found["threshold:-inf"]["psnr"]["mean"] > 90
    assert found["threshold:-1"]["psnr"]["mean"] < 70
    assert found["threshold:-inf"]["cost"] == 1
    assert 0.1 < found["threshold:-1"]["cost"] < 0.98
    assert found["dense"]["seconds"]["mean"] > 0
    assert found["steps:3"]["cost"] == pytest.approx(0.6)
    assert found["residual:0.3,3"]["cost"] == pytest.approx((3 + 2 * 0.3) / 5, abs=0.03)  # the third and fifth skip
    assert found["mean-keys:0.3,3"]["cost"] == pytest.approx((3 + 2 * (0.3 + 1 / 16)) / 5, abs=0.03)
    assert 15 < found["residual:0.3,3"]["psnr"]["mean"] < 90
    assert 15 < found["mean-keys:0.3,3"]["psnr"]["mean"] < 90
    steps = [2, 5, 5]  # each method warms up
    assert [given["num_inference_steps"] for given in calls] == [*3 * steps, 2, 3, 3, *2 * steps]
    assert {given["prompt"] for given in calls} == {"a fox", "a tram at night"}
    assert all(given["output_type"] == "pt" and given["num_frames"] == 5 for given in calls)

    # What is skipped, from the calls themselves: the log says what the next step skips.
    pipe = quality_pretrained.load(tmp_path / "Wan", "float32", "cpu")
    lite_attention.enable(pipe, compile=False, threshold=-1.0, num_steps=5)
    with Counting(pipe, -1.0) as counting:
        pipe(**{**calls[1], "prompt": "a fox", "generator": torch.Generator().manual_seed(0)})
    shares = torch.stack([torch.stack(calls).mean() for calls in counting.found.values()])
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()[1:]]
    (record,) = (r for r in records if (r["method"], r["prompt"]) == ("threshold:-1", 0))
    assert len(shares) == 3 * 5  # sites, steps
    assert record["skipped"] == pytest.approx(float(shares.mean()), abs=1e-6)

    calls.clear()
    quality_pretrained.main(command)
    assert not calls


def test_what_calibrating_costs(capsys: pytest.CaptureFixture[str]) -> None:
    steps, calls = 3, []
    forward = calibration.VideoDiT.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration.VideoDiT, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
        calibration.main(f"--untrained 32 1 16 --size 4 32 32 --steps {steps} --device cpu".split())
    generations = len(calls) / 2  # a forward with the prompt, and one without
    assert generations == 3 * 2 + (3 + 3) * steps  # calibrated once of two steps; then dense ones, two passes, verified
    found = re.search(r"calibrating (\S+) \(passes (\S+), (\S+)\), verifying (\S+)\n", capsys.readouterr().out)
    assert found is not None
    both, first, second, verifying = map(float, found.groups())
    assert both == pytest.approx(first + second, abs=0.02)
    assert min(first, second, verifying) > 0
