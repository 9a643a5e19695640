"""Pictures: what ends up in them, read back from the figures' artists, and the log of sparsity over the steps."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toys import TILE, Toy, context, tokens

pytest.importorskip("matplotlib")

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import lite_attention
from lite_attention import SparsityLog, ThresholdTable, plot
from lite_attention.inspection import named_states
from lite_attention.ops import SkipState, skip_attention

NEVER = -math.inf


@pytest.fixture(scope="module")
def model() -> Any:
    """A toy of six layers that has run three steps of the branch cond and one of uncond."""
    model = lite_attention.enable(Toy(layers=6), compile=False, num_steps=4, tile_shape=TILE, threshold=-3.0)
    with torch.no_grad():
        for seed, (branch, steps) in enumerate({"cond": 3, "uncond": 1}.items()):
            for step in range(steps):
                with lite_attention.branch(branch, model=model):
                    model(tokens(step, seed=seed), context())
    return model


def _image(axes: Any) -> np.ndarray[Any, Any]:
    (image,) = axes.images
    return np.ma.filled(image.get_array(), np.nan)


def _saved(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_skip_maps_show_the_tiles_of_the_sites_and_heads(model: Any, tmp_path: Path) -> None:
    sites, states = ["blocks.4.attn1", "blocks.1.attn1"], named_states(model)
    assert all((s.kept_tiles()[0, 0, 1] != s.kept_tiles()[1, 0, 1]).any() for s in states.values())
    for slot in (0, 1):
        figure = plot.skip_maps(model, sites=sites, heads=[1], slot=slot, path=tmp_path / "maps.png")
        assert [axes.get_ylabel() for axes in figure.axes] == sites
        assert figure.axes[0].get_title() == "head 1"
        for site, axes in zip(sites, figure.axes, strict=True):
            kept = states[site].kept_tiles()[slot, 0, 1]
            assert np.array_equal(_image(axes), kept.numpy())
            assert not kept.all()
            assert axes.get_xlabel() == f"{float((~kept).float().mean()):.0%} skipped"
    assert _saved(tmp_path / "maps.png")
    figure = plot.skip_maps(model)
    assert len(figure.axes) == 4 * 2
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [f"blocks.{i}.attn1" for i in (0, 2, 3, 5)]


def test_skip_maps_of_states_show_only_the_tiles_of_the_last_call() -> None:
    state = SkipState(batch=2, heads=3, seq_q=512, seq_k=512, tile_m=64, tile_n=64, threshold=-1.0)
    q = torch.randn(1, 200, 3, 8)
    skip_attention(q, q[:, :130], q[:, :130], state)
    figure = plot.skip_maps({"mine": state})
    assert [_image(axes).shape for axes in figure.axes] == [(4, 3)] * 3
    assert figure.get_supxlabel() == "3 key tiles"
    assert figure.get_supylabel() == "4 query tiles"


def test_skip_maps_of_sites_that_differ_in_heads_and_tiles() -> None:
    states = {}
    for heads, tile_n in ((6, 64), (3, 32)):
        q = torch.randn(1, 200, heads, 8)
        state = states[f"{heads} heads"] = SkipState.for_inputs(q, q, tile_m=64, tile_n=tile_n, threshold=-1.0)
        skip_attention(q, q, q, state)
    figure = plot.skip_maps(states)
    assert [_image(axes).shape for axes in figure.axes] == [(4, 4)] * 3 + [(4, 7)] * 3
    assert figure.get_supxlabel() == "4 to 7 key tiles"
    assert len(plot.skip_maps(states, sites=["6 heads"]).axes) == 4
    with pytest.raises(ValueError, match=r"below 2 and 3 for 3 heads, got 0 and \[0, 5\]"):
        plot.skip_maps(states, heads=[0, 5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": ["blocks.9.attn1"]}, r"sites out of \['blocks.0.attn1', .*, got \['blocks.9.attn1'\]"),
        ({"sites": []}, "expected some"),
        ({"heads": []}, "expected some"),
        ({"heads": [2]}, r"expected below 3 and 2 for blocks.0.attn1, got 0 and \[2\]"),
        ({"slot": 3}, "expected below 3 and 2 for blocks.0.attn1, got 3"),
        ({"slot": 2}, "slot: expected one that has run, got 2, in which blocks.0.attn1 has not"),
    ],
)
def test_skip_maps_refuse_what_is_not_there(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.skip_maps(model, **arguments)


def test_skip_maps_refuse_what_has_not_run() -> None:
    with pytest.raises(ValueError, match="model_or_states: expected sites that have run, got none"):
        plot.skip_maps(Toy())
    state = SkipState(batch=1, heads=1, seq_q=64, seq_k=64, tile_m=16, tile_n=16)
    with pytest.raises(ValueError, match="slot: expected one that has run, got 1, in which mine has not"):
        plot.skip_maps({"mine": state}, slot=1)


def test_sparsity_log_and_its_heat_map(tmp_path: Path) -> None:
    model = Toy(layers=3)
    log = SparsityLog(model)
    log.record()  # nothing is known before the first call
    lite_attention.enable(model, compile=False, num_steps=4, tile_shape=TILE, threshold=-3.0)
    want = []
    for step in range(3):
        with torch.no_grad():
            model(tokens(step), context())
        if step == 0:
            log.record()
        else:
            assert log.on_step_end(None, step, 0.5, {"latents": 3}) == {"latents": 3}
        want.append([float(state.sparsity()) for state in named_states(model).values()])
    assert log.sites == [f"blocks.{i}.attn1" for i in range(3)]
    table = log.table()
    assert table[:, 0].isnan().all()
    assert torch.equal(table[:, 1:], torch.tensor(want).T)
    assert table[0, 3] > table[0, 1] > 0

    figure = plot.sparsity(log, path=tmp_path / "sparsity.png")
    axes, colors = figure.axes
    np.testing.assert_allclose(_image(axes), 100 * table.numpy())
    assert [label.get_text() for label in axes.get_yticklabels()] == log.sites
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("denoising step", "attention site")
    assert "(%)" in colors.get_ylabel()
    assert axes.images[0].get_clim() == (0, 100)
    assert _saved(tmp_path / "sparsity.png")
    with pytest.raises(ValueError, match="log: expected a record"):
        plot.sparsity(SparsityLog(model))


def test_thresholds_heat_map(tmp_path: Path) -> None:
    table = ThresholdTable(
        {
            "a": torch.tensor([[[-1.0, -2.0, -9.0], [NEVER, NEVER, -1.0]]]),
            "b": torch.tensor([[[-5.0]]]),
            "c": torch.tensor([[[-4.0]], [[-4.0]], [[-8.0]]]),
        },
        model_class="WanTransformer3DModel",
    )
    figure = plot.thresholds(table, path=tmp_path / "thresholds.png")
    axes, colors = figure.axes
    np.testing.assert_array_equal(_image(axes), [[-2, np.nan], [-5, -5], [-4, -4]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert "log2 units" in colors.get_ylabel()
    assert figure.get_suptitle() == "Thresholds of WanTransformer3DModel: median over heads, gray = -inf"
    assert _saved(tmp_path / "thresholds.png")
    plot.thresholds(ThresholdTable({"a": torch.full((1, 1, 1), NEVER)}), path=tmp_path / "dense.png")


def test_error_against_sparsity_has_a_curve_for_each_method(tmp_path: Path) -> None:
    results = {"per head": [(0.5, 0.02), (0.1, 0.001)], "constant": [(0.3, 0.05)]}
    figure = plot.error_against_sparsity(results, path=tmp_path / "curves.png")
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"per head": [[10, pytest.approx(0.1)], [50, 2]], "constant": [[30, 5]]}
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(results)
    assert _saved(tmp_path / "curves.png")
    for wrong in ({}, {"a": []}, {"a": [(0.1, 0.0)]}):
        with pytest.raises(ValueError, match="results"):
            plot.error_against_sparsity(wrong)


def test_frames_side_by_side(tmp_path: Path) -> None:
    video = torch.rand(9, 3, 4, 6)
    videos = {"dense": video, "skip-aware": (255 * torch.rand(10, 1, 4, 6)).byte()}
    figure = plot.frames(videos, path=tmp_path / "frames.png")
    images = [_image(axes) for axes in figure.axes]
    assert len(images) == 2 * 4
    for i, frame in enumerate([0, 3, 5, 8]):
        assert figure.axes[i].get_title() == f"frame {frame}"
        np.testing.assert_array_equal(images[i], video[frame].movedim(0, -1).numpy())
        np.testing.assert_array_equal(images[4 + i][..., 2], videos["skip-aware"][frame, 0].numpy())
    assert [figure.axes[i].get_ylabel() for i in (0, 4)] == list(videos)
    assert _saved(tmp_path / "frames.png")
    assert [axes.get_title() for axes in plot.frames({"a": video}, shown=[8, 1]).axes] == ["frame 8", "frame 1"]


@pytest.mark.parametrize(
    ("videos", "shown", "message"),
    [
        ({}, None, "videos, shown: expected frames out of"),
        ({"a": torch.rand(3, 4, 4, 3)}, None, r"videos\['a'\]: expected \(frames, 3 or 1, height, width\)"),
        ({"a": 2 * torch.ones(3, 3, 4, 4)}, None, r"videos\['a'\]: expected uint8 or floats from 0 to 1, got 2 to 2"),
        ({"a": torch.full((1, 3, 4, 4), -0.5)}, None, "got -0.5 to -0.5"),
        ({"a": torch.rand(3, 3, 4, 4), "b": torch.rand(2, 3, 4, 4)}, [2], r"frames out of 0 to 1, got \[2\]"),
    ],
)
def test_frames_refuse(videos: dict[str, torch.Tensor], shown: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.frames(videos, shown=shown)


def test_figures_are_drawn_without_pyplot(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import fails
    monkeypatch.delattr(matplotlib, "pyplot", raising=False)
    assert isinstance(plot.skip_maps(model), Figure)
