"""INT8 queries and keys, which `quantization="int8"` computes scores from. Schemas, fake kernels and the CPU's own.

The mean of the keys is taken off them first, a channel at a time: that moves all scores of a row alike, so neither
softmax nor votes see it, and an offset that the keys share costs no precision. The LSE sees it, and gets it back.

* key_mean: k [B, Sk, Hkv, D] -> float32 [B, Hkv, D], the mean of the allowed keys; 0 where there is none.
* quantize_query: q [B, Sq, Hq, D] -> int8 of the same shape, contiguous; scales float32 [B, Hq, ceil(Sq / 16)], with
  the factor of the scores and log2(e) in them, so that `values_q . values_k * scale_q * scale_k` is a score in log2
  units; lse_shift float32 [B, Hq, Sq], what the scores of a row lost with the mean, natural log.
* quantize_key: k -> int8 of the same shape, contiguous; scales float32 [B, Hkv, ceil(Sk / tile_n)].

Symmetric: a group's scale is its largest magnitude / 127, and a value round(x * (127 / largest)), to nearest even,
clamped to +-127, in float32, to which q and k are rounded first. Keys that a mask excludes count neither in the mean
nor in a scale.

A NaN or an infinity makes the scale of its group one, and the values of the group 0, so its scores are NaN: of 16 rows
for one in q; for one in k, which the mean spreads, of all rows of the heads that read it.
"""

from __future__ import annotations

import math

import torch

from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.validate import check_keys, check_quantize_key, check_queries

__all__ = [
    "KEY_MEAN_SCHEMA",
    "QUANTIZE_KEY_SCHEMA",
    "QUANTIZE_QUERY_SCHEMA",
    "QUERY_ROWS",
    "dequantized",
    "key_mean",
    "key_mean_fake",
    "quantize_key",
    "quantize_key_fake",
    "quantize_query",
    "quantize_query_fake",
]

KEY_MEAN_SCHEMA = "(Tensor k, Tensor? key_mask) -> Tensor"
QUANTIZE_QUERY_SCHEMA = "(Tensor q, Tensor mean, *, float? scale) -> (Tensor values, Tensor scales, Tensor lse_shift)"
QUANTIZE_KEY_SCHEMA = "(Tensor k, Tensor mean, Tensor? key_mask, *, int tile_n) -> (Tensor values, Tensor scales)"

QUERY_ROWS = 16  # that share a scale: those that one warp of the Hopper kernel holds

_LARGEST = 127


def key_mean(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Compute `lite_attention::key_mean` on any device.

    Raises:
        ValueError: an argument does not fit.
    """
    check_keys(k, key_mask)
    count: int | torch.Tensor = k.shape[1]
    if key_mask is not None:
        k = torch.where(key_mask[..., None, None], k, 0)
        count = key_mask.sum(1).clamp(min=1)[:, None, None]
    return (k.sum(1, dtype=torch.float64) / count).to(torch.float32)  # the same for any strides


def quantize_query(
    q: torch.Tensor, mean: torch.Tensor, *, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::quantize_query` on any device.

    Raises:
        ValueError: an argument does not fit.
    """
    check_queries(q, mean, scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    q = q.to(torch.float32)
    values, scales = _quantized(q, q.abs(), QUERY_ROWS)
    lost = torch.einsum("bshd,bhd->bhs", q, mean.repeat_interleave(q.shape[2] // mean.shape[1], 1))
    return values, scales * (scale / math.log(2)), (lost * scale).contiguous()


def quantize_key(
    k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, *, tile_n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::quantize_key` on any device.

    Raises:
        ValueError: an argument does not fit.
    """
    check_quantize_key(k, mean, key_mask, tile_n)
    k = k.to(torch.float32) - mean.unsqueeze(1)
    counted = k.abs() if key_mask is None else torch.where(key_mask[..., None, None], k.abs(), 0)
    return _quantized(k, counted, tile_n)


def _quantized(x: torch.Tensor, magnitudes: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of x, float32 [B, S, H, D], and scales [B, H, groups] by the magnitudes of so many rows."""
    groups = ceil_div(x.shape[1], rows)
    padded = torch.nn.functional.pad(magnitudes, (0, 0, 0, 0, 0, groups * rows - x.shape[1]))
    largest = padded.unflatten(1, (groups, rows)).amax((2, 4)).transpose(1, 2).contiguous()
    # 0 for NaN and infinity too. A number / tensor would be number * (1 / tensor), rounded twice.
    factors = torch.where(largest > 0, torch.full_like(largest, _LARGEST) / largest, 0)
    values = (x * _each_row(factors, rows, x.shape[1])).round_().clamp_(-_LARGEST, _LARGEST).nan_to_num_(0)
    return values.to(torch.int8, memory_format=torch.contiguous_format), largest / _LARGEST


def _each_row(scales: torch.Tensor, rows: int, seq: int) -> torch.Tensor:
    """[B, H, groups] -> [B, seq, H, 1]."""
    return scales.repeat_interleave(rows, 2)[..., :seq].transpose(1, 2).unsqueeze(-1)


def dequantized(
    q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, *, scale: float | None, tile_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q and k as INT8 scores see them, float32, their product in log2 units, and lse_shift.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D].
        key_mask: bool [B or 1, Sk], True = the key takes part.
        scale: factor of the scores; None = D ** -0.5.
        tile_n: keys of a tile.
    """
    mean = key_mean(k, key_mask)
    q_values, q_scales, lse_shift = quantize_query(q, mean, scale=scale)
    k_values, k_scales = quantize_key(k, mean, key_mask, tile_n=tile_n)
    seen_q = q_values * _each_row(q_scales, QUERY_ROWS, q.shape[1])
    return seen_q, k_values * _each_row(k_scales, tile_n, k.shape[1]), lse_shift


# ---- fake kernels --------------------------------------------------------------------------------------------------


def key_mean_fake(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return an empty result of `key_mean`."""
    check_keys(k, key_mask)
    return k.new_empty((k.shape[0], *k.shape[2:]), dtype=torch.float32)


def quantize_query_fake(
    q: torch.Tensor, mean: torch.Tensor, *, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an empty result of `quantize_query`."""
    check_queries(q, mean, scale)
    values, scales = _empty_quantized(q, QUERY_ROWS)
    return values, scales, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def quantize_key_fake(
    k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, *, tile_n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an empty result of `quantize_key`."""
    check_quantize_key(k, mean, key_mask, tile_n)
    return _empty_quantized(k, tile_n)


def _empty_quantized(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seq, heads, _ = x.shape
    scales = x.new_empty((batch, heads, ceil_div(seq, rows)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales
