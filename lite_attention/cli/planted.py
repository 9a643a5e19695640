"""States of which a chosen share of the tiles is skipped, so that skipping can be timed on any input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lite_attention.cli.timing import Call
from lite_attention.ops import SkipState, skip_attention
from lite_attention.ops.bitmask import pack_bits

__all__ = ["planted", "skipping"]

_NO_VOTE = -60.0  # random inputs: nothing is voted out, so the planted mask stays


def planted(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plant: Callable[[int, int], torch.Tensor], **how: Any
) -> SkipState:
    """Return a state in use whose mask is planted, and stays.

    Args:
        q: (batch, seq_q, heads, head_dim).
        k: (batch, seq_k, kv_heads, head_dim).
        v: likewise.
        plant: called with (q_tiles, k_tiles), returns bool (batch or 1, heads, q_tiles, k_tiles), True = skipped; the
            first axis may be missing.
        how: `quantization` and `implementation`, as `skip_attention` takes them.
    """
    state = SkipState.for_inputs(q, k, threshold=_NO_VOTE, slots=1, **how)
    skip_attention(q, k, v, state, **how)  # from now on the step is not fresh
    state.skip_mask[0] = pack_bits(plant(*state.tiles)).to(q.device)
    return state


def skipping(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: SkipState, **how: Any
) -> tuple[Call, float]:  # fmt: skip
    """Return a call with a state in use, and the share of tiles that it skips."""
    return lambda: skip_attention(q, k, v, state, **how), float(state.sparsity())
