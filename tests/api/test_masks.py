"""Static patterns against plain loops over pairs of tokens, the classes of heads, and masks in models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lite_attention
from lite_attention import masks
from lite_attention.compile import Site
from lite_attention.masks import SPATIAL, TEMPORAL, Pattern
from lite_attention.model_sites import sites_of
from lite_attention.ops.bitmask import unpack_bits
from tests.support import diffusers_models as dm
from tests.support.toys import Toy, context, tokens

Token = tuple[int, int, int] | None  # frame, row, column; None is text
Rule = Callable[[Token, Token], bool]


def _video(pattern: Pattern, block: tuple[int, int, int] | None = None) -> list[Token]:
    """The tokens of a video in order, text included; in blocks, by sorting."""
    order: list[Any] = [*itertools.product(*map(range, pattern.grid))]
    if block is not None:
        order.sort(key=lambda t: ([i // size for i, size in zip(t, block, strict=True)], t))
    text: list[Any] = [None] * pattern.text_tokens
    return text + order if pattern.text_first else order + text


def _skipped(order: list[Token], rule: Rule, tile_m: int, tile_n: int) -> torch.Tensor:
    """Which tiles have no pair of the pattern, one pair at a time."""
    skipped = torch.ones(-(-len(order) // tile_m), -(-len(order) // tile_n), dtype=torch.bool)
    for (i, query), (j, key) in itertools.product(enumerate(order), enumerate(order)):
        if query is None or key is None or rule(query, key):
            skipped[i // tile_m, j // tile_n] = False
    return skipped


def _window(radius: tuple[int, int, int]) -> Rule:
    return lambda q, k: all(abs(a - b) <= r for a, b, r in zip(q, k, radius, strict=True))  # type: ignore[arg-type]


def _radial(height: int, width: int, min_width: int, sinks: int) -> Rule:
    def rule(q: Token, k: Token) -> bool:
        assert q is not None
        assert k is not None
        distance = abs(q[0] - k[0])
        if k[0] < sinks or distance < 2:
            return True
        n, shrink = height * width, 2 ** math.floor(math.log2(distance))
        apart = abs((q[1] - k[1]) * width + q[2] - k[2])
        if n / shrink >= min_width:
            return apart < n / shrink
        return apart == 0 and distance % math.ceil(min_width * shrink / n) == 0

    return rule


def _spatial(near: int, sinks: int) -> Rule:
    return lambda q, k: k[0] < sinks or abs(q[0] - k[0]) <= near  # type: ignore[index]


def _temporal(width: int, near: int, sinks: int) -> Rule:
    return lambda q, k: k[0] < sinks or abs((q[1] - k[1]) * width + q[2] - k[2]) <= near  # type: ignore[index]


# ---- patterns against loops ----------------------------------------------------------------------------------------

CASES: dict[str, tuple[Pattern, list[Rule]]] = {
    "window": (masks.window(4, 5, 7, radius=(1, 2, 1)), [_window((1, 2, 1))]),
    "window of one radius": (masks.window(3, 4, 6, 5, radius=1), [_window((1, 1, 1))]),
    "window of nothing else": (masks.window(3, 4, 6, radius=0), [_window((0, 0, 0))]),
    "window after text": (masks.window(3, 4, 6, 5, radius=(0, 1, 2), text_first=True), [_window((0, 1, 2))]),
    "radial of the paper": (masks.radial(18, 1, 5, min_width=1), [_radial(1, 5, 1, 1)]),
    "radial": (masks.radial(17, 3, 4, 3, min_width=5), [_radial(3, 4, 5, 1)]),
    "radial without a sink": (masks.radial(9, 3, 4, min_width=3, sink_frames=0), [_radial(3, 4, 3, 0)]),
    "radial of small frames": (masks.radial(9, 2, 3, 2, min_width=80, text_first=True), [_radial(2, 3, 6, 1)]),
    "classes": (
        masks.spatial_temporal(5, 3, 4, 2, near_frames=1, near_tokens=2),
        [_spatial(1, 1), _temporal(4, 2, 1)],
    ),
    "classes, defaults": (masks.spatial_temporal(6, 4, 3), [_spatial(1, 1), _temporal(3, 3, 1)]),
    "classes without a sink": (
        masks.spatial_temporal(5, 3, 4, near_frames=0, near_tokens=0, sink_frames=0),
        [_spatial(0, 0), _temporal(4, 0, 0)],
    ),
}


@pytest.mark.parametrize("tile", [(1, 1), (6, 4), (16, 10), (7, 13)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_tile_is_skipped_iff_none_of_its_pairs_belongs(case: str, tile: tuple[int, int]) -> None:
    pattern, rules = CASES[case]
    got = pattern.tiles(*tile)
    order = _video(pattern)
    want = torch.stack([_skipped(order, rule, *tile) for rule in rules])
    assert torch.equal(got, want)
    assert got.dtype == torch.bool
    assert want.any() or tile[0] > 6  # the case says something


@pytest.mark.parametrize("case", ["window", "window after text", "radial", "classes"])
@pytest.mark.parametrize("token_order", ["tile3d", (2, 2, 3)])
def test_tiles_follow_a_token_order_and_the_pattern_does_not(case: str, token_order: Any) -> None:
    pattern, rules = CASES[case]
    block = (2, 2, 3) if token_order == "tile3d" else token_order  # 12 tokens
    order = _video(pattern, block)
    got = replace(pattern, token_order=token_order).tiles(12, 5)
    assert torch.equal(got, torch.stack([_skipped(order, rule, 12, 5) for rule in rules]))
    assert not torch.equal(got, pattern.tiles(12, 5))


def test_pairs_are_those_of_the_rule() -> None:
    for pattern, rules in CASES.values():
        order = _video(pattern)
        sample = torch.randperm(len(order))[:9]
        got = pattern.pairs(sample)
        for of_class, rule in zip(got, rules, strict=True):
            for row, i in zip(of_class, sample.tolist(), strict=True):
                q = order[i]
                assert row.tolist() == [q is None or k is None or rule(q, k) for k in order]


@pytest.mark.parametrize(
    "pattern",
    [
        masks.window(21, 45, 80, radius=(3, 6, 10)),
        masks.radial(21, 45, 80, 256),
        masks.spatial_temporal(21, 45, 80, text_tokens=100, text_first=True),
    ],
    ids=["window", "radial", "classes"],
)
def test_a_video_of_720p_keeps_the_diagonal_and_skips_much(pattern: Pattern) -> None:
    """75,600 tokens, of which 5.7 thousand million pairs are never looked at one by one."""
    tiles = pattern.tiles(192, 80)
    assert tiles.shape[1:] == (-(-pattern.tokens // 192), -(-pattern.tokens // 80))
    at = torch.arange(pattern.tokens)
    assert not tiles[:, at // 192, at // 80].any()
    assert (tiles.float().mean((1, 2)) > 0.4).all()


# ---- as an initial mask --------------------------------------------------------------------------------------------


def _site(seq: int, heads: int = 2, tile: tuple[int, int] | None = (6, 4)) -> Site:
    shape = (1, seq, heads, 16)
    return Site(
        "blocks.0.attn1", "Attention", 0, shape, shape, shape, torch.float32, torch.device("cpu"), tile_shape=tile
    )


def test_heads_get_the_pattern_of_their_class() -> None:
    pattern = masks.spatial_temporal(5, 3, 4)
    tiles = pattern.tiles(6, 4)
    assert not torch.equal(tiles[SPATIAL], tiles[TEMPORAL])
    of_heads = replace(pattern, heads=[TEMPORAL, SPATIAL, TEMPORAL])
    want = torch.stack([tiles[1], tiles[0], tiles[1]]).unsqueeze(0)
    assert torch.equal(of_heads(_site(60, 3)), want)
    by_site = replace(pattern, heads=lambda site: torch.tensor([0, 1] if "blocks.0" in site.name else [1, 0]))
    assert torch.equal(by_site(_site(60))[0], tiles)
    assert masks.radial(5, 3, 4)(_site(60)).shape == (1, 1, 10, 15)


def test_mistakes_are_named() -> None:
    pattern = masks.spatial_temporal(5, 3, 4)
    for wrong, site, message in [
        (masks.radial(5, 3, 4, 7), _site(60), "initial_mask: expected 5 x 3 x 4 tokens of video and 7 of text, got 60"),
        (masks.radial(5, 3, 4), _site(60, tile=None), "site: expected one with a tile_shape"),
        (pattern, _site(60), "heads: expected a class of each head"),
        (replace(pattern, heads=[0, 1, 1]), _site(60), "heads: expected a class from 0 to 1 for each of 2 heads"),
        (replace(pattern, heads=[0, 2]), _site(60), "heads: expected a class from 0 to 1"),
        (replace(pattern, heads=[0, -1]), _site(60), "heads: expected a class from 0 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong(site)
    for build, message in [
        (lambda: masks.window(0, 3, 4, radius=1), "frames: expected at least 1, got 0"),
        (lambda: masks.window(2, 3, 4, -1, radius=1), "text_tokens: expected at least 0"),
        (lambda: masks.window(2, 3, 4, radius=(1, -1, 1)), "radius: expected at least 0"),
        (lambda: masks.radial(2, 3, 4, min_width=0), "min_width: expected at least 1"),
        (lambda: masks.radial(2, 3, 4, sink_frames=-1), "sink_frames: expected at least 0"),
        (lambda: masks.spatial_temporal(2, 3, 4, near_tokens=-1), "near_tokens: expected at least 0"),
        (lambda: masks.grid_of(object(), 1, 2, 3), "model: expected one with config.patch_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize("compile", [False, True])
def test_a_pattern_alone_is_attention_over_its_tiles(compile: bool) -> None:
    """At -inf nothing is voted out: each call attends to what the pattern left, tile by tile."""
    model = Toy(2)
    pattern = masks.window(4, 4, 6, radius=(1, 1, 2))
    kept = ~pattern.tiles(8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, kept)

    for block in model.blocks:
        block.attn1.attend = attend
    with torch.no_grad():
        want = model(tokens(0), context())
    for block in model.blocks:
        block.attn1.attend = torch.nn.functional.scaled_dot_product_attention
    options = {"inner": "aot_eager", "compile": compile, "num_steps": 3}
    lite_attention.enable(model, threshold=-math.inf, tile_shape=(8, 8), initial_mask=pattern, **options)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model(tokens(0), context()), want, rtol=0, atol=1e-5)


def test_enable_gives_a_pattern_its_token_order() -> None:
    model, pattern = dm.WAN_OF_ONE_LAYER.model(), masks.window(3, 8, 4, radius=1)
    grids = []
    for token_order in (None, "tile3d", (1, 8, 2)):
        lite_attention.enable(
            model, compile=False, threshold=-4.0, tile_shape=(16, 8), initial_mask=pattern, token_order=token_order
        )
        dm.run(model, dm.WAN.inputs(0, 0))
        (record,) = [found.record for found in sites_of(model) if found.swapped]
        assert record.last is not None
        assert record.last.initial_mask is not None
        got = unpack_bits(record.last.initial_mask, 12)[0, 0]
        assert torch.equal(got, replace(pattern, token_order=token_order).tiles(16, 8)[0])
        grids.append(got)
    assert not torch.equal(grids[0], grids[1])
    assert not torch.equal(grids[1], grids[2])
    assert pattern.token_order is None


# ---- classes of heads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_heads_are_told_by_what_they_attend_to(kv_heads: int) -> None:
    """Heads 0 and 2 look for their frame, 1 and 3 for their place in the frame."""
    frames, height, width = 6, 4, 5
    pattern = masks.spatial_temporal(frames, height, width, 3, near_tokens=1)
    frame = torch.arange(frames).repeat_interleave(height * width)
    place = torch.arange(height * width).repeat(frames)
    looks = {0: _one_hot(frame), 1: _one_hot(place)}
    query = torch.stack([looks[head % 2] for head in range(4)], 1)
    key = torch.stack([looks[head % 2] for head in range(4)], 1)
    if kv_heads == 2:  # heads 0 and 1 share one
        query, key = query[:, [0, 2, 1, 3]], key[:, [0, 1]]
    pad = (0, 0, 0, 0, 0, 3)
    query, key = (torch.nn.functional.pad(6 * t, pad).unsqueeze(0) for t in (query, key))
    value = torch.randn(1, pattern.tokens, kv_heads, 8)
    want = [0, 1, 0, 1] if kv_heads == 4 else [0, 0, 1, 1]
    for rows in (16, 10_000):
        classes = masks.classify_heads(pattern, query, key, value, rows=rows)
        assert classes.tolist() == want
    assert classes.dtype == torch.int64


def _one_hot(index: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(index, 24).float()


def test_classes_are_those_of_the_smaller_error() -> None:
    pattern = masks.spatial_temporal(4, 3, 3, 2, near_frames=0, near_tokens=1)
    q, k, v = (2 * torch.randn(2, pattern.tokens, 6, 8) for _ in range(3))
    order = _video(pattern)
    rules = [_spatial(0, 1), _temporal(3, 1, 1)]
    errors = torch.zeros(2, 6)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randperm(pattern.tokens, generator=generator)[:5].tolist()
    for c, i in itertools.product(range(2), sample):
        query = order[i]
        mask = torch.tensor([query is None or key is None or rules[c](query, key) for key in order])
        scores = torch.einsum("bhd,bjhd->bhj", q[:, i], k) * 0.3
        full = torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), v)
        sparse = torch.einsum("bhj,bjhd->bhd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)
        errors[c] += (full - sparse).square().sum((0, 2))
    got = masks.classify_heads(pattern, q, k, v, rows=5, scale=0.3, generator=torch.Generator().manual_seed(3))
    assert got.tolist() == errors.argmin(0).tolist()
    assert len(set(got.tolist())) == 2


def test_classify_heads_names_mistakes() -> None:
    pattern = masks.spatial_temporal(4, 3, 3)
    x = torch.randn(1, 36, 2, 8)
    with pytest.raises(ValueError, match=r"key: expected \(batch, 36, heads, head_dim\), got \(1, 35, 2, 8\)"):
        masks.classify_heads(pattern, x, x[:, 1:], x)
    with pytest.raises(ValueError, match="rows: expected at least 1"):
        masks.classify_heads(pattern, x, x, x, rows=0)


def test_grid_of_reads_the_patch_size() -> None:
    assert masks.grid_of(dm.WAN.model(), 21, 90, 160) == (21, 45, 80)
    assert masks.grid_of(dm.LTX.model(), 21, 90, 160) == (21, 90, 160)
    config = SimpleNamespace(patch_size=2, patch_size_t=3)
    assert masks.grid_of(SimpleNamespace(config=config), 6, 8, 4) == (2, 4, 2)
    config.patch_size_t = None
    assert masks.grid_of(SimpleNamespace(config=config), 6, 8, 4) == (6, 4, 2)
