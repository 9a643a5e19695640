"""The contract of residual_attention in float64, sentence by sentence, one tile at a time. Slow, and right."""

from __future__ import annotations

import bisect
import itertools
import math
from typing import Any, NamedTuple

import torch

from lite_attention.ops import control as c
from lite_attention.ops.oracle_parts import Told, attend, bit, order, scores_of, set_bit, values_of

__all__ = ["ResidualOracleResult", "decoded_residual", "residual_attention_oracle"]

_BINS = 32 * 64  # 1/64 octave each, from 2^-32 up
_HASH = 2654435761

_At = tuple[int, int, slice]  # batch element, head and rows
_Attended = tuple[torch.Tensor, torch.Tensor]  # output and LSE


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
    shape = (batch, heads, math.ceil(seq_q / tile_m), math.ceil(seq_k / tile_n))
    skip_mask, control, times = skip_mask.clone(), control.clone(), times.clone()
    allowed = torch.ones(batch, seq_k, dtype=torch.bool) if key_mask is None else key_mask.expand(batch, seq_k)
    scores, values = scores_of(q, k, allowed, scale), values_of(v, heads)
    shift = torch.zeros(batch, heads, seq_q, dtype=torch.float64) if lse_shift is None else lse_shift.double()
    told = Told.of(control, (batch, seq_q, seq_k))
    geometry = (seq_q, seq_k, tile_m, tile_n, told.query_start)
    step = _Step.of(told, plan, times[told.slot], residual.shape[1])
    memory = _Memory.of(decoded_residual(residual, residual_scale), row_lse.double(), told.slot, step.residuals)
    masks = skip_mask[told.slot]
    tiles = _tiles(shape, masks[step.mask % 2] if step.mask else None, initial_mask, must_do, allowed, geometry)

    out = torch.zeros(batch, seq_q, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, seq_q), -math.inf, dtype=torch.float64)
    mass = torch.zeros(shape, dtype=torch.float64)
    for b, h, i in itertools.product(*map(range, shape[:3])):
        at = (b, h, slice(i * tile_m, min((i + 1) * tile_m, seq_q)))
        rows = _Rows(scores[at], values[b, h], shift[at], tile_n)
        visitable, kept = tiles.visitable[b, h, i], tiles.kept[b, h, i]
        if step.full:
            out[b, at[2], h], lse[at] = rows.attend(visitable)
            if step.mask:
                memory.put(at, rows.attend(visitable), rows.attend(kept))
        elif visitable.any():  # a row without a visitable tile gives 0 and -inf
            out[b, at[2], h], lse[at] = memory.added(at, rows.attend(kept), step.factor)
        if step.deciding:
            sample = visitable & _sample(order(i, *geometry)[0], shape[3])
            norm = rows.sampled_lse(sample) if step.fresh else memory.row_lse[0][at] - shift[at]
            mass[b, h, i] = rows.masses(visitable, norm)

    certain = torch.ones(shape, dtype=torch.bool)
    if step.deciding:
        share = float(keep[min(told.step, len(keep) - 1)])
        for b in range(batch):
            chosen, certain[b] = _choose(mass[b], tiles.visitable[b], tiles.first[b], share, slack)
            _write_choice(masks[(step.decided + 1) % 2, b], chosen)
    if not step.dense:
        memory.lse_after[told.slot, 0, :batch, :, :seq_q] = lse
        step.note(told, times[told.slot])
        told.write(control)
    visited = tiles.visitable if step.full else tiles.kept
    return ResidualOracleResult(
        out, lse, skip_mask, control, times, memory.residuals_after, memory.lse_after, certain, step.kind, visited
    )


class _Step(NamedTuple):
    """What the state says that a call is to do."""

    dense: bool
    fresh: bool
    full: bool
    deciding: bool
    mask: int  # the number of the mask in use; 0 = none
    residuals: int  # stored of that mask
    decided: int  # masks
    now: float
    factor: float  # of the forecast

    @classmethod
    def of(cls, told: Told, plan: torch.Tensor, times: torch.Tensor, planes: int) -> _Step:
        # A fresh start forgets masks and residuals.
        residuals, decided, mask = (0, 0, 0) if told.fresh or told.dense else told.words[c.RESIDUALS :]
        kind = int(plan[min(told.step, len(plan) - 1)])
        # Full: fresh, or the plan says so, or there is no residual of the mask in use. Deciding: full, and the plan
        # says so or no mask has been decided.
        full = told.dense or told.fresh or kind > 0 or residuals == 0
        deciding = full and not told.dense and (kind == 2 or decided == 0)
        # A mask decided since the one in use was comes into use first, and there are no residuals of it.
        if full and decided > mask:
            mask, residuals = decided, 0
        now = told.step if math.isnan(times[0]) else float(times[0])
        factor = 0.0
        if residuals > 1 and planes > 1 and times[1] != times[2]:
            factor = (now - float(times[1])) / float(times[1] - times[2])
        return cls(
            told.dense, told.fresh, full, deciding, mask, residuals, decided, now,
            factor if math.isfinite(factor) else 0.0,
        )  # fmt: skip

    def note(self, told: Told, times: torch.Tensor) -> None:
        """Write down what this step has stored and decided."""
        stores = self.full and self.mask > 0
        if stores:
            times[2] = times[1]
            times[1] = self.now
        told.words[c.RESIDUALS :] = self.residuals + stores, self.decided + self.deciding, self.mask

    @property
    def kind(self) -> str:
        return "dense" if self.dense else "deciding" if self.deciding else "full" if self.full else "sparse"


# ---- tiles ---------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """Which tiles are what, bool [B, Hq, q_tiles, k_tiles]."""

    visitable: torch.Tensor
    first: torch.Tensor  # those that a choice takes before all others
    kept: torch.Tensor


