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

from PIL import Image

from examples.moving_shapes import demo
from examples.moving_shapes.judge import load_judge, measure, measure_truth
from examples.moving_shapes.log import LOG, draw_log
from examples.moving_shapes.model import load_weights
from examples.moving_shapes.sample import generate, read_prompt
from examples.moving_shapes.scenes import prompt_ids
from lite_attention import plot

SIZE = (6, 32, 32)  # 384 tokens
STEPS, SPARSE = 5, [2, 4]  # of the residual
NEVER = -math.inf


def options(threshold: float, keep: float) -> demo.Options:
    prompt = ("shape=star", "color=red")
    return demo.Options(prompt=prompt, size=SIZE, steps=STEPS, threshold=threshold, keep=keep, tile=16)


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.run(options(-3.0, 0.4))


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


def test_votes_skip_more_and_more_and_change_little(result: demo.Result) -> None:
    votes = result.skip_aware["votes"]
    assert votes.computed.shape == (STEPS, 6)
    assert (votes.computed[0] == 1).all()
    assert (votes.computed.diff(dim=0) <= 0).all()
    assert votes.computed[-1].mean() < 0.9
    assert votes.kept.shape == (STEPS, 3, 24, 24)  # layer 3 has heads of 128
    assert votes.kept[0].all()
    assert not (votes.kept[1:] & ~votes.kept[:-1]).any()  # what was dropped stays out


def test_the_residual_has_its_share_in_sparse_steps_alone(result: demo.Result) -> None:
    residual = result.skip_aware["residual"]
    wanted = torch.ones(STEPS, 6)
    wanted[SPARSE] = 0.4
    torch.testing.assert_close(residual.computed, wanted, rtol=0, atol=0.01)
    full = [step for step in range(STEPS) if step not in SPARSE]
    assert residual.kept[full].all()
    assert not residual.kept[SPARSE].flatten(1).all(1).any()
    assert residual.kept.dtype == torch.bool


@pytest.mark.parametrize("method", ["votes", "residual"])
def test_videos_are_near_the_dense_one(result: demo.Result, method: str) -> None:
    made, dense = result.skip_aware[method], result.dense
    assert 20 < made.psnr(dense) < 80
    assert 0 < made.path_distance(dense) < 0.05
    assert dense.seen.keys() == {"shape", "color", "motion", "speed", "count"}
    assert dense.seen["color"] == made.seen["color"] == "red"


def test_all_begin_with_the_same_noise() -> None:
    result = demo.run(options(NEVER, 1.0))
    for made in result.skip_aware.values():
        assert (made.computed == 1).all()
        assert made.psnr(result.dense) > 60  # the kernels round differently
        assert result.dense.seen == made.seen


def test_the_psnr_is_that_of_the_pixels(result: demo.Result) -> None:
    made = result.skip_aware["residual"]
    error = (made.video - result.dense.video).square().mean()
    assert made.psnr(result.dense) == pytest.approx(10 * math.log10(1 / float(error)), abs=1e-3)
    assert result.dense.video.shape == (6, 3, 32, 32)


def test_prints_and_draws(
    result: demo.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command makes the videos that `run` makes of the same options."""
    picture = tmp_path / "demo.png"
    command = f"demo --steps {STEPS} --threshold -3 --keep 0.4 --tile 16 --size 6 32 32 --prompt shape=star color=red"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--output", str(picture)])
    demo.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    animation = Image.open(picture.with_suffix(".gif"))
    assert (animation.size, getattr(animation, "n_frames", 1)) == ((3 * 32, 32), 6)
    printed = capsys.readouterr().out
    shares = [f"{float(made.computed[-1].mean()):.0%}" for made in result.skip_aware.values()]
    assert [str(STEPS - 1), *shares] in [line.split() for line in printed.splitlines()]
    parts = ["384 tokens; 5 steps; tiles of 16 x 16", "votes: threshold -3; residual: keeps 40%, every 3 steps"]
    for name, made in result.skip_aware.items():
        parts += [f"By {name}: {float(made.computed.mean()):.0%} of", f"PSNR {made.psnr(result.dense):.1f} dB"]
        parts += [f"{made.path_distance(result.dense):.4f} of a side"]
    assert all(part in printed for part in parts), printed


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
