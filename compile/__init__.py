"""torch.compile and torch.export: attention swapped for the skip-aware op, its state threaded through. Imports ops.

Names are resolved on first use: who runs a model eagerly needs neither the backend nor the export pass.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ == "compile":
    raise ImportError("import lite_attention.compile, not compile: a second copy would hold other states")

if TYPE_CHECKING:
    from lite_attention.compile.backend import LiteAttentionBackend, liteattn_backend
    from lite_attention.compile.export import SkipAwareProgram, make_skip_aware, skip_states
    from lite_attention.compile.settings import SkipSettings
    from lite_attention.ops.site import Site

__all__ = [
    "LiteAttentionBackend",
    "Site",
    "SkipAwareProgram",
    "SkipSettings",
    "liteattn_backend",
    "make_skip_aware",
    "skip_states",
]

_ROOMS = {
    "LiteAttentionBackend": "compile.backend",
    "Site": "ops.site",
    "SkipAwareProgram": "compile.export",
    "SkipSettings": "compile.settings",
    "liteattn_backend": "compile.backend",
    "make_skip_aware": "compile.export",
    "skip_states": "compile.export",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"lite_attention.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
