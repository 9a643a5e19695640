"""What leaving out tiles costs: for one attention call, the error at every candidate threshold, in one pass.

The sets of tiles that growing thresholds vote out are nested. So each tile belongs to one class, the first threshold
that drops it; the tiles' partial outputs are summed over classes, and every candidate's output is one of the sums.
A vote takes effect at the next call: so classes are of the votes of one call, and errors of the next one's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.quantize import dequantized
from lite_attention.ops.reference import LOG2_E
from lite_attention.ops.tiles import allowed_in_tiles, ceil_div, visit_order

__all__ = ["METRICS", "TileStatistics", "error_of", "error_parts", "measure_tiles"]

METRICS = ("L1", "Cossim", "RMSE")

_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # scores held at once: what fits a cache, and what fills a GPU


def error_parts(metric: str, out: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Return sums over rows and value dims, float64 [3, ...]: they add up over parts of an output, errors do not.

    Args:
        metric: one of METRICS.
        out: [..., rows, Dv].
        dense: what it should be, [..., rows, Dv].
    """
    if metric == "L1":
        terms = [(out - dense).abs(), dense.abs()]
    elif metric == "RMSE":
        terms = [(out - dense).square(), dense.square()]
    else:
        terms = [out * dense, dense.square(), out.square()]
    sums = [term.sum((-1, -2), dtype=torch.float64) for term in terms]
    return torch.stack(torch.broadcast_tensors(*sums, *[torch.zeros_like(sums[0])] * (3 - len(sums))))


def error_of(metric: str, parts: torch.Tensor) -> torch.Tensor:
    """Return errors [...] of summed parts [3, ...]; 0 where the dense output is 0 and the other is too.

    L1 is sum|out - dense| / sum|dense|, as in arXiv 2511.11062; RMSE is |out - dense|_2 / |dense|_2; Cossim is
    1 - cosine similarity.
    """
    first, of_dense, of_out = parts
    if metric == "Cossim":
        length = (of_dense * of_out).sqrt()
        return torch.where((of_dense == 0) & (of_out == 0), 0.0, 1 - first / length.where(length != 0, 1)).clamp(min=0)
    ratio = torch.where(first == 0, 0.0, first / of_dense)
    return ratio.sqrt() if metric == "RMSE" else ratio


