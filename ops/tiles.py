"""Tile sizes and the order in which the k-tiles of a row are visited."""

from __future__ import annotations

import torch

__all__ = ["ceil_div", "diagonal_tile", "tile_shape", "visit_order"]

# (device type, head dim) -> (tile_m, tile_n). 192 x 80 is what measured best on Hopper at head dim 128;
# the other CUDA entries wait for a search of their own.
_TILE_SHAPES: dict[tuple[str, int], tuple[int, int]] = {("cuda", 128): (192, 80)}
_DEFAULT_TILE_SHAPE = {"cuda": (128, 128), "cpu": (64, 64)}


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; works on symbolic sizes too."""
    return (a + b - 1) // b


def tile_shape(head_dim: int, dtype: torch.dtype, device: torch.device | str) -> tuple[int, int]:
    """Return (tile_m, tile_n): query rows and keys of one tile of the skip mask.

    Args:
        head_dim: width of a query or key vector.
        dtype: dtype of the query; part of the key of the table, since INT8 and FP8 kernels tile otherwise.
        device: where the attention runs. Devices without an entry use the sizes of the CPU.
    """
    kind = torch.device(device).type
    return _TILE_SHAPES.get((kind, head_dim), _DEFAULT_TILE_SHAPE.get(kind, _DEFAULT_TILE_SHAPE["cpu"]))


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
