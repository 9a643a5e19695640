"""What the CPU kernels share: which k-tiles each q-tile visits, and attention from one q-tile to some of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.dequantize import dequantized, round_weights_
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.tiles import allowed_in_tiles, visit_order
from lite_attention.ops.units import LOG2_E

__all__ = ["Head", "Operands", "Row", "RowMemory", "Sums", "Visits", "attend_row", "heads_of", "visits_of"]


class Visits(NamedTuple):
    """The tiles that each row visits. All but `always` and `excluded` are [B, Hq, q_tiles, k_tiles]."""

    order: torch.Tensor  # int64, k-tiles in visiting order
    visited: torch.Tensor  # bool, in that order
    always: torch.Tensor  # bool [k_tiles], named by must_do
    excluded: torch.Tensor  # bool [B, k_tiles, tile_n], keys that take no part
    masked: torch.Tensor  # bool [B, Hq, q_tiles]: some key of a visited tile is excluded

    def by_tile(self, in_order: torch.Tensor) -> torch.Tensor:
        """Return by number of the tile what is in visiting order, [B, Hq, q_tiles, k_tiles]."""
        return torch.zeros_like(in_order).scatter_(-1, self.order, in_order)

    def split(self, some: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the k-tiles of each row, in visiting order, of which `some`, bool in that order, are True."""
        lists: tuple[torch.Tensor, ...] = self.order[some].split(some.sum(-1).flatten().tolist())
        return lists


def visits_of(
    skipped: torch.Tensor,
    must_do: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    sizes: tuple[int, int, int],
    tile_m: int,
    tile_n: int,
    query_start: int | None,
) -> Visits:
    """Return what a call at (batch, seq_q, seq_k) visits; the tensors are those of the op."""
    (batch, seq_q, seq_k), (q_tiles, k_tiles), device = sizes, skipped.shape[2:], skipped.device
    allowed = torch.ones(1, seq_k, dtype=torch.bool, device=device) if key_mask is None else key_mask
    allowed = allowed_in_tiles(allowed, tile_n).expand(batch, k_tiles, tile_n)
    always = skipped.new_zeros(k_tiles) if must_do is None else unpack_bits(must_do, k_tiles)
    visited = (~skipped | always) & allowed.any(-1)[:, None, None]
    masked = (visited & ~allowed.all(-1)[:, None, None]).any(-1)
    orders = [visit_order(i, seq_q, seq_k, tile_m, tile_n, query_start) for i in range(q_tiles)]
    order = torch.tensor(orders, device=device).expand_as(visited)
    return Visits(order, visited.gather(-1, order), always, ~allowed, masked)


class Operands(NamedTuple):
    """What a call computes with."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    to_log2: float  # q . k times this is a score
    weights_in: torch.dtype | None  # that weights are rounded to
    lse_shift: torch.Tensor | None  # [B, Hq, Sq], what the scores of a row lack

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, *,
        scale: float | None, tile_n: int, quantization: str,
    ) -> Operands:  # fmt: skip
        """Return the tensors of the op as its scores and products see them."""
        held = check_quantization(quantization)
        if held.scores is None:
            return cls(q, k, v, (q.shape[3] ** -0.5 if scale is None else scale) * LOG2_E, None, None)
        q, k, v, lse_shift = dequantized(q, k, v, key_mask, quantization=quantization, scale=scale, tile_n=tile_n)
        return cls(q, k, v, 1.0, held.values, lse_shift)

    def whole(self, lse: torch.Tensor, at: tuple[int, int]) -> torch.Tensor:
        """Return the LSE of a head with what its scores lack; without a key there is nothing to put back, not NaN."""
        return lse if self.lse_shift is None else lse + self.lse_shift[at].where(lse != -math.inf, 0)


class Head(NamedTuple):
    """One head of one batch element."""

    at: tuple[int, int]  # batch element and head
    q: torch.Tensor  # [Sq, D], scaled so that scores come out in log2 units
    k: torch.Tensor  # [k_tiles, tile_n, D], zeros past the end, as in v
    v: torch.Tensor  # [k_tiles, tile_n, Dv]
    excluded: torch.Tensor  # bool [k_tiles, tile_n], keys that take no part


def heads_of(operands: Operands, excluded: torch.Tensor, dtype: torch.dtype) -> Iterator[Head]:
    """Yield what a call brings head by head, in the dtype that is computed in."""
    q, k, v = operands[:3]
    batch, heads, group = q.shape[0], q.shape[2], q.shape[2] // k.shape[2]
    for b, h in itertools.product(range(batch), range(heads)):
        if h % group == 0:
            k_in_tiles, v_in_tiles = (_in_tiles(x[b, :, h // group].to(dtype), excluded[b]) for x in (k, v))
        yield Head((b, h), q[b, :, h].to(dtype) * operands.to_log2, k_in_tiles, v_in_tiles, excluded[b])


def _in_tiles(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return [tiles, tile_n, D], zeros past the end, from [seq, D]; `like` is [tiles, tile_n]."""
    return torch.nn.functional.pad(x, (0, 0, 0, like.numel() - len(x))).view(*like.shape, -1)


