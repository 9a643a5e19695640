"""A node for ComfyUI: "LiteAttention", which patches a model to skip attention that does not matter.

This folder is a custom node pack; its README says how to install it. ComfyUI is imported when it asks for the node.
"""

from __future__ import annotations

from typing import Any

__all__ = ["comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """Return the extension, as ComfyUI asks for it."""
    from .node import LiteAttentionExtension

    return LiteAttentionExtension()
