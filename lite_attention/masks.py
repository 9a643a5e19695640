"""Static patterns of attention over a video, as the `initial_mask` that skipping starts from.

    enable(pipe, threshold=-6.0, initial_mask=masks.radial(21, 45, 80))          # votes shrink the pattern further
    enable(pipe, threshold=-math.inf, initial_mask=masks.radial(21, 45, 80))     # the pattern alone

A `Pattern` says which pairs of tokens belong together. A tile is skipped from the start only if none of its pairs
belongs, so a pattern is never cut, and every token attends to itself. Sizes are those of the grid of tokens, after
patching: see `grid_of`. Text tokens attend to everything, and everything to them. `pattern.tiles(tile_m, tile_n)` gives
the plain tensor.

Where `enable(token_order=)` makes tiles of other tokens, the pattern stays what it is and the tiles follow. That suits
`window`; `radial` and `spatial_temporal` are bands of the order frame by frame, and skip fewer tiles in another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from lite_attention.flex_mask import from_flex
from lite_attention.ops.tiles import ceil_div
from lite_attention.pattern import ALL, HeadClasses, Pattern
from lite_attention.token_grid import grid_of, grid_of_call

if TYPE_CHECKING:
    from lite_attention.ops.site import Site

__all__ = [
    "SPATIAL",
    "TEMPORAL",
    "Pattern",
    "classify_heads",
    "from_flex",
    "grid_of",
    "grid_of_call",
    "radial",
    "spatial_temporal",
    "window",
]

SPATIAL, TEMPORAL = 0, 1  # classes of heads


def window(
    frames: int,
    height: int,
    width: int,
    text_tokens: int = 0,
    *,
    radius: int | tuple[int, int, int],
    text_first: bool = False,
) -> Pattern:
    """Return a local window: tokens at most so many frames, rows and columns apart.

    Args:
        frames: of the grid of tokens.
        height: rows of the grid.
        width: columns of the grid.
        text_tokens: beside those of the video.
        radius: largest distance in frames, rows and columns; one number is for all three.
        text_first: text stands before the video.

    Raises:
        ValueError: a size below 1, or a negative radius.
    """
    _check_grid(frames, height, width, text_tokens)
    of_frames, of_rows, of_columns = (radius,) * 3 if isinstance(radius, int) else radius
    if min(of_frames, of_rows, of_columns) < 0:
        raise ValueError(f"radius: expected at least 0, got {radius}")
    frame = torch.arange(frames, device="cpu").repeat_interleave(height)
    row = torch.arange(height, device="cpu").repeat(frames)
    near = (_distances(frame) <= of_frames) & (_distances(row) <= of_rows)
    reach = torch.where(near, of_columns, -1).int()
    return Pattern((frames, height, width), width, reach.unsqueeze(0), text_tokens, text_first)


def radial(
    frames: int,
    height: int,
    width: int,
    text_tokens: int = 0,
    *,
    text_first: bool = False,
    min_width: int = 80,
    sink_frames: int = 1,
) -> Pattern:
    """Return RadialAttention's pattern (arXiv 2506.19852, section 4): attention thins out with the distance in time.

    With n tokens a frame, frames at a distance of 2^r to 2^(r+1) - 1 keep the band |k - l| < n / 2^r of tokens k and l
    within their frames; the same frame and the next ones are dense. Where the band is narrower than `min_width`, only
    every ceil(min_width * 2^r / n)-th distance keeps its diagonal, k = l.

    Args:
        frames: of the grid of tokens.
        height: rows of the grid.
        width: columns of the grid.
        text_tokens: beside those of the video.
        text_first: text stands before the video.
        min_width: tokens. A narrower band costs a whole tile all the same, so this is about one k-tile: 80 at head dim
            128 on Hopper. 1 gives the paper's formula.
        sink_frames: first frames whose keys are kept for all.

    Raises:
        ValueError: a size out of range.
    """
    _check_grid(frames, height, width, text_tokens)
    _check_at_least(1, min_width=min_width)
    _check_at_least(0, sink_frames=sink_frames)
    n = height * width
    min_width = min(min_width, n)  # so that near frames stay dense, however small
    reach = []  # by distance
    for distance in range(frames):
        shrink = 1 << max(distance.bit_length() - 1, 0)  # 2^r
        every = ceil_div(min_width * shrink, n)
        band = (n - 1) // shrink  # the largest |k - l| with |k - l| * 2^r < n
        reach.append(band if every == 1 else 0 if distance % every == 0 else -1)
    return _of_frames((frames, height, width), [reach], sink_frames, text_tokens, text_first)


def spatial_temporal(
    frames: int,
    height: int,
    width: int,
    text_tokens: int = 0,
    *,
    heads: HeadClasses | Callable[[Site], HeadClasses] | None = None,
    text_first: bool = False,
    near_frames: int = 1,
    near_tokens: int | None = None,
    sink_frames: int = 1,
) -> Pattern:
    """Return SparseVideoGen's patterns (arXiv 2502.01776): heads that see near frames, and heads that see one place.

    Args:
        frames: of the grid of tokens.
        height: rows of the grid.
        width: columns of the grid.
        text_tokens: beside those of the video.
        heads: `SPATIAL` or `TEMPORAL` for each head, or a callable that returns them for a `Site`. They come from
            `classify_heads`, which needs none yet.
        text_first: text stands before the video.
        near_frames: how many frames before and after its own a spatial head sees, whole.
        near_tokens: how many tokens before and after its own place a temporal head sees, in every frame; None = a row.
        sink_frames: first frames whose keys are kept for all.

    Raises:
        ValueError: a size out of range.
    """
    _check_grid(frames, height, width, text_tokens)
    near_tokens = width if near_tokens is None else near_tokens
    _check_at_least(0, near_frames=near_frames, near_tokens=near_tokens, sink_frames=sink_frames)
    spatial = [ALL if distance <= near_frames else -1 for distance in range(frames)]
    temporal = [near_tokens] * frames
    pattern = _of_frames((frames, height, width), [spatial, temporal], sink_frames, text_tokens, text_first)
    return replace(pattern, heads=heads)


def classify_heads(
    pattern: Pattern,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    rows: int = 64,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return the class of each head, int64 (heads,): the one whose pattern changes the output least.

    SparseVideoGen's profile: a few rows are sampled, and for the pattern of each class the mean squared error of their
    outputs against full attention is taken. Do it once, for example at the first step, and give the result to
    `spatial_temporal(heads=)`.

    Args:
        pattern: with more than one class.
        query: (batch, tokens, heads, head_dim), tokens frame by frame, row by row.
        key: (batch, tokens, kv_heads, head_dim).
        value: (batch, tokens, kv_heads, value_dim).
        rows: how many are sampled.
        scale: of the scores; None = head_dim ** -0.5.
        generator: of the sample, on the CPU.

    Raises:
        ValueError: the tokens are not those of the pattern, or no row is to be sampled.
    """
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != 4 or tensor.shape[1] != pattern.tokens:
            raise ValueError(f"{name}: expected (batch, {pattern.tokens}, heads, head_dim), got {tuple(tensor.shape)}")
    _check_at_least(1, rows=rows)
    sample = torch.randperm(pattern.tokens, generator=generator, device="cpu")[:rows]
    belongs = pattern.pairs(sample).to(query.device)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    group = query.shape[2] // key.shape[2]
    errors = []
    for head in range(query.shape[2]):  # one at a time: the scores of all would be large
        q, k, v = query[:, sample, head].float(), key[:, :, head // group].float(), value[:, :, head // group].float()
        scores = scale * q @ k.transpose(1, 2)
        full = scores.softmax(-1) @ v
        sparse = [scores.masked_fill(~kept, -torch.inf).softmax(-1) @ v for kept in belongs]
        errors.append(torch.stack([(out - full).square().mean() for out in sparse]))
    return torch.stack(errors).argmin(1)


def _of_frames(
    grid: tuple[int, int, int], reaches: list[list[int]], sink_frames: int, text_tokens: int, text_first: bool
) -> Pattern:
    """Return a pattern whose lines are frames, from the reach of each class by distance in time."""
    frames, height, width = grid
    by_distance = torch.tensor(reaches, dtype=torch.int32, device="cpu")
    reach = by_distance[:, _distances(torch.arange(frames, device="cpu"))]
    reach[:, :, :sink_frames] = ALL
    return Pattern(grid, height * width, reach, text_tokens, text_first)


def _distances(index: torch.Tensor) -> torch.Tensor:
    return (index.unsqueeze(1) - index).abs()


def _check_grid(frames: int, height: int, width: int, text_tokens: int) -> None:
    _check_at_least(1, frames=frames, height=height, width=width)
    _check_at_least(0, text_tokens=text_tokens)


def _check_at_least(least: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")
