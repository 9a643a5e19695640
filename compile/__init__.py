"""torch.compile and torch.export: attention swapped for the skip-aware op, its state threaded through. Imports ops."""

from __future__ import annotations

if __name__ == "compile":
    raise ImportError("import lite_attention.compile, not compile: a second copy would hold other states")

from lite_attention.compile.backend import LiteAttentionBackend, liteattn_backend
from lite_attention.compile.export import SkipAwareProgram, make_skip_aware, skip_states
from lite_attention.compile.settings import Site, SkipSettings

__all__ = [
    "LiteAttentionBackend",
    "Site",
    "SkipAwareProgram",
    "SkipSettings",
    "liteattn_backend",
    "make_skip_aware",
    "skip_states",
]
