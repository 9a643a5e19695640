"""The name "lite_attention" among diffusers' attention backends, and which models have it where processes share them.

All that is called by it is PyTorch's attention, as of the backend "native", for the swap to find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch
from torch import nn

from lite_attention.compile.other_attention import NATIVE_BACKENDS
from lite_attention.integrations.enum_member import add_member
from lite_attention.parallel.context_parallel import attend, own_heads_of_mask

__all__ = ["MEMBER", "NAME", "attach"]

NAME = "lite_attention"

_registry = dispatch._AttentionBackendRegistry
_native = _registry._backends[dispatch.AttentionBackendName.NATIVE]

MEMBER = add_member(dispatch.AttentionBackendName, NAME.upper(), NAME)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """Call scaled_dot_product_attention as diffusers does: in an enabled model, the swap is there."""
    split = None if _parallel_config is None else _parallel_config.context_parallel_config
    if split is not None and split.ring_degree > 1 and not return_lse:
        how: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return attend(query, key, value, attn_mask, split, **how)
    if split is not None and attn_mask is not None:
        attn_mask = own_heads_of_mask(attn_mask, query.shape[2], split)
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse, _parallel_config)
    return _native(*arguments)  # type: ignore[no-any-return]


_registry.register(MEMBER, supports_context_parallel=True)(_attend)


def attach(model: nn.Module) -> Callable[[], None]:
    """Let a model whose attention is split attend by this backend, and return what undoes it.

    In a ring it attends to gathered keys. Where heads alone are exchanged, diffusers does it all but cut a mask by head
    to the heads here, as LTX needs it. What runs another backend's attention is left as it is.
    """
    before = [(processor, processor._attention_backend) for processor in _native_processors(model)]
    for processor, _ in before:
        processor._attention_backend = MEMBER

    def detach() -> None:
        for processor, backend in before:
            if processor._attention_backend is MEMBER:
                processor._attention_backend = backend

    return detach


def _native_processors(model: nn.Module) -> Iterator[Any]:
    """Yield the attention processors whose backend is PyTorch's attention."""
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            backend = processor._attention_backend or _registry.get_active_backend()[0]
            if str(getattr(backend, "value", backend)) in NATIVE_BACKENDS:
                yield processor
