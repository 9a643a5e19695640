"""The choice of a deciding step of `residual_attention`: the tiles of the largest mass, over all heads of a video.

No sort: masses are compared in bins, of which one is cut by a hash of the tiles' numbers.
"""

from __future__ import annotations

import torch

__all__ = ["BINS", "BINS_PER_OCTAVE", "HASH", "LOWEST_OCTAVE", "chosen_tiles"]

BINS_PER_OCTAVE = 64
LOWEST_OCTAVE = -32  # smaller masses share the lowest bin
BINS = -LOWEST_OCTAVE * BINS_PER_OCTAVE
HASH = 2654435761  # 2^32 over the golden ratio: neighbors land far apart


def chosen_tiles(mass: torch.Tensor, visitable: torch.Tensor, first: torch.Tensor, keep: float) -> torch.Tensor:
    """Return bool [B, Hq, q_tiles, k_tiles], True = chosen.

    Args:
        mass: float32 [B, Hq, q_tiles, k_tiles], a tile's share of its row of tiles. NaN is chosen.
        visitable: bool, of the same shape: the tiles to choose from.
        first: bool, likewise: tiles that come before all others, even if they are more than are wanted.
        keep: share of the visitable tiles that is wanted.
    """
    forced = visitable & (first | mass.isnan())
    others = visitable & ~forced
    wanted = (visitable.flatten(1).sum(1).to(torch.float32) * keep).round().to(torch.int64)
    bins = _bins(mass).flatten(1)
    counts = torch.zeros(len(mass), BINS, dtype=torch.int64, device=mass.device)
    counts.scatter_add_(1, bins, others.flatten(1).to(torch.int64))
    above = counts.flip(1).cumsum(1).flip(1) - counts
    needed = (wanted - forced.flatten(1).sum(1)).unsqueeze(1) - above
    needed = needed.clamp(min=0).minimum(counts)  # of each bin: all of the high ones, none of the low ones
    stays = _hashes(mass[0]) * counts.gather(1, bins) < needed.gather(1, bins) << 32
    return forced | (others & stays.view_as(mass))


def _bins(mass: torch.Tensor) -> torch.Tensor:
    octaves = mass.nan_to_num(0).log2() - LOWEST_OCTAVE
    return (octaves * BINS_PER_OCTAVE).floor().clamp(0, BINS - 1).to(torch.int64)


def _hashes(tiles: torch.Tensor) -> torch.Tensor:
    """Return a number below 2^32 for each tile of a batch element, flat."""
    return torch.arange(tiles.numel(), device=tiles.device) * HASH % (1 << 32)
