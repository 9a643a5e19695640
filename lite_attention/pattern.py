"""`Pattern`: which tokens of a video belong together, and the tiles in which none do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lite_attention.ops.tiles import ceil_div
from lite_attention.token_order import block_of, tile3d_order

if TYPE_CHECKING:
    from lite_attention.ops.site import Site

__all__ = ["ALL", "HeadClasses", "Pattern"]

ALL = 1 << 30  # a reach beyond any line
_NONE = -ALL  # no pair of two lines
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
        return torch.nn.functional.pad(reach, (0, 1, 0, 1), value=ALL)

    def _runs(self, tile: int, tile_m: int) -> _Runs:
        """Cut the sequence into runs of neighbors in a line that lie in one tile of so many tokens."""
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
