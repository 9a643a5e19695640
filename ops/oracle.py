"""The contract of skip_attention in float64, sentence by sentence, one tile at a time. Slow, and right."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from lite_attention.ops.oracle_parts import Told, attend, bit, order, scores_of, set_bit, values_of

__all__ = ["OracleResult", "skip_attention_oracle"]


class OracleResult(NamedTuple):
    """What one call computes, and the state it leaves."""

    out: torch.Tensor  # [B, Sq, Hq, Dv] float64
    lse: torch.Tensor  # [B, Hq, Sq] float64, natural log
    skip_mask: torch.Tensor
    control: torch.Tensor
    margin: torch.Tensor  # [B, Hq, q_tiles, k_tiles]: distance of each vote from the threshold; inf = no vote cast


def skip_attention_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    skip_mask: torch.Tensor,
    control: torch.Tensor,
    threshold: torch.Tensor,
    initial_mask: torch.Tensor | None = None,
    must_do: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    tile_m: int,
    tile_n: int,
) -> OracleResult:
    """Compute `lite_attention::skip_attention` in float64, leaving the arguments as they are."""
    (batch, seq_q, heads, _), seq_k = q.shape, k.shape[1]
    q_tiles, k_tiles = math.ceil(seq_q / tile_m), math.ceil(seq_k / tile_n)
    skip_mask, control = skip_mask.clone(), control.clone()
    allowed = torch.ones(batch, seq_k, dtype=torch.bool) if key_mask is None else key_mask.expand(batch, seq_k)
    scores, values = scores_of(q, k, allowed, scale), values_of(v, heads)
    # Everything that changes between calls is read from the control tensor.
    told = Told.of(control, (batch, seq_q, seq_k))
    slot, step, dense, fresh = told.slot, told.step, told.dense, told.fresh

    out = torch.zeros(batch, seq_q, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, seq_q), -math.inf, dtype=torch.float64)
    margin = torch.full((batch, heads, q_tiles, k_tiles), math.inf, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(q_tiles)):
        rows = slice(i * tile_m, min((i + 1) * tile_m, seq_q))  # rows beyond Sq do not exist
        mask = skip_mask[slot, b, h, i]
        if not dense:
            start = None if initial_mask is None else initial_mask[b % len(initial_mask), h % initial_mask.shape[1], i]
            _begin(mask, start, fresh, k_tiles)
        # Past the end of the table the last row holds; a size of 1 serves all.
        limit = float(threshold[min(slot, len(threshold) - 1)][min(step, threshold.shape[1] - 1)].expand(heads)[h])
        seen = torch.zeros(seq_k, dtype=torch.bool)
        running: torch.Tensor | None = None
        for j in order(i, seq_q, seq_k, tile_m, tile_n, told.query_start):
            tile = slice(j * tile_n, min((j + 1) * tile_n, seq_k))
            must = must_do is not None and bit(must_do, j)
            if not allowed[b, tile].any() or (bit(mask, j) and not must and not dense):
                continue
            seen[tile] = True
            tile_max = scores[b, h, rows, tile].amax(-1)  # a NaN survives amax and maximum
            if running is None:  # the first tile visited is kept
                running = tile_max
                continue
            rise = tile_max - running
            running = torch.maximum(running, tile_max)
            if must or dense or limit == -math.inf:
                continue
            margin[b, h, i, j] = (rise.max() - limit).abs().nan_to_num(nan=math.inf)
            if bool((rise <= limit).all()):  # NaN keeps the tile
                set_bit(mask, j, True)
        # Attention over the allowed keys of the visited tiles.
        out[b, rows, h], lse[b, h, rows] = attend(scores[b, h, rows], values[b, h], seen)
    if not dense:
        told.write(control)
    return OracleResult(out, lse, skip_mask, control, margin)


def _begin(mask: torch.Tensor, initial: torch.Tensor | None, fresh: bool, k_tiles: int) -> None:
    """Let the words of a row be what a call starts from."""
    for j in range(k_tiles, 32 * math.ceil(k_tiles / 32)):  # bits that are no tiles
        set_bit(mask, j, False)
    for j in range(k_tiles) if fresh else ():  # start from the initial mask, not from the last votes
        set_bit(mask, j, initial is not None and bit(initial, j))
