"""Empty results of the ops, as a caller gets them: for the CPU kernels, the CUDA kernels and the fakes."""

from __future__ import annotations

import torch

from lite_attention.ops.quantize import FP8_KEYS
from lite_attention.ops.tiles import ceil_div

__all__ = ["empty_output", "empty_quantized", "empty_quantized_value"]


def empty_output(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return an empty [B, Sq, Hq, Dv]: dense, its dims in q's stride order, the head dim innermost."""
    like = torch.empty_like(q if q.stride(-1) == 1 else q.contiguous())
    if v.shape[-1] == q.shape[-1]:
        return like
    strides = like.stride()
    order = [*sorted(range(3), key=lambda dim: -strides[dim]), 3]
    return torch.empty_permuted((*q.shape[:-1], v.shape[-1]), order, dtype=q.dtype, device=q.device)


def empty_quantized(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return empty values, scales and norms of queries or keys [B, S, H, D], of which so many rows share a scale."""
    batch, seq, heads, _ = x.shape
    scales = x.new_empty((batch, heads, ceil_div(seq, rows)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales, torch.empty_like(scales)


def empty_quantized_value(v: torch.Tensor) -> torch.Tensor:
    """Return empty FP8 values of v [B, Sk, Hkv, D]."""
    batch, seq, heads, dim = v.shape
    return v.new_empty((batch, heads, dim, ceil_div(seq, FP8_KEYS) * FP8_KEYS), dtype=torch.float8_e4m3fn)
