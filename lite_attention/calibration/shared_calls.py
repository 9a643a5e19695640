"""`Sharing`: what a call on this rank is of the call of all ranks that share a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from lite_attention.model_sites import ModelSite
from lite_attention.ops.arguments import require
from lite_attention.ops.shard import WHOLE, Ranks, Shard
from lite_attention.ops.torch_internals import all_gather, arrived

__all__ = ["ALONE", "Sharing", "sharing_of"]


@dataclass(frozen=True)
class Sharing:
    """Heads and queries of a call that are here, among those of all ranks."""

    shard: Shard
    whole: int = 0  # heads of all ranks
    own: tuple[int, ...] = ()  # which of them are here

    @property
    def is_shared(self) -> bool:
        """Whether other ranks have a part of the call."""
        return self.shard.place.ranks > 1

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return of a tensor [..., all heads, or 1] that of the heads here."""
        if not self.is_shared or x.shape[-1] == 1:
            return x
        return x.index_select(-1, torch.tensor(self.own, device=x.device))

    def of_all(self, sums: torch.Tensor) -> torch.Tensor:
        """Return sums over queries [n, heads here] as they are over all queries, and of all heads; a collective.

        They are added in the order of the ranks, so all get the same bits.
        """
        queries, heads = self.shard.query_ranks, self.shard.head_ranks
        heads_group, queries_group = self.shard.groups
        sums = _gathered(sums.unsqueeze(0), queries, queries_group).sum(0)
        each = -(-self.whole // heads.ranks)
        at = torch.tensor(self.own, dtype=sums.dtype, device=sums.device).unsqueeze(1)
        rows = pad(torch.cat([at, sums.T], 1), (0, 0, 0, each - len(self.own)), value=-1.0)
        rows = _gathered(rows, heads, heads_group)
        rows = rows[rows[:, 0] >= 0]
        whole = torch.empty(self.whole, rows.shape[1] - 1, dtype=sums.dtype, device=sums.device)
        whole[rows[:, 0].long()] = rows[:, 1:]
        return whole.T


ALONE = Sharing(WHOLE)


def _gathered(x: torch.Tensor, place: Ranks, group: str) -> torch.Tensor:
    return arrived(all_gather(x.contiguous(), place.ranks, group)) if place.ranks > 1 else x


def sharing_of(site: ModelSite, heads: int) -> Sharing:
    """Return what a call of a site, with so many heads here, is of that of all ranks.

    Raises:
        ValueError: the heads of a rank are computed in several parts.
    """
    shard, exchange = site.shard, None if site.module is None else site.module.exchange
    if shard.place.ranks == 1:
        return ALONE
    if exchange is None:
        here = shard.heads_here(heads)
        return Sharing(shard, shard.all_heads(heads), tuple(here))
    require(exchange.parts == 1, f"parts of {site.name}", "1 to be calibrated", exchange.parts)
    own: list[int] = exchange.own_heads.tolist()
    return Sharing(shard, len(exchange.order), tuple(own))
