"""The op in plain PyTorch, one q-tile row at a time: what runs on the CPU, and on any device for comparison.

All visited tiles of a row go through one matmul, and the votes are found afterwards by a cumulative maximum in
visiting order, so skipped tiles cost nothing and visited ones little more than dense attention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lite_attention.ops.allocate import empty_output
from lite_attention.ops.bitmask import pack_bits, unpack_bits
from lite_attention.ops.control import Call, read_control, write_control
from lite_attention.ops.dequantize import dequantized, rounded_weights
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.tiles import allowed_in_tiles, ceil_div, visit_order
from lite_attention.ops.units import LOG2_E
from lite_attention.ops.validate import call_signature, check_call

__all__ = ["skip_attention_reference", "skipped_tiles"]


def skipped_tiles(call: Call, bits: torch.Tensor, initial_mask: torch.Tensor | None, k_tiles: int) -> torch.Tensor:
    """Return bool [B, Hq, q_tiles, k_tiles], True = to be skipped, from int32 bits [B, Hq, q_tiles, k_words]."""
    batch, heads, q_tiles, _ = bits.shape
    if not call.dense and not call.fresh:
        return unpack_bits(bits, k_tiles)
    if not call.dense and initial_mask is not None:
        start = unpack_bits(initial_mask[:batch, :, :q_tiles], k_tiles)
        return start.expand(batch, heads, q_tiles, k_tiles).clone()
    return torch.zeros(batch, heads, q_tiles, k_tiles, dtype=torch.bool, device=bits.device)


def _in_tiles(x: torch.Tensor, tiles: int, tile_n: int) -> torch.Tensor:
    """[seq, D] -> [tiles, tile_n, D], zeros past the end."""
    return torch.nn.functional.pad(x, (0, 0, 0, tiles * tile_n - x.shape[0])).view(tiles, tile_n, -1)


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
    quantization: str,
) -> _Row:
    """Attend from one q-tile to the chosen k-tiles.

    Args:
        q: [m, D], scaled so that scores come out in log2 units.
        k: [k_tiles, tile_n, D].
        v: [k_tiles, tile_n, Dv].
        excluded: bool [k_tiles, tile_n], keys that take no part; None if all of these tiles' keys do.
        tiles: k-tiles to visit, in order.
        quantization: "int8_fp8" rounds the weights; q, k and v are what it left.
    """
    k_tiles, tile_n, _ = k.shape
    everything = len(tiles) == k_tiles  # then a look at k and v as they lie saves a copy
    if not everything:
        k, v = k.index_select(0, tiles), v.index_select(0, tiles)
        excluded = None if excluded is None else excluded.index_select(0, tiles)
    scores = q @ k.view(-1, k.shape[-1]).T
    if excluded is not None:
        scores.masked_fill_(excluded.view(-1), -math.inf)
    tile_max = scores.view(len(q), -1, tile_n).amax(-1)
    row_max = tile_max.amax(-1)
    scores -= row_max.clamp(min=torch.finfo(scores.dtype).min).unsqueeze(-1)
    weights = scores.exp2_()
    if quantization == "int8_fp8":
        weights = rounded_weights(weights)
    if everything:
        tile_max = tile_max.index_select(1, tiles)
    return _Row(weights @ v.view(-1, v.shape[-1]), weights.sum(-1), row_max, tile_max)


def _votes(tile_max: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return bool [tiles]: voted out, from maxima in visiting order. The first tile stays."""
    rise = tile_max[:, 1:] - tile_max.cummax(1).values[:, :-1]
    return torch.nn.functional.pad((rise <= threshold).all(0), (1, 0))


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
    batch, seq_q, heads, head_dim = q.shape
    seq_k, kv_heads = k.shape[1], k.shape[2]
    q_tiles, k_tiles = ceil_div(seq_q, tile_m), ceil_div(seq_k, tile_n)
    sizes = (batch, seq_q, seq_k)
    call = read_control(control, skip_mask.shape[0], sizes)

    device = q.device
    dtype = torch.promote_types(q.dtype, torch.float32)
    to_log2 = (head_dim**-0.5 if scale is None else scale) * LOG2_E
    out = empty_output(q, v)
    lse = torch.empty(batch, heads, seq_q, dtype=torch.float32, device=device)
    lse_shift = None
    if quantization != "none":
        q, k, v, lse_shift = dequantized(q, k, v, key_mask, quantization=quantization, scale=scale, tile_n=tile_n)
        to_log2 = 1.0

    bits = skip_mask[call.slot, :batch, :, :q_tiles]
    skipped = skipped_tiles(call, bits, initial_mask, k_tiles)

    allowed = torch.ones(1, seq_k, dtype=torch.bool, device=device) if key_mask is None else key_mask
    allowed = allowed_in_tiles(allowed, tile_n).expand(batch, k_tiles, tile_n)
    some_allowed, all_allowed, excluded = allowed.any(-1), allowed.all(-1), ~allowed
    always = torch.zeros(k_tiles, dtype=torch.bool, device=device)
    if must_do is not None:
        always = unpack_bits(must_do, k_tiles)
    visited = (~skipped | always) & some_allowed[:, None, None]
    needs_mask = (visited & ~all_allowed[:, None, None]).any(-1).tolist()
    # All rows' tiles in visiting order, in one list: [positions] of a flat index into visited.
    order = torch.tensor(
        [visit_order(i, seq_q, seq_k, tile_m, tile_n) for i in range(q_tiles)], device=device
    ).expand_as(visited)
    in_order = visited.gather(-1, order)
    tiles_of_rows = iter(order[in_order].split(in_order.sum(-1).flatten().tolist()))
    voted: list[torch.Tensor] = []

    table_row = threshold[min(call.slot, threshold.shape[0] - 1), min(call.step, threshold.shape[1] - 1)]
    limits = [-math.inf] * heads if call.dense else table_row.expand(heads).tolist()
    for b in range(batch):
        for h in range(heads):
            if h % (heads // kv_heads) == 0:
                kv = h // (heads // kv_heads)
                k_in_tiles = _in_tiles(k[b, :, kv].to(dtype), k_tiles, tile_n)
                v_in_tiles = _in_tiles(v[b, :, kv].to(dtype), k_tiles, tile_n)
            q_head = q[b, :, h].to(dtype) * to_log2
            weighted = torch.zeros(seq_q, v.shape[3], dtype=dtype, device=device)
            total = torch.zeros(seq_q, dtype=dtype, device=device)
            row_max = torch.full_like(total, -math.inf)
            for i in range(q_tiles):
                tiles = next(tiles_of_rows)
                if len(tiles) == 0:
                    continue
                rows = slice(i * tile_m, (i + 1) * tile_m)
                some_excluded = excluded[b] if needs_mask[b][h][i] else None
                row = _attend_row(q_head[rows], k_in_tiles, v_in_tiles, some_excluded, tiles, quantization)
                weighted[rows], total[rows], row_max[rows] = row.weighted, row.total, row.row_max
                if limits[h] == -math.inf:  # skips nothing, whatever the scores
                    voted.append(torch.zeros_like(tiles, dtype=torch.bool))
                else:
                    voted.append(_votes(row.tile_max, limits[h]))
            out[b, :, h] = weighted / total.where(total != 0, 1).unsqueeze(-1)
            lse[b, h] = (row_max + total.log2()) / LOG2_E
    if lse_shift is not None:
        lse += lse_shift.where(lse != -math.inf, 0)  # a row without a key has nothing to put back, not even a NaN
    if voted:
        keeps = always.expand_as(visited).gather(-1, order)[in_order]
        out_of_it = torch.zeros_like(in_order).masked_scatter(in_order, torch.cat(voted) & ~keeps)
        skipped |= torch.zeros_like(skipped).scatter(-1, order, out_of_it)
    if not call.dense:
        words = pack_bits(skipped)
        bits[..., : words.shape[-1]] = words
        write_control(control, call, sizes)
    return out, lse
