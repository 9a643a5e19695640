"""What leaving out tiles costs: for one attention call, the error at every candidate threshold, in one pass.

The sets of tiles that growing thresholds vote out are nested. So each tile belongs to one class, the first threshold
that drops it; the tiles' partial outputs are summed over classes, and every candidate's output is one of the sums.
A vote takes effect at the next call: so classes are of the votes of one call, and errors of the next one's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
_APART = 4  # rows of a tile that errors are taken from, at most, where only some rows of tiles are measured

# Which of the B * Hq heads; which rows of tiles; scores [rows of tiles, tile_m, heads, k_tiles, tile_n], log2 units,
# heads within rows so that products of some rows and all tiles need no copy; values [heads, k_tiles, tile_n, Dv].
_Piece = tuple[slice, slice, torch.Tensor, torch.Tensor]


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
    # Value dims first: a sum of everything in float64 makes a copy in float64 on the CPU.
    sums = [term.sum(-1).sum(-1, dtype=torch.float64) for term in terms]
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
    Work: the scores of dense attention without a fused kernel, and for the rows that errors are taken from its second
    half, and a product of (thresholds + 2) / tile_n of that.

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
        stride: only every so many rows of tiles are measured; rows do not depend on each other. Votes are of all their
            queries, errors of every min(stride, 4)-th one.
    """
    batch, seq_q, heads, head_dim = q.shape
    seq_k, q_tiles, k_tiles = k.shape[1], ceil_div(seq_q, tile_m), ceil_div(k.shape[1], tile_n)
    device, dtype = q.device, torch.promote_types(q.dtype, torch.float32)
    to_log2 = (head_dim**-0.5 if scale is None else scale) * LOG2_E
    if quantization != "none":
        q, k, v, _ = dequantized(q, k, v, key_mask, quantization=quantization, scale=scale, tile_n=tile_n)
        to_log2 = 1.0
    grid = torch.tensor(thresholds, dtype=dtype, device=device)
    never = len(thresholds) + 1
    excluded, some_allowed, free = _of_keys(k, must_do, key_mask, tile_n)

    def choices(votes: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        return votes.masked_fill(skipped, 0).masked_fill(~free, never)

    skipped = skipped[:, :, ::stride]
    voted = torch.full_like(skipped, never, dtype=torch.uint8) if voted is None else voted
    choice = choices(voted, skipped).flatten(0, 1)
    rows = torch.arange(q_tiles * tile_m, device=device).view(q_tiles, tile_m)[::stride]
    # Rows past the end are the last one again, which changes no vote.
    pieces = _pieces(q, k, v, excluded, rows.clamp(max=seq_q - 1), to_log2, dtype, tile_n)
    peaks, parts, left_out = _measured(pieces, choice, rows < seq_q, dtype, never, metric, min(stride, _APART))
    parts, left_out = (x.unflatten(-2, (batch, heads)).sum(-3).mT for x in (parts, left_out))
    visits = [visit_order(i, seq_q, seq_k, tile_m, tile_n) for i in range(0, q_tiles, stride)]
    order = torch.tensor(visits, device=device)

    def votes(skipped: torch.Tensor) -> torch.Tensor:
        skipped = skipped[:, :, ::stride]
        visited = some_allowed & ~(skipped & free)
        margins = _margins(peaks, visited.flatten(0, 1), order)
        return choices((torch.bucketize(margins, grid) + 1).to(torch.uint8).view_as(skipped), skipped)

    return TileStatistics(parts, left_out, batch * len(rows) * k_tiles, votes)


def _of_keys(
    k: torch.Tensor, must_do: torch.Tensor | None, key_mask: torch.Tensor | None, tile_n: int
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return excluded keys, tiles with other keys, and those of them that may be left out.

    Bool [B, k_tiles, tile_n], True also past the end, None = there are none; bool [B, 1, 1, k_tiles]; likewise.
    Arguments are those of `measure_tiles`.
    """
    batch, seq_k = k.shape[:2]
    allowed = torch.ones(1, seq_k, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    allowed = allowed_in_tiles(allowed, tile_n).expand(batch, -1, -1)
    some_allowed = allowed.any(-1)[:, None, None]
    free = some_allowed if must_do is None else some_allowed & ~unpack_bits(must_do, allowed.shape[1])
    return None if key_mask is None and seq_k % tile_n == 0 else ~allowed, some_allowed, free


def _pieces(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    excluded: torch.Tensor | None,
    rows: torch.Tensor,
    to_log2: float,
    dtype: torch.dtype,
    tile_n: int,
) -> Iterator[_Piece]:
    """Yield as many heads at once as fit, and where not even one does, its rows of tiles in pieces.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D].
        v: [B, Sk, Hkv, Dv].
        excluded: bool [B, k_tiles, tile_n], no scores of these; None = there are none.
        rows: [rows of tiles, tile_m], the queries.
        to_log2: factor of the scores.
        dtype: of scores and values.
        tile_n: keys of a tile.
    """
    batch, heads, seq_k, tile_m = q.shape[0], q.shape[2], k.shape[1], rows.shape[1]
    k_tiles = ceil_div(seq_k, tile_n)
    of_tiles, chunk = tile_m * k_tiles * tile_n, _CHUNK[q.device.type]
    rows_at_once = min(len(rows), max(1, chunk // of_tiles))
    heads_at_once = max(1, chunk // (rows_at_once * of_tiles))
    of_batch = torch.arange(batch, device=q.device).repeat_interleave(heads)
    shared = torch.arange(batch * heads, device=q.device) // (heads // k.shape[2])
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # a copy where there are several in the batch
    for first in range(0, batch * heads, heads_at_once):
        at = slice(first, first + heads_at_once)
        end = (0, 0, 0, k_tiles * tile_n - seq_k)
        keys, values = (pad(x.index_select(0, shared[at]), end).to(dtype) for x in (k, v))
        for start in range(0, len(rows), rows_at_once):
            place = slice(start, start + rows_at_once)
            queries = q[at].index_select(1, rows[place].flatten()).to(dtype) * to_log2
            scores = queries.new_empty(queries.shape[1], len(queries), k_tiles * tile_n)
            torch.bmm(queries, keys.mT, out=scores.transpose(0, 1))
            scores = scores.view(-1, tile_m, len(queries), k_tiles, tile_n)
            if excluded is not None:
                scores.masked_fill_(excluded[of_batch[at]], -torch.inf)
            yield at, place, scores, values.unflatten(1, (k_tiles, tile_n))


def _measured(
    pieces: Iterator[_Piece],
    choice: torch.Tensor,
    rows_exist: torch.Tensor,
    dtype: torch.dtype,
    choices: int,
    metric: str,
    apart: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row maxima of tiles, error parts, and how many tiles are left out.

    [heads, rows of tiles, tile_m, k_tiles]; float64 [3, heads, choices]; float64 [heads, choices].

    Args:
        pieces: see `_pieces`; scores are overwritten.
        choice: [heads, rows of tiles, k_tiles], the first one that leaves out a tile.
        rows_exist: bool [rows of tiles, tile_m], False past the end of the sequence.
        dtype: of the scores.
        choices: how many.
        metric: one of METRICS.
        apart: errors are of every so many rows of a tile.
    """
    peaks = choice.new_empty(*choice.shape[:2], *rows_exist.shape[1:], choice.shape[2], dtype=dtype)
    parts = choice.new_zeros(3, len(choice), choices, dtype=torch.float64)
    left_out = choice.new_zeros(len(choice), choices, dtype=torch.float64)
    for at, place, scores, values in pieces:
        tile_max = scores.amax(-1)
        peaks[at, place] = tile_max.movedim(2, 0)
        # Row 0 sums over all tiles: the dense output. Row i + 1 sums over what choice i leaves.
        summed = choice[at, place].unsqueeze(2) >= torch.arange(choices + 1, device=choice.device).unsqueeze(-1)
        left_out[at] += (~summed[:, :, 1:]).sum((1, 3))
        measured = rows_exist[place, ::apart]
        out = _outputs(scores[:, ::apart], tile_max[:, ::apart], values, summed.to(dtype), measured)
        parts[:, at] += error_parts(metric, out[:, :, 1:], out[:, :, :1]).sum(2)
    return peaks, parts, left_out


def _outputs(
    scores: torch.Tensor, tile_max: torch.Tensor, values: torch.Tensor, summed: torch.Tensor, rows_exist: torch.Tensor
) -> torch.Tensor:
    """Return the output of each sum over tiles, [heads, rows of tiles, sums, tile_m, Dv]; 0 past the end.

    Args:
        scores: [rows of tiles, tile_m, heads, k_tiles, tile_n], log2 units; become weights.
        tile_max: their row maxima [rows of tiles, tile_m, heads, k_tiles].
        values: [heads, k_tiles, tile_n, Dv].
        summed: [heads, rows of tiles, sums, k_tiles], 1 = the tile is in the sum.
        rows_exist: bool [rows of tiles, tile_m], False past the end of the sequence.
    """
    heads, count, _, k_tiles = summed.shape
    top = tile_max.amax(-1).clamp(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(top[..., None, None]).exp2_()
    partial = weights.flatten(2, 3).flatten(0, 1).transpose(0, 1) @ values.flatten(0, 1)  # [heads * k_tiles, rows, Dv]
    weighted = summed @ partial.view(heads, k_tiles, count, -1).transpose(1, 2)
    total = summed @ weights.sum(-1).permute(2, 0, 3, 1)
    total = total.where(total != 0, 1).masked_fill_(~rows_exist.unsqueeze(1), torch.inf)
    return weighted.view(*total.shape, -1).div_(total.unsqueeze(-1))


def _margins(peaks: torch.Tensor, visited: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return [heads, rows of tiles, k_tiles]: the lowest threshold that drops a tile; inf for the first one visited.

    Args:
        peaks: row maxima of tiles [heads, rows of tiles, tile_m, k_tiles], log2 units.
        visited: bool [heads, rows of tiles, k_tiles].
        order: [rows of tiles, k_tiles], tiles in visiting order.
    """
    margins = torch.empty(visited.shape, dtype=peaks.dtype, device=peaks.device)
    heads_at_once = max(1, _CHUNK[peaks.device.type] // peaks[0].numel())
    for some, visits, margin in zip(*(x.split(heads_at_once) for x in (peaks, visited, margins)), strict=True):
        ordered = some.masked_fill(~visits.unsqueeze(2), -torch.inf)
        ordered = ordered.gather(-1, order.unsqueeze(1).expand_as(ordered))
        rise = (ordered[..., 1:] - ordered.cummax(-1).values[..., :-1]).amax(2)
        rise = pad(rise, (1, 0), value=torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        margin.scatter_(-1, order.expand_as(rise), rise)
    return margins
