"""`Group`: the processes that share a sequence, and what they must agree upon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from lite_attention.ops.arguments import require
from lite_attention.ops.torch_internals import all_gather, arrived, group_named

__all__ = ["ALONE", "Group", "even_lengths", "gathered_rows"]


class Group(NamedTuple):
    """A process group by its name, which can be copied, pickled and traced as the group itself cannot."""

    name: str
    rank: int  # of this process
    ranks: int

    @classmethod
    def of(cls, group: Any, name: str = "process_group") -> Group:
        """Return it of a `torch.distributed.ProcessGroup`, the argument of this name.

        Raises:
            ValueError: no group, or one without this process.
        """
        if isinstance(group, cls):
            return group
        is_group = dist.is_available() and isinstance(group, dist.ProcessGroup)
        require(is_group, name, "a torch.distributed.ProcessGroup", type(group).__name__)
        require(group.rank() >= 0, name, "one with this process", "one without it")
        return cls(group.group_name, group.rank(), group.size())

    def is_there(self, name: str) -> bool:
        """Return whether this process has the group, the argument of this name.

        Raises:
            ValueError: this is another rank of it than the one that made this; what a pickle learned is of its heads.
        """
        group = group_named(self.name) if self.ranks > 1 else None
        if group is not None:
            made, here = (f"rank {rank} of {ranks}" for rank, ranks in (self[1:], (group.rank(), group.size())))
            require(made == here, name, f"{made}, which made this module: make a new one on each", here)
        return self.ranks == 1 or group is not None

    def numbers(self, own: list[int], device: torch.device) -> list[list[int]]:
        """Return the numbers of each rank, as many from all. A collective, which waits for the device."""
        gathered = arrived(all_gather(torch.tensor([own], device=device), self.ranks, self.name))
        rows: list[list[int]] = gathered.tolist()
        return rows


ALONE = Group("", 0, 1)


def gathered_rows(tensors: Sequence[torch.Tensor], lengths: Sequence[int], group: str) -> list[torch.Tensor]:
    """Return the rows of all ranks, as many as the lengths say, of tensors of those here; a collective.

    Uneven parts are padded while they travel, and joined by a copy; even ones are views of what arrives.
    """
    longest = max(lengths)
    begun = [all_gather(_padded(x, longest).contiguous(), len(lengths), group) for x in tensors]
    return [_joined(arrived(x), lengths) for x in begun]


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x))) if len(x) < rows else x


def _joined(x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    longest = max(lengths)
    if min(lengths) == longest:
        return x
    return torch.cat([x[rank * longest : rank * longest + length] for rank, length in enumerate(lengths)])


def even_lengths(whole: int, ranks: int) -> tuple[int, ...]:
    """Return the tokens of each rank: runs as even as can be, the longer ones first, as `torch.tensor_split`."""
    return tuple(whole // ranks + (rank < whole % ranks) for rank in range(ranks))
