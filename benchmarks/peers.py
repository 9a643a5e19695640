"""Other people's attention, as contenders of `attention.py`: each function returns (call, share of tiles skipped)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lite_attention.cli.timing import Call

Contender = tuple[Call, float]

FLEX_TILE = 128  # FlexAttention's own block size: it wants multiples of the tiles of its kernel, so not 192 x 80


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))

    def call() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(qh, kh, vh)

    return call, 0.0


def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    from fa3_fwd_interface import flash_attn_func

    return lambda: flash_attn_func(q, k, v), 0.0


def fa3_fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    """FlashAttention-3's FP8 mode, one scale for each head; quantized outside of the call."""
    from fa3_fwd_interface import flash_attn_func

    largest = [x.abs().amax((1, 3)).float() / 448 for x in (q, k, v)]  # of e4m3
    values = [
        (x / scale.to(x.dtype)[:, None, :, None]).to(torch.float8_e4m3fn)
        for x, scale in zip((q, k, v), largest, strict=True)
    ]
    scales = dict(zip(("q_descale", "k_descale", "v_descale"), largest, strict=True))
    return lambda: flash_attn_func(*values, **scales), 0.0


def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    """SageAttention as PyPI has it: INT8 scores, Triton; it quantizes within the call."""
    from sageattention import sageattn

    return lambda: sageattn(q, k, v, tensor_layout="NHD"), 0.0


def sol(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tau: float) -> Contender:
    """Sol-Attn as comfy-kitchen has it: INT8 scores, head dim 128; blocks not attended exactly have means."""
    from comfy_kitchen import sol_attn

    return lambda: sol_attn(q, k, v, tau=tau), 0.0


def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Contender:
    from flash_attn.cute import flash_attn_func

    return lambda: flash_attn_func(q, k, v), 0.0


def block_mask(skipped: torch.Tensor, seq: int, device: torch.device) -> Any:
    """Return FlexAttention's form of bool [heads, q_tiles, k_tiles], True = skipped, with no partly masked tile."""
    from torch.nn.attention.flex_attention import BlockMask

    kept = (~skipped).unsqueeze(0).to(device)
    count = kept.sum(-1, dtype=torch.int32)
    # Kept tiles come first, in their order.
    indices = (~kept).to(torch.int8).argsort(stable=True, dim=-1).to(torch.int32).contiguous()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(indices), count, indices, BLOCK_SIZE=FLEX_TILE, seq_lengths=(seq, seq)
    )


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plant: Callable[[int, int], torch.Tensor] | None = None
) -> Contender:
    """Return FlexAttention, compiled with its default configuration.

    Args:
        q: (batch, seq_len, heads, head_dim).
        k: likewise.
        v: likewise.
        plant: returns what is skipped as bool [heads, q_tiles, k_tiles]; None: dense, without any mask.
    """
    from torch.nn.attention.flex_attention import flex_attention

    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    if plant is None:
        return functools.partial(compiled, *heads_first), 0.0
    seq = q.shape[1]
    tiles = -(-seq // FLEX_TILE)
    skipped = plant(tiles, tiles)
    mask = block_mask(skipped, seq, q.device)
    return functools.partial(compiled, *heads_first, block_mask=mask), skipped.float().mean().item()
