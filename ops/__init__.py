"""Op schemas, fake kernels, tile geometry, skip state and the CPU reference. Imports torch alone."""

from __future__ import annotations

if __name__ == "ops":
    raise ImportError("import lite_attention.ops, not ops: the op must be registered once")

from lite_attention.ops.functional import attention, skip_attention
from lite_attention.ops.session import Session, default_session
from lite_attention.ops.state import DEFAULT_SLOTS, DEFAULT_THRESHOLD, SkipState
from lite_attention.ops.tiles import tile_shape

__all__ = [
    "DEFAULT_SLOTS",
    "DEFAULT_THRESHOLD",
    "Session",
    "SkipState",
    "attention",
    "default_session",
    "skip_attention",
    "tile_shape",
]
