"""INT8 queries and keys and FP8 values, of `quantization="int8"` and "int8_fp8". Schemas, fakes and the CPU's own.

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
    "KEY_MEAN_SCHEMA",
    "LARGEST_FP8",
    "LARGEST_INT8",
    "QUANTIZE_KEY_SCHEMA",
    "QUANTIZE_QUERY_SCHEMA",
    "QUANTIZE_VALUE_SCHEMA",
    "QUERY_ROWS",
    "dequantized",
    "empty_quantized",
    "empty_quantized_value",
    "key_mean",
    "key_mean_fake",
    "quantize_key",
    "quantize_key_fake",
    "quantize_query",
    "quantize_query_fake",
    "quantize_value",
    "quantize_value_fake",
    "rounded_weights",
    "zero_excluded",
]

KEY_MEAN_SCHEMA = "(Tensor k, Tensor? key_mask) -> Tensor"
QUANTIZE_QUERY_SCHEMA = (
    "(Tensor q, Tensor mean, *, float? scale) -> (Tensor values, Tensor scales, Tensor norms, Tensor lse_shift)"
)
QUANTIZE_KEY_SCHEMA = (
    "(Tensor k, Tensor mean, Tensor? key_mask, *, int tile_n) -> (Tensor values, Tensor scales, Tensor norms)"
)
QUANTIZE_VALUE_SCHEMA = "(Tensor v, Tensor? key_mask) -> (Tensor values, Tensor scales)"

QUERY_ROWS = 16  # that share a scale: those that one warp of the Hopper kernel holds

LARGEST_INT8 = 127
LARGEST_FP8 = 448  # of e4m3
_LARGEST_WEIGHT = 256  # leaves room for weights that grow before the kernel rescales a row
FP8_KEYS = 32  # of one FP8 product: tiles, and the values in memory, are padded to a multiple
# Key 8a + 2t + b of each 16 is at position 4t + 2a + b. So the scores of a thread of the kernel, whose columns of an
# accumulator are 8a + 2t + b, are the weights that it has in the FP8 product as they lie.
_KEYS_OF_16 = (2, 4, 2)  # a, t, b
_POSITIONS_OF_16 = (4, 2, 2)  # t, a, b


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


def zero_excluded(x: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return x [B, Sk, Hkv, D] with 0 for excluded keys, whatever they hold."""
    return x if key_mask is None else torch.where(key_mask[..., None, None], x, 0)


def _quantized(x: torch.Tensor, magnitudes: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values of x, float32 [B, S, H, D], scales [B, H, groups] by the magnitudes of so many rows, and norms."""
    largest = _largest_of_groups(magnitudes.amax(-1), rows)
    scales = largest / LARGEST_INT8
    values = _scaled(x, _each_row(_factors(largest, LARGEST_INT8), rows, x.shape[1]), LARGEST_INT8).round_()
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


def _each_row(scales: torch.Tensor, rows: int, seq: int) -> torch.Tensor:
    """[B, H, groups] -> [B, seq, H, 1]."""
    return scales.repeat_interleave(rows, 2)[..., :seq].transpose(1, 2).unsqueeze(-1)


def dequantized(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    quantization: str,
    scale: float | None,
    tile_n: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q and k as INT8 scores see them, float32, their product in log2 units, v as it is seen, and lse_shift.

    Args:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D].
        v: [B, Sk, Hkv, Dv].
        key_mask: bool [B or 1, Sk], True = the key takes part.
        quantization: "int8", which leaves v as it is, or "int8_fp8".
        scale: factor of the scores; None = D ** -0.5.
        tile_n: keys of a tile.
    """
    mean = key_mean(k, key_mask)
    q_values, q_scales, _, lse_shift = quantize_query(q, mean, scale=scale)
    k_values, k_scales, _ = quantize_key(k, mean, key_mask, tile_n=tile_n)
    seen_q = q_values * _each_row(q_scales, QUERY_ROWS, q.shape[1])
    seen_k = k_values * _each_row(k_scales, tile_n, k.shape[1])
    seen_v = _dequantized_value(v, key_mask) if quantization == "int8_fp8" else v
    return seen_q, seen_k, seen_v, lse_shift


def _dequantized_value(v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return v [B, Sk, Hkv, Dv] as the FP8 product sees it, float32."""
    values, scales = quantize_value(v, key_mask)
    in_order: torch.Tensor = values.to(torch.float32).unflatten(3, (-1, *_POSITIONS_OF_16)).transpose(4, 5).flatten(3)
    return (in_order[..., : v.shape[1]] * scales.unsqueeze(3)).permute(0, 3, 1, 2)


def rounded_weights(weights: torch.Tensor) -> torch.Tensor:
    """Return weights of softmax, the largest of a row 1, as "int8_fp8" rounds them."""
    return (weights * _LARGEST_WEIGHT).to(torch.float8_e4m3fn).to(weights.dtype) / _LARGEST_WEIGHT


# ---- fake kernels --------------------------------------------------------------------------------------------------


def key_mean_fake(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return an empty result of `key_mean`."""
    check_keys(k, key_mask)
    return k.new_empty((k.shape[0], *k.shape[2:]), dtype=torch.float32)


def quantize_query_fake(
    q: torch.Tensor, mean: torch.Tensor, *, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an empty result of `quantize_query`."""
    check_queries(q, mean, scale)
    return *empty_quantized(q, QUERY_ROWS), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def quantize_key_fake(
    k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, *, tile_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return an empty result of `quantize_key`."""
    check_quantize_key(k, mean, key_mask, tile_n)
    return empty_quantized(k, tile_n)


def quantize_value_fake(v: torch.Tensor, key_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an empty result of `quantize_value`."""
    check_values(v, key_mask)
    return empty_quantized_value(v), v.new_empty((v.shape[0], *v.shape[2:]), dtype=torch.float32)


# ---- empty results, of the fakes and of the CUDA kernels -----------------------------------------------------------


def empty_quantized(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return empty values, scales and norms of queries or keys [B, S, H, D], of which so many rows share a scale."""
    batch, seq, heads, _ = x.shape
    scales = x.new_empty((batch, heads, ceil_div(seq, rows)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales, torch.empty_like(scales)


def empty_quantized_value(v: torch.Tensor) -> torch.Tensor:
    """Return empty FP8 values of v [B, Sk, Hkv, D]."""
    batch, seq, heads, dim = v.shape
    return v.new_empty((batch, heads, dim, ceil_div(seq, FP8_KEYS) * FP8_KEYS), dtype=torch.float8_e4m3fn)
