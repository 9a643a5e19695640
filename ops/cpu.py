"""The CPU kernel: the op in plain PyTorch, one q-tile row at a time.

All visited tiles of a row go through one matmul, and the votes are found afterwards by a cumulative maximum in
visiting order, so skipped tiles cost nothing and visited ones little more than dense attention. It runs on any device:
that is `skip_attention_reference`, for comparison.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from lite_attention.ops.allocate import empty_output
from lite_attention.ops.bitmask import pack_bits, unpack_bits
from lite_attention.ops.check_calls import check_call
from lite_attention.ops.control import Call, read_control, write_control
from lite_attention.ops.dequantize import dequantized, round_weights_
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.signature import call_signature
from lite_attention.ops.tiles import allowed_in_tiles, ceil_div, visit_order
from lite_attention.ops.units import LOG2_E

__all__ = ["skip_attention_reference", "skipped_tiles"]


def skip_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    skip_mask: torch.Tensor,
    control: torch.Tensor,
    threshold: torch.Tensor,
    initial_mask: torch.Tensor | None,
    must_do: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    *,
    scale: float | None,
    tile_m: int,
    tile_n: int,
    quantization: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::skip_attention` on any device; see `lite_attention.ops.schema` for the contract."""
    tensors = (q, k, v, skip_mask, control, threshold, initial_mask, must_do, key_mask)
    check_call(call_signature(tensors, scale, tile_m, tile_n))
    held = check_quantization(quantization)
    batch, seq_q, heads, head_dim = q.shape
    sizes = (batch, seq_q, k.shape[1])
    call = read_control(control, skip_mask.shape[0], sizes)
    bits = skip_mask[call.slot, :batch, :, : ceil_div(seq_q, tile_m)]
    skipped = skipped_tiles(call, bits, initial_mask, ceil_div(k.shape[1], tile_n))
    visits = _visits(skipped, must_do, key_mask, sizes, tile_m, tile_n)
    limits = _limits(call, threshold, heads)

    out, lse = empty_output(q, v), torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
    to_log2, lse_shift = (head_dim**-0.5 if scale is None else scale) * LOG2_E, None
    if held.scores is not None:
        q, k, v, lse_shift = dequantized(q, k, v, key_mask, quantization=quantization, scale=scale, tile_n=tile_n)
        to_log2 = 1.0
    voted = _attend(q, k, v, visits, limits, out, lse, to_log2, held.values, tile_m)
    if lse_shift is not None:
        lse += lse_shift.where(lse != -math.inf, 0)  # a row without a key has nothing to put back, not even a NaN
    if not call.dense:
        words = pack_bits(skipped | visits.by_tile(voted))
        bits[..., : words.shape[-1]] = words
        write_control(control, call, sizes)
    return out, lse


# ---- what is visited, and how it is judged -------------------------------------------------------------------------


def skipped_tiles(call: Call, bits: torch.Tensor, initial_mask: torch.Tensor | None, k_tiles: int) -> torch.Tensor:
    """Return bool [B, Hq, q_tiles, k_tiles], True = to be skipped, from int32 bits [B, Hq, q_tiles, k_words]."""
    batch, heads, q_tiles, _ = bits.shape
    if not call.dense and not call.fresh:
        return unpack_bits(bits, k_tiles)
    if not call.dense and initial_mask is not None:
        start = unpack_bits(initial_mask[:batch, :, :q_tiles], k_tiles)
        return start.expand(batch, heads, q_tiles, k_tiles).clone()
    return torch.zeros(batch, heads, q_tiles, k_tiles, dtype=torch.bool, device=bits.device)


class _Visits(NamedTuple):
    """The tiles that each row visits. All but `always` and `excluded` are [B, Hq, q_tiles, k_tiles]."""

    order: torch.Tensor  # int64, k-tiles in visiting order
    visited: torch.Tensor  # bool, in that order
    always: torch.Tensor  # bool [k_tiles], named by must_do
    excluded: torch.Tensor  # bool [B, k_tiles, tile_n], keys that take no part
    masked: torch.Tensor  # bool [B, Hq, q_tiles]: some key of a visited tile is excluded

    def by_tile(self, voted: torch.Tensor) -> torch.Tensor:
        """Return what is voted out, bool [B, Hq, q_tiles, k_tiles], from a vote for each visit, bool [visits]."""
        in_order = torch.zeros_like(self.visited).masked_scatter_(self.visited, voted)
        return torch.zeros_like(in_order).scatter_(-1, self.order, in_order) & ~self.always


def _visits(
    skipped: torch.Tensor,
    must_do: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    sizes: tuple[int, int, int],
    tile_m: int,
    tile_n: int,
) -> _Visits:
    """Return what a call at (batch, seq_q, seq_k) visits; the tensors are those of the op."""
    (batch, seq_q, seq_k), (q_tiles, k_tiles), device = sizes, skipped.shape[2:], skipped.device
    allowed = torch.ones(1, seq_k, dtype=torch.bool, device=device) if key_mask is None else key_mask
    allowed = allowed_in_tiles(allowed, tile_n).expand(batch, k_tiles, tile_n)
    always = skipped.new_zeros(k_tiles) if must_do is None else unpack_bits(must_do, k_tiles)
    visited = (~skipped | always) & allowed.any(-1)[:, None, None]
    masked = (visited & ~allowed.all(-1)[:, None, None]).any(-1)
    orders = [visit_order(i, seq_q, seq_k, tile_m, tile_n) for i in range(q_tiles)]
    order = torch.tensor(orders, device=device).expand_as(visited)
    return _Visits(order, visited.gather(-1, order), always, ~allowed, masked)


