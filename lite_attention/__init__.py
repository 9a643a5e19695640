"""LiteAttention: attention for diffusion transformers that skips the tiles which do not matter.

lite_attention.enable(pipe, threshold=-6.0)                   # a diffusers pipeline
torch.compile(model, backend=lite_attention.liteattn_backend) # any model
attn = lite_attention.LiteAttention(threshold=-6.0)           # by hand, one module per layer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lite_attention.inspection import Report, report
from lite_attention.module import LiteAttention
from lite_attention.ops import SkipState, attention, skip_attention
from lite_attention.wiring import branch, disable, enable, reset

if TYPE_CHECKING:
    from lite_attention.compile import LiteAttentionBackend, liteattn_backend, make_skip_aware

__version__ = "0.1.0"

__all__ = [
    "LiteAttention",
    "LiteAttentionBackend",
    "Report",
    "SkipState",
    "attention",
    "branch",
    "disable",
    "enable",
    "liteattn_backend",
    "make_skip_aware",
    "report",
    "reset",
    "skip_attention",
]

_FROM_COMPILE = ("LiteAttentionBackend", "liteattn_backend", "make_skip_aware")


def __getattr__(name: str) -> Any:
    # torch.compile's machinery takes a second to import, and eager users never need it.
    if name in _FROM_COMPILE:
        import lite_attention.compile

        return getattr(lite_attention.compile, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
