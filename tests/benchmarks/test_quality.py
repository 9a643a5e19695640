"""The quality benchmarks: do methods do what they say, and is what they did measured?"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import lite_attention
from benchmarks import calibration, quality, quality_pretrained
from benchmarks import quality_methods as methods
from benchmarks import quality_report as reporting
from benchmarks.quality_metrics import Pair, psnr, ssim
from examples.moving_shapes.sample import generate
from lite_attention.calibration.probe import AttentionProbe, CaughtCall, Output
from lite_attention.compile import settings
from lite_attention.inspection import named_states
from lite_attention.ops.tiles import diagonal_tile
from tests.support import pipelines
from tests.support.quality import ABOUT, SIZE, STEPS, bench_of, setup

# ---- methods -------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_example() -> None:
    of = setup()
    prompt = methods.scene(3).prompt()
    start = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(11))
    wanted = generate(of.model, prompt, SIZE, STEPS, 3.0, seed=11)
    torch.testing.assert_close(methods.denoise(of.model, prompt, start, STEPS, 3.0), wanted, rtol=0, atol=0)


def test_a_video_does_not_depend_on_its_batch() -> None:
    of = setup()
    lite_attention.enable(of.model, threshold=-1.0, num_steps=STEPS, compile=False, tile_shape=(16, 16))
    pairs = [(0, 0), (0, 1), (1, 0)]
    together = methods.sample(of, pairs, STEPS).int()
    for pair, one in zip(pairs, together, strict=True):
        assert (methods.sample(of, [pair], STEPS)[0].int() - one).abs().max() <= 1
    assert all((together[a] != together[b]).any() for a, b in ((0, 1), (0, 2), (1, 2)))


class Counting(AttentionProbe):
    """Counts what each call of the op skips, by site, step and video."""

    def __init__(self, model_or_pipe: Any, threshold: float) -> None:
        self.found: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.threshold = threshold
        super().__init__(model_or_pipe)

    def attend(self, call: CaughtCall) -> Output:
        share = call.skipped.float().mean((1, 2, 3))
        self.found.setdefault((call.site, call.control.step), []).append(share)
        return call.run(torch.full_like(call.args[5], self.threshold))


@pytest.mark.parametrize("options", [{"threshold": -1.0}, {"initial_mask": (2, 3, 6)}], ids=["votes", "mask"])
def test_shares_are_what_the_calls_skip(options: dict[str, Any]) -> None:
    of = setup()
    if "initial_mask" in options:
        mask = lite_attention.masks.window(*of.grid, radius=options["initial_mask"])
        options = {"initial_mask": mask, "threshold": -math.inf}
    lite_attention.enable(of.model, num_steps=STEPS, compile=False, tile_shape=(16, 16), **options)
    noted = methods.SkipShares(of.model, 2, STEPS)
    with Counting(of.model, options["threshold"]) as counting:
        methods.sample(of, [(0, 0), (1, 0)], STEPS, noted.after_step)
    sites = list(dict.fromkeys(site for site, _ in counting.found))
    for step in range(STEPS):
        for i, site in enumerate(sites):
            calls = counting.found[site, step]
            assert len(calls) == 2  # cond and uncond
            torch.testing.assert_close(noted.shares[:, i, step], torch.stack(calls).mean(0))
    assert noted.shares[:, :, -1].min() > 0.02
    assert (noted.shares[:, :, 0] > 0).all() == ("initial_mask" in options)


def test_random_skips_are_as_many_nested_and_never_on_the_diagonal() -> None:
    of = setup()
    lite_attention.enable(of.model, threshold=-math.inf, num_steps=STEPS, compile=False, tile_shape=(16, 16))
    wanted = torch.tensor([[[0, 0.1, 0.3, 0.5], [0, 0.2, 0.2, 0.9]], [[0, 0.0, 0.4, 0.4], [0, 0.05, 0.1, 0.15]]])
    random = methods.RandomSkips(of.model, wanted, [(0, 0), (1, 0)])
    kept: list[list[torch.Tensor]] = []

    def after_step(step: int) -> None:
        random.after_step(step)
        kept.append([state.kept_tiles().clone() for state in named_states(of.model).values()])

    sampled = methods.sample(of, [(0, 0), (1, 0)], STEPS, after_step)
    torch.testing.assert_close(random.shares, wanted, rtol=0, atol=0.5 / 14**2)
    diagonal = [diagonal_tile(i, 216, 216, 16, 16) for i in range(14)]
    for site in range(2):
        for step in range(STEPS - 1):
            skipped = ~kept[step][site]  # [slots, B, heads, q_tiles, k_tiles]
            assert not skipped[..., range(14), diagonal].any()
            heads = skipped.float().mean((-1, -2))
            torch.testing.assert_close(
                heads, wanted[:, site, step + 1].view(1, 2, 1).expand_as(heads), rtol=0, atol=0.5 / 14**2
            )
            assert step == 0 or not (~kept[step - 1][site] & ~skipped).any()
        assert (kept[2][site][0, 0, 0] != kept[2][site][0, 0, 1]).any()  # each head has its own
    assert (random._ranks[0][:, :, :2] != random._ranks[1]).any()  # and so has each site
    lite_attention.disable(of.model)
    assert (methods.sample(of, [(0, 0), (1, 0)], STEPS) != sampled).flatten(1).any(1).all()


def test_heads_are_classified_by_what_they_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    of = setup()
    seen: list[tuple[int, ...]] = []

    def classify(pattern: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(tuple(query.shape))
        return torch.arange(query.shape[2]) % 2

    monkeypatch.setattr(methods.masks, "classify_heads", classify)
    pattern = methods.pattern_of(of, "spatial-temporal:1,0")
    assert seen == [(1, 216, 4, 16), (1, 216, 2, 32)] * (2 * STEPS)  # blocks, by branch and step; no cross-attention
    plain = lite_attention.masks.spatial_temporal(*of.grid, near_frames=1, near_tokens=0).tiles(16, 16)
    assert (plain[0] != plain[1]).any()
    lite_attention.enable(of.model, threshold=-math.inf, initial_mask=pattern, compile=False, tile_shape=(16, 16))
    methods.sample(of, [(0, 0)], 1)
    for classes, state in zip(([0, 1, 0, 1], [0, 1]), named_states(of.model).values(), strict=True):
        torch.testing.assert_close(~state.kept_tiles()[0, 0, :, :14, :14], plain[classes])


def test_each_site_has_the_tiles_of_its_head_dim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (methods, settings):
        monkeypatch.setattr(module, "tile_shape", lambda head_dim, *_: {16: (16, 24), 32: (16, 12)}[head_dim])
    bench, pair, path = bench_of(tmp_path, tile=None), (0, 0), tmp_path / "error.toml"
    quality.calibrate(bench.setup, "error=0.1", path, prompts=1, held_out=0)
    bench.setup.tables = {"error": path}
    bench.run("table:error", [pair])
    table = lite_attention.LiteAttentionRegistry.from_model(bench.setup.model, "load", filename=path).table
    assert table is not None
    assert list(table.tile_shapes.values()) == [(16, 24), (16, 12)]
    assert [threshold.shape[2] for threshold in table.thresholds.values()] == [4, 2]
    for method in ("random:table:error", "tile3d:-1", "radial", "spatial-temporal:1,0"):
        bench.run(method, [pair])
        states = named_states(bench.setup.model)
        assert {site: (state.tile_m, state.tile_n) for site, state in states.items()} == table.tile_shapes
        assert 0.02 < bench.results.of(method)[pair]["skipped"] < 0.9
    by_table, at_random = (bench.results.of(method)[pair] for method in ("table:error", "random:table:error"))
    assert at_random["skipped"] == pytest.approx(by_table["skipped"], abs=0.5 / (14 * 9))


@pytest.mark.parametrize(
    "method",
    [
        "thresholds:-3",
        "threshold:1",
        "threshold:-3,x",
        "table:none",
        "window:3",
        "random:window:1,1,1",
        "random:0.5",
        "steps:x",
    ],
)
def test_wrong_methods_are_told(method: str) -> None:
    with pytest.raises(ValueError, match=f"method {method}: expected"):
        methods.check(method, {})


# ---- whole runs ----------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pair, ...]]:
    """Return a list that all later sampling is noted in."""
    calls: list[tuple[Pair, ...]] = []
    original = methods.sample

    def sample(setup: quality.Setup, pairs: Any, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(tuple(pairs))
        return original(setup, pairs, *args, **options)

    for module in (quality, methods):
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
    ran, twins = quality.run_all(bench, ["steps:threshold:-1", "steps:3", "random:threshold:-1"], [(0, 0), (0, 1)])
    record = bench.results.of("threshold:-1")[0, 1]
    shares = torch.tensor(record["shares"])
    assert shares.shape == (2, STEPS)
    assert record["attention"] == pytest.approx(1 - float(shares.mean()), abs=1e-4)
    video, dense = (bench.videos.load(method, (0, 1)) for method in ("threshold:-1", "dense"))
    assert record["psnr"] == psnr(video, dense) < 60
    assert record["ssim"] == pytest.approx(ssim(video, dense))
    assert bench.results.of("steps:3")[0, 0]["attention"] == 0.75
    random = bench.results.of("random:threshold:-1")[0, 1]
    assert random["skipped"] == pytest.approx(record["skipped"], abs=0.5 / 14**2)
    assert random["psnr"] != record["psnr"]
    # A tenth of four steps is less than a step: there is no such twin.
    assert ran == ["dense", "threshold:-1", "steps:3", "random:threshold:-1"]
    assert twins == [("random:threshold:-1", "threshold:-1")]
    bench.results.add([{**record, "seed": seed, "attention": 0.55} for seed in (0, 1)])
    assert bench.resolved("steps:threshold:-1", [(0, 0), (0, 1)]) == "steps:2"


@pytest.mark.slow
def test_tiny_run_of_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "out"), "--prompts", "2", "--random-of-tables"]
    command += ["--calibrate", "error=0.1", "--calibration-prompts", "1"]
    outputs = {name: tmp_path / f"report.{end}" for name, end in
               {"markdown": "md", "json": "json", "plot": "png", "frames": "jpg"}.items()}  # fmt: skip
    command += [part for name, path in outputs.items() for part in (f"--{name}", str(path))]
    quality.main(command)
    report = outputs["markdown"].read_text()
    found = json.loads(outputs["json"].read_text())["methods"]
    names = {m for m in quality.METHODS if not m.startswith("steps")}
    assert found.keys() == names | {"table:error-0.1", "random:table:error-0.1"}
    assert found["threshold:-inf"]["psnr"]["mean"] > 90
    assert found["threshold:-6"]["psnr"]["mean"] >= found["threshold:-3"]["psnr"]["mean"]
    assert 20 < found["int8:-inf"]["psnr"]["mean"] < found["threshold:-inf"]["psnr"]["mean"]
    assert found["int8:-inf"]["saved"] == 0
    assert 15 < found["fp8:-inf"]["psnr"]["mean"] < found["int8:-inf"]["psnr"]["mean"]
    assert found["table:error-0.1"]["saved"] == pytest.approx(found["random:table:error-0.1"]["saved"], abs=0.01)
    assert found["table:error-0.1"]["saved"] > 0.02
    assert found["radial"]["saved"] > 0.1
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
    (tmp_path / "prompts.txt").write_text("a fox\n\na tram at night\n")
    command = f"""
        --pipeline {tmp_path}/Wan --out {tmp_path}/out --prompts {tmp_path}/prompts.txt --json {tmp_path}/report.json
        --plot {tmp_path}/report.png --methods threshold:-inf threshold:-1 --steps 5 --height 32 --width 16 --frames 5
        --device cpu --dtype float32
    """.split()
    quality_pretrained.main(command)
    found = json.loads((tmp_path / "report.json").read_text())["methods"]
    assert list(found) == ["dense", "threshold:-inf", "threshold:-1"]
    assert found["threshold:-inf"]["psnr"]["mean"] > 90
    assert found["threshold:-1"]["psnr"]["mean"] < 70
    assert found["threshold:-inf"]["saved"] == 0
    assert 0.02 < found["threshold:-1"]["saved"] < 0.9
    assert found["dense"]["seconds"]["mean"] > 0
    assert [given["num_inference_steps"] for given in calls] == [2, 5, 5] * 3  # each method warms up
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
