"""What the scores of "int8" and the products of "int8_fp8" are of, in floats: for kernels that multiply floats."""

from __future__ import annotations

import torch

from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.quantize import QUERY_ROWS, each_row, key_mean, quantize_key, quantize_query, quantize_value

__all__ = ["dequantized", "round_weights_"]

_LARGEST_WEIGHT = 256  # leaves room for weights that grow before the kernel rescales a row
_POSITIONS_OF_16 = (4, 2, 2)  # t, a, b: undoes the order of keys that `quantize_value` makes


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
    seen_q = q_values * each_row(q_scales, QUERY_ROWS, q.shape[1])
    seen_k = k_values * each_row(k_scales, tile_n, k.shape[1])
    seen_v = _dequantized_value(v, key_mask) if QUANTIZATIONS[quantization].values is not None else v
    return seen_q, seen_k, seen_v, lse_shift


def _dequantized_value(v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return v [B, Sk, Hkv, Dv] as the FP8 product sees it, float32."""
    values, scales = quantize_value(v, key_mask)
    in_order: torch.Tensor = values.to(torch.float32).unflatten(3, (-1, *_POSITIONS_OF_16)).transpose(4, 5).flatten(3)
    return (in_order[..., : v.shape[1]] * scales.unsqueeze(3)).permute(0, 3, 1, 2)


def round_weights_(weights: torch.Tensor, dtype: torch.dtype) -> None:
    """Round weights of softmax, the largest of a row 1, in place, to what kernels hold them in."""
    weights.copy_(weights.mul_(_LARGEST_WEIGHT).to(dtype)).div_(_LARGEST_WEIGHT)
