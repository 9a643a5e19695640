"""The CPU kernel of `lite_attention::residual_attention` in plain PyTorch, one q-tile row at a time.

A full step computes a row in two parts, the kept tiles and the rest: attention over the first alone, and over both, are
what the residual is the difference of. A sparse step computes the first part alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from lite_attention.ops import control as c
from lite_attention.ops.allocate import empty_output
from lite_attention.ops.bitmask import WORD_BITS, pack_bits, unpack_bits
from lite_attention.ops.check_calls import check_residual_call
from lite_attention.ops.choice import chosen_tiles
from lite_attention.ops.plan import DECIDING, SPARSE
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.residual_store import Residuals
from lite_attention.ops.rows import Head, Operands, Row, RowMemory, Sums, Visits, attend_row, heads_of, visits_of
from lite_attention.ops.signature import call_signature
from lite_attention.ops.tiles import ceil_div, diagonal_tile, sampled_tiles
from lite_attention.ops.units import LOG2_E

__all__ = ["residual_attention_reference"]


def residual_attention_reference(
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
    initial_mask: torch.Tensor | None,
    must_do: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    *,
    scale: float | None,
    tile_m: int,
    tile_n: int,
    quantization: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::residual_attention` on any device; see `lite_attention.ops.schema` for the contract."""
    state = (skip_mask, control, plan, keep, times, residual, residual_scale, row_lse, initial_mask)
    check_residual_call(call_signature((q, k, v, *state, must_do, key_mask), scale, tile_m, tile_n))
    check_quantization(quantization)
    (batch, seq_q, heads, _), seq_k = q.shape, k.shape[1]
    sizes = (batch, seq_q, seq_k)
    call = c.read_control(control, skip_mask.shape[0], sizes)
    geometry = (seq_q, seq_k, tile_m, tile_n, call.query_start)
    step = _Step.of(call, control, plan, keep)
    planes = residual.shape[1]
    q_tiles, k_tiles = ceil_div(seq_q, tile_m), ceil_div(seq_k, tile_n)
    bits = skip_mask[call.slot, :, :batch, :, :q_tiles, : ceil_div(k_tiles, WORD_BITS)]

    barred = _barred(initial_mask, (batch, heads, q_tiles, k_tiles), q.device)
    visits = visits_of(barred, must_do, key_mask, sizes, tile_m, tile_n, call.query_start)
    kept = _kept(visits, bits[step.mask % 2]) if step.mask else visits.visited
    operands = Operands.of(q, k, v, key_mask, scale=scale, tile_n=tile_n, quantization=quantization)
    masses = None
    if step.deciding:
        sampled = _table(q_tiles, k_tiles, lambda i: sampled_tiles(i, *geometry), q.device)
        masses = _Masses.of(step, visits, operands, row_lse[call.slot, 0, :batch, :, :seq_q], sampled)
    stored = Residuals.of(residual, residual_scale, row_lse, call.slot, batch, seq_q)
    now, factor = _time_and_factor(times[call.slot], call.step, min(step.residuals, planes))

    out, lse = empty_output(q, v), torch.empty(batch, heads, seq_q, dtype=torch.float32, device=q.device)
    for head, of_kept, of_all in _attend(operands, visits, kept, masses, tile_m, out.dtype, whole=step.full):
        result, total = of_all.output(), operands.whole(of_all.lse(), head.at)
        if not step.full:
            result, total = _recovered(result, total, stored, step.residuals, factor, head.at)
            attends = visits.visited[head.at].any(-1).repeat_interleave(tile_m)[:seq_q]
            result, total = result.where(attends.unsqueeze(-1), 0), total.where(attends, -math.inf)
        elif step.stores:
            kept_lse = operands.whole(of_kept.lse(), head.at)
            left_out = torch.where(kept_lse == -math.inf, total, total - kept_lse)
            stored.put(step.residuals % planes, *head.at, result - of_kept.output(), left_out)
        out[head.at[0], :, head.at[1]], lse[head.at] = result, total
    if call.dense:
        return out, lse

    row_lse[call.slot, 0, :batch, :, :seq_q] = lse
    if masses is not None:
        diagonal = _table(q_tiles, k_tiles, lambda i: [diagonal_tile(i, *geometry)], q.device)
        bits[(step.decided + 1) % 2] = pack_bits(~masses.chosen(visits, diagonal, step.keep))
    if step.stores:
        times[call.slot, 2] = times[call.slot, 1]
        times[call.slot, 1] = now
    c.write_control(control, call, sizes, step.words_after())
    return out, lse


