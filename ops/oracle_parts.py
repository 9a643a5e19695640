"""What the oracles share: bits, the order of visits, scores, plain attention, and what the control tensor says."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat

from lite_attention.ops import control as c

__all__ = ["Told", "attend", "bit", "order", "scores_of", "set_bit", "values_of"]


def bit(words: torch.Tensor, tile: int) -> bool:
    """Return the bit of a tile in int32 words [w]."""
    return bool(int(words[tile // 32]) >> (tile % 32) & 1)


def set_bit(words: torch.Tensor, tile: int, on: bool) -> None:
    """Write the bit of a tile into int32 words [w]."""
    word = int(words[tile // 32]) & 0xFFFFFFFF
    word = word | 1 << tile % 32 if on else word & ~(1 << tile % 32)
    words[tile // 32] = word - (1 << 32) if word >= 1 << 31 else word


def order(i: int, seq_q: int, seq_k: int, tile_m: int, tile_n: int, start: int | None = None) -> list[int]:
    """Return the k-tiles in the order in which q-tile i visits them, that on the diagonal first.

    Args:
        i: the q-tile, as are the others of the call.
        start: the key at which the first query stands; None = queries stand at equal distances among all keys.
    """
    last = math.ceil(seq_k / tile_n) - 1
    middle = Fraction((2 * i + 1) * tile_m, 2)  # of the q-tile
    at = middle * seq_k / seq_q if start is None else start + middle
    diagonal = min(last, math.floor(at / tile_n))
    visits = [diagonal]
    visits += [j for j in (0, last) if j not in visits]
    visits += [j for j in range(diagonal - 1, -1, -1) if j not in visits]
    visits += [j for j in range(last, diagonal, -1) if j not in visits]
    return visits


def scores_of(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Return scores float64 [B, Hq, Sq, Sk], scaled and in log2 units; an excluded key scores -inf."""
    to_log2 = (q.shape[3] ** -0.5 if scale is None else scale) * math.log2(math.e)
    keys = repeat(k.double(), "b j h d -> b (h group) j d", group=q.shape[2] // k.shape[2])
    scores = to_log2 * einsum(rearrange(q.double(), "b i h d -> b h i d"), keys, "b h i d, b h j d -> b h i j")
    return scores.masked_fill(~allowed[:, None, None], -math.inf)


def values_of(v: torch.Tensor, heads: int) -> torch.Tensor:
    """Return values float64 [B, Hq, Sk, Dv]."""
    return repeat(v.double(), "b j h d -> b (h group) j d", group=heads // v.shape[2])


def attend(scores: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention [m, Dv] and LSE [m] of scores [m, Sk] over the keys seen; a row without any gives 0 and -inf."""
    logits = scores.masked_fill(~seen, -math.inf) * math.log(2)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp().masked_fill((lse == -math.inf).unsqueeze(-1), 0)
    return weights @ values.masked_fill(~seen.unsqueeze(-1), 0), lse


class Told(NamedTuple):
    """What the control tensor says about a call."""

    slot: int
    step: int
    dense: bool
    fresh: bool
    query_start: int | None
    words: list[int]  # of the slot's block, after the call

    @classmethod
    def of(cls, control: torch.Tensor, sizes: tuple[int, int, int]) -> Told:
        """Read it for a call at (batch, seq_q, seq_k)."""
        words = control.tolist()
        slot = words[c.SLOT]
        block = words[c.slot_word(slot, 0) : c.slot_word(slot + 1, 0)]
        step = block[c.STEP]
        fresh = (
            step == 0
            or block[c.FRESH] != 0
            or (words[c.REFRESH] > 0 and step % words[c.REFRESH] == 0)
            or (block[c.BATCH], block[c.SEQ_Q], block[c.SEQ_K]) != sizes
        )
        start = words[c.QUERY_START] - 1 if words[c.QUERY_START] else None
        next_step = step
        if words[c.FLAGS] & c.FLAG_AUTO_STEP:
            next_step = 0 if 0 < words[c.NUM_STEPS] <= step + 1 else step + 1
        block[c.STEP], block[c.FRESH], block[c.BATCH : c.SEQ_K + 1] = next_step, 0, sizes
        return cls(slot, step, bool(words[c.FLAGS] & c.FLAG_DENSE), fresh, start, block)

    def write(self, control: torch.Tensor) -> None:
        """Note that the call has been done."""
        first = c.slot_word(self.slot, 0)
        control[first : first + len(self.words)] = torch.tensor(self.words, dtype=control.dtype)
