"""The trained weights, and the demo that shows what skipping does to them, at a size that runs in seconds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from examples.moving_shapes import demo
from examples.moving_shapes.judge import load_judge, measure, measure_truth
from examples.moving_shapes.log import LOG, draw_log
from examples.moving_shapes.model import load_weights
from examples.moving_shapes.sample import generate, read_prompt
from examples.moving_shapes.scenes import prompt_ids
from lite_attention import plot

SIZE = (6, 32, 32)  # 384 tokens
NEVER = -math.inf


def options(threshold: float) -> demo.Options:
    return demo.Options(prompt=("shape=star", "color=red"), size=SIZE, steps=4, threshold=threshold, tile=16)


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.run(options(-3.0))


# ---- the weights ---------------------------------------------------------------------------------------------------


def test_the_judge_knows_rendered_scenes() -> None:
    measured = measure_truth(load_judge(), 8, (10, 48, 48))
    assert min(measured[name] for name in ("shape", "color", "motion", "speed", "count")) >= 0.85
    assert measured["path_error"] < 0.005


def test_the_model_paints_what_is_asked_for() -> None:
    asked = [prompt_ids(shape=shape, color=color, count="1") for shape, color in (("star", "red"), ("circle", "cyan"))]
    prompt = torch.cat(asked)
    video = generate(load_weights().eval(), prompt, SIZE, steps=8)
    measured = measure(load_judge(), video, prompt)
    assert measured["color"] == 1
    assert measured["shape"] == 1
    assert measured["certainty"] > 0.9


# ---- the demo ------------------------------------------------------------------------------------------------------


def test_skips_more_and_more_and_changes_little(result: demo.Result) -> None:
    sparsity = result.sparsity
    assert sparsity.shape == (4, 6)
    assert (sparsity[0] == 0).all()
    assert (sparsity.diff(dim=0) >= 0).all()
    assert sparsity[-1].mean() > 0.1
    assert result.kept.shape == (4, 3, 24, 24)  # layer 3 has heads of 128
    assert result.kept[0].all()
    assert not (result.kept[1:] & ~result.kept[:-1]).any()  # what was dropped stays out
    assert 20 < result.psnr < 80
    assert 0 < result.path_distance < 0.05
    assert result.dense.seen.keys() == {"shape", "color", "motion", "speed", "count"}
    assert result.dense.seen["color"] == result.skip_aware.seen["color"] == "red"


def test_both_begin_with_the_same_noise() -> None:
    result = demo.run(options(NEVER))
    assert (result.sparsity == 0).all()
    assert result.psnr > 80  # the kernels round differently
    assert result.dense.seen == result.skip_aware.seen


def test_the_psnr_is_that_of_the_pixels(result: demo.Result) -> None:
    error = (result.skip_aware.video - result.dense.video).square().mean()
    assert result.psnr == pytest.approx(10 * math.log10(1 / float(error)), abs=1e-3)
    assert result.dense.video.shape == (6, 3, 32, 32)


def test_prints_and_draws(
    result: demo.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command makes the videos that `run` makes of the same options."""
    picture = tmp_path / "demo.png"
    command = "demo --steps 4 --threshold -3 --tile 16 --size 6 32 32 --prompt shape=star color=red --output"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(picture)])
    demo.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    last_step = ["3", *(f"{share:.0%}" for share in (*result.sparsity[3].tolist(), float(result.sparsity[3].mean())))]
    assert last_step in [line.split() for line in printed.splitlines()]
    for part in (
        "384 tokens; 4 steps; threshold -3, tiles of 16 x 16", f"PSNR {result.psnr:.1f} dB",
        f"{float(result.sparsity.mean()):.0%} of all", f"{result.path_distance:.4f} of a side apart",
    ):  # fmt: skip
        assert part in printed


def test_what_is_wrong_with_a_prompt_is_told() -> None:
    with pytest.raises(ValueError, match="color: expected one of red"):
        read_prompt(["color=pink"])
    with pytest.raises(ValueError, match="fields of shape"):
        read_prompt(["nonsense"])


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "lite-attention\[plot\]"'):
        plot.require_matplotlib()


# ---- the log of the training ---------------------------------------------------------------------------------------


def test_the_log_is_drawn_a_curve_for_each_size() -> None:
    lines = [
        {"step": 50 * i, "minutes": i, "loss": {"a": float(i), **({"b": 1.0} if i % 2 else {})}} for i in range(1, 21)
    ]
    (axes,) = draw_log(lines).axes
    curves = {curve.get_label(): curve.get_xydata().tolist() for curve in axes.lines}
    assert curves == {"a": [[275.0, 5.5], [775.0, 15.5]], "b": [[500.0, 1.0]]}
    assert json.loads(LOG.read_text().splitlines()[-1])["step"] == 11400