class RowMemory(NamedTuple):
    """Where the large tensors of a row lie, flat, with room for the longest row."""

    scores: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, rows: int, keys: int, operands: Operands, dtype: torch.dtype) -> RowMemory:
        """Return memory for so many rows and keys of a call."""
        q, v = operands.q, operands.v
        return cls(*(torch.empty(keys * dim, dtype=dtype, device=q.device) for dim in (rows, q.shape[3], v.shape[3])))


class Sums(NamedTuple):
    """Softmax of rows on its way, in log2 units."""

    weighted: torch.Tensor  # [m, Dv], not yet divided by total
    total: torch.Tensor  # [m]
    row_max: torch.Tensor  # [m]

    @classmethod
    def nothing(cls, head: Head) -> Sums:
        """Return the sums of all rows of a head before anything is visited."""
        total = head.q.new_zeros(len(head.q))
        return cls(head.v.new_zeros(len(head.q), head.v.shape[2]), total, torch.full_like(total, -math.inf))

    def put(self, some: slice, row: Row) -> None:
        """Write what one q-tile computed."""
        self.weighted[some], self.total[some], self.row_max[some] = row.sums

    def plus(self, other: Sums) -> Sums:
        """Return the sums over the keys of both."""
        row_max = torch.maximum(self.row_max, other.row_max)
        own, others = ((part.row_max - _finite(row_max)).exp2() for part in (self, other))
        weighted = self.weighted * own.unsqueeze(-1) + other.weighted * others.unsqueeze(-1)
        return Sums(weighted, self.total * own + other.total * others, row_max)

    def output(self) -> torch.Tensor:
        """Return attention, [m, Dv]; 0 of a row without a score."""
        return self.weighted / self.total.where(self.total != 0, 1).unsqueeze(-1)

    def lse(self) -> torch.Tensor:
        """Return the log-sum-exp, [m], natural log."""
        return (self.row_max + self.total.log2()) / LOG2_E


class Row(NamedTuple):
    """What one q-tile computes; everything in log2 units."""

    sums: Sums
    tile_max: torch.Tensor  # [m, tiles], in visiting order
    tile_sums: torch.Tensor | None  # likewise, of the weights; None if not asked for


def attend_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    excluded: torch.Tensor | None,
    tiles: torch.Tensor,
    weights_in: torch.dtype | None,
    memory: RowMemory,
    *,
    by_tile: bool = False,
) -> Row:
    """Attend from one q-tile to the chosen k-tiles.

    Args:
        q: [m, D], scaled so that scores come out in log2 units.
        k: [k_tiles, tile_n, D].
        v: [k_tiles, tile_n, Dv].
        excluded: bool [k_tiles, tile_n], keys that take no part; None if all of these tiles' keys do.
        tiles: k-tiles to visit, in order.
        weights_in: dtype that weights are rounded to; None = not rounded.
        memory: written over.
        by_tile: return the sums of each tile too, of weights before they are rounded.
    """
    k_tiles, tile_n, _ = k.shape
    everything = len(tiles) == k_tiles  # then a look at k and v as they lie saves a copy
    if not everything:
        k, v = _chosen(k, tiles, memory.k), _chosen(v, tiles, memory.v)
        excluded = None if excluded is None else excluded.index_select(0, tiles)
    scores = memory.scores[: len(q) * len(tiles) * tile_n].view(len(q), -1)
    torch.mm(q, k.flatten(0, 1).T, out=scores)
    if excluded is not None:
        scores.masked_fill_(excluded.view(-1), -math.inf)
    tile_max = scores.view(len(q), -1, tile_n).amax(-1)
    row_max = tile_max.amax(-1)
    scores -= _finite(row_max).unsqueeze(-1)
    weights = scores.exp2_()
    tile_sums = weights.view(len(q), -1, tile_n).sum(-1) if by_tile else None
    if weights_in is not None:
        round_weights_(weights, weights_in)
    if everything:
        tile_max = tile_max.index_select(1, tiles)
        tile_sums = None if tile_sums is None else tile_sums.index_select(1, tiles)
    return Row(Sums(weights @ v.flatten(0, 1), weights.sum(-1), row_max), tile_max, tile_sums)


def _finite(row_max: torch.Tensor) -> torch.Tensor:
    """Return what is subtracted from scores: -inf less -inf would be NaN."""
    return row_max.clamp(min=torch.finfo(row_max.dtype).min)


def _chosen(x: torch.Tensor, tiles: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return x[tiles], in that memory."""
    shape = (len(tiles), *x.shape[1:])
    return torch.index_select(x, 0, tiles, out=memory[: math.prod(shape)].view(shape))