# ---- what a step does ----------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """What the state says that a call is to do."""

    full: bool
    deciding: bool
    mask: int  # the number of the mask in use; 0 = none
    residuals: int  # stored of that mask
    decided: int  # number of masks
    keep: float

    @classmethod
    def of(cls, call: c.Call, control: torch.Tensor, plan: torch.Tensor, keep: torch.Tensor) -> _Step:
        if call.dense:
            return cls(full=True, deciding=False, mask=0, residuals=0, decided=0, keep=1.0)
        kind, share = (int(plan[min(call.step, len(plan) - 1)]), float(keep[min(call.step, len(keep) - 1)]))
        first = c.slot_word(call.slot, c.RESIDUALS)
        residuals, decided, mask = (0, 0, 0) if call.fresh else control[first : first + 3].tolist()
        full = call.fresh or kind != SPARSE or residuals == 0
        if full and decided > mask:
            residuals, mask = 0, decided
        return cls(full, full and (kind == DECIDING or decided == 0), mask, residuals, decided, share)

    @property
    def stores(self) -> bool:
        """Whether there is a residual of it."""
        return self.full and self.mask > 0

    def words_after(self) -> tuple[int, int, int]:
        """Return how many residuals and masks there are behind it, and the mask in use."""
        return self.residuals + int(self.stores), self.decided + int(self.deciding), self.mask


def _time_and_factor(times: torch.Tensor, step: int, known: int) -> tuple[float, float]:
    """Return the time of a step, and how far it lies past the last of so many known residuals, in distances of two."""
    now, last, before = times.to("cpu", copy=True)
    now = now.where(~now.isnan(), step)
    factor = float((now - last) / (last - before))
    return float(now), factor if known > 1 and math.isfinite(factor) else 0.0


