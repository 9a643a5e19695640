"""Are the metrics what they are called, and the intervals honest?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from benchmarks import quality_metrics
from benchmarks import quality_report as reporting
from benchmarks import quality_setup as methods
from benchmarks.quality_metrics import Pair, bootstrap, difference, psnr, ssim, vmaf, vmaf_missing
from tests.support.quality import ABOUT, video

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
