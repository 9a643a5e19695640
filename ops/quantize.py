"""INT8 queries and keys and FP8 values, of `quantization="int8"` and "int8_fp8": the contract, and the CPU kernels.

The mean of the keys is taken off them first, a channel at a time: that moves all scores of a row alike, so neither
softmax nor votes see it, and an offset that the keys share costs no precision. The LSE sees it, and gets it back.

* key_mean: k [B, Sk, Hkv, D] -> float32 [B, Hkv, D], the mean of the allowed keys; 0 where there is none.
* quantize_query: q [B, Sq, Hq, D] -> int8 of the same shape, contiguous; scales float32 [B, Hq, ceil(Sq / 16)], with
  the factor of the scores and log2(e) in them, so that `values_q . values_k * scale_q * scale_k` is a score in log2
  units; norms, of the same shape as the scales; lse_shift float32 [B, Hq, Sq], what the scores of a row lost with the
  mean, natural log.
* quantize_key: k -> int8 of the same shape, contiguous; scales float32 [B, Hkv, ceil(Sk / tile_n)]; norms, likewise.

Symmetric: a group's scale is its largest magnitude / 127, and a value round(x * (127 / largest)), to nearest even,
clamped to +-127, in float32, to which q and k are rounded first. Keys that a mask excludes count neither in the mean
nor in a scale. A group's norm is the largest L2 norm of its rows of values, times the scale: no score exceeds
`norm_q * norm_k` in magnitude.

A NaN or an infinity makes the scale of its group one, and the values of the group 0, so its scores are NaN: of 16 rows
for one in q; for one in k, which the mean spreads, of all rows of the heads that read it.

* quantize_value: v [B, Sk, Hkv, D] -> float8_e4m3fn [B, Hkv, D, 32 * ceil(Sk / 32)], contiguous: keys innermost, as the
  FP8 product wants them, and in an order of their own, see `_KEYS_OF_16`; scales float32 [B, Hkv, D].

A channel's scale is its largest magnitude over the allowed keys / 448, and a value v * (448 / largest), likewise, to
the nearest in e4m3. Excluded keys and those past the end are 0. A NaN or an infinity makes its channel NaN.

Weights are e4m3 too, the largest of a row 2^8, and their sum is that of the rounded ones.
"""

from __future__ import annotations

import math

import torch

from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.validate import check_keys, check_quantize_key, check_queries, check_values

__all__ = [
    "FP8_KEYS",
    "LARGEST_FP8",
    "LARGEST_INT8",
    "QUERY_ROWS",
    "each_row",
    "key_mean",
    "quantize_key",
    "quantize_query",
    "quantize_rows",
    "quantize_value",
    "zero_excluded",
]

QUERY_ROWS = 16  # that share a scale: those of a warp's product

LARGEST_INT8 = 127
LARGEST_FP8 = 448  # of e4m3
FP8_KEYS = 32  # of one FP8 product: tiles, and the values in memory, are padded to a multiple
# Key 8a + 2t + b of each 16 is at position 4t + 2a + b. So the scores of a thread of the kernel, whose columns of an
# accumulator are 8a + 2t + b, are the weights that it has in the FP8 product as they lie.
_KEYS_OF_16 = (2, 4, 2)  # a, t, b


