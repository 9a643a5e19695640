"""The contract of residual_attention in float64, sentence by sentence, one tile at a time. Slow, and right."""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

import torch

from lite_attention.ops import control as c
from lite_attention.ops.oracle_parts import Told, attend, bit, order, scores_of, set_bit, values_of

__all__ = ["ResidualOracleResult", "decoded_residual", "residual_attention_oracle"]

_BINS = 32 * 64  # 1/64 octave each, from 2^-32 up
_HASH = 2654435761


class ResidualOracleResult(NamedTuple):
    """What one call computes, and the state it leaves."""

    out: torch.Tensor  # [B, Sq, Hq, Dv] float64
    lse: torch.Tensor  # [B, Hq, Sq] float64, natural log
    skip_mask: torch.Tensor
    control: torch.Tensor
    times: torch.Tensor
    residual: torch.Tensor  # [slots, planes, B, Hq, Sq, Dv] float64, columns in order, before it is rounded
    row_lse: torch.Tensor  # [slots, 1 + planes, B, Hq, Sq] float64
    certain: torch.Tensor  # bool [B, Hq, q_tiles, k_tiles], False where rounding may change the choice
    kind: str  # of the step: "dense", "full", "deciding" or "sparse"
    visited: torch.Tensor  # bool [B, Hq, q_tiles, k_tiles], the tiles that are computed


def decoded_residual(residual: torch.Tensor, residual_scale: torch.Tensor | None) -> torch.Tensor:
    """Return stored residuals in float64, columns in order."""
    dim = residual.shape[-1]
    places = [*range(dim)]
    if dim % 8 == 0:
        places = [column % 8 // 2 * (dim // 4) + column // 8 * 2 + column % 2 for column in range(dim)]
    values = residual.double()[..., places]
    return values if residual_scale is None else values * residual_scale.double().unsqueeze(-1)


def residual_attention_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    skip_mask: torch.Tensor,
    control: torch.Tensor,
    plan: torch.Tensor,
    keep: torch.Tensor,
    times: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    row_lse: torch.Tensor,
    initial_mask: torch.Tensor | None = None,
    must_do: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    tile_m: int,
    tile_n: int,
    lse_shift: torch.Tensor | None = None,
    slack: float = 0.02,
) -> ResidualOracleResult:
    """Compute `lite_attention::residual_attention` in float64, leaving the arguments as they are.

    Args:
        q: as the op takes it, as are the others; of a quantized call, what its scores see.
        lse_shift: [B, Hq, Sq], what those scores lack, natural log.
        slack: how far masses may be off, in bins of 1/64 octave, before a choice is uncertain.
    """
    (batch, seq_q, heads, _), seq_k = q.shape, k.shape[1]
    q_tiles, k_tiles = math.ceil(seq_q / tile_m), math.ceil(seq_k / tile_n)
    planes = residual.shape[1]
    skip_mask, control, times = skip_mask.clone(), control.clone(), times.clone()
    stored, row_lse = decoded_residual(residual, residual_scale), row_lse.double()
    allowed = torch.ones(batch, seq_k, dtype=torch.bool) if key_mask is None else key_mask.expand(batch, seq_k)
    scores, values = scores_of(q, k, allowed, scale), values_of(v, heads)
    shift = torch.zeros(batch, heads, seq_q, dtype=torch.float64) if lse_shift is None else lse_shift.double()

    told = Told.of(control, (batch, seq_q, seq_k))
    geometry = (seq_q, seq_k, tile_m, tile_n, told.query_start)
    slot, step, dense, fresh = told.slot, told.step, told.dense, told.fresh
    # A fresh start forgets masks and residuals.
    residuals, decided, mask = (0, 0, 0) if fresh or dense else told.words[c.RESIDUALS :]
    kind = int(plan[min(step, len(plan) - 1)])
    # Full: fresh, or the plan says so, or there is no residual of the mask in use. Deciding: full, and the plan says so
    # or no mask has been decided.
    full = dense or fresh or kind > 0 or residuals == 0
    deciding = full and not dense and (kind == 2 or decided == 0)
    # A mask decided since the one in use was comes into use first, and there are no residuals of it.
    if full and decided > mask:
        mask, residuals = decided, 0
    now = step if math.isnan(times[slot, 0]) else float(times[slot, 0])
    factor = 0.0
    if residuals > 1 and planes > 1 and times[slot, 1] != times[slot, 2]:
        factor = (now - float(times[slot, 1])) / float(times[slot, 1] - times[slot, 2])
        factor = factor if math.isfinite(factor) else 0.0
    last, before, free = (1 + (residuals - n) % planes for n in (1, 2, 0))  # planes of row_lse; of residual, one less

    out = torch.zeros(batch, seq_q, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, seq_q), -math.inf, dtype=torch.float64)
    mass = torch.zeros(batch, heads, q_tiles, k_tiles, dtype=torch.float64)
    visitable = torch.zeros(batch, heads, q_tiles, k_tiles, dtype=torch.bool)
    visited, first = torch.zeros_like(visitable), torch.zeros_like(visitable)
    new_stored, new_row_lse = stored.clone(), row_lse.clone()
    for b in range(batch):
        for h in range(heads):
            for i in range(q_tiles):
                rows = slice(i * tile_m, min((i + 1) * tile_m, seq_q))
                kept = torch.zeros(seq_k, dtype=torch.bool)
                able = torch.zeros(seq_k, dtype=torch.bool)
                for j in range(k_tiles):
                    tile = slice(j * tile_n, min((j + 1) * tile_n, seq_k))
                    must = must_do is not None and bit(must_do, j)
                    barred = initial_mask is not None and bit(
                        initial_mask[b % len(initial_mask), h % initial_mask.shape[1], i], j
                    )
                    if (barred and not must) or not allowed[b, tile].any():
                        continue
                    visitable[b, h, i, j] = able[tile] = True
                    first[b, h, i, j] = must or j == order(i, *geometry)[0]
                    if mask == 0 or must or not bit(skip_mask[slot, mask % 2, b, h, i], j):
                        kept[tile] = True
                    visited[b, h, i, j] = full or kept[tile].any()
                here = (scores[b, h, rows], values[b, h])
                kept_out, kept_lse = attend(*here, kept)
                kept_lse = kept_lse + shift[b, h, rows]
                if not able.any():  # a row without a visitable tile gives 0 and -inf
                    kept_lse = torch.full_like(kept_lse, -math.inf)
                none_kept = kept_lse == -math.inf
                if full:
                    whole_out, whole_lse = attend(*here, able)
                    whole_lse = torch.where(whole_lse == -math.inf, whole_lse, whole_lse + shift[b, h, rows])
                    if mask > 0:
                        new_stored[slot, free - 1, b, h, rows] = whole_out - kept_out
                        new_row_lse[slot, free, b, h, rows] = torch.where(none_kept, whole_lse, whole_lse - kept_lse)
                    out[b, rows, h], lse[b, h, rows] = whole_out, whole_lse
                elif able.any():
                    result, left_out = stored[slot, last - 1, b, h, rows], row_lse[slot, last, b, h, rows]
                    if factor != 0:
                        result = result + factor * (result - stored[slot, before - 1, b, h, rows])
                        change = factor * (left_out - row_lse[slot, before, b, h, rows])
                        left_out = left_out + torch.where(change.isfinite(), change, 0)
                    out[b, rows, h] = kept_out + result
                    lse[b, h, rows] = torch.where(none_kept, left_out, kept_lse + left_out)
                if deciding:
                    norm = row_lse[slot, 0, b, h, rows] - shift[b, h, rows]
                    if fresh:  # the LSE of a sample
                        sample = torch.zeros(seq_k, dtype=torch.bool)
                        diagonal = order(i, *geometry)[0]
                        for j in range(k_tiles):
                            if j in (0, k_tiles - 1) or (j - diagonal) % 16 == 0:
                                sample[j * tile_n : (j + 1) * tile_n] = visitable[b, h, i, j]
                        norm = attend(*here, sample)[1]
                    weighed = (scores[b, h, rows] - norm.unsqueeze(-1) * math.log2(math.e)).exp2()
                    weighed[norm == -math.inf] = 0  # no weight
                    in_all = weighed[:, able].sum()
                    for j in range(k_tiles):
                        if visitable[b, h, i, j]:
                            mass[b, h, i, j] = weighed[:, j * tile_n : (j + 1) * tile_n].sum() / in_all

    certain = torch.ones_like(visitable)
    if deciding:
        share = float(keep[min(step, len(keep) - 1)])
        for b in range(batch):
            chosen, certain[b] = _choose(mass[b], visitable[b], first[b], share, slack)
            half = skip_mask[slot, (decided + 1) % 2, b]
            for h in range(heads):
                for i in range(q_tiles):
                    for j in range(32 * math.ceil(k_tiles / 32)):
                        set_bit(half[h, i], j, j < k_tiles and not chosen[h, i, j])
    if not dense:
        new_row_lse[slot, 0, :batch, :, :seq_q] = lse
        stores = full and mask > 0
        if stores:
            times[slot, 2] = times[slot, 1]
            times[slot, 1] = now
        told.words[c.RESIDUALS :] = residuals + stores, decided + deciding, mask
        told.write(control)
    name = "dense" if dense else "deciding" if deciding else "full" if full else "sparse"
    return ResidualOracleResult(out, lse, skip_mask, control, times, new_stored, new_row_lse, certain, name, visited)


