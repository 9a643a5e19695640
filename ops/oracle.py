"""The contract of skip_attention in float64, sentence by sentence, one tile at a time. Slow, and right."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat

from lite_attention.ops import control as c

__all__ = ["OracleResult", "skip_attention_oracle"]


class OracleResult(NamedTuple):
    """What one call computes, and the state it leaves."""

    out: torch.Tensor  # [B, Sq, Hq, Dv] float64
    lse: torch.Tensor  # [B, Hq, Sq] float64, natural log
    skip_mask: torch.Tensor
    control: torch.Tensor
    margin: torch.Tensor  # [B, Hq, q_tiles, k_tiles]: distance of each vote from the threshold; inf = no vote cast


def _bit(words: torch.Tensor, tile: int) -> bool:
    return bool(int(words[tile // 32]) >> (tile % 32) & 1)


def _set_bit(words: torch.Tensor, tile: int, on: bool) -> None:
    word = int(words[tile // 32]) & 0xFFFFFFFF
    word = word | 1 << tile % 32 if on else word & ~(1 << tile % 32)
    words[tile // 32] = word - (1 << 32) if word >= 1 << 31 else word


def _order(i: int, seq_q: int, seq_k: int, tile_m: int, tile_n: int) -> list[int]:
    last = math.ceil(seq_k / tile_n) - 1
    diagonal = min(last, ((2 * i + 1) * tile_m * seq_k) // (2 * seq_q * tile_n))
    order = [diagonal]
    order += [j for j in (0, last) if j not in order]
    order += [j for j in range(diagonal - 1, -1, -1) if j not in order]
    order += [j for j in range(last, diagonal, -1) if j not in order]
    return order


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
    (batch, seq_q, heads, head_dim), seq_k = q.shape, k.shape[1]
    group = heads // k.shape[2]
    q_tiles, k_tiles = math.ceil(seq_q / tile_m), math.ceil(seq_k / tile_n)
    skip_mask, control = skip_mask.clone(), control.clone()

    # Scores are scaled and in log2 units; an excluded key scores -inf.
    to_log2 = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    keys = repeat(k.double(), "b j h d -> b (h group) j d", group=group)
    values = repeat(v.double(), "b j h d -> b (h group) j d", group=group)
    scores = to_log2 * einsum(rearrange(q.double(), "b i h d -> b h i d"), keys, "b h i d, b h j d -> b h i j")
    allowed = torch.ones(batch, seq_k, dtype=torch.bool) if key_mask is None else key_mask.expand(batch, seq_k)
    scores = scores.masked_fill(~allowed[:, None, None], -math.inf)

    # Everything that changes between calls is read from the control tensor.
    words = control.tolist()
    slot = words[c.SLOT]
    block = words[c.slot_word(slot, 0) : c.slot_word(slot + 1, 0)]
    step = block[c.STEP]
    dense = bool(words[c.FLAGS] & c.FLAG_DENSE)
    fresh = (
        step == 0
        or block[c.FRESH] != 0
        or (words[c.REFRESH] > 0 and step % words[c.REFRESH] == 0)
        or [block[c.BATCH], block[c.SEQ_Q], block[c.SEQ_K]] != [batch, seq_q, seq_k]
    )

    out = torch.zeros(batch, seq_q, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, seq_q), -math.inf, dtype=torch.float64)
    margin = torch.full((batch, heads, q_tiles, k_tiles), math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            # Past the end of the table the last row holds; a size of 1 serves all.
            limit = float(threshold[min(slot, len(threshold) - 1)][min(step, threshold.shape[1] - 1)].expand(heads)[h])
            for i in range(q_tiles):
                rows = slice(i * tile_m, min((i + 1) * tile_m, seq_q))  # rows beyond Sq do not exist
                mask = skip_mask[slot, b, h, i]
                if not dense:
                    for j in range(k_tiles, 32 * math.ceil(k_tiles / 32)):  # bits that are no tiles
                        _set_bit(mask, j, False)
                if fresh and not dense:  # start from the initial mask, not from the last votes
                    for j in range(k_tiles):
                        start = initial_mask is not None and _bit(
                            initial_mask[b % len(initial_mask), h % initial_mask.shape[1], i], j
                        )
                        _set_bit(mask, j, start)
                seen = torch.zeros(seq_k, dtype=torch.bool)
                running: torch.Tensor | None = None
                for j in _order(i, seq_q, seq_k, tile_m, tile_n):
                    tile = slice(j * tile_n, min((j + 1) * tile_n, seq_k))
                    must = must_do is not None and _bit(must_do, j)
                    if not allowed[b, tile].any() or (_bit(mask, j) and not must and not dense):
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
                        _set_bit(mask, j, True)
                # Attention over the allowed keys of the visited tiles; a row without any gives 0 and -inf.
                logits = scores[b, h, rows].masked_fill(~seen, -math.inf) * math.log(2)
                row_lse = logits.logsumexp(-1)
                weights = (logits - row_lse.unsqueeze(-1)).exp()
                weights = weights.masked_fill((row_lse == -math.inf).unsqueeze(-1), 0)
                lse[b, h, rows] = row_lse
                out[b, rows, h] = weights @ values[b, h].masked_fill(~seen.unsqueeze(-1), 0)
    if not dense:
        if words[c.FLAGS] & c.FLAG_AUTO_STEP:
            step = 0 if 0 < words[c.NUM_STEPS] <= step + 1 else step + 1
        for field, value in (
            (c.STEP, step),
            (c.FRESH, 0),
            (c.BATCH, batch),
            (c.SEQ_Q, seq_q),
            (c.SEQ_K, seq_k),
        ):
            control[c.slot_word(slot, field)] = value
    return OracleResult(out, lse, skip_mask, control, margin)
