"""`Shard`: which part of a model's attention a process computes, where several processes share it.

Thresholds, initial masks and files are of the whole model; a state is of the heads and queries here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from lite_attention.ops.part import Part
from lite_attention.ops.site import Site
from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.torch_internals import holds_unless_unknown

__all__ = ["WHOLE", "Ranks", "Shard", "rows_of_queries"]


class Ranks(NamedTuple):
    """A place among processes."""

    rank: int = 0
    ranks: int = 1


_ALONE = Ranks()


@dataclass(frozen=True)
class Shard:
    """Some heads, and some queries, each against all keys.

    Args:
        head_ranks: the heads are dealt to so many in blocks of ceil(heads / ranks), the last of which may be smaller.
        query_ranks: the queries likewise, in blocks as even as can be, the larger ones first; all have all keys.
        heads: of the whole model, where they do not divide evenly. None = those here, times the ranks.
        groups: names of the process groups that share heads, and queries; "" = not known.
    """

    head_ranks: Ranks = _ALONE
    query_ranks: Ranks = _ALONE
    heads: int | None = None
    groups: tuple[str, str] = field(default=("", ""), compare=False)

    @property
    def place(self) -> Ranks:
        """The place of this process among all that share the model."""
        (head, heads), (query, queries) = self.head_ranks, self.query_ranks
        return Ranks(query * heads + head, queries * heads)

    # ---- heads -----------------------------------------------------------------------------------------------------

    def all_heads(self, heads: int) -> int:
        """Return how many heads a site has in the whole model, of which there are so many here."""
        if self.heads is not None and len(range(self.heads)[self._block(self.heads)]) == heads:
            return self.heads
        return heads * self.head_ranks.ranks

    def heads_here(self, heads: int) -> range:
        """Return which heads of the whole model these are, of which there are so many here."""
        whole = self.all_heads(heads)
        return range(whole)[self._block(whole)]

    def _block(self, heads: int) -> slice:
        each = ceil_div(heads, self.head_ranks.ranks)
        return slice(each * self.head_ranks.rank, each * (self.head_ranks.rank + 1))

    def own_heads(self, name: str, table: Any, heads: int, dim: int = -1) -> Any:
        """Return the part of a tensor that is of the heads here.

        Args:
            name: of the argument, for the message.
            table: of all heads of the model along `dim`; a number, or one for all heads, is returned as it is.
            heads: here.
            dim: the dimension of the heads.

        Raises:
            ValueError: it has another number of heads.
        """
        rank, ranks = self.head_ranks
        if ranks == 1 or not isinstance(table, torch.Tensor) or not table.dim() or table.shape[dim] == 1:
            return table
        whole = self.all_heads(heads)
        if table.shape[dim] != whole:
            raise ValueError(
                f"{name}: expected one for all heads, or {whole}, those of the whole model, of which rank {rank} of "
                f"{ranks} takes {heads}; got {table.shape[dim]}"
            )
        return table.narrow(dim, self._block(whole).start, heads)

    # ---- queries ---------------------------------------------------------------------------------------------------

    def is_gathered(self, seq_q: Any, seq_k: Any) -> bool:
        """Return whether so many keys are those of all ranks, and so many queries those of this one."""
        rank, ranks = self.query_ranks
        return ranks > 1 and holds_unless_unknown((seq_k + ranks - 1 - rank) // ranks == seq_q)

    def query_start(self, seq_q: int, seq_k: int) -> int | None:
        """Return the key at which the first query stands; None = the queries are those of all keys."""
        rank, ranks = self.query_ranks
        if not self.is_gathered(seq_q, seq_k):
            return None
        return rank * (seq_k // ranks) + min(rank, seq_k % ranks)

    def all_queries(self, seq_q: Any, seq_k: Any) -> Any:
        """Return how many queries a site has in the whole model."""
        return seq_k if self.is_gathered(seq_q, seq_k) else seq_q

    def own_queries(self, mask: torch.Tensor, seq_q: int, seq_k: int, tile_m: int) -> torch.Tensor:
        """Return the rows of an initial mask (..., q_tiles, k_tiles), True = skipped, that are of the queries here.

        Where the queries here do not begin with a tile, a tile of theirs lies in two: what either keeps is kept.

        Raises:
            ValueError: it has rows of another number of queries than those of the whole model.
        """
        start = self.query_start(seq_q, seq_k)
        if start is None:
            return mask
        return rows_of_queries(mask, start, seq_q, seq_k, tile_m)

    # ---- sites -----------------------------------------------------------------------------------------------------

    def part(self, heads: int, seq_q: int, seq_k: int) -> Part:
        """Return which part of a site so many heads, queries and keys are."""
        start = self.query_start(seq_q, seq_k)
        return Part(
            tuple(self.heads_here(heads)), self.all_heads(heads), start or 0, seq_q, self.all_queries(seq_q, seq_k)
        )

    def whole(self, site: Site) -> Site:
        """Return a site as it is in the model: with all its heads and queries."""
        if self == WHOLE:
            return site
        (batch, seq_q, heads, head_dim), (_, seq_k, kv_heads, _), (_, _, v_heads, value_dim) = (
            site.q_shape, site.k_shape, site.v_shape,
        )  # fmt: skip
        return replace(
            site, q_shape=(batch, self.all_queries(seq_q, seq_k), self.all_heads(heads), head_dim),
            k_shape=(batch, seq_k, self.all_heads(kv_heads), head_dim),
            v_shape=(batch, seq_k, self.all_heads(v_heads), value_dim),
        )  # fmt: skip


WHOLE = Shard()


def rows_of_queries(mask: torch.Tensor, start: int, seq_q: int, seq_k: int, tile_m: int) -> torch.Tensor:
    """Return the rows of an initial mask (..., q_tiles, k_tiles) of the whole that are of a part of its queries.

    Where the part does not begin with a tile, a tile of its own lies in two: what either keeps is kept.

    Args:
        mask: bool, True = skipped.
        start: the key at which the first of these queries stands.
        seq_q: how many there are.
        seq_k: queries of the whole, which are as many as keys.
        tile_m: queries of a tile.

    Raises:
        ValueError: it has rows of another number of queries than those of the whole.
    """
    q_tiles = ceil_div(seq_k, tile_m)
    if mask.shape[-2] != q_tiles:
        raise ValueError(
            f"initial_mask: expected {q_tiles} q-tiles, those of the whole model, of which this rank takes its own; "
            f"got {mask.shape[-2]}"
        )
    firsts = torch.arange(0, seq_q, tile_m, device=mask.device)
    first, last = firsts + start, (firsts + tile_m).clamp(max=seq_q) + start - 1
    return mask[..., first // tile_m, :] & mask[..., last // tile_m, :]
