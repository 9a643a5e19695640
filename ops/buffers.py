"""What the buffers of a state are: one table for who allocates them and for who traces them with symbolic sizes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from lite_attention.ops.bitmask import WORD_BITS
from lite_attention.ops.control import control_words
from lite_attention.ops.tiles import ceil_div

__all__ = ["MASKS", "Buffers", "Sizes", "nbytes_of", "readable", "residual_buffers", "vote_buffers"]

Buffers = dict[str, tuple[tuple[Any, ...], torch.dtype] | None]  # shape and dtype by name; None = there is none

MASKS = 2  # of a slot with residuals: one in use, one decided or old


class Sizes(NamedTuple):
    """Sizes of a state; numbers, or torch.SymInt."""

    batch: Any
    heads: Any
    seq_q: Any
    seq_k: Any
    tile_m: int
    tile_n: int

    @property
    def mask(self) -> tuple[Any, ...]:
        """Shape of the words of a mask, (batch, heads, q_tiles, k_words)."""
        words = ceil_div(ceil_div(self.seq_k, self.tile_n), WORD_BITS)
        return self.batch, self.heads, ceil_div(self.seq_q, self.tile_m), words


def vote_buffers(sizes: Sizes, *, slots: int, steps: int, has_initial_mask: bool) -> Buffers:
    """Return the buffers of a `SkipState`."""
    return {
        "skip_mask": ((slots, *sizes.mask), torch.int32),
        "control": ((control_words(slots),), torch.int32),
        "threshold": ((slots, steps, sizes.heads), torch.float32),
        "initial_mask": (sizes.mask, torch.int32) if has_initial_mask else None,
    }


def residual_buffers(
    sizes: Sizes, *, slots: int, steps: int, has_initial_mask: bool, value_dim: Any, forecast: bool, dtype: torch.dtype
) -> Buffers:
    """Return the buffers of a `ResidualState`."""
    planes = 2 if forecast else 1
    rows = (sizes.batch, sizes.heads, sizes.seq_q)
    has_scale = dtype == torch.float8_e4m3fn
    return {
        "skip_mask": ((slots, MASKS, *sizes.mask), torch.int32),
        "control": ((control_words(slots),), torch.int32),
        "plan": ((steps + 1,), torch.int32),  # the last is of all steps that come after
        "keep": ((steps,), torch.float32),
        "times": ((slots, 3), torch.float32),
        "residual": ((slots, planes, *rows, value_dim), dtype),
        "residual_scale": ((slots, planes, *rows), torch.float32) if has_scale else None,
        "row_lse": ((slots, 1 + planes, *rows), torch.float32),
        "initial_mask": (sizes.mask, torch.int32) if has_initial_mask else None,
    }


def nbytes_of(buffers: Buffers) -> dict[str, int]:
    """Return the bytes of buffers by name, 0 of one that there is not; sizes are numbers."""
    return {name: 0 if like is None else math.prod(like[0]) * like[1].itemsize for name, like in buffers.items()}


def readable(nbytes: int) -> str:
    """Return a number of bytes as text."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"
