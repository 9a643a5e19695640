"""Keys gathered: a rank attends from its own tokens to those of all.

Queries stay where they are, so a state is of the queries here and of all keys. `QUERY_START` tells the op where they
stand: tiles are visited in the order of one process, and where the runs of tokens are multiples of tiles, masks are its
rows, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from lite_attention.ops import control as c
from lite_attention.ops.site_state import SiteState
from lite_attention.parallel.group import Group, gathered_rows

__all__ = ["Keys"]


class Keys(NamedTuple):
    """Whose keys are gathered, and how many each has."""

    group: Group
    lengths: tuple[int, ...]  # by rank

    @property
    def query_start(self) -> int:
        """The key at which the queries here stand."""
        return sum(self.lengths[: self.group.rank])

    def place(self, state: SiteState) -> None:
        """Tell a state where the queries of its next call stand."""
        start: Any = 1 + self.query_start
        state.control[c.QUERY_START : c.QUERY_START + 1].fill_(start)

    def gathered(self, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Return the keys and values of all ranks, (B, S, heads, D), of those here.

        Tokens come first while they travel, so that what arrives is one run of them, which attention reads as it lies;
        uneven parts are padded, and joined by a copy.
        """
        shapes = [x.shape[2:] for x in (k, v)]
        rows = torch.cat([x.transpose(0, 1).flatten(2) for x in (k, v)], -1)
        (whole,) = gathered_rows([rows], self.lengths, self.group.name)
        split = whole.transpose(0, 1).split([heads * dim for heads, dim in shapes], 2)
        return [x.unflatten(2, shape) for x, shape in zip(split, shapes, strict=True)]
