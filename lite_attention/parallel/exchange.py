"""Heads for tokens, and back: what Ulysses sends around attention.

Before, a rank has some tokens of all heads, (B, tokens here, H, D); between the two exchanges all tokens of some
heads, (B, S, H / ranks, D). Queries, keys and values travel together: of each token, the heads of all three that go to
one rank are a row. They are packed by one copy, and attention reads what arrives as it lies. Its output has its dims in
the same order, so it is sent as it lies, too, and unpacked by the last copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lite_attention.ops.arguments import check_count, require
from lite_attention.ops.torch_internals import all_to_all, arrived
from lite_attention.ops.validate import check_inputs
from lite_attention.parallel.group import Group, even_lengths
from lite_attention.parallel.key_gather import Keys

__all__ = [
    "Tokens",
    "begin_gather",
    "begin_scatter",
    "end_gather",
    "end_scatter",
    "gather_lse",
    "spread",
    "tokens_of",
]


class Tokens(NamedTuple):
    """Which tokens of a sequence each rank has: those that exchange heads, and those whose keys are gathered."""

    group: Group  # whose heads are exchanged
    lengths: tuple[int, ...]  # of its ranks
    keys: Keys | None = None  # gathered after the exchange; None = those of the group are all

    @property
    def here(self) -> int:
        """Tokens of this rank."""
        return self.lengths[self.group.rank]

    @property
    def of_each(self) -> list[int]:
        """What goes to the ranks, or comes from them, where it is of the tokens here."""
        return [self.here] * self.group.ranks

    @property
    def whole(self) -> int:
        """Tokens of all ranks."""
        return sum(self.lengths if self.keys is None else self.keys.lengths)

    def shapes(self, qkv: Sequence[torch.Tensor], parts: int) -> list[tuple[int, ...]]:
        """Return the shapes of q, k and v between the exchanges, of one of so many parts of the heads of a rank."""
        rows = (sum(self.lengths), self.whole, self.whole)
        hands = self.group.ranks * parts
        return [(len(x), n, x.shape[2] // hands, x.shape[3]) for x, n in zip(qkv, rows, strict=True)]


def spread(group: Group, key_group: Group, seq_len: int) -> Tokens:
    """Return where the tokens of a sequence are: neighbors exchange heads, and such neighborhoods gather keys."""
    lengths = even_lengths(seq_len, group.ranks * key_group.ranks)
    runs = [lengths[i : i + group.ranks] for i in range(0, len(lengths), group.ranks)]
    keys = None if key_group.ranks == 1 else Keys(key_group, tuple(sum(run) for run in runs))
    return Tokens(group, runs[key_group.rank], keys)


def tokens_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: Group,
    key_group: Group,
    seq_len: int | None,
    parts: int = 1,
) -> Tokens:
    """Check the tokens of this rank, and return where those of all ranks are.

    Args:
        q: (batch, tokens here, heads, head_dim).
        k: (batch, tokens here, kv_heads, head_dim).
        v: (batch, tokens here, kv_heads, value_dim).
        group: the ranks that exchange heads.
        key_group: the ranks whose keys are gathered.
        seq_len: tokens of all ranks; None = as many on each as here.
        parts: the heads of a rank are computed in so many.

    Raises:
        ValueError: heads that do not divide among ranks and parts, tokens that are not those of this rank, or one of
            what `skip_attention` refuses.
    """
    is_compiling = torch.compiler.is_compiling()  # which would trace the messages, too
    if not is_compiling:
        check_inputs(q, k, v)
    here, kv_heads, ranks = q.shape[1], k.shape[2], group.ranks * key_group.ranks
    if not is_compiling:
        require(k.shape[1] == here, "seq_len of k", f"that of q, {here}, as of one sequence", k.shape[1])
        dealt = f"{group.ranks} ranks" if parts == 1 else f"{group.ranks} ranks x {parts} parts"
        require(kv_heads % (group.ranks * parts) == 0, "heads of k", f"a multiple of {dealt}", kv_heads)
        seq_len = None if seq_len is None else check_count("seq_len", seq_len)
    if seq_len is None:
        keys = None if key_group.ranks == 1 else Keys(key_group, (here * group.ranks,) * key_group.ranks)
        return Tokens(group, (here,) * group.ranks, keys)
    tokens = spread(group, key_group, seq_len)
    if here != tokens.here:
        raise ValueError(
            f"seq_len of q: expected {tokens.here}, which rank {key_group.rank * group.ranks + group.rank} of {ranks} "
            f"has of {seq_len} tokens, got {here}"
        )
    return tokens


def begin_scatter(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens, order: torch.Tensor | None = None,
    parts: int = 1, part: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Begin to send each rank its heads, or one of so many parts of them, of the tokens here; order is of q's heads."""
    shared, ranks = q.shape[2] // k.shape[2], tokens.group.ranks
    orders = (order, *[None if order is None else order[::shared] // shared] * 2)
    if order is None or torch.compiler.is_compiling() or _has_gradient(q, k, v):  # compiled, two copies are one
        dealt = (x if heads is None else x.index_select(2, heads) for x, heads in zip((q, k, v), orders, strict=True))
        packed = torch.cat([_heads_by_rank(x, ranks, parts, part).flatten(3) for x in dealt], -1)
    else:
        packed = _packed((q, k, v), [_by_rank(heads, ranks, parts, part) for heads in orders if heads is not None])
    return all_to_all(packed.flatten(0, 1), tokens.of_each, tokens.lengths, tokens.group.name)


def _has_gradient(*tensors: torch.Tensor) -> bool:
    """Return whether the op refuses these, and says so better than a copy that has no derivative."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _heads_by_rank(x: torch.Tensor, ranks: int, parts: int, part: int) -> torch.Tensor:
    """Return a view (ranks, tokens, B, heads of a part, D) of (B, tokens, H, D)."""
    by_rank: torch.Tensor = x.unflatten(2, (ranks, parts, -1))[:, :, :, part]
    return by_rank.permute(2, 1, 0, 3, 4)


def _by_rank(order: torch.Tensor, ranks: int, parts: int, part: int) -> torch.Tensor:
    """Return which heads are of a part of each rank, (ranks, heads of a part)."""
    return order.view(ranks, parts, -1)[:, part]


def _packed(qkv: Sequence[torch.Tensor], heads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return (ranks, tokens, B, what a token has for a rank), of the heads (ranks, heads of a rank) of q, k and v."""
    widths = [of_ranks.shape[1] * x.shape[3] for x, of_ranks in zip(qkv, heads, strict=True)]
    packed = qkv[0].new_empty(len(heads[0]), qkv[0].shape[1], qkv[0].shape[0], sum(widths))
    for x, of_ranks, into in zip(qkv, heads, packed.split(widths, -1), strict=True):
        for of_rank, place in zip(of_ranks, into.unflatten(-1, (-1, x.shape[3])), strict=True):
            torch.index_select(x.transpose(0, 1), 2, of_rank, out=place)
    return packed


def end_scatter(begun: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Return q, k and v of all tokens, views (B, S, heads, D) of what arrived; shapes are heads and D of each."""
    rows = arrived(begun).transpose(0, 1)
    widths = [heads * dim for heads, dim in shapes]
    return [x.unflatten(2, shape) for x, shape in zip(rows.split(widths, 2), shapes, strict=True)]


def begin_gather(out: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Begin to send each rank its tokens of (B, S, heads, ...)."""
    return all_to_all(out.transpose(0, 1).contiguous(), tokens.lengths, tokens.of_each, tokens.group.name)


def end_gather(begun: Sequence[torch.Tensor], tokens: Tokens, order: torch.Tensor | None = None) -> torch.Tensor:
    """Return (B, tokens here, H, ...) of all heads, from all parts of the heads of each rank."""
    parts = [arrived(x).unflatten(0, (tokens.group.ranks, -1)).transpose(0, 2) for x in begun]
    if order is None or torch.compiler.is_compiling():
        joined: torch.Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
        whole: torch.Tensor = joined.flatten(2, 3)
        return whole if order is None else whole.index_select(2, order.argsort())
    batch, here, ranks, _, *dims = parts[0].shape
    whole = parts[0].new_empty((batch, here, len(order), *dims))
    for i, x in enumerate(parts):
        for of_rank, heads in zip(x.unbind(2), _by_rank(order, ranks, len(parts), i), strict=True):
            whole.index_copy_(2, heads, of_rank)
    return whole


def gather_lse(lse: Sequence[torch.Tensor], tokens: Tokens, order: torch.Tensor | None = None) -> torch.Tensor:
    """Return (B, H, tokens here), from (B, heads of a part, S)."""
    begun = [begin_gather(x.transpose(1, 2), tokens) for x in lse]
    return end_gather(begun, tokens, order).transpose(1, 2).contiguous()
