"""The quality report: are the metrics what they are called, the intervals honest, and methods what they say?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

import lite_attention
from benchmarks import calibration, quality, quality_metrics, quality_pretrained
from benchmarks import quality_methods as methods
from benchmarks import quality_report as reporting
from benchmarks.quality_metrics import Pair, bootstrap, difference, psnr, ssim, vmaf, vmaf_missing
from examples.moving_shapes.sample import generate
from examples.moving_shapes.scenes import Size
from lite_attention.calibration.probe import AttentionProbe, CaughtCall, Output
from lite_attention.compile import settings
from lite_attention.inspection import named_states
from lite_attention.ops.tiles import diagonal_tile
from tests.support import diffusers_models as dm

SIZE: Size = (6, 24, 24)  # 216 tokens, 14 x 14 tiles
STEPS = 4
ABOUT = {"size": SIZE, "tokens": 216, "steps": STEPS, "guidance": 3.0, "dtype": "float32"}


def video(seed: int, frames: int = 2, height: int = 16, width: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, frames, height, width), generator=generator, dtype=torch.uint8)


def setup(**options: Any) -> quality.Setup:
    model, judge = quality.tiny()
    return quality.Setup(model, judge, SIZE, STEPS, **{"tile": (16, 16), "batch": 2, **options})


def bench_of(folder: Path, **options: Any) -> quality.Bench:
    results = reporting.Results(folder / "results.jsonl", ABOUT)
    return quality.Bench(setup(**options), results, reporting.Videos(folder / "videos"))


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_all_pixels() -> None:
    one = torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    other = one.clone()
    other[:, 0] = 10  # half of the pixels, so the mean squared error is 50
    assert psnr(other, one) == pytest.approx(10 * math.log10(255**2 / 50))
    assert psnr(one, other) == psnr(other, one)  # the difference of bytes must not wrap round
    assert psnr(one, one) == quality_metrics.MOST_PSNR


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_psnr_and_ssim_are_those_of_torchmetrics(share: float) -> None:
    one = video(0)
    other = (one.float() * (1 - share) + video(1).float() * share).to(torch.uint8)
    wanted = peak_signal_noise_ratio(other.double(), one.double(), data_range=255.0)
    assert psnr(other, one) == pytest.approx(float(wanted), abs=1e-5)

    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    x, y = (torch.einsum("c,cfhw->fhw", weights, v.double()) for v in (one, other))
    _, by_place = structural_similarity_index_measure(x[:, None], y[:, None], data_range=255.0, return_full_image=True)
    whole_windows = by_place[..., 5:-5, 5:-5]  # the others reach over the edge
    assert ssim(one, other) == pytest.approx(float(whole_windows.mean()), abs=1e-10)


def test_ssim_of_equal_and_of_too_small_videos() -> None:
    assert ssim(video(0), video(0)) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(video(0)[:, :, :10], video(1)[:, :, :10])


@pytest.mark.skipif(vmaf_missing() is not None, reason=str(vmaf_missing()))
def test_vmaf_falls_with_noise() -> None:
    clean = methods.to_bytes(methods.scene(0).render((8, 48, 64)))[0]
    noisy = (clean.float() + 20 * torch.randn(clean.shape)).clamp(0, 255).to(torch.uint8)
    assert vmaf(clean, clean) > 95 > vmaf(noisy, clean) + 5


def test_without_vmaf_the_report_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (quality_metrics, reporting):
        monkeypatch.setattr(module, "vmaf_missing", lambda: "imageio-ffmpeg is not installed")
    assert quality_metrics.fidelity(video(0), video(1))["vmaf"] is None
    with pytest.raises(RuntimeError, match="not installed"):
        vmaf(video(0), video(1))
    results = reporting.Results(tmp_path / "r", ABOUT)
    results.add([{"method": "threshold:-3", "prompt": 0, "seed": 0, "psnr": 30.0, "vmaf": None}])
    assert reporting.vmaf_note(results, ["threshold:-3"], [(0, 0)]) == "No VMAF: imageio-ffmpeg is not installed."


def test_vmaf_is_made_up_for_where_videos_were_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results, videos = reporting.Results(tmp_path / "r", ABOUT), reporting.Videos(tmp_path)
    results.add({"method": "threshold:-3", "prompt": p, "seed": 0, "psnr": 30.0, "vmaf": None} for p in range(2))
    videos.save("dense", (0, 0), video(0))
    videos.save("threshold:-3", (0, 0), video(1))
    monkeypatch.setattr(reporting, "vmaf_missing", lambda: None)
    monkeypatch.setattr(reporting, "fidelity", lambda one, _: {"vmaf": 50.0 + float(torch.equal(one, video(1)))})
    results.fill_vmaf(videos)
    assert reporting.Results(tmp_path / "r", ABOUT).values("threshold:-3", "vmaf", [(0, 0), (1, 0)]) == {(0, 0): 51.0}
    assert "Measured on 1 videos" in reporting.vmaf_note(results, ["threshold:-3"], [(0, 0), (1, 0)])


# ---- intervals -----------------------------------------------------------------------------------------------------


def normal(count: int, seed: int, seeds: int = 1) -> dict[Pair, float]:
    drawn = torch.randn(count, seeds, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {(prompt, s): float(drawn[prompt, s]) for prompt in range(count) for s in range(seeds)}


def test_intervals_cover_the_true_mean_as_often_as_they_should() -> None:
    intervals = [bootstrap(normal(40, seed), resamples=400) for seed in range(300)]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals) / 300
    assert 0.89 <= covered <= 0.98  # 95 % of the percentile interval are some 94 % at n = 40
    widths = [interval.high - interval.low for interval in intervals]
    assert sum(widths) / 300 == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.08)


def test_intervals_are_repeatable_and_hold_the_mean() -> None:
    values = normal(30, 5, 2)
    interval = bootstrap(values)
    assert interval == bootstrap(dict(reversed(values.items())))
    assert interval.low < interval.mean < interval.high
    assert interval.mean == pytest.approx(sum(values.values()) / 60)
    assert bootstrap({(0, 0): 2.0, (1, 0): 2.0}) == (2, 2, 2)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap({})


def test_seeds_of_a_prompt_are_no_further_evidence() -> None:
    values = normal(30, 5)
    repeated = {(prompt, seed): value for (prompt, _), value in values.items() for seed in range(4)}
    assert bootstrap(repeated) == pytest.approx(bootstrap(values))
    independent = bootstrap({(4 * prompt + seed, 0): value for (prompt, seed), value in repeated.items()})
    assert independent.high - independent.low < 0.6 * (bootstrap(values).high - bootstrap(values).low)


def test_differences_are_paired() -> None:
    values = normal(30, 5)
    higher = {pair: 100 * value + 0.1 for pair, value in values.items()}
    found = difference(higher, {pair: 100 * value for pair, value in values.items()})
    assert found == pytest.approx((0.1, 0.1, 0.1))
    assert found.sign == 1
    assert difference(values, values).sign == 0
    # Of those that only one has, nothing is counted.
    assert difference(values | {(99, 0): 1e6}, {(0, 0): 0.0}).mean == pytest.approx(values[0, 0])


# ---- results -------------------------------------------------------------------------------------------------------


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


class TinyPipeline(DiffusionPipeline):
    """Denoises noise with a tiny Wan transformer, and takes what Wan's pipeline does."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, prompt: str, generator: torch.Generator, output_type: str, num_inference_steps: int,
        callback_on_step_end: Any = None, **more: Any,
    ) -> SimpleNamespace:  # fmt: skip
        self.calls.append({"prompt": prompt, "steps": num_inference_steps, "output_type": output_type, **more})
        said = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(len(prompt)))
        latent = 0.1 * torch.randn(1, 4, 3, 16, 16, generator=generator) + dm.latents(3, 16, 16)
        self.scheduler.set_timesteps(num_inference_steps)
        with self.progress_bar(total=num_inference_steps):
            for i, t in enumerate(self.scheduler.timesteps):
                with self.transformer.cache_context("cond", step_index=i):
                    velocity = self.transformer(latent, t.view(1), said, return_dict=False)[0]
                latent = self.scheduler.step(velocity, t, latent, return_dict=False)[0]
                if callback_on_step_end is not None:
                    callback_on_step_end(self, i, t, {})
        return SimpleNamespace(frames=(latent[:, :3].transpose(1, 2) / 6 + 0.5).clamp(0, 1))