def _limits(call: Call, threshold: torch.Tensor, heads: int) -> list[float]:
    """Return the threshold of each head."""
    if call.dense:
        return [-math.inf] * heads
    row = threshold[min(call.slot, threshold.shape[0] - 1), min(call.step, threshold.shape[1] - 1)]
    limits: list[float] = row.expand(heads).tolist()
    return limits


def _vote(tile_max: torch.Tensor, limit: float, voted: torch.Tensor) -> None:
    """Write bool [tiles], True = voted out, from maxima [m, tiles] in visiting order. The first tile stays."""
    if limit > -math.inf:  # which skips nothing, whatever the scores
        rise = tile_max[:, 1:] - tile_max.cummax(1).values[:, :-1]
        torch.all(rise <= limit, 0, out=voted[1:])


# ---- attention -----------------------------------------------------------------------------------------------------


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visits: _Visits,
    limits: list[float],
    out: torch.Tensor,
    lse: torch.Tensor,
    to_log2: float,
    weights_in: torch.dtype | None,
    tile_m: int,
) -> torch.Tensor:
    """Fill out and lse; return a vote for each visit, bool [visits], row by row in visiting order."""
    (batch, seq_q, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    dtype = torch.promote_types(out.dtype, torch.float32)
    counts = visits.visited.sum(-1)
    # One tensor for all votes, and one memory for all rows: small tensors that stay between large ones that go would
    # leave holes in the heap, as many as there are rows.
    voted = torch.zeros(int(counts.sum()), dtype=torch.bool, device=q.device)
    rows = zip(
        visits.order[visits.visited].split(counts.flatten().tolist()),
        voted.split(counts.flatten().tolist()),
        visits.masked.flatten().tolist(),
        strict=True,
    )
    memory = _Memory.of(min(tile_m, seq_q), int(counts.max()) * visits.excluded.shape[2], q, v, dtype)
    for b, h in itertools.product(range(batch), range(heads)):
        if h % group == 0:
            k_in_tiles, v_in_tiles = (_in_tiles(x[b, :, h // group].to(dtype), visits.excluded[b]) for x in (k, v))
        q_head = q[b, :, h].to(dtype) * to_log2
        weighted = torch.zeros(seq_q, v.shape[3], dtype=dtype, device=q.device)
        total = torch.zeros(seq_q, dtype=dtype, device=q.device)
        row_max = torch.full_like(total, -math.inf)
        for first in range(0, seq_q, tile_m):
            tiles, votes, masked = next(rows)
            if len(tiles) == 0:
                continue
            some = slice(first, first + tile_m)
            excluded = visits.excluded[b] if masked else None
            row = _attend_row(q_head[some], k_in_tiles, v_in_tiles, excluded, tiles, weights_in, memory)
            weighted[some], total[some], row_max[some] = row.weighted, row.total, row.row_max
            _vote(row.tile_max, limits[h], votes)
        out[b, :, h] = weighted / total.where(total != 0, 1).unsqueeze(-1)
        lse[b, h] = (row_max + total.log2()) / LOG2_E
    return voted


def _in_tiles(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return [tiles, tile_n, D], zeros past the end, from [seq, D]; `like` is [tiles, tile_n]."""
    return torch.nn.functional.pad(x, (0, 0, 0, like.numel() - len(x))).view(*like.shape, -1)


class _Memory(NamedTuple):
    """Where the large tensors of a row lie, flat, with room for the longest row."""

    scores: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, rows: int, keys: int, q: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> _Memory:
        """Return memory for so many rows and keys; q and v tell the head dims and the device."""
        return cls(*(torch.empty(keys * dim, dtype=dtype, device=q.device) for dim in (rows, q.shape[3], v.shape[3])))


class _Row(NamedTuple):
    """What one q-tile computes; everything in log2 units."""

    weighted: torch.Tensor  # [m, Dv], not yet divided by total
    total: torch.Tensor  # [m]
    row_max: torch.Tensor  # [m]
    tile_max: torch.Tensor  # [m, tiles], in visiting order


def _attend_row(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    excluded: torch.Tensor | None,
    tiles: torch.Tensor,
    weights_in: torch.dtype | None,
    memory: _Memory,
) -> _Row:
    """Attend from one q-tile to the chosen k-tiles.

    Args:
        q: [m, D], scaled so that scores come out in log2 units.
        k: [k_tiles, tile_n, D].
        v: [k_tiles, tile_n, Dv].
        excluded: bool [k_tiles, tile_n], keys that take no part; None if all of these tiles' keys do.
        tiles: k-tiles to visit, in order.
        weights_in: dtype that weights are rounded to; None = not rounded.
        memory: written over.
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
    scores -= row_max.clamp(min=torch.finfo(scores.dtype).min).unsqueeze(-1)
    weights = scores.exp2_()
    if weights_in is not None:
        round_weights_(weights, weights_in)
    if everything:
        tile_max = tile_max.index_select(1, tiles)
    return _Row(weights @ v.flatten(0, 1), weights.sum(-1), row_max, tile_max)


def _chosen(x: torch.Tensor, tiles: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Return x[tiles], in that memory."""
    shape = (len(tiles), *x.shape[1:])
    return torch.index_select(x, 0, tiles, out=memory[: math.prod(shape)].view(shape))