def _barred(initial_mask: torch.Tensor | None, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the tiles of the initial mask, bool of the shape (batch, heads, q_tiles, k_tiles)."""
    barred = torch.zeros(shape, dtype=torch.bool, device=device)
    return barred if initial_mask is None else barred | unpack_bits(initial_mask[: shape[0], :, : shape[2]], shape[3])


def _kept(visits: Visits, bits: torch.Tensor) -> torch.Tensor:
    """Return which visits a mask keeps, bool [B, Hq, q_tiles, k_tiles] in visiting order."""
    k_tiles = visits.order.shape[3]
    keeps = ~unpack_bits(bits, k_tiles) | visits.always
    return visits.visited & keeps.gather(-1, visits.order)


def _table(q_tiles: int, k_tiles: int, tiles_of: Callable[[int], list[int]], device: torch.device) -> torch.Tensor:
    """Return bool [q_tiles, k_tiles], True for the k-tiles that a function names for a q-tile."""
    table = torch.zeros(q_tiles, k_tiles, dtype=torch.bool, device="cpu")
    for i in range(q_tiles):
        table[i, tiles_of(i)] = True
    return table.to(device)


class _Masses(NamedTuple):
    """How much each tile matters in a deciding step."""

    sums: torch.Tensor  # float32 [B, Hq, q_tiles, k_tiles]
    norms: torch.Tensor | None  # [B, Hq, Sq], the LSE before in log2 units; None = the sample tells
    sampled: torch.Tensor  # bool [q_tiles, k_tiles]

    @classmethod
    def of(
        cls, step: _Step, visits: Visits, operands: Operands, last_lse: torch.Tensor, sampled: torch.Tensor
    ) -> _Masses:
        norms = None
        if step.decided:  # then there was a step before
            norms = (last_lse if operands.lse_shift is None else last_lse - operands.lse_shift) * LOG2_E
        return cls(torch.zeros_like(visits.visited, dtype=torch.float32), norms, sampled)

    def add(self, at: tuple[int, int], i: int, some: slice, tiles: torch.Tensor, row: Row) -> None:
        """Take in what one q-tile gave some tiles, in a step without a mask all of them."""
        assert row.tile_sums is not None
        if self.norms is None:
            norms = row.sums.row_max + row.tile_sums[:, self.sampled[i, tiles]].sum(-1).log2()
        else:
            norms = self.norms[at][some]
        norms = norms.where(norms != -math.inf, math.inf)  # such a row has no weight
        weights = (row.sums.row_max - norms).exp2().unsqueeze(-1)
        self.sums[at][i, tiles] = (row.tile_sums * weights).sum(0).to(torch.float32)

    def chosen(self, visits: Visits, diagonal: torch.Tensor, keep: float) -> torch.Tensor:
        """Return which tiles stay, by the share of its q-tile that each has; some come before all others."""
        shares = self.sums / self.sums.sum(-1, keepdim=True)
        return chosen_tiles(shares, visits.by_tile(visits.visited), visits.always | diagonal, keep)


# ---- attention -----------------------------------------------------------------------------------------------------


def _attend(
    operands: Operands,
    visits: Visits,
    kept: torch.Tensor,
    masses: _Masses | None,
    tile_m: int,
    out_dtype: torch.dtype,
    *,
    whole: bool,
) -> Iterator[tuple[Head, Sums, Sums]]:
    """Yield for each head the sums over the kept tiles and, where the whole is asked for, over all, else the same."""
    dtype = torch.promote_types(out_dtype, torch.float32)
    rest = visits.visited & ~kept if whole else torch.zeros_like(kept)
    parts = [visits.split(some) for some in (kept, rest)]
    rows = zip(*parts, visits.masked.flatten().tolist(), strict=True)
    longest = max(len(tiles) for part in parts for tiles in part)
    seq_q = operands.q.shape[1]
    memory = RowMemory.of(min(tile_m, seq_q), longest * visits.excluded.shape[2], operands, dtype)
    for head in heads_of(operands, visits.excluded, dtype):
        sums = [Sums.nothing(head) for _ in parts]
        for i in range(ceil_div(seq_q, tile_m)):
            some = slice(i * tile_m, (i + 1) * tile_m)
            *of_row, masked = next(rows)
            for part, tiles in zip(sums, of_row, strict=True):
                if len(tiles) == 0:
                    continue
                row = attend_row(
                    head.q[some], head.k, head.v, head.excluded if masked else None, tiles, operands.weights_in,
                    memory, by_tile=masses is not None,
                )  # fmt: skip
                part.put(some, row)
                if masses is not None:
                    masses.add(head.at, i, some, tiles, row)
        yield head, sums[0], sums[0].plus(sums[1]) if whole else sums[0]


def _recovered(
    kept: torch.Tensor, kept_lse: torch.Tensor, stored: Residuals, residuals: int, factor: float, at: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and LSE of a head with what the skipped tiles gave, extended to this step."""
    planes = len(stored.values)
    residual, left_out = stored.get((residuals - 1) % planes, *at)
    if factor:
        before, left_out_before = stored.get((residuals - 2) % planes, *at)
        residual = residual + factor * (residual - before)
        change = factor * (left_out - left_out_before)
        left_out = left_out + change.where(change.isfinite(), 0)
    return kept + residual, torch.where(kept_lse == -math.inf, left_out, kept_lse + left_out)
