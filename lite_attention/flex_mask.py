"""Masks of FlexAttention as the `initial_mask` that skipping starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lite_attention.ops.tiles import ceil_div

if TYPE_CHECKING:
    from lite_attention.ops.site import Site

__all__ = ["from_flex"]

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_PAIRS_AT_ONCE = 1 << 24  # of a query and a key


def from_flex(mask: Any, *, by_head: bool = False) -> Callable[[Site], torch.Tensor]:
    """Return a FlexAttention mask as an `initial_mask`: a tile is skipped from the start if none of its pairs attends.

    A tile of which some pairs attend is computed whole, so this is a pattern to start from, not a mask: the output is
    that of FlexAttention only where the mask is made of whole tiles.

        enable(pipe, initial_mask=masks.from_flex(lambda b, h, q, k: (q // 1560 - k // 1560).abs() <= 2))

    Args:
        mask: a `mask_mod`, which gets batch, head, query and key as int64 tensors without dimensions, and returns bool,
            True = attends; or a `BlockMask`, of which only the blocks count.
        by_head: the `mask_mod` tells heads apart; each is then asked for on its own.

    Raises:
        ValueError: `mask` is neither; or, when a state is born, a `BlockMask` of other lengths, batch or heads.
    """
    if hasattr(mask, "to_dense") and hasattr(mask, "BLOCK_SIZE"):
        return lambda site: _of_blocks(mask, site)
    if not callable(mask):
        raise ValueError(f"mask: expected a mask_mod or a BlockMask of FlexAttention, got {type(mask).__name__}")
    return lambda site: _of_mask_mod(mask, site, by_head)


def _of_mask_mod(mask_mod: MaskMod, site: Site, by_head: bool) -> torch.Tensor:
    """Return bool (1, heads or 1, q_tiles, k_tiles), True = no pair attends."""
    (_, seq_q, heads, _), seq_k = site.q_shape, site.k_shape[1]
    tile_m, tile_n = _tile_of(site)
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_pairs = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    keys = torch.arange(seq_k, device=site.device)
    batch = keys.new_zeros(())
    rows_at_once = max(1, _PAIRS_AT_ONCE // seq_k // tile_m) * tile_m
    found = []
    for head in range(heads if by_head else 1):
        attends = [
            _any_in_tiles(over_pairs(batch, keys.new_full((), head), queries, keys), tile_m, tile_n)
            for queries in torch.arange(seq_q, device=site.device).split(rows_at_once)
        ]
        found.append(~torch.cat(attends))
    return torch.stack(found).unsqueeze(0)


def _any_in_tiles(pairs: torch.Tensor, tile_m: int, tile_n: int) -> torch.Tensor:
    """Return bool (q_tiles, k_tiles) of bool (queries, keys): does any pair of a tile attend?"""
    queries, keys = pairs.shape
    rows, columns = ceil_div(queries, tile_m), ceil_div(keys, tile_n)
    padded = torch.nn.functional.pad(pairs, (0, columns * tile_n - keys, 0, rows * tile_m - queries))
    return padded.view(rows, tile_m, columns, tile_n).any(3).any(1)


def _of_blocks(mask: Any, site: Site) -> torch.Tensor:
    """Return bool (1 or batch, 1 or heads, q_tiles, k_tiles), True = no block that the tile touches attends."""
    (batch, seq_q, heads, _), seq_k = site.q_shape, site.k_shape[1]
    blocks: torch.Tensor = mask.to_dense().bool()
    expected, got = (batch, heads, seq_q, seq_k), (*blocks.shape[:2], *mask.seq_lengths)
    if got[2:] != expected[2:] or got[0] not in (1, batch) or got[1] not in (1, heads):
        raise ValueError(
            f"initial_mask: expected a BlockMask of (batch, heads, queries, keys) = {expected}, the first two "
            f"perhaps 1, as {site.name or 'a site'} has, got {got}"
        )
    for dim, length, tile, block in zip((2, 3), (seq_q, seq_k), _tile_of(site), mask.BLOCK_SIZE, strict=True):
        blocks = _at_tiles(blocks, dim, length, tile, block)
    return ~blocks.to(site.device)


def _at_tiles(blocks: torch.Tensor, dim: int, length: int, tile: int, block: int) -> torch.Tensor:
    """Return which tiles along a dimension touch a block that is set."""
    first = torch.arange(0, length, tile, device=blocks.device)
    last = (first + tile).clamp(max=length) - 1
    counts = torch.nn.functional.pad(blocks.movedim(dim, -1).cumsum(-1), (1, 0))
    return (counts[..., last // block + 1] > counts[..., first // block]).movedim(-1, dim)


def _tile_of(site: Site) -> tuple[int, int]:
    if site.tile_shape is None:
        raise ValueError(f"site: expected one with a tile_shape, got none at {site.name or 'a site'}")
    return site.tile_shape
