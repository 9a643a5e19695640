"""Calls of the op: inputs that drop tiles, layouts, wrong arguments, and one step held against the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lite_attention.ops import SkipState
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.oracle import OracleResult, skip_attention_oracle

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Of what the op computes in float32 and stores once; float64 is computed in float64.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Of e4m3, which moves a weight by up to 1/16, and one below its range by a sliver: so a sum, and an output by twice it.
FP8_TOLERANCE = 1 / 14


def clustered_qkv(
    seed: int,
    *,
    batch: int = 1,
    seq_q: int,
    seq_k: int | None = None,
    heads: int = 2,
    kv_heads: int | None = None,
    head_dim: int = 8,
    value_dim: int | None = None,
    clusters: int = 4,
    gain: float = 1.5,
    dtype: torch.dtype = torch.float32,
    step: int = 0,
) -> Qkv:
    """Return q, k, v whose tokens flock to a few centers along the sequence, so that many tiles matter little.

    The centers depend on the seed alone, the noise also on the step: as in a denoising loop, patterns last.
    """
    kv_heads = kv_heads or heads
    centers = gain * torch.randn(kv_heads, clusters, head_dim, generator=torch.Generator().manual_seed(seed))
    noise = torch.Generator().manual_seed(1000 * seed + step)

    def tokens(seq: int, n_heads: int) -> torch.Tensor:
        of_head = centers.repeat_interleave(n_heads // kv_heads, 0)
        placed = of_head[:, torch.arange(seq) * clusters // seq].transpose(0, 1)
        return (placed + torch.randn(batch, seq, n_heads, head_dim, generator=noise)).to(dtype)

    seq_k = seq_k or seq_q
    v = torch.randn(batch, seq_k, kv_heads, value_dim or head_dim, generator=noise).to(dtype)
    return tokens(seq_q, heads), tokens(seq_k, kv_heads), v


def assert_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: SkipState,
    *,
    scale: float | None = None,
    must_do: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    quantization: str = "none",
) -> tuple[torch.Tensor, OracleResult]:
    """Run the op from the state as it is; hold all that it returns and leaves behind against the oracle.

    The oracle attends with what the quantized tensors stand for, and does not round the weights of "int8_fp8".
    """
    others = (state.skip_mask, state.control, state.threshold, state.initial_mask, must_do, key_mask)
    tiles = {"tile_m": state.tile_m, "tile_n": state.tile_n}
    slot, dtype, lse_shift = state.slot, q.dtype, None
    given, given_scale, fp8 = (q, k, v), scale, quantization == "int8_fp8"
    if quantization != "none":
        (q, k, lse_shift), scale = dequantized(q, k, key_mask, scale, state.tile_n), math.log(2)
    if fp8:
        v = dequantized_value(v, key_mask)
    want = skip_attention_oracle(q, k, v, *others, scale=scale, **tiles)
    if lse_shift is not None:
        want.lse.add_(lse_shift.where(want.lse != -math.inf, 0))
    out, lse = torch.ops.lite_attention.skip_attention(
        *given, *others, scale=given_scale, quantization=quantization, **tiles
    )

    tol = TOLERANCE[dtype] if quantization == "none" else max(TOLERANCE[dtype], TOLERANCE[torch.float32])
    tol = 2 * FP8_TOLERANCE if fp8 else tol
    reach = max(1.0, float(v.double().abs().max()))
    torch.testing.assert_close(out.double(), want.out, rtol=tol, atol=tol * reach, equal_nan=True)
    lse_tol = 1e-6 if dtype == torch.float64 and lse_shift is None else 1e-4  # stored in float32 either way
    lse_tol = FP8_TOLERANCE if fp8 else lse_tol
    torch.testing.assert_close(lse.double(), want.lse, rtol=lse_tol, atol=lse_tol, equal_nan=True)
    assert torch.equal(state.control, want.control)

    # Every bit of the state, also those out of reach of this call; only votes too close to call may differ.
    all_bits = 32 * state.skip_mask.shape[-1]
    differs = unpack_bits(state.skip_mask, all_bits) != unpack_bits(want.skip_mask, all_bits)
    batch, _, q_tiles, k_tiles = want.margin.shape
    differs[slot, :batch, :, :q_tiles, :k_tiles] &= want.margin >= too_close(q, k, scale)
    assert not differs.any(), differs.nonzero().tolist()
    return out, want


def dequantized(
    q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, scale: float | None, tile_n: int
) -> Qkv:
    """Return q and k in float64 as the quantizing ops leave them, their product in log2 units, and lse_shift."""
    ops = torch.ops.lite_attention
    mean = ops.key_mean(k, key_mask)
    q_values, q_scales, _, lse_shift = ops.quantize_query(q, mean, scale=scale)
    k_values, k_scales, _ = ops.quantize_key(k, mean, key_mask, tile_n=tile_n)
    seen = []
    for values, scales, rows in ((q_values, q_scales, 16), (k_values, k_scales, tile_n)):
        by_row = torch.stack([scales[:, :, i // rows] for i in range(values.shape[1])], 1)
        seen.append(values.double() * by_row.double().unsqueeze(-1))
    return seen[0], seen[1], lse_shift.double()


def dequantized_value(v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return v in float64 as the quantizing op leaves it, its keys put back in order one by one."""
    values, scales = torch.ops.lite_attention.quantize_value(v, key_mask)
    places = [16 * (key // 16) + 4 * (key % 8 // 2) + 2 * (key % 16 // 8) + key % 2 for key in range(v.shape[1])]
    return (values.double()[..., places] * scales.double().unsqueeze(-1)).permute(0, 3, 1, 2)


def too_close(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> float:
    """Return the distance from the threshold below which a vote may go either way."""
    keys = k.double().repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), keys).nan_to_num(posinf=0, neginf=0)
    to_log2 = (q.shape[3] ** -0.5 if scale is None else scale) * math.log2(math.e)
    return 1e-3 * max(1.0, to_log2 * float(scores.abs().max()) / 64)


def live_sparsity(state: SkipState) -> float:
    """Count the skipped tiles of all slots in use, within the sizes of their last call, one slot at a time."""
    skipped = total = 0
    for slot, kept in enumerate(state.kept_tiles()):
        batch, seq_q, seq_k = state.control[c.slot_word(slot, c.BATCH) :][:3].tolist()
        live = kept[:batch, :, : math.ceil(seq_q / state.tile_m), : math.ceil(seq_k / state.tile_n)]
        skipped, total = skipped + int((~live).sum()), total + live.numel()
    return skipped / max(total, 1)


# ---- memory layouts --------------------------------------------------------------------------------------------------

Layout = Callable[[torch.Tensor], torch.Tensor]


def _fused(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x, x], dim=2)[:, :, 1]  # [B, S, 3, H, D], as one projection of q, k and v gives


