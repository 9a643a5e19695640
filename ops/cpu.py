"""The CPU kernel of `lite_attention::skip_attention` in plain PyTorch, one q-tile row at a time.

All visited tiles of a row go through one matmul, and the votes are found afterwards by a cumulative maximum in
visiting order, so skipped tiles cost nothing and visited ones little more than dense attention. It runs on any device:
that is `skip_attention_reference`, for comparison.
"""

from __future__ import annotations

import math

import torch

from lite_attention.ops.allocate import empty_output
from lite_attention.ops.bitmask import pack_bits, unpack_bits
from lite_attention.ops.check_calls import check_call
from lite_attention.ops.control import Call, read_control, write_control
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.rows import Operands, RowMemory, Sums, Visits, attend_row, heads_of, visits_of
from lite_attention.ops.signature import call_signature
from lite_attention.ops.tiles import ceil_div

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
    check_quantization(quantization)
    batch, seq_q, heads, _ = q.shape
    sizes = (batch, seq_q, k.shape[1])
    call = read_control(control, skip_mask.shape[0], sizes)
    bits = skip_mask[call.slot, :batch, :, : ceil_div(seq_q, tile_m)]
    skipped = skipped_tiles(call, bits, initial_mask, ceil_div(k.shape[1], tile_n))
    visits = visits_of(skipped, must_do, key_mask, sizes, tile_m, tile_n, call.query_start)
    limits = _limits(call, threshold, heads)

    out, lse = empty_output(q, v), torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
    operands = Operands.of(q, k, v, key_mask, scale=scale, tile_n=tile_n, quantization=quantization)
    voted = _attend(operands, visits, limits, out, lse, tile_m)
    if not call.dense:
        voted_out = visits.by_tile(torch.zeros_like(visits.visited).masked_scatter_(visits.visited, voted))
        words = pack_bits(skipped | (voted_out & ~visits.always))
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
    operands: Operands,
    visits: Visits,
    limits: list[float],
    out: torch.Tensor,
    lse: torch.Tensor,
    tile_m: int,
) -> torch.Tensor:
    """Fill out and lse; return a vote for each visit, bool [visits], row by row in visiting order."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    by_row = visits.split(visits.visited)
    # One tensor for all votes, and one memory for all rows: small tensors that stay between large ones that go would
    # leave holes in the heap, as many as there are rows.
    voted = torch.zeros(sum(map(len, by_row)), dtype=torch.bool, device=out.device)
    rows = zip(by_row, voted.split([*map(len, by_row)]), visits.masked.flatten().tolist(), strict=True)
    memory = RowMemory.of(min(tile_m, out.shape[1]), max(map(len, by_row)) * visits.excluded.shape[2], operands, dtype)
    for head in heads_of(operands, visits.excluded, dtype):
        sums = Sums.nothing(head)
        for first in range(0, len(head.q), tile_m):
            tiles, votes, masked = next(rows)
            if len(tiles) == 0:
                continue
            some = slice(first, first + tile_m)
            excluded = head.excluded if masked else None
            row = attend_row(head.q[some], head.k, head.v, excluded, tiles, operands.weights_in, memory)
            sums.put(some, row)
            _vote(row.tile_max, limits[head.at[1]], votes)
        out[head.at[0], :, head.at[1]], lse[head.at] = sums.output(), operands.whole(sums.lse(), head.at)
    return voted
