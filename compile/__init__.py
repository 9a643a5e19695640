"""torch.compile and torch.export: attention swapped for the skip-aware op, its state threaded through. Imports ops.

Names are resolved on first use: who runs a model eagerly needs neither the backend nor the export pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lite_attention.ops.lazy_names import on_first_use

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

_LAZY = {
    "LiteAttentionBackend": "lite_attention.compile.backend",
    "Site": "lite_attention.ops.site",
    "SkipAwareProgram": "lite_attention.compile.export",
    "SkipSettings": "lite_attention.compile.settings",
    "liteattn_backend": "lite_attention.compile.backend",
    "make_skip_aware": "lite_attention.compile.export",
    "skip_states": "lite_attention.compile.export",
}

__getattr__, __dir__ = on_first_use(__name__, _LAZY)