class TileStatistics(NamedTuple):
    """One call, measured. Choice 0 leaves out what was skipped, choice i also what thresholds[i - 1] had voted out."""

    parts: torch.Tensor  # float64 [3, choices, Hq], see `error_parts`
    left_out: torch.Tensor  # float64 [choices, Hq], tiles
    tiles: int  # of one head
    # From what the call skips, bool [B, Hq, q_tiles, k_tiles], to its votes, uint8 [B, Hq, rows of tiles, k_tiles]: the
    # first choice of the next call that leaves out a tile.
    votes: Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def measure_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    skipped: torch.Tensor,
    voted: torch.Tensor | None = None,
    must_do: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    *,
    thresholds: Sequence[float],
    metric: str = "L1",
    scale: float | None = None,
    tile_m: int,
    tile_n: int,
    quantization: str = "none",
    stride: int = 1,
) -> TileStatistics:
    """Return the error against the dense output of each threshold of the call before, and what this one votes.

    Scores, votes and outputs are those of `lite_attention::skip_attention`, in float32 or better; what was skipped
    before casts no vote and is left out of every choice. The error is that of attention over the tiles left.
    Work: one dense attention without a fused kernel, and a product of (thresholds + 2) / tile_n of its second half.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D].
        v: [B, Sk, Hkv, Dv].
        skipped: bool [B, Hq, q_tiles, k_tiles], left out whatever the choice.
        voted: votes of the call before; None = there was none.
        must_do: int32 [k_words], tiles that are always visited.
        key_mask: bool [B or 1, Sk], True = the key takes part.
        thresholds: ascending, in log2 units.
        metric: one of METRICS.
        scale: factor of the scores; None = D ** -0.5.
        tile_m: query rows of a tile.
        tile_n: keys of a tile.
        quantization: as for the op, and for the dense output too; weights are not rounded.
        stride: only every so many rows of tiles are measured; rows do not depend on each other.
    """
    batch, seq_q, heads, head_dim = q.shape
    seq_k, group, value_dim = k.shape[1], heads // k.shape[2], v.shape[3]
    q_tiles, k_tiles = ceil_div(seq_q, tile_m), ceil_div(seq_k, tile_n)
    device, dtype = q.device, torch.promote_types(q.dtype, torch.float32)
    to_log2 = (head_dim**-0.5 if scale is None else scale) * LOG2_E
    if quantization != "none":
        q, k, v, _ = dequantized(q, k, v, key_mask, quantization=quantization, scale=scale, tile_n=tile_n)
        to_log2 = 1.0
    rows = torch.arange(0, q_tiles, stride, device=device)
    order = torch.tensor([visit_order(i, seq_q, seq_k, tile_m, tile_n) for i in rows.tolist()], device=device)
    grid = torch.tensor(thresholds, dtype=dtype, device=device)
    never = len(thresholds) + 1

    allowed = torch.ones(1, seq_k, dtype=torch.bool, device=device) if key_mask is None else key_mask
    allowed = allowed_in_tiles(allowed, tile_n).expand(batch, -1, -1)
    some_allowed, excluded = allowed.any(-1), ~allowed
    some_excluded = key_mask is not None or seq_k % tile_n != 0
    must = torch.zeros(k_tiles, dtype=torch.bool, device=device)
    if must_do is not None:
        must = unpack_bits(must_do, k_tiles)
    is_row = torch.arange(q_tiles * tile_m, device=device).view(q_tiles, tile_m) < seq_q

    peaks = torch.empty(batch, heads, len(rows), tile_m, k_tiles, dtype=dtype, device=device)
    parts = torch.zeros(3, never, heads, dtype=torch.float64, device=device)
    left_out = torch.zeros(never, heads, dtype=torch.float64, device=device)
    places = torch.arange(len(rows), device=device).split(max(1, _CHUNK[device.type] // (tile_m * tile_n * k_tiles)))
    for b in range(batch):
        for h in range(heads):
            if h % group == 0:
                end = (0, 0, 0, k_tiles * tile_n - seq_k)
                keys = pad(k[b, :, h // group].to(dtype), end)
                values = pad(v[b, :, h // group].to(dtype), end).view(k_tiles, tile_n, value_dim)
            queries = pad(q[b, :, h].to(dtype) * to_log2, (0, 0, 0, q_tiles * tile_m - seq_q)).view(q_tiles, tile_m, -1)
            for place in places:
                some = rows[place]
                count, rows_exist = len(some), is_row[some].unsqueeze(-1)  # [count, tile_m, 1]
                scores = (queries[some].flatten(0, 1) @ keys.T).view(count, tile_m, k_tiles, tile_n)
                if some_excluded:
                    scores.masked_fill_(excluded[b], -torch.inf)
                tile_max = peaks[b, h, place] = scores.amax(-1)
                before = skipped[b, h, some] & ~must & some_allowed[b]
                choice = torch.full(before.shape, never, device=device)
                if voted is not None:
                    choice = torch.where(some_allowed[b] & ~must, voted[b, h, place].long(), never)
                choice.masked_fill_(before, 0)

                # Row 0 sums over all tiles: the dense output. Row i + 1 sums over what choice i leaves.
                summed = choice.unsqueeze(1) >= torch.arange(never + 1, device=device).unsqueeze(-1)
                left_out[:, h] += (~summed[:, 1:]).sum((0, 2))
                weights = scores.sub_(tile_max.amax(-1)[..., None, None].clamp(min=torch.finfo(dtype).min)).exp2_()
                if seq_q % tile_m:
                    weights.mul_(rows_exist.unsqueeze(-1))
                out = _outputs(weights, values, summed.to(dtype))
                parts[:, :, h] += error_parts(metric, out[:, 1:], out[:, :1]).sum(1)

    def votes(skipped: torch.Tensor) -> torch.Tensor:
        cast = torch.empty(batch, heads, len(rows), k_tiles, dtype=torch.uint8, device=device)
        for b, h in itertools.product(range(batch), range(heads)):
            before = skipped[b, h, rows] & ~must & some_allowed[b]
            visited = some_allowed[b] & ~before
            margin = _margins(peaks[b, h], visited, is_row[rows].unsqueeze(-1), order)
            vote = torch.where(visited & ~must, torch.bucketize(margin, grid) + 1, never)
            cast[b, h] = vote.masked_fill(before, 0).to(torch.uint8)
        return cast

    return TileStatistics(parts, left_out, batch * len(rows) * k_tiles, votes)


def _outputs(weights: torch.Tensor, values: torch.Tensor, summed: torch.Tensor) -> torch.Tensor:
    """Return the output of each sum over tiles, [rows of tiles, sums, tile_m, Dv].

    Args:
        weights: [rows of tiles, tile_m, k_tiles, tile_n].
        values: [k_tiles, tile_n, Dv].
        summed: [rows of tiles, sums, k_tiles], 1 = the tile is in the sum.
    """
    count, _, k_tiles, tile_n = weights.shape
    partial = weights.view(-1, k_tiles, tile_n).transpose(0, 1) @ values  # [k_tiles, rows, Dv]
    weighted = summed @ partial.view(k_tiles, count, -1).transpose(0, 1)
    total = summed @ weights.sum(-1).transpose(1, 2)
    return weighted.view(*total.shape, -1) / total.where(total != 0, 1).unsqueeze(-1)


def _margins(
    tile_max: torch.Tensor, visited: torch.Tensor, rows_exist: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Return [rows of tiles, k_tiles]: the lowest threshold that drops a tile; inf for the first one visited.

    Args:
        tile_max: row maxima [rows of tiles, tile_m, k_tiles], log2 units.
        visited: bool [rows of tiles, k_tiles].
        rows_exist: bool [rows of tiles, tile_m, 1], False past the end of the sequence.
        order: [rows of tiles, k_tiles], tiles in visiting order.
    """
    peaks = tile_max.masked_fill(~visited.unsqueeze(1), -torch.inf)
    peaks = peaks.gather(-1, order.unsqueeze(1).expand_as(peaks))
    rise = (peaks[..., 1:] - peaks.cummax(-1).values[..., :-1]).masked_fill(~rows_exist, -torch.inf)
    margin = pad(rise.amax(1), (1, 0), value=torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.empty_like(margin).scatter_(-1, order, margin)
