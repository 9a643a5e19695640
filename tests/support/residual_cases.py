"""Calls of `residual_attention`: states, and one step held against the oracle."""

from __future__ import annotations

import math
from typing import Any

import torch

from lite_attention.ops import ResidualState
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.residual_oracle import ResidualOracleResult, decoded_residual, residual_attention_oracle
from tests.support.op_cases import FP8_TOLERANCE, TOLERANCE, dequantized, dequantized_value

# Of what is stored: relative to a value, and to the largest of its row.
_STORED = {
    torch.float8_e4m3fn: (2**-4, 2**-10 / 448), torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-20),
    torch.float32: (2**-23, 0.0),
}  # fmt: skip


def residual_state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> ResidualState:
    """Return a state for a call, with one slot and tiles of 8 x 8 unless told."""
    sizes = {"batch": q.shape[0], "heads": q.shape[2], "seq_q": q.shape[1], "seq_k": k.shape[1]}
    given = {**sizes, "value_dim": v.shape[3], "tile_m": 8, "tile_n": 8, "slots": 1, "residual_dtype": "fp32"}
    return ResidualState(**{**given, **options})  # type: ignore[arg-type]


def assert_residual_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: ResidualState,
    *,
    scale: float | None = None,
    must_do: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    quantization: str = "none",
    slack: float = 0.02,
) -> tuple[torch.Tensor, ResidualOracleResult]:
    """Run the op from the state as it is; hold all that it returns and leaves behind against the oracle.

    The oracle attends with what the quantized tensors stand for, and does not round the weights of "int8_fp8".
    """
    buffers = [state._buffers[name] for name in state.BUFFERS]
    before = {name: None if x is None else x.clone() for name, x in zip(state.BUFFERS, buffers, strict=True)}
    tiles = {"tile_m": state.tile_m, "tile_n": state.tile_n}
    seen, seen_scale, lse_shift = (q, k, v), scale, None
    if quantization != "none":
        (seen_q, seen_k, lse_shift), seen_scale = dequantized(q, k, key_mask, scale, state.tile_n), math.log(2)
        seen = (seen_q, seen_k, dequantized_value(v, key_mask) if quantization == "int8_fp8" else v)
    want = residual_attention_oracle(
        *seen, *buffers, must_do, key_mask, scale=seen_scale, lse_shift=lse_shift, slack=slack, **tiles
    )
    out, lse = torch.ops.lite_attention.residual_attention(
        q, k, v, *buffers, must_do, key_mask, scale=scale, quantization=quantization, **tiles
    )

    tol, lse_tol = _tolerances(q.dtype, quantization)
    # The forecast multiplies what is off by as much as it goes ahead.
    reach = max(1.0, float(v.double().abs().max()), float(want.out.nan_to_num(0).abs().max()))
    torch.testing.assert_close(out.double(), want.out, rtol=tol, atol=tol * reach, equal_nan=True)
    lse_reach = max(1.0, float(want.lse.nan_to_num(0, 0, 0).abs().max()))
    torch.testing.assert_close(lse.double(), want.lse, rtol=lse_tol, atol=lse_tol * lse_reach, equal_nan=True)
    assert torch.equal(state.control, want.control)
    torch.testing.assert_close(state.times, want.times, rtol=0, atol=0, equal_nan=True)
    _assert_masks(state, want)
    _assert_stored(state, before, want, tol * reach)
    torch.testing.assert_close(
        state.row_lse.double(), want.row_lse, rtol=2 * lse_tol, atol=2 * lse_tol * lse_reach, equal_nan=True
    )
    return out, want


def _tolerances(dtype: torch.dtype, quantization: str) -> tuple[float, float]:
    """Return how far outputs and LSEs may be off."""
    if quantization == "int8_fp8":
        return 4 * FP8_TOLERANCE, 2 * FP8_TOLERANCE
    exact = dtype == torch.float64 and quantization == "none"
    return max(TOLERANCE[dtype], 1e-6 if exact else 1e-4), 1e-6 if exact else 1e-4


def _assert_masks(state: ResidualState, want: ResidualOracleResult) -> None:
    """Every bit of the state, also those out of reach of this call; only choices too close to call may differ."""
    all_bits = 32 * state.skip_mask.shape[-1]
    differs = unpack_bits(state.skip_mask, all_bits) != unpack_bits(want.skip_mask, all_bits)
    batch, _, q_tiles, k_tiles = want.certain.shape
    decided = int(want.control[c.slot_word(state.slot, c.DECIDED)])
    differs[state.slot, decided % 2, :batch, :, :q_tiles, :k_tiles] &= want.certain
    assert not differs.any(), differs.nonzero().tolist()


def _assert_stored(state: ResidualState, before: dict[str, Any], want: ResidualOracleResult, tol: float) -> None:
    """The residual of this step is the oracle's, rounded; all others are as they were."""
    got = decoded_residual(state.residual, state.residual_scale)
    relative, of_largest = _STORED[state.residual.dtype]
    largest = want.residual.abs().amax(-1, keepdim=True)
    is_nan = want.residual.isnan()
    if state.residual_scale is not None:  # a NaN makes its row NaN
        is_nan = is_nan.any(-1, keepdim=True).expand_as(is_nan)
    assert torch.equal(got.isnan(), is_nan)
    off = (got - want.residual).abs() - relative * want.residual.abs() - of_largest * largest
    assert not (off > 2 * tol).any(), off.max()
    stores = want.kind in ("full", "deciding") and int(want.control[c.slot_word(state.slot, c.RESIDUALS)]) > 0
    for name in ("residual", "residual_scale"):
        if state._buffers[name] is None:
            continue
        now, was = state._buffers[name].clone(), before[name]
        if stores:
            plane = (int(want.control[c.slot_word(state.slot, c.RESIDUALS)]) - 1) % now.shape[1]
            batch, seq_q, heads = want.out.shape[:3]
            now[state.slot, plane, :batch, :, :seq_q] = was[state.slot, plane, :batch, :, :seq_q]
            assert heads == now.shape[3]
        raw = torch.uint8 if now.element_size() == 1 else torch.int16 if now.element_size() == 2 else torch.int32
        assert torch.equal(now.view(raw), was.view(raw))
