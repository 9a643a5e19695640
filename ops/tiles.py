"""Tile sizes and the order in which the k-tiles of a row are visited."""

from __future__ import annotations

import torch

from lite_attention.ops.targets import target_of

__all__ = [
    "SAMPLE_EVERY",
    "allowed_in_tiles",
    "ceil_div",
    "diagonal_tile",
    "sampled_tiles",
    "tile_shape",
    "visit_order",
]


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; works on symbolic sizes too."""
    return (a + b - 1) // b


def allowed_in_tiles(key_mask: torch.Tensor, tile_n: int) -> torch.Tensor:
    """Return the keys that take part by tile, bool [B, k_tiles, tile_n], False past the end, from bool [B, Sk]."""
    padded = torch.nn.functional.pad(key_mask, (0, -key_mask.shape[1] % tile_n))
    in_tiles: torch.Tensor = padded.unflatten(1, (-1, tile_n))
    return in_tiles


def tile_shape(
    head_dim: int,
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantization: str = "none",
    implementation: str | None = None,
) -> tuple[int, int]:
    """Return (tile_m, tile_n): query rows and keys of one tile of the skip mask. `ops/targets.py` has the tables.

    Args:
        head_dim: width of a query or key vector.
        dtype: dtype of the query; no table depends on it yet.
        device: where the attention runs.
        quantization: name of one of `QUANTIZATIONS`, as for the op.
        implementation: as for `skip_attention`.

    Raises:
        ValueError: no such quantization, or not for this head dim on this device.
    """
    return target_of(device, implementation).tile_shape(head_dim, quantization)


def diagonal_tile(q_tile: int, seq_q: int, seq_k: int, tile_m: int, tile_n: int, query_start: int | None = None) -> int:
    """Return the k-tile on the diagonal of a q-tile: the one visited first.

    The queries stand one to a key from `query_start` on; None = they spread over all keys.
    """
    middle = (2 * q_tile + 1) * tile_m  # twice its place among the queries
    middle = middle * seq_k // seq_q if query_start is None else middle + 2 * query_start  # among the keys
    return min(ceil_div(seq_k, tile_n) - 1, middle // (2 * tile_n))


SAMPLE_EVERY = 16


def sampled_tiles(
    q_tile: int, seq_q: int, seq_k: int, tile_m: int, tile_n: int, query_start: int | None = None
) -> list[int]:
    """Return the k-tiles that tell the LSE of a q-tile's rows about, where no step before has told it.

    The tile on the diagonal, every 16th counted from it, the first and the last one.
    """
    diagonal = diagonal_tile(q_tile, seq_q, seq_k, tile_m, tile_n, query_start)
    last = ceil_div(seq_k, tile_n) - 1
    return sorted({0, last, *range(diagonal % SAMPLE_EVERY, last + 1, SAMPLE_EVERY)})


def visit_order(
    q_tile: int, seq_q: int, seq_k: int, tile_m: int, tile_n: int, query_start: int | None = None
) -> list[int]:
    """Return all k-tiles in the order in which a q-tile visits them.

    The diagonal tile, then the first and the last one (sinks and text tokens live at the ends), then downwards
    from the diagonal, then from the last tile down to the diagonal. So the running maximum, against which later
    tiles are judged, is found at once.
    """
    first = diagonal_tile(q_tile, seq_q, seq_k, tile_m, tile_n, query_start)
    last = ceil_div(seq_k, tile_n) - 1
    return list(dict.fromkeys([first, 0, last, *range(first - 1, 0, -1), *range(last - 1, first, -1)]))
