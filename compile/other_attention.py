"""Attention that no swap reaches: within one op, or by another backend of diffusers. It is never dense unsaid."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn

from lite_attention.compile.provenance import name_of, value_of
from lite_attention.compile.sites import Names
from lite_attention.compile.store import StateStore
from lite_attention.ops.site import Site

__all__ = [
    "NATIVE_BACKENDS",
    "attention_modules",
    "note_other_backends",
    "on_other_backends",
    "reason_of_op",
    "site_of_op",
    "sites_of_ops",
]

_MULTIHEAD = "nn.MultiheadAttention computes it as a whole: call it with need_weights=False and without masks"
_REASONS = {
    "multi_head_attention_forward": _MULTIHEAD,
    "_native_multi_head_attention": _MULTIHEAD,
    "_transformer_encoder_layer_fwd": "nn.TransformerEncoderLayer computes it as a whole on its fast path: call "
    "torch.backends.mha.set_fastpath_enabled(False), and see nn.MultiheadAttention",
    "flex_attention": "another attention backend: FlexAttention",
}
# Of diffusers; they call scaled_dot_product_attention. The last is of `lite_attention.integrations.diffusers`.
NATIVE_BACKENDS = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "lite_attention")


@functools.cache  # asked at every call of torch, run eagerly
def reason_of_op(name: str) -> str | None:
    """Return why the swap does not reach the attention within an op or function, None if it is none.

    Args:
        name: of the function, or "namespace::name" of the op.
    """
    space, _, op = name.removeprefix("aten::").rpartition("::")
    if op.startswith("_scaled_dot_product_"):
        return f"another attention backend: torch's {op}"
    if space in ("lite_attention", "higher_order") or not (space or op in _REASONS):
        return None
    is_attention = any(word in op for word in ("attention", "attn"))
    return _REASONS.get(op) or (f"another attention backend: {name}" if is_attention else None)


def site_of_op(caller: tuple[str, str], ordinal: int, tensors: Sequence[torch.Tensor], reason: str) -> Site:
    """Return the site of an op's attention; its shapes are those of the tensors that the op is given.

    Args:
        caller: path and class name of the module.
        ordinal: among such ops.
        tensors: the arguments of the op, real or fake.
        reason: why it does not skip.
    """
    shapes = [tuple(t.shape) for t in tensors[:3]] or [()]
    q, k, v = (shapes * 3)[:3] if len(shapes) < 3 or len(shapes[1]) != len(shapes[0]) else shapes
    like = tensors[0] if tensors else torch.empty(0)
    return Site(*caller, ordinal, q, k, v, like.dtype, like.device, reason=reason)


def sites_of_ops(graph: fx.Graph, names: Names | None = None) -> list[Site]:
    """Return the attention within ops of a graph."""
    found: list[Site] = []
    for node in graph.nodes:
        reason = reason_of_op(name_of(node)) if node.op == "call_function" else None
        if reason is not None:
            values = [value_of(n) for n in node.all_input_nodes]
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            found.append(site_of_op((names or Names()).of_caller(node), len(found), tensors, reason))
    return found


def note_other_backends(attention: Sequence[tuple[str, nn.Module]], store: StateStore) -> None:
    """Note, after a forward, which modules attended through another backend of diffusers.

    Args:
        attention: modules that have a `processor`, by path.
        store: of the model's sites.
    """
    for path, module, reason in on_other_backends(attention):
        own = store.records_in(module)
        records = own + [record for record in store.records if record.site.name == path and record not in own]
        if not records:
            site = site_of_op((path, type(module).__name__), 0, (), reason)
            records = [store.record([module], ("backend",), site)]
        for record in records:
            store.note(record, None, reason)


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a model that attend as diffusers does, by path."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "processor")]


def on_other_backends(attention: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield those of the modules that do not call scaled_dot_product_attention now, with the reason."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    active = getattr(registry, "_active_backend", None)
    for path, module in attention:
        processor = module.processor
        if hasattr(processor, "_attention_backend"):
            backend = processor._attention_backend or active
            name = str(getattr(backend, "value", backend))
            if backend is not None and name not in NATIVE_BACKENDS:
                yield path, module, f"another attention backend: {name}"