def key_mean(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Compute `lite_attention::key_mean` on any device.

    Raises:
        ValueError: an argument does not fit.
    """
    check_keys(k, key_mask)
    count = k.shape[1] if key_mask is None else key_mask.sum(1).clamp(min=1)[:, None, None]
    total = zero_excluded(k, key_mask).sum(1, dtype=torch.float64)  # the same for any strides
    return (total / count).to(torch.float32)


def quantize_query(
    q: torch.Tensor, mean: torch.Tensor, *, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::quantize_query` on any device.

    Raises:
        ValueError: an argument does not fit.
    """
    check_queries(q, mean, scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q = q.to(torch.float32)
    values, scales, norms = _quantized(q, q.abs(), QUERY_ROWS)
    lost = torch.einsum("bshd,bhd->bhs", q, mean.repeat_interleave(q.shape[2] // mean.shape[1], 1))
    factor = scale / math.log(2)
    return values, scales * factor, norms * factor, (lost * scale).contiguous()


def quantize_key(
    k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, *, tile_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::quantize_key` on any device.

    Raises:
        ValueError: an argument does not fit.
    """
    check_quantize_key(k, mean, key_mask, tile_n)
    k = k.to(torch.float32) - mean.unsqueeze(1)
    return _quantized(k, zero_excluded(k.abs(), key_mask), tile_n)


def quantize_value(v: torch.Tensor, key_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::quantize_value` on any device.

    Raises:
        ValueError: an argument does not fit.
    """
    check_values(v, key_mask)
    v = zero_excluded(v.to(torch.float32), key_mask)
    largest = v.abs().amax(1)
    values = _scaled(v, _factors(largest, LARGEST_FP8).unsqueeze(1), LARGEST_FP8).permute(0, 2, 3, 1)
    values = torch.nn.functional.pad(values, (0, -v.shape[1] % FP8_KEYS))
    values = values.unflatten(3, (-1, *_KEYS_OF_16)).transpose(4, 5).flatten(3)
    return values.to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), largest / LARGEST_FP8


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [..., D] in e4m3 and its scales [...], the largest magnitude of a row / 448.

    A NaN or an infinity makes its row NaN.
    """
    largest = x.abs().amax(-1)
    values = _scaled(x, _factors(largest, LARGEST_FP8).unsqueeze(-1), LARGEST_FP8)
    return values.to(torch.float8_e4m3fn), largest / LARGEST_FP8


def zero_excluded(x: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return x [B, Sk, Hkv, D] with 0 for excluded keys, whatever they hold."""
    return x if key_mask is None else torch.where(key_mask[..., None, None], x, 0)


def _quantized(x: torch.Tensor, magnitudes: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values of x, float32 [B, S, H, D], scales [B, H, groups] by the magnitudes of so many rows, and norms."""
    largest = _largest_of_groups(magnitudes.amax(-1), rows)
    scales = largest / LARGEST_INT8
    values = _scaled(x, each_row(_factors(largest, LARGEST_INT8), rows, x.shape[1]), LARGEST_INT8).round_()
    norms = _largest_of_groups(values.square().sum(-1), rows).sqrt_() * scales
    return values.to(torch.int8, memory_format=torch.contiguous_format), scales, norms


def _largest_of_groups(x: torch.Tensor, rows: int) -> torch.Tensor:
    """[B, S, H], at least 0 -> [B, H, groups]."""
    groups = ceil_div(x.shape[1], rows)
    padded = torch.nn.functional.pad(x, (0, 0, 0, groups * rows - x.shape[1]))
    largest: torch.Tensor = padded.unflatten(1, (groups, rows)).amax(2).transpose(1, 2).contiguous()
    return largest


def _factors(largest: torch.Tensor, limit: int) -> torch.Tensor:
    """Return what takes the largest magnitudes to the limit; 0 for 0, NaN and infinity."""
    # A number / tensor would be number * (1 / tensor), rounded twice.
    return torch.where(largest > 0, torch.full_like(largest, limit) / largest, 0)


def _scaled(x: torch.Tensor, factors: torch.Tensor, limit: int) -> torch.Tensor:
    """Return x * factors within +-limit; 0 for NaN."""
    return (x * factors).clamp_(-limit, limit).nan_to_num_(0)


def each_row(scales: torch.Tensor, rows: int, seq: int) -> torch.Tensor:
    """Return for each row what its group of so many has, [B, seq, H, 1] from [B, H, groups]."""
    return scales.repeat_interleave(rows, 2)[..., :seq].transpose(1, 2).unsqueeze(-1)
