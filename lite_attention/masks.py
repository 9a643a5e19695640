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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from lite_attention.ops.tiles import ceil_div
from lite_attention.token_grid import grid_of, grid_of_call
from lite_attention.token_order import block_of, tile3d_order

if TYPE_CHECKING:
    from lite_attention.ops.site import Site

__all__ = [
    "SPATIAL",
    "TEMPORAL",
    "Pattern",
    "classify_heads",
    "grid_of",
    "grid_of_call",
    "radial",
    "spatial_temporal",
    "window",
]

SPATIAL, TEMPORAL = 0, 1  # classes of heads

_ALL = 1 << 30  # a reach beyond any line
_NONE = -_ALL  # no pair of two lines
_PAIRS_AT_ONCE = 1 << 19  # of runs: few enough to stay in a cache

# The class of each head, (heads,), or the same by site.
HeadClasses = torch.Tensor | Sequence[int]


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which pairs of tokens belong together, for one or more classes of heads.

    The video is cut into lines of consecutive tokens: rows, or whole frames. Two tokens belong together iff their
    distance within their lines is at most the reach of these two lines.

    Args:
        grid: frames, height and width of the video in tokens.
        line: tokens of a line; divides frames * height * width.
        reach: int32 (classes, lines, lines): of query lines and key lines; negative = no pair belongs.
        text_tokens: tokens of text beside those of the video.
        text_first: they stand before the video and not behind it.
        heads: class of each head, (heads,), or a callable that returns them for a `Site`; None = all of class 0.
        token_order: as of `lite_attention.enable`, which sets it; None = frame by frame, row by row.
    """

    grid: tuple[int, int, int]
    line: int
    reach: torch.Tensor
    text_tokens: int = 0
    text_first: bool = False
    heads: HeadClasses | Callable[[Site], HeadClasses] | None = None
    token_order: str | Sequence[int] | None = None
    _cache: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens of the sequence, with the text."""
        frames, height, width = self.grid
        return frames * height * width + self.text_tokens

    def check_grid(self, grid: tuple[int, int, int]) -> None:
        """Raise ValueError for a video of another grid of tokens, also one of as many tokens, turned round.

        Args:
            grid: frames, height and width of a call, see `grid_of_call`.
        """
        if grid != self.grid:
            expected, got = (" x ".join(map(str, sizes)) for sizes in (self.grid, grid))
            raise ValueError(
                f"initial_mask: expected a video of {expected} tokens (frames x height x width), got one of {got}: "
                "the pattern is for the former; masks.grid_of(model, frames, height, width) tells that of other latents"
            )

    def __call__(self, site: Site) -> torch.Tensor:
        """Return the initial mask of a site, bool (1, heads or 1, q_tiles, k_tiles), True = skipped from the start.

        Raises:
            ValueError: the site attends over another number of tokens, or has other heads than are classified.
        """
        lengths = (site.q_shape[1], site.k_shape[1])
        if lengths != (self.tokens, self.tokens):
            grid = " x ".join(map(str, self.grid))
            raise ValueError(
                f"initial_mask: expected {grid} tokens of video and {self.text_tokens} of text, got {lengths[0]} "
                f"queries and {lengths[1]} keys at {site.name or 'a site'}; give the sizes after patching, see "
                "masks.grid_of, or leave the site out with select="
            )
        if site.tile_shape is None:
            raise ValueError(f"site: expected one with a tile_shape, got none at {site.name or 'a site'}")
        tiles = self.tiles(*site.tile_shape)
        classes = self.heads(site) if callable(self.heads) else self.heads
        if classes is None:
            if len(tiles) > 1:
                raise ValueError(f"heads: expected a class of each head, since there are {len(tiles)}, got None")
            return tiles.unsqueeze(0)
        index = torch.as_tensor(classes, dtype=torch.int64, device="cpu")
        if index.shape != (site.q_shape[2],) or not 0 <= int(index.min()) <= int(index.max()) < len(tiles):
            raise ValueError(
                f"heads: expected a class from 0 to {len(tiles) - 1} for each of {site.q_shape[2]} heads, got {classes}"
            )
        return tiles[index].unsqueeze(0)

    def tiles(self, tile_m: int, tile_n: int) -> torch.Tensor:
        """Return bool (classes, q_tiles, k_tiles), True = no pair of the tile belongs to the pattern."""
        found = self._cache.get((tile_m, tile_n))
        if found is None:
            with torch.device("cpu"):  # whatever the default is where a model runs
                queries, keys = self._runs(tile_m, tile_m), self._runs(tile_n, tile_m)
                belongs = [queries.any_near(keys, reach) for reach in self._reach_with_text()]
            found = self._cache[tile_m, tile_n] = ~torch.stack(belongs)
        return found

    def pairs(self, queries: torch.Tensor) -> torch.Tensor:
        """Return bool (classes, queries, tokens), True = the pair belongs; tokens frame by frame, row by row.

        Args:
            queries: int64 (queries,), numbers of tokens in the sequence.
        """
        with torch.device("cpu"):
            line, place = self._lines_and_places()
        reach = self._reach_with_text()[:, line[queries]][:, :, line]
        return (place[queries].unsqueeze(1) - place).abs() <= reach

    def _lines_and_places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the line of each token of the sequence, and its place within; text is one more line."""
        video = torch.arange(self.tokens - self.text_tokens)
        text = torch.arange(self.text_tokens)
        parts = [(video // self.line, video % self.line), (torch.full_like(text, self.reach.shape[1]), text)]
        lines, places = zip(*(parts[::-1] if self.text_first else parts), strict=True)
        return torch.cat(lines), torch.cat(places)

    def _reach_with_text(self) -> torch.Tensor:
        reach = self.reach.masked_fill(self.reach < 0, _NONE)  # below any gap of two runs, which may overlap
        return torch.nn.functional.pad(reach, (0, 1, 0, 1), value=_ALL)

    def _runs(self, tile: int, tile_m: int) -> _Runs:
        """Cut the sequence into runs of neighbours in a line that lie in one tile of so many tokens."""
        line, place = self._lines_and_places()
        if self.token_order is not None:
            order = tile3d_order(*self.grid, block_of(self.token_order, tile_m))
            start = self.text_tokens if self.text_first else 0
            video = slice(start, start + len(order))
            line[video], place[video] = line[video][order], place[video][order]
        of_tile = torch.arange(self.tokens) // tile
        breaks = (line.diff() != 0) | (place.diff() != 1) | (of_tile.diff() != 0)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), breaks.nonzero().flatten() + 1])
        last = torch.cat([first[1:] - 1, torch.tensor([self.tokens - 1])])
        return _Runs(of_tile[first], line[first], place[first].int(), place[last].int(), ceil_div(self.tokens, tile))


@dataclass(frozen=True)
class _Runs:
    """Stretches of tokens, in the order of the sequence, each in one line and one tile."""

    tile: torch.Tensor
    line: torch.Tensor
    first: torch.Tensor  # places in the line
    last: torch.Tensor
    tiles: int

    def any_near(self, keys: _Runs, reach: torch.Tensor) -> torch.Tensor:
        """Return bool (tiles, tiles of keys): are any two tokens of the two tiles within reach of their lines?"""
        at_once = max(1, _PAIRS_AT_ONCE // len(keys.line))
        hits = []
        for i in range(0, len(self.line), at_once):
            part = slice(i, i + at_once)
            gap = torch.maximum(self.first[part, None] - keys.last, keys.first - self.last[part, None])
            hits.append(keys.any_of_tile(gap <= reach[self.line[part]].index_select(1, keys.line)))
        return self.any_of_tile(torch.cat(hits).T).T

    def any_of_tile(self, hits: torch.Tensor) -> torch.Tensor:
        """Return bool (rows, tiles) of bool (rows, runs): is any run of a tile hit?"""
        counts = torch.nn.functional.pad(hits.cumsum(1, dtype=torch.int32), (1, 0))
        ends = torch.searchsorted(self.tile, torch.arange(self.tiles + 1))
        return counts[:, ends].diff(dim=1) > 0


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
    spatial = [_ALL if distance <= near_frames else -1 for distance in range(frames)]
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
    reach[:, :, :sink_frames] = _ALL
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
