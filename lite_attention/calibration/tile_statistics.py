"""What leaving out tiles costs: for one attention call, the error at every candidate threshold, in one pass.

The sets of tiles that growing thresholds vote out are nested. So each tile belongs to one class, the first threshold
that drops it; the tiles' partial outputs are summed over classes, and every candidate's output is one of the sums.
A vote takes effect at the next call: so classes are of the votes of one call, and errors of the next one's output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.dequantize import dequantized
from lite_attention.ops.tiles import allowed_in_tiles, ceil_div, visit_order
from lite_attention.ops.units import LOG2_E

__all__ = ["METRICS", "TileStatistics", "error_of", "error_parts", "loss_of", "measure_tiles"]

METRICS = ("L1", "Cossim", "RMSE")

_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 27}  # scores held at once: what fits a cache, and what fills a GPU

# Which of the B * Hq heads; which rows of tiles; scores [heads, rows of tiles, tile_m, k_tiles, tile_n], to be scaled;
# values [heads, k_tiles, tile_n, Dv + 8], with a one behind each, so that products have the sums of weights too.
_Piece = tuple[slice, slice, torch.Tensor, torch.Tensor]


def error_parts(metric: str, out: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Return sums over rows and value dims, float64 [4, ...]: they add up over parts of an output, errors do not.

    The squares of what is off and of the dense output, and two of the metric's own.

    Args:
        metric: one of METRICS.
        out: [..., rows, Dv].
        dense: what it should be, [..., rows, Dv].
    """
    off = out - dense
    sums: list[torch.Tensor] = [torch.linalg.vecdot(x, x) for x in (off, dense)]
    if metric == "L1":
        sums += [off.abs_().sum(-1), dense.abs().sum(-1)]
    elif metric == "Cossim":
        sums += [torch.linalg.vecdot(out, x) for x in (dense, out)]
    # Value dims first: a sum of everything in float64 makes a copy in float64 on the CPU.
    sums = [x.sum(-1, dtype=torch.float64) for x in sums]
    parts = sums[0].new_zeros(4, *sums[0].shape)
    for part, x in zip(parts, sums, strict=False):
        part.copy_(x)
    return parts


def error_of(metric: str, parts: torch.Tensor) -> torch.Tensor:
    """Return errors [...] of summed parts [4, ...]; 0 where the dense output is 0 and the other is too.

    L1 is sum|out - dense| / sum|dense|, as in arXiv 2511.11062; RMSE is |out - dense|_2 / |dense|_2; Cossim is
    1 - cosine similarity.
    """
    squared, of_dense, first, second = parts
    if metric == "Cossim":
        length = (of_dense * second).sqrt()
        none = (of_dense == 0) & (second == 0)
        return torch.where(none, 0.0, 1 - first / length.where(length != 0, 1)).clamp(min=0)
    off, whole = (squared, of_dense) if metric == "RMSE" else (first, second)
    ratio: torch.Tensor = torch.where(off == 0, 0.0, off / whole)
    return ratio.sqrt() if metric == "RMSE" else ratio


def loss_of(parts: torch.Tensor) -> torch.Tensor:
    """Return what a site loses by the errors of its heads, [..., heads] of summed parts [4, ..., heads].

    The square of what a head is off by, against the mean square of the dense outputs of all heads: independent errors
    add up in squares, and a head counts as much as its output does beside the others'.
    """
    squared, of_dense = parts[:2]
    return torch.where(squared == 0, 0.0, squared / of_dense.mean(-1, keepdim=True))


