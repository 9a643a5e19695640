"""Fake kernels of the ops: the checks, and empty results of the right shapes, for compilers and `meta` tensors."""

from __future__ import annotations

from typing import Any

import torch

from lite_attention.ops.allocate import empty_output, empty_quantized, empty_quantized_value
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.quantize import QUERY_ROWS
from lite_attention.ops.validate import check_inputs, check_keys, check_quantize_key, check_queries, check_values

__all__ = [
    "attention_fake",
    "key_mean_fake",
    "quantize_key_fake",
    "quantize_query_fake",
    "quantize_value_fake",
    "stateful_attention_fake",
]


def stateful_attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, quantization: str = "none", **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an empty result of an op with a state, which is not looked at, since sizes may be symbolic."""
    check_quantization(quantization)
    return attention_fake(q, k, v)


def attention_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an empty result of `attention`."""
    check_inputs(q, k, v)
    return empty_output(q, v), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


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
