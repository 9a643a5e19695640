"""The CPU kernel of `lite_attention::residual_attention`."""

from __future__ import annotations

import torch

from lite_attention.ops.check_calls import check_residual_call
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.signature import call_signature

__all__ = ["residual_attention_reference"]


def residual_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    skip_mask: torch.Tensor,
    control: torch.Tensor,
    plan: torch.Tensor,
    keep: torch.Tensor,
    times: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    row_lse: torch.Tensor,
    initial_mask: torch.Tensor | None,
    must_do: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    *,
    scale: float | None,
    tile_m: int,
    tile_n: int,
    quantization: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `lite_attention::residual_attention` on any device; see `lite_attention.ops.schema` for the contract."""
    state = (skip_mask, control, plan, keep, times, residual, residual_scale, row_lse, initial_mask)
    check_residual_call(call_signature((q, k, v, *state, must_do, key_mask), scale, tile_m, tile_n))
    check_quantization(quantization)
    raise NotImplementedError("lite_attention::residual_attention: its CPU kernel comes with the next commit")
