"""Token ranges on the key axis: `[start, end, start, end, ...]` with ends excluded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lite_attention.ops.arguments import check_count
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.tiles import ceil_div

__all__ = ["merge_ranges", "must_do_words", "must_skip_mask", "range_ends"]


def range_ends(name: str, ranges: Sequence[int]) -> tuple[int, ...]:
    """Return the ends of the ranges as ints.

    Raises:
        ValueError: no sequence of integers, or an odd number of them.
    """
    try:
        ends = [check_count(name, end, least=-(2**31)) for end in ranges]
    except TypeError:
        raise ValueError(f"{name}: expected integers [start, end, ...], got {ranges!r}") from None
    if len(ends) % 2:
        raise ValueError(f"{name} must hold pairs of start and end, got {len(ends)} numbers: {ends}")
    return tuple(ends)


def merge_ranges(name: str, ranges: Sequence[int], seq_k: int) -> list[tuple[int, int]]:
    """Return the ranges sorted, merged and without empty ones; the argument is left as it is.

    Raises:
        ValueError: as `range_ends`, or an end outside [0, seq_k], or a start after its end.
    """
    ends = range_ends(name, ranges)
    pairs = sorted(zip(ends[::2], ends[1::2], strict=True))
    merged: list[tuple[int, int]] = []
    for start, end in pairs:
        if not 0 <= start <= end <= seq_k:
            raise ValueError(f"{name} expects 0 <= start <= end <= {seq_k} keys, got [{start}, {end})")
        if start == end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def must_do_words(
    ranges: Sequence[int], seq_k: int, tile_n: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return bit words [ceil(k_tiles / 32)] of the k-tiles that the ranges touch: rounded outward to tiles."""
    tiles = torch.zeros(ceil_div(seq_k, tile_n), dtype=torch.bool, device="cpu")
    for start, end in merge_ranges("must_do", ranges, seq_k):
        tiles[start // tile_n : ceil_div(end, tile_n)] = True
    return pack_bits(tiles).to(device)


def must_skip_mask(ranges: Sequence[int], seq_k: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return a bool key mask [1, seq_k], False in the ranges: exact to the token."""
    allowed = torch.ones(1, seq_k, dtype=torch.bool, device="cpu")
    for start, end in merge_ranges("must_skip", ranges, seq_k):
        allowed[:, start:end] = False
    return allowed.to(device)
