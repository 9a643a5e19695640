"""Tile sizes and the order in which the k-tiles of a row are visited."""

from __future__ import annotations

import torch

__all__ = [
    "HOPPER_HEAD_DIMS",
    "QUANTIZATIONS",
    "allowed_in_tiles",
    "ceil_div",
    "check_quantization",
    "diagonal_tile",
    "quantization_of",
    "tile_shape",
    "visit_order",
]

# (tile_m, tile_n) on Hopper by quantization and head dim, chosen among those measured: see docs/performance.md.
_HOPPER_TILE_SHAPES = {
    "none": {64: (192, 128), 96: (192, 112), 128: (192, 80), 192: (128, 96), 256: (128, 64)},
    "int8": {64: (192, 128), 128: (192, 80)},
    "int8_fp8": {64: (192, 128), 128: (128, 192)},  # a product takes 32 keys at a time
}
_TILE_SHAPE = (64, 64)  # elsewhere

QUANTIZATIONS = tuple(_HOPPER_TILE_SHAPES)  # of scores, and after the underscore of weights and values
HOPPER_HEAD_DIMS = tuple(_HOPPER_TILE_SHAPES["none"])


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; works on symbolic sizes too."""
    return (a + b - 1) // b


def allowed_in_tiles(key_mask: torch.Tensor, tile_n: int) -> torch.Tensor:
    """Return the keys that take part by tile, bool [B, k_tiles, tile_n], False past the end, from bool [B, Sk]."""
    padded = torch.nn.functional.pad(key_mask, (0, -key_mask.shape[1] % tile_n))
    in_tiles: torch.Tensor = padded.unflatten(1, (-1, tile_n))
    return in_tiles


def check_quantization(quantization: str) -> None:
    """Check the name of a quantization.

    Raises:
        ValueError: it is none of `QUANTIZATIONS`.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization: expected {' or '.join(map(repr, QUANTIZATIONS))}, got {quantization!r}")


def quantization_of(use_int8: bool, use_fp8: bool) -> str:
    """Return the quantization that users' switches stand for.

    Raises:
        ValueError: neither True nor False, or `use_fp8` alone.
    """
    for name, switch in (("use_int8", use_int8), ("use_fp8", use_fp8)):
        if not isinstance(switch, bool):
            raise ValueError(f"{name}: expected True or False, got {switch!r}")
    if use_fp8 and not use_int8:
        raise ValueError("use_fp8: expected use_int8=True beside it, got use_int8=False")
    return "int8_fp8" if use_fp8 else "int8" if use_int8 else "none"


def tile_shape(
    head_dim: int, dtype: torch.dtype | None, device: torch.device | str, quantization: str = "none"
) -> tuple[int, int]:
    """Return (tile_m, tile_n): query rows and keys of one tile of the skip mask.

    Args:
        head_dim: width of a query or key vector.
        dtype: dtype of the query; no table depends on it yet.
        device: where the attention runs.
        quantization: "none", "int8" or "int8_fp8", as for the op.

    Raises:
        ValueError: no such quantization, or not for this head dim on this device.
    """
    check_quantization(quantization)
    if torch.device(device).type != "cuda":
        return _TILE_SHAPE
    shapes = _HOPPER_TILE_SHAPES[quantization]
    if quantization != "none" and head_dim not in shapes:
        head_dims = " and ".join(map(str, shapes))
        raise ValueError(f"quantization: expected head dims {head_dims} for {quantization!r}, got {head_dim}")
    return shapes.get(head_dim, _TILE_SHAPE)


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