def test_pretrained_weights_are_measured_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = TinyPipeline(dm.WAN_OF_ONE_LAYER.model(), FlowMatchEulerDiscreteScheduler())
    asked: list[Any] = []

    def from_pretrained(path: Path, **options: Any) -> TinyPipeline:
        asked.append((path, options))
        return pipe

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    enable = lite_attention.enable  # with tiles small enough for 192 tokens
    monkeypatch.setattr(lite_attention, "enable", lambda *a, **o: enable(*a, tile_shape=(16, 16), **o))
    (tmp_path / "prompts.txt").write_text("a fox\n\na tram at night\n")
    command = ["--pipeline", str(tmp_path / "Wan"), "--out", str(tmp_path / "out"), "--steps", "5", "--device", "cpu"]
    command += [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--methods",
        "threshold:-inf",
        "threshold:-1",
        "--dtype",
        "float32",
    ]
    command += ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "report.png"), "--frames", "9"]
    quality_pretrained.main(command)
    assert asked == [(tmp_path / "Wan", {"local_files_only": True, "torch_dtype": torch.float32})]
    found = json.loads((tmp_path / "report.json").read_text())["methods"]
    assert list(found) == ["dense", "threshold:-inf", "threshold:-1"]
    assert found["threshold:-inf"]["psnr"]["mean"] > 90
    assert found["threshold:-1"]["psnr"]["mean"] < 60
    assert found["threshold:-inf"]["saved"] == 0
    assert 0.02 < found["threshold:-1"]["saved"] < 0.9
    assert found["dense"]["seconds"]["mean"] > 0
    steps = [call["steps"] for call in pipe.calls]
    assert steps == [2, 5, 5] * 3  # each method warms up
    assert {call["prompt"] for call in pipe.calls} == {"a fox", "a tram at night"}
    assert all(call["output_type"] == "pt" and call["num_frames"] == 9 for call in pipe.calls)

    # What is skipped, from the calls themselves: the log says what the next step skips.
    lite_attention.enable(pipe, compile=False, threshold=-1.0, num_steps=5)
    with Counting(pipe, -1.0) as counting:
        pipe("a fox", torch.Generator().manual_seed(0), "pt", 5)
    shares = torch.stack([torch.stack(calls).mean() for calls in counting.found.values()])
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()[1:]]
    (record,) = (r for r in records if (r["method"], r["prompt"]) == ("threshold:-1", 0))
    assert len(shares) == 5
    assert record["skipped"] == pytest.approx(float(shares.mean()), abs=1e-6)

    pipe.calls.clear()
    quality_pretrained.main(command)
    assert not pipe.calls


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
