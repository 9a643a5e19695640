"""The drawings of "How it works", as SVG."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

__all__ = ["residual", "votes"]

Tile = tuple[int, int]  # row of queries, column of keys

_SIDE, _CELL, _GAP, _TOP = 8, 14, 56, 46
_WIDE = _SIDE * _CELL
_COMPUTED, _SKIPPED, _SMALL, _ADDED = "#f28e2b", "#d8d8d8", "#6fa8dc", "#d3e4f5"


def votes() -> str:
    """Four steps: what is voted out at one is skipped at the next, and stays out."""
    draw = random.Random(1)
    tiles = [(row, column) for row in range(_SIDE) for column in range(_SIDE) if abs(row - column) > 1]
    draw.shuffle(tiles)
    grids = [_grid(i, f"step {i}", tiles[: 12 * i], _SKIPPED) for i in range(4)]
    between = [_arrow(i, "votes") for i in range(3)]
    return _svg(4, [*grids, *between], "orange: computed; gray: skipped, not even loaded")


def residual() -> str:
    """A full step keeps what the small tiles give; the sparse steps after it compute the rest and add that."""
    draw = random.Random(2)
    near = [(row, column) for row in range(_SIDE) for column in range(_SIDE) if abs(row - column) <= 1]
    others = [(row, column) for row in range(_SIDE) for column in range(_SIDE) if (row, column) not in near]
    small = draw.sample(others, 40)
    colors = {"full": _SMALL, "sparse": _ADDED}
    titles = ["full", "sparse", "sparse", "full"]
    grids = [_grid(i, f"step {i + 1}: {title}", small, colors[title]) for i, title in enumerate(titles)]
    between = [_arrow(0, "residual"), _arrow(1, "forecast"), _arrow(2, "")]
    said = "orange: computed at every step; blue: computed at full steps; light: not computed, their residual is added"
    return _svg(4, [*grids, *between], said)


def _left(number: int) -> int:
    return 10 + number * (_WIDE + _GAP)


def _grid(number: int, title: str, others: Collection[Tile], color: str) -> str:
    """Return a square of tiles, those of `others` in another color."""
    left = _left(number)
    cells = [
        f'<rect x="{left + column * _CELL}" y="{_TOP + row * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}" '
        f'fill="{color if (row, column) in others else _COMPUTED}"/>'
        for row in range(_SIDE)
        for column in range(_SIDE)
    ]
    return "\n".join([_text(left + _WIDE / 2, _TOP - 10, title), *cells])


def _arrow(number: int, word: str) -> str:
    """Return an arrow from a grid to the next, with a word over it."""
    start, end, middle = _left(number) + _WIDE + 5, _left(number + 1) - 6, _TOP + _WIDE / 2
    line = f'<path d="M{start} {middle}H{end}m-5 -4l5 4l-5 4" fill="none" stroke="#777" stroke-width="1.5"/>'
    return line + (_text((start + end) / 2, middle - 8, word, 9) if word else "")


def _text(x: float, y: float, words: str, size: int = 12) -> str:
    font = f'font-family="sans-serif" font-size="{size}" text-anchor="middle" fill="#777"'
    return f'<text x="{x:g}" y="{y:g}" {font}>{words}</text>'


def _svg(grids: int, parts: Sequence[str], legend: str) -> str:
    width, height = _left(grids) - _GAP + 10, _TOP + _WIDE + 34
    body = "\n".join(
        [*parts, _text(width / 2, 14, "rows: queries; columns: keys", 10), _text(width / 2, height - 10, legend, 11)]
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">\n{body}\n</svg>\n'