def _tiles(
    shape: tuple[int, ...],
    mask: torch.Tensor | None,
    initial_mask: torch.Tensor | None,
    must_do: torch.Tensor | None,
    allowed: torch.Tensor,
    geometry: tuple[Any, ...],
) -> _Tiles:
    """Return what each tile is, by the mask in use, int32 [B, Hq, q_tiles, k_words]; None = there is none."""
    tiles, tile_n = _Tiles(*torch.zeros(3, *shape, dtype=torch.bool)), geometry[3]
    for b, h, i, j in itertools.product(*map(range, shape)):
        must = must_do is not None and bit(must_do, j)
        barred = initial_mask is not None and bit(initial_mask[b % len(initial_mask), h % initial_mask.shape[1], i], j)
        if (barred and not must) or not allowed[b, j * tile_n : (j + 1) * tile_n].any():
            continue
        tiles.visitable[b, h, i, j] = True
        tiles.first[b, h, i, j] = must or j == order(i, *geometry)[0]
        tiles.kept[b, h, i, j] = mask is None or must or not bit(mask[b, h, i], j)
    return tiles


def _sample(diagonal: int, k_tiles: int) -> torch.Tensor:
    """Return which tiles, bool [k_tiles], a fresh step takes the LSE of."""
    return torch.tensor([j in (0, k_tiles - 1) or (j - diagonal) % 16 == 0 for j in range(k_tiles)])


# ---- rows ----------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The rows of a q-tile of a head."""

    scores: torch.Tensor  # [m, Sk], log2 units
    values: torch.Tensor  # [Sk, Dv]
    shift: torch.Tensor  # [m], what the scores lack
    tile_n: int

    def keys(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the keys of tiles."""
        return tiles.repeat_interleave(self.tile_n)[: self.scores.shape[1]]

    def attend(self, tiles: torch.Tensor) -> _Attended:
        """Return attention over tiles, normalized by itself, and its LSE."""
        out, lse = attend(self.scores, self.values, self.keys(tiles))
        return out, torch.where(lse == -math.inf, lse, lse + self.shift)

    def sampled_lse(self, sample: torch.Tensor) -> torch.Tensor:
        """Return the LSE of the scores of a sample of the tiles, as they are."""
        return attend(self.scores, self.values, self.keys(sample))[1]

    def masses(self, visitable: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Return the mass of each visitable tile, [k_tiles], 0 of others."""
        weighed = (self.scores - norm.unsqueeze(-1) * math.log2(math.e)).exp2()
        weighed[norm == -math.inf] = 0  # no weight
        in_all = weighed[:, self.keys(visitable)].sum()
        of_tiles = torch.stack([weights.sum() for weights in weighed.split(self.tile_n, 1)])
        return torch.where(visitable, of_tiles / in_all, 0)


class _Memory(NamedTuple):
    """Residuals, and what their masks leave out of the LSE; those of a slot are read, copies of all are written."""

    residuals: torch.Tensor  # [planes, B, Hq, Sq, Dv]
    row_lse: torch.Tensor  # [1 + planes, B, Hq, Sq]
    residuals_after: torch.Tensor
    lse_after: torch.Tensor
    slot: int
    stored: int  # residuals

    @classmethod
    def of(cls, residuals: torch.Tensor, row_lse: torch.Tensor, slot: int, stored: int) -> _Memory:
        return cls(residuals[slot], row_lse[slot], residuals.clone(), row_lse.clone(), slot, stored)

    def plane(self, back: int) -> int:
        """Return where the last residual but so many is; -1 = where the next one goes."""
        return (self.stored - 1 - back) % len(self.residuals)

    def put(self, at: _At, whole: _Attended, kept: _Attended) -> None:
        """Store what is not kept, in place of the older one of two."""
        (out, lse), (kept_out, kept_lse), plane = whole, kept, self.plane(-1)
        self.residuals_after[self.slot, plane][at] = out - kept_out
        self.lse_after[self.slot, 1 + plane][at] = torch.where(kept_lse == -math.inf, lse, lse - kept_lse)

    def added(self, at: _At, kept: _Attended, factor: float) -> _Attended:
        """Return the kept tiles' attention with the last residual, extended by so much of its change."""
        (out, lse), last, before = kept, self.plane(0), self.plane(1)
        residual, left_out = self.residuals[last][at], self.row_lse[1 + last][at]
        if factor != 0:
            residual = residual + factor * (residual - self.residuals[before][at])
            change = factor * (left_out - self.row_lse[1 + before][at])
            left_out = left_out + torch.where(change.isfinite(), change, 0)
        return out + residual, torch.where(lse == -math.inf, left_out, lse + left_out)


# ---- the choice ----------------------------------------------------------------------------------------------------


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


def _write_choice(words: torch.Tensor, chosen: torch.Tensor) -> None:
    """Write what is not chosen of [Hq, q_tiles, k_tiles] as skipped; bits beyond the tiles are 0."""
    heads, q_tiles, k_tiles = chosen.shape
    for h, i, j in itertools.product(range(heads), range(q_tiles), range(32 * math.ceil(k_tiles / 32))):
        set_bit(words[h, i], j, j < k_tiles and not chosen[h, i, j])


def _rounded(keep: float, tiles: int) -> int:
    """Return keep * tiles in float32, to nearest even."""
    return int((torch.tensor(keep, dtype=torch.float32) * torch.tensor(tiles, dtype=torch.float32)).round())


def _bin(place: float) -> int:
    return min(max(math.floor(place), 0), _BINS - 1)


def _count(bins: list[int], least: int) -> int:
    """Return how many of the sorted bins are at least so high."""
    return len(bins) - bisect.bisect_left(bins, least)
