"""Tile sizes and the order in which the k-tiles of a row are visited."""

from __future__ import annotations

import torch

__all__ = ["HOPPER_HEAD_DIMS", "ceil_div", "diagonal_tile", "tile_shape", "visit_order"]

# (tile_m, tile_n) by head dim on Hopper. 192 x 80 and 192 x 128 measured best of many at 128 and 64; the
# others are the widest tiles that compile without spills, see docs/performance.md.
_HOPPER_TILE_SHAPES = {64: (192, 128), 96: (192, 112), 128: (192, 80), 192: (128, 96), 256: (128, 64)}
_TILE_SHAPE = (64, 64)  # elsewhere

HOPPER_HEAD_DIMS = tuple(_HOPPER_TILE_SHAPES)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; works on symbolic sizes too."""
    return (a + b - 1) // b


def tile_shape(head_dim: int, dtype: torch.dtype | None, device: torch.device | str) -> tuple[int, int]:
    """Return (tile_m, tile_n): query rows and keys of one tile of the skip mask.

    Args:
        head_dim: width of a query or key vector.
        dtype: dtype of the query; part of the key of the table, since INT8 and FP8 kernels tile otherwise.
        device: where the attention runs.
    """
    if torch.device(device).type == "cuda":
        return _HOPPER_TILE_SHAPES.get(head_dim, _TILE_SHAPE)
    return _TILE_SHAPE


def diagonal_tile(q_tile: int, seq_q: int, seq_k: int, tile_m: int, tile_n: int) -> int:
    """Return the k-tile on the diagonal of a q-tile: the one visited first."""
    k_tiles = ceil_div(seq_k, tile_n)
    return min(k_tiles - 1, (2 * q_tile + 1) * tile_m * seq_k // (2 * seq_q * tile_n))


def visit_order(q_tile: int, seq_q: int, seq_k: int, tile_m: int, tile_n: int) -> list[int]:
    """Return all k-tiles in the order in which a q-tile visits them.

    The diagonal tile, then the first and the last one (sinks and text tokens live at the ends), then downwards
    from the diagonal, then from the last tile down to the diagonal. So the running maximum, against which later
    tiles are judged, is found at once.
    """
    first = diagonal_tile(q_tile, seq_q, seq_k, tile_m, tile_n)
    last = ceil_div(seq_k, tile_n) - 1
    return list(dict.fromkeys([first, 0, last, *range(first - 1, 0, -1), *range(last - 1, first, -1)]))