class TileStatistics(NamedTuple):
    """One call, measured. Choice 0 leaves out what was skipped, choice i also what thresholds[i - 1] had voted out."""

    parts: torch.Tensor  # float64 [4, choices, Hq] on the CPU, see `error_parts`
    left_out: torch.Tensor  # float64 [choices, Hq] on the CPU, tiles
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
    query_start: int | None = None,
    stride: int = 1,
    apart: int = 1,
) -> TileStatistics:
    """Return the error against the dense output of each threshold of the call before, and what this one votes.

    Scores, votes and outputs are those of `lite_attention::skip_attention`, in float32 or better; what was skipped
    before casts no vote and is left out of every choice. The error is that of attention over the tiles left.
    Work: the scores of dense attention without a fused kernel, and for the queries that errors are taken from its
    second half, and a product of (thresholds + 2) / tile_n of that. Waits for the device once.

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
        query_start: the key at which the first query stands, of a part of the queries.
        stride: only every so many rows of tiles are measured; rows do not depend on each other.
        apart: errors are of every so many queries of these; votes are of all.
    """
    batch, seq_q, heads, head_dim = q.shape
    seq_k = k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    if quantization != "none":
        q, k, v, _ = dequantized(q, k, v, key_mask, quantization=quantization, scale=scale, tile_n=tile_n)
        scale = 1 / LOG2_E
    dtype = torch.promote_types(q.dtype, torch.float32)
    if not scale > 0:  # row maxima are taken before scores are scaled
        q, scale = q.to(dtype) * scale, 1.0
    rows, order, grid = _constants(
        (seq_q, seq_k, query_start), (tile_m, tile_n), stride, tuple(thresholds), q.device, dtype
    )
    never = len(thresholds) + 1
    some_allowed, free = _of_keys(must_do, key_mask, tile_n, order.shape[1])

    def choices(votes: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        votes = votes.masked_fill(skipped, 0)
        return votes if free is None else votes.masked_fill(~free, never)

    some_past_end = seq_q % tile_m > 0 and (skipped.shape[2] - 1) % stride == 0
    skipped = skipped[:, :, ::stride]
    voted = torch.full_like(skipped, never, dtype=torch.uint8) if voted is None else voted
    choice = choices(voted, skipped).flatten(0, 1)
    # Past the end the last one again, which changes no vote.
    pieces = _pieces(q, k, v, key_mask, rows.clamp(max=seq_q - 1), dtype, tile_n)
    rows_exist = rows < seq_q if some_past_end else None
    peaks, sums = _measured(pieces, choice, scale, rows_exist, never, metric, apart)
    sums = sums.cpu()
    if key_mask is not None:
        sums.nan_to_num_(0)  # of an element of the batch without any key
    sums = sums.unflatten(1, (batch, heads)).sum(1).mT

    def votes(skipped: torch.Tensor) -> torch.Tensor:
        skipped = skipped[:, :, ::stride]
        visited = ~(skipped if free is None else skipped & free)
        visited = visited if some_allowed is None else visited & some_allowed
        margins = _margins(peaks, visited.flatten(0, 1), order)
        first = torch.bucketize(margins, grid, out_int32=True) + 1  # a NaN is behind the last threshold
        return choices(first.to(torch.uint8).view_as(skipped), skipped)

    tiles = batch * order.numel()
    return TileStatistics(sums[:4], tiles - sums[4], tiles, votes)


@functools.lru_cache(maxsize=64)
def _constants(
    lengths: tuple[int, int, int | None],
    tile: tuple[int, int],
    stride: int,
    thresholds: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what calls of a size share, made and moved to the device once.

    The queries measured, [rows of tiles, tile_m], the last perhaps past the end; the visiting order of their tiles,
    [rows of tiles, k_tiles]; the thresholds in natural units.
    """
    (seq_q, seq_k, query_start), (tile_m, tile_n) = lengths, tile
    measured = range(0, ceil_div(seq_q, tile_m), stride)
    with torch.device("cpu"):  # whatever the default is
        rows = torch.tensor(measured).unsqueeze(1) * tile_m + torch.arange(tile_m)
        order = torch.tensor([visit_order(i, seq_q, seq_k, tile_m, tile_n, query_start) for i in measured])
        grid = torch.tensor(thresholds, dtype=torch.float64) / LOG2_E
    return rows.to(device), order.to(device), grid.to(device, dtype)


def _of_keys(
    must_do: torch.Tensor | None, key_mask: torch.Tensor | None, tile_n: int, k_tiles: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return tiles with keys that take part, and those of them that may be left out; None = all.

    Bool [B or 1, 1, 1, k_tiles]; bool that broadcasts to it. Arguments are those of `measure_tiles`.
    """
    some_allowed = None if key_mask is None else allowed_in_tiles(key_mask, tile_n).any(-1)[:, None, None]
    if must_do is None:
        return some_allowed, some_allowed
    free = ~unpack_bits(must_do, k_tiles)
    return some_allowed, free if some_allowed is None else some_allowed & free


def _pieces(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rows: torch.Tensor,
    dtype: torch.dtype,
    tile_n: int,
) -> Iterator[_Piece]:
    """Yield as many heads at once as fit, and where not even one does, its rows of tiles in pieces.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D].
        v: [B, Sk, Hkv, Dv].
        key_mask: bool [B or 1, Sk], True = the key takes part; None = all do.
        rows: [rows of tiles, tile_m], the queries.
        dtype: of scores and values.
        tile_n: keys of a tile.
    """
    (batch, seq_k, kv_heads, value_dim), heads, tile_m = v.shape, q.shape[2], rows.shape[1]
    k_tiles = ceil_div(seq_k, tile_n)
    of_tiles, chunk = tile_m * k_tiles * tile_n, _CHUNK[q.device.type]
    rows_at_once = min(len(rows), max(1, chunk // of_tiles))
    heads_at_once = max(1, chunk // (rows_at_once * of_tiles))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # a copy where there are several in the batch
    shared = torch.arange(batch * heads, device=q.device) // (heads // kv_heads) if heads > kv_heads else None
    excluded = None if key_mask is None else ~key_mask.expand(batch, -1).repeat_interleave(heads, 0).unsqueeze(1)
    for first in range(0, batch * heads, heads_at_once):
        at = slice(first, first + heads_at_once)
        some_k, some_v = (x[at] if shared is None else x.index_select(0, shared[at]) for x in (k, v))
        keys = pad(some_k, (0, 0, 0, k_tiles * tile_n - seq_k)).mT
        values = v.new_zeros(len(keys), k_tiles * tile_n, value_dim + 8, dtype=dtype)
        values[:, :seq_k, :value_dim] = some_v
        values[..., value_dim] = 1
        for start in range(0, len(rows), rows_at_once):
            place = slice(start, start + rows_at_once)
            scores = _products(q[at].index_select(1, rows[place].flatten()), keys, dtype)
            scores[..., seq_k:] = -torch.inf
            if excluded is not None:
                scores[..., :seq_k].masked_fill_(excluded[at], -torch.inf)
            yield at, place, scores.view(len(scores), -1, tile_m, k_tiles, tile_n), values.unflatten(1, (k_tiles, -1))


def _products(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x @ y of batches of matrices, summed in a dtype; on a GPU, halves are multiplied as they are."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(x, y, out_dtype=dtype)
    return torch.bmm(x.to(dtype), y.to(dtype))


def _measured(
    pieces: Iterator[_Piece],
    choice: torch.Tensor,
    scale: float,
    rows_exist: torch.Tensor | None,
    choices: int,
    metric: str,
    apart: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row maxima of tiles, [heads, rows of tiles, tile_m, k_tiles], and sums, float64 [5, heads, choices].

    The sums are the parts of errors, and how many tiles are visited.

    Args:
        pieces: see `_pieces`.
        choice: [heads, rows of tiles, k_tiles], the first one that leaves out a tile.
        scale: factor of the scores.
        rows_exist: bool [rows of tiles, tile_m], False past the end of the sequence; None = all do.
        choices: how many.
        metric: one of METRICS.
        apart: errors are of every so many rows of a tile.
    """
    peaks = []
    sums = choice.new_zeros(5, len(choice), choices, dtype=torch.float64)
    each = torch.arange(choices + 1, device=choice.device).unsqueeze(-1)
    for at, place, scores, values in pieces:
        peaks.append(scores.amax(-1))
        # Row 0 sums over all tiles: the dense output. Row i + 1 sums over what choice i leaves.
        summed = (choice[at, place].unsqueeze(2) >= each).to(scores.dtype)
        out = _outputs(_weights(scores[:, :, ::apart], scale), values, summed)
        if rows_exist is not None:
            out.masked_fill_(~rows_exist[place, None, ::apart, None], 0)
        sums[:4, at] += error_parts(metric, out[:, :, 1:], out[:, :, :1]).sum(2)
        sums[4, at] += summed[:, :, 1:].sum((1, 3))
    return scale * torch.cat([x.flatten(0, 1) for x in peaks]).unflatten(0, choice.shape[:2]), sums


def _weights(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the softmax [rows of tiles, queries, heads, k_tiles * tile_n] of scores as `_pieces` yields them.

    Heads within rows, so that products of some rows and all tiles need no copy.
    """
    heads, count, queries, k_tiles, tile_n = scores.shape
    scaled = scores.new_empty(count, queries, heads, k_tiles, tile_n)
    torch.mul(scores.permute(1, 2, 0, 3, 4), scale, out=scaled)
    return scaled.flatten(3).softmax(-1)


def _outputs(weights: torch.Tensor, values: torch.Tensor, summed: torch.Tensor) -> torch.Tensor:
    """Return the output of each sum over tiles, [heads, rows of tiles, sums, queries, Dv]; 0 where there is no weight.

    Args:
        weights: [rows of tiles, queries, heads, k_tiles * tile_n].
        values: [heads, k_tiles, tile_n, Dv + 8], see `_Piece`.
        summed: [heads, rows of tiles, sums, k_tiles], 1 = the tile is in the sum.
    """
    heads, k_tiles, tile_n, width = values.shape
    count, queries = weights.shape[:2]
    by_tile = weights.view(count * queries, heads * k_tiles, tile_n).transpose(0, 1)
    partial = (by_tile @ values.flatten(0, 1)).view(heads, k_tiles, count, queries * width)
    sums: torch.Tensor = (summed @ partial.transpose(1, 2)).unflatten(-1, (queries, width))
    weighted, total = sums[..., :-8], sums[..., -8:-7]
    return weighted / total.clamp(min=torch.finfo(sums.dtype).tiny)


def _margins(peaks: torch.Tensor, visited: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return [heads, rows of tiles, k_tiles]: the lowest threshold that drops a tile; inf for the first one visited.

    Of tiles that are not visited, anything.

    Args:
        peaks: row maxima of tiles [heads, rows of tiles, tile_m, k_tiles].
        visited: bool [heads, rows of tiles, k_tiles].
        order: [rows of tiles, k_tiles], tiles in visiting order.
    """
    margins = torch.full(visited.shape, torch.inf, dtype=peaks.dtype, device=peaks.device)
    heads_at_once = max(1, _CHUNK[peaks.device.type] // peaks[0].numel())
    for some, visits, margin in zip(*(x.split(heads_at_once) for x in (peaks, visited, margins)), strict=True):
        ordered = some.masked_fill(~visits.unsqueeze(2), -torch.inf)
        ordered = ordered.gather(-1, order.unsqueeze(1).expand_as(ordered))
        rise = (ordered[..., 1:] - ordered.cummax(-1).values[..., :-1]).amax(2)
        margin.scatter_(-1, order[:, 1:].expand_as(rise), rise)
    return margins
