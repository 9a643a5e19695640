"""The example: are videos what their labels say, is attention swapped where it should be, and does training learn?"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lite_attention
from examples.moving_shapes import judge as judging
from examples.moving_shapes.model import Config, VideoDiT, load_weights, rotary, rotate, save_weights
from examples.moving_shapes.sample import generate, save_videos, time_steps
from examples.moving_shapes.scenes import (
    FIELDS,
    NULL_PROMPT,
    PALETTE,
    Scenes,
    draw_scenes,
    make_videos,
    prompt_ids,
)
from examples.moving_shapes.train import TINY, Trainer, train
from tests.support.diffusers_models import silent_report

SIZE = (6, 24, 24)  # 216 tokens
NEVER = float("-inf")


def scenes(batch: int = 16, seed: int = 0) -> Scenes:
    return draw_scenes(batch, torch.Generator().manual_seed(seed))


def tiny_model(head_dims: tuple[int, ...] = (16, 32)) -> VideoDiT:
    """A model whose every part matters: fresh ones predict zero."""
    torch.manual_seed(0)
    model = VideoDiT(Config(width=64, layers=2, head_dims=head_dims, mlp_ratio=2, cross_width=32))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    for block in model.blocks:
        block.self_attention.norm_q.data.mul_(5)  # peaked attention, so that tiles are skipped
    return model.eval().requires_grad_(False)


# ---- scenes --------------------------------------------------------------------------------------------------------


def test_the_seed_decides_everything() -> None:
    first, again, other = (make_videos(4, SIZE, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(getattr(first[1], f.name), getattr(again[1], f.name)) for f in fields(Scenes))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (4, 3, *SIZE)
    assert first[0].abs().max() <= 1


@pytest.mark.parametrize("size", [(12, 64, 64), (12, 48, 80), (12, 80, 48)])
def test_sprites_have_their_color_at_their_center(size: tuple[int, int, int]) -> None:
    drawn = scenes(32)
    video, paths = drawn.render(size), drawn.path(size)
    side = min(size[1:])
    column, row = (paths[:, 0] * side).long().unbind(-1)
    assert (row < size[1]).all()
    assert (column < size[2]).all()
    batch, frame = torch.arange(32).unsqueeze(1), torch.arange(size[0])
    seen = video[batch, :, frame, row, column]  # [B, F, 3]
    torch.testing.assert_close(
        seen, torch.tensor(PALETTE)[drawn.color[:, 0]].unsqueeze(1).expand_as(seen), atol=0.02, rtol=0
    )


def test_the_main_sprite_covers_what_is_behind_it() -> None:
    drawn = scenes(8)
    drawn.count.fill_(2)
    alone = copy.copy(drawn)
    alone.count = torch.zeros(8, dtype=torch.long)
    together, single = drawn.render((8, 64, 64)), alone.render((8, 64, 64))
    color = torch.tensor(PALETTE)[drawn.color[:, 0]].view(8, 3, 1, 1, 1)
    main = (single - color).abs().amax(1) < 0.01  # [B, F, H, W]
    assert main.any()
    torch.testing.assert_close(together.movedim(1, -1)[main], single.movedim(1, -1)[main], atol=0.01, rtol=0)
    assert not torch.equal(together, single)


@pytest.mark.parametrize("shape", FIELDS["shape"])
def test_the_middle_of_the_pixels_follows_the_path(shape: str) -> None:
    drawn = scenes()
    drawn.shape[:, 0] = FIELDS["shape"].index(shape)
    drawn.count.zero_()
    size = (8, 96, 96)
    color = torch.tensor(PALETTE)[drawn.color[:, 0]].view(-1, 3, 1, 1, 1)
    cover = (drawn.render(size) - color).norm(dim=1) < 0.05  # [B, F, H, W]
    places = (torch.arange(96) + 0.5) / 96
    area = cover.sum((2, 3))
    middle = torch.stack([(cover.sum(axis) * places).sum(-1) / area for axis in (2, 3)], -1)
    assert (middle - drawn.path(size)[:, 0]).norm(dim=-1).max() < 0.02
    disc = math.pi * drawn.size[:, :1] ** 2
    assert ((area / 96**2) / disc).sub(1).abs().max() < 0.35  # shapes are about as large as each other


def test_sprites_go_where_their_motion_says() -> None:
    drawn = scenes(256)
    step = drawn.path((2, 64, 64)).diff(dim=2)[:, 0, 0]
    directions = FIELDS["motion"].index("clockwise")
    straight = drawn.motion[:, 0] < directions
    torch.testing.assert_close(step.norm(dim=1)[straight], drawn.speed[straight, 0])
    said = drawn.motion[:, 0] * (2 * math.pi / directions)
    off = (torch.atan2(step[:, 1], step[:, 0]) - said)[straight]
    assert torch.atan2(off.sin(), off.cos()).abs().max() < math.pi / directions
    v = drawn.path((4, 64, 64)).diff(dim=2)[:, 0]
    turning = (v[:, 0, 0] * v[:, 1, 1] - v[:, 0, 1] * v[:, 1, 0]).sign()[~straight]
    assert torch.equal(turning, torch.where(drawn.motion[:, 0] == directions, 1.0, -1.0)[~straight])


def test_paths_stay_in_the_frame_and_never_jump() -> None:
    drawn = scenes(64)
    path = drawn.path((100, 48, 72))
    assert (path >= drawn.size[..., None, None]).all()
    assert (path <= torch.tensor([1.5, 1.0]) - drawn.size[..., None, None] + 1e-6).all()
    assert (path.diff(dim=2).norm(dim=3) <= drawn.speed.unsqueeze(-1) + 1e-5).all()


def test_the_background_moves_against_the_pan() -> None:
    drawn = scenes(64)
    drawn.count.fill_(-1)  # nothing in front
    drawn.tones.zero_()
    drawn.pan.fill_(FIELDS["pan"].index("right"))
    drawn.pan_speed.fill_(2 / 48)  # two pixels a frame
    video = drawn.render((4, 48, 48))
    torch.testing.assert_close(video[:, :, 1:, :, :-2], video[:, :, :-1, :, 2:], atol=1e-4, rtol=0)
    drawn.pan.zero_()
    still = drawn.render((4, 48, 48))
    assert torch.equal(still[:, :, 0], still[:, :, 3])


def test_a_scene_looks_the_same_at_each_resolution() -> None:
    drawn = scenes(4)
    small = torch.nn.functional.avg_pool3d(drawn.render((3, 128, 128)), (1, 2, 2))
    assert (small - drawn.render((3, 64, 64))).abs().mean() < 0.01


def test_prompts_in_words() -> None:
    prompt = prompt_ids(shape="star", color="red")
    assert prompt.tolist() == [[FIELDS["shape"].index("star"), 0, *NULL_PROMPT[2:]]]
    with pytest.raises(ValueError, match=r"color: expected one of red, .* got mauve"):
        prompt_ids(color="mauve")
    with pytest.raises(ValueError, match=r"prompt: expected fields of shape, .* got size"):
        prompt_ids(size="large")


# ---- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_depend_on_distances_alone(head_dim: int) -> None:
    q, k = torch.randn(2, 1, 1, 1, head_dim, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([(0.0, 2.0, 1.0), (3.0, 5.0, 4.0)])

    def score(shift: float) -> torch.Tensor:
        turned = rotary(places + shift, head_dim)
        return (rotate(q, turned[:, :1]) * rotate(k, turned[:, 1:])).sum()

    torch.testing.assert_close(score(0.0), score(7.0))
    assert (score(0.0) - (q * k).sum()).abs() > 0.1
    torch.testing.assert_close(rotate(q, rotary(places[:1], head_dim)).norm(), q.norm())


def test_blocks_take_head_dims_in_turn() -> None:
    model = VideoDiT(Config(width=96, layers=5, head_dims=(16, 48), cross_width=32))
    generate(lite_attention.enable(model, compile=False, min_tiles=1), prompt_ids(), SIZE, steps=1)
    shapes = [row.q_shape[2:] for row in silent_report(model).swapped]
    assert shapes == [(6, 16), (2, 48)] * 2 + [(6, 16)]


@pytest.mark.parametrize("head_dims", [(32,), (64,), (16, 32)])
def test_takes_videos_of_any_size(head_dims: tuple[int, ...]) -> None:
    model = tiny_model(head_dims)
    for size in ((1, 8, 8), (3, 12, 20)):
        video = torch.randn(2, 3, *size)
        assert model(video, torch.tensor([0.2, 0.9]), prompt_ids().expand(2, -1)).shape == video.shape


def test_prompt_time_and_every_token_matter() -> None:
    model, video = tiny_model(), torch.randn(1, 3, *SIZE)
    base = model(video, torch.tensor([0.5]), prompt_ids(shape="star"))
    assert not torch.allclose(base, model(video, torch.tensor([0.6]), prompt_ids(shape="star")))
    assert not torch.allclose(base, model(video, torch.tensor([0.5]), prompt_ids(shape="circle")))
    video[0, :, -1, -1, -1] += 1
    assert not torch.equal(
        base[0, :, 0, 0, 0], model(video, torch.tensor([0.5]), prompt_ids(shape="star"))[0, :, 0, 0, 0]
    )


def test_the_order_of_tokens_changes_nothing() -> None:
    model = tiny_model()
    video, time, prompt = torch.randn(2, 3, 5, 16, 24), torch.tensor([0.2, 0.9]), scenes(2).prompt()
    want = model(video, time, prompt)
    model.order = torch.randperm(5 * 4 * 6)
    torch.testing.assert_close(model(video, time, prompt), want)
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0].flip(1), *args[1:]))
    assert not torch.allclose(model(video, time, prompt), want)  # positions and tokens must go together


@pytest.mark.parametrize("head_dims", [(), (64, 100), (64, 4), (64, 0), [64, 128], 64])
def test_head_dims_that_do_not_fit_are_refused(head_dims: Any) -> None:
    wanted = f"head_dims: expected a tuple of multiples of 8 that divide the width, 384, got {head_dims}"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        Config(head_dims=head_dims)


@pytest.mark.parametrize("cross_width", [0, 100])
def test_a_cross_width_that_does_not_fit_is_refused(cross_width: int) -> None:
    with pytest.raises(ValueError, match=f"cross_width: expected at most 64, or a multiple of it, got {cross_width}"):
        Config(cross_width=cross_width)


def test_the_weights_fit_into_the_repository() -> None:
    with torch.device("meta"):
        model = VideoDiT(Config())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e6:.1f}" == "11.6"  # as the README says
    assert count * 2 < 25e6


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_come_back(tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    model, path = tiny_model(), tmp_path / f"weights{suffix}"
    save_weights(path, model.config, model.state_dict())
    loaded = load_weights(path)
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float())


# ---- skip-aware ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [False, "blocks"])
def test_exactly_the_self_attention_is_swapped(how: bool | str) -> None:
    model = tiny_model()
    lite_attention.enable(model, compile=how, threshold=-4.0, num_steps=2, **({"inner": "eager"} if how else {}))
    generate(model, prompt_ids(), SIZE, steps=2)
    report = silent_report(model)
    assert sorted(row.name for row in report.swapped) == ["blocks.0.self_attention", "blocks.1.self_attention"]
    left = {row.name: row.reason for row in report.rows if row not in report.swapped}
    assert {name: reason.split(" ")[0] for name, reason in left.items() if reason} == {
        "blocks.0.cross_attention": "cross-attention",
        "blocks.1.cross_attention": "cross-attention",
    }
    lite_attention.disable(model)


def test_sampling_is_deterministic_and_dense_without_a_threshold() -> None:
    model, prompt = tiny_model(), prompt_ids(shape="star", motion="left").expand(2, -1)
    dense, again = (generate(model, prompt, SIZE, steps=4, seed=5) for _ in range(2))
    assert torch.equal(dense, again)
    assert not torch.allclose(dense, generate(model, prompt, SIZE, steps=4, seed=6))

    lite_attention.enable(model, compile=False, threshold=NEVER, num_steps=4)
    torch.testing.assert_close(generate(model, prompt, SIZE, steps=4, seed=5), dense, atol=1e-4, rtol=1e-4)

    lite_attention.enable(model, compile=False, threshold=-1.0, num_steps=4, tile_shape=(16, 16))
    skipped, fresh = (generate(model, prompt, SIZE, steps=4, seed=5) for _ in range(2))
    assert all(row.state is not None and row.state.sparsity() > 0.05 for row in silent_report(model).swapped)
    assert torch.equal(skipped, fresh)  # each generation forgets the one before
    assert 0 < (skipped - dense).abs().mean() < 0.2 * dense.abs().mean()


def test_times_fall_from_noise_to_clean() -> None:
    short, long = time_steps(8, (10, 48, 48)), time_steps(8, (28, 96, 96))
    assert short[0] == 1
    assert short[-1] == 0
    assert (short.diff() < 0).all()
    assert (long[1:-1] > short[1:-1]).all()  # longer videos stay longer in the noise


def test_pictures_are_written(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    save_videos(torch.zeros(2, 3, 5, 8, 12), tmp_path / "zero")
    with image.open(tmp_path / "zero.png") as rows:
        assert rows.size == (5 * 12, 2 * 8)
    with image.open(tmp_path / "zero.gif") as moving:
        assert moving.size == (2 * 12, 8)


# ---- training ------------------------------------------------------------------------------------------------------


def test_training_learns() -> None:
    trainer = Trainer(*TINY)
    losses = torch.stack([trainer.step()[1] for _ in range(80)])
    assert losses[:5].mean() > 1.0  # noise - video, and a prediction of zero
    assert losses[-10:].mean() < 0.6


def test_resuming_changes_nothing(tmp_path: Path) -> None:
    straight = Trainer(*TINY)
    for _ in range(6):
        straight.step()
    first = Trainer(*TINY)
    for _ in range(3):
        first.step()
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(*TINY, seed=1)  # the checkpoint's seed counts
    second.load(tmp_path / "checkpoint.pt")
    for _ in range(3):
        second.step()
    for one, other in ((straight.model.state_dict(), second.model.state_dict()), (straight.averaged, second.averaged)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    with pytest.raises(ValueError, match="checkpoint: expected"):
        Trainer(replace(TINY[0], head_dims=(32, 16)), TINY[1]).load(tmp_path / "checkpoint.pt")


def test_begins_with_weights_whose_checkpoint_is_lost() -> None:
    before, after = Trainer(*TINY), Trainer(*TINY, seed=1)
    before.step()
    after.begin_with(before.averaged)
    weights = after.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in before.averaged.items())
    after.step()
    assert all(torch.isfinite(tensor).all() for tensor in after.averaged.values())


def test_pieces_of_training_add_up(tmp_path: Path) -> None:
    for _ in range(2):
        train(Trainer(*TINY), tmp_path, minutes=0.02, decay_minutes=0.01)
    steps = [line.split('"step": ')[1].split(",")[0] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [int(step) for step in steps] == [10 * i for i in range(1, len(steps) + 1)]
    (weights,) = tmp_path.glob("weights.*")
    assert load_weights(weights).config == TINY[0]


# ---- the judge -----------------------------------------------------------------------------------------------------


def test_the_judge_learns_to_find_the_sprite() -> None:
    judge = judging.Judge(width=8)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=5e-3)
    video, drawn = make_videos(4, SIZE, torch.Generator().manual_seed(0))
    prompt, path = drawn.prompt(), drawn.path(SIZE)[:, 0]
    before = judging.measure(judge, video, prompt, path)
    for _ in range(40):
        optimizer.zero_grad()
        judging.judge_loss(judge, video, prompt, path).backward()
        optimizer.step()
    after = judging.measure(judge, video, prompt, path)
    assert after["path_error"] < 0.5 * before["path_error"]
    assert after["color"] >= 0.75
    assert judging.path_distance(judge, video, video) == 0
    assert "shape" not in judging.measure(judge, video, prompt_ids(color="red").expand(4, -1))