def _choose(
    mass: torch.Tensor, visitable: torch.Tensor, first: torch.Tensor, keep: float, slack: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is chosen of the tiles of one batch element, [Hq, q_tiles, k_tiles], and where that is certain."""
    shape, (mass, visitable, first) = mass.shape, (x.flatten() for x in (mass, visitable, first))
    first = visitable & (first | mass.isnan())
    others = [int(n) for n in (visitable & ~first).nonzero()]
    needed = _rounded(keep, int(visitable.sum())) - int(first.sum())
    places = {n: 64 * (math.log2(mass[n]) + 32) if mass[n] > 0 else 0.0 for n in others}
    bins, low, high = ({n: _bin(place + off) for n, place in places.items()} for off in (0, -slack, slack))
    in_order, lowest, highest = (sorted(x.values()) for x in (bins, low, high))

    chosen, certain = first.clone(), torch.ones_like(first)
    for n in others:
        wanted = needed - _count(in_order, bins[n] + 1)
        same = _count(in_order, bins[n]) - _count(in_order, bins[n] + 1)
        chosen[n] = wanted >= same or n * _HASH % 2**32 * same < wanted * 2**32
        # Surely in, surely out, or in a bin that nothing can enter or leave, from above neither.
        certain[n] = (
            _count(highest, low[n]) <= needed
            or _count(lowest, high[n] + 1) >= needed
            or all(_count(highest, edge) == _count(lowest, edge) for edge in (bins[n], bins[n] + 1))
        )
    return chosen.view(shape), certain.view(shape)


def _rounded(keep: float, tiles: int) -> int:
    """Return keep * tiles in float32, to nearest even."""
    return int((torch.tensor(keep, dtype=torch.float32) * torch.tensor(tiles, dtype=torch.float32)).round())


def _bin(place: float) -> int:
    return min(max(math.floor(place), 0), _BINS - 1)


def _count(bins: list[int], least: int) -> int:
    """Return how many of the sorted bins are at least so high."""
    return len(bins) - bisect.bisect_left(bins, least)
