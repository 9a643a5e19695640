"""From tensors to the launches that make INT8 queries and keys and FP8 values."""

from __future__ import annotations

import torch

from lite_attention.cute_kernels.cache import Kernel, get_kernel
from lite_attention.cute_kernels.config import KEY_CHUNK, VALUE_BLOCK, QuantizeConfig
from lite_attention.cute_kernels.launch import check_supported, readable, reads, run_in_parts
from lite_attention.ops.allocate import empty_quantized, empty_quantized_value
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.quantize import LARGEST_FP8, QUERY_ROWS
from lite_attention.ops.targets import DTYPE_NAMES, Target, target_of
from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.validate import check_keys, check_quantize_key, check_queries, check_values

__all__ = [
    "key_mean",
    "mean_of",
    "quantize_key",
    "quantize_query",
    "quantize_value",
    "quantized_key",
    "quantized_query",
    "quantized_value",
]

_OF_OP = {"quantize_value": "values"}  # the part of a quantization that an op is for; the others are for scores


def key_mean(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Launch the kernel for `lite_attention::key_mean` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    check_keys(k, key_mask)
    _check_quantizable("key_mean", k)
    return mean_of(readable(k, reads(k.stride())), key_mask, target_of(k.device))


def quantize_query(
    q: torch.Tensor, mean: torch.Tensor, *, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::quantize_query` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    check_queries(q, mean, scale)
    _check_quantizable("quantize_query", q)
    q, mean = (readable(x, reads(x.stride())) for x in (q, mean))
    return quantized_query(q, mean, q.shape[3] ** -0.5 if scale is None else scale, target_of(q.device))


def quantize_key(
    k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, *, tile_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::quantize_key` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    check_quantize_key(k, mean, key_mask, tile_n)
    expected = _check_quantizable("quantize_key", k)
    if tile_n not in expected:
        raise ValueError(f"tile_n: expected {' or '.join(map(str, expected))} on {k.device}, got {tile_n}")
    k, mean = (readable(x, reads(x.stride())) for x in (k, mean))
    return quantized_key(k, mean, key_mask, tile_n, target_of(k.device))


def quantize_value(v: torch.Tensor, key_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels for `lite_attention::quantize_value` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    check_values(v, key_mask)
    _check_quantizable("quantize_value", v)
    return quantized_value(readable(v, reads(v.stride())), key_mask, target_of(v.device))


def _check_quantizable(op: str, x: torch.Tensor) -> list[int]:
    """Return the keys of a tile, by quantization, if there are kernels for queries, keys or values like these."""
    head_dim = x.shape[3]
    check_supported(op, head_dim, head_dim, x.dtype, x.device)
    target, portable = target_of(x.device), target_of(x.device, "portable")
    formats = [name for name, kind in QUANTIZATIONS.items() if getattr(kind, _OF_OP.get(op, "scores")) is not None]
    fitting = [name for name in formats if target.quantizes(head_dim, name)] or formats  # of which one says why not
    return list(dict.fromkeys(t.tile_shape(head_dim, name)[1] for t in (target, portable) for name in fitting))


def _quantizer(op: str, x: torch.Tensor, rows: int, target: Target, key_mask: torch.Tensor | None = None) -> Kernel:
    return get_kernel(QuantizeConfig(op, DTYPE_NAMES[x.dtype], x.shape[3], rows, key_mask is not None, target))


def _bytes(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def mean_of(k: torch.Tensor, key_mask: torch.Tensor | None, target: Target) -> torch.Tensor:
    """The mean of checked keys; see `key_mean`."""
    batch, seq, heads, head_dim = k.shape
    sums = k.new_empty((batch, heads, ceil_div(seq, KEY_CHUNK), head_dim), dtype=torch.float32)
    run_in_parts(_quantizer("key_sums", k, KEY_CHUNK, target, key_mask), k, _bytes(key_mask), sums)
    count = seq if key_mask is None else key_mask.sum(1).clamp_(min=1)[:, None, None]
    return sums.sum(2).div_(count)


def quantized_query(
    q: torch.Tensor, mean: torch.Tensor, scale: float, target: Target
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checked queries; see `quantize_query`."""
    batch, seq, heads, _ = q.shape
    values, scales, norms = empty_quantized(q, QUERY_ROWS)
    lse_shift = q.new_empty((batch, heads, seq), dtype=torch.float32)
    kernel = _quantizer("quantize_query", q, QUERY_ROWS, target)
    run_in_parts(kernel, q, mean, None, values, scales, norms, lse_shift, scale)
    return values, scales, norms, lse_shift


def quantized_key(
    k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, tile_n: int, target: Target
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checked keys; see `quantize_key`."""
    values, scales, norms = empty_quantized(k, tile_n)
    kernel = _quantizer("quantize_key", k, tile_n, target, key_mask)
    run_in_parts(kernel, k, mean, _bytes(key_mask), values, scales, norms, None, 1.0)
    return values, scales, norms


def quantized_value(
    v: torch.Tensor, key_mask: torch.Tensor | None, target: Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checked values; see `quantize_value`."""
    batch, seq, heads, head_dim = v.shape
    parts = v.new_empty((batch, heads, ceil_div(seq, KEY_CHUNK), head_dim), dtype=torch.float32)
    run_in_parts(_quantizer("value_max", v, KEY_CHUNK, target, key_mask), v, _bytes(key_mask), parts)
    largest = parts.amax(2)
    values = empty_quantized_value(v)
    kernel = _quantizer("quantize_value", v, VALUE_BLOCK, target, key_mask)
    bytes_of_values = values.view(torch.uint8)  # DLPack of old has no FP8
    run_in_parts(kernel, v, largest, _bytes(key_mask), bytes_of_values)
    return values, largest / LARGEST_FP8