def _fused_last(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x, x], dim=3)[..., x.shape[3] : 2 * x.shape[3]]


LAYOUTS: dict[str, Layout] = {
    "bshd": torch.Tensor.contiguous,
    "bhsd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sbhd": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "fused": _fused,
    "fused_last": _fused_last,
    "fused_bhsd": lambda x: _fused(x.transpose(1, 2)).transpose(1, 2),
    "last_stride_not_1": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other": lambda x: torch.stack([x, x], dim=4).flatten(3)[..., ::2],
    "one_head_for_all": lambda x: x[:, :, :1].expand(-1, -1, x.shape[2], -1),
}


def stride_order(x: torch.Tensor) -> list[int]:
    return sorted(range(x.dim()), key=lambda dim: -x.stride(dim))


# ---- what a call refuses ---------------------------------------------------------------------------------------------

# The sizes of a call that is in order.
B, SQ, SK, H, D = 2, 20, 36, 4, 8

# argument, wrong value, the error's beginning
WRONG_QKV: list[tuple[str, torch.Tensor, str]] = [
    ("q", torch.randn(B, SQ, D), "q: expected (batch, seq_len, heads, head_dim), got 3 dimensions"),
    ("k", torch.randn(B, SK, 2 * D), "k: expected (batch, seq_len, heads, head_dim), got 3 dimensions"),
    ("v", torch.randn(B, SK, 2, D, 1), "v: expected (batch, seq_len, heads, head_dim), got 5 dimensions"),
    ("k", torch.randn(B, SK, 2, D).half(), "dtype of k: expected that of q, torch.float32, got torch.float16"),
    ("v", torch.randn(B, SK, 2, D).double(), "dtype of v: expected that of q, torch.float32, got torch.float64"),
    ("k", torch.randn(B, SK, 2, D, device="meta"), "device of k: expected that of q, cpu, got meta"),
    ("v", torch.randn(B, SK, 2, D, device="meta"), "device of v: expected that of q, cpu, got meta"),
    ("k", torch.randn(1, SK, 2, D), "batch of k: expected that of q, 2, got 1"),
    ("k", torch.randn(B, SK, 2, 7), "head_dim of k: expected that of q, 8, got 7"),
    ("v", torch.randn(3, SK, 2, D), "batch of v: expected that of q, 2, got 3"),
    ("v", torch.randn(B, 35, 2, D), "seq_len of v: expected that of k, 36, got 35"),
    ("v", torch.randn(B, SK, 4, D), "heads of v: expected those of k, 2, got 4"),
    ("q", torch.randn(B, 0, H, D), "seq_len of q: expected at least 1, got 0"),
    ("v", torch.randn(B, SK, 2, 0), "head_dim of v: expected at least 1, got 0"),
    ("q", torch.randn(B, SQ, 3, D), "heads of q: expected a multiple of those of k, 2, got 3"),
    ("q", torch.randn(B, SQ, 0, D), "heads of q: expected a multiple of those of k, 2, got 0"),
]
