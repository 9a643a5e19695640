"""Putting an op of ours in place of one attention call."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lite_attention.compile.provenance import value_of
from lite_attention.compile.settings import SkipSettings
from lite_attention.compile.sites import GraphSite
from lite_attention.ops.methods import METHODS
from lite_attention.ops.schema import ATTENTION

__all__ = ["emit_call", "swap_site"]


def emit_call(graph: fx.Graph, meta_key: str, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call with the fake value that later passes look for."""
    node = graph.call_function(target, args, kwargs)

    def fake(x: Any) -> Any:
        return value_of(x) if isinstance(x, fx.Node) else x

    node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
    node.meta[meta_key] = target(*fx.node.map_arg(args, fake), **fx.node.map_arg(kwargs, fake))
    return node


def swap_site(
    graph: fx.Graph, found: GraphSite, state: Sequence[fx.Node | None] | None, settings: SkipSettings, meta_key: str
) -> fx.Node:
    """Replace one attention call by the skip-aware op or the dense one, and return what has its value now.

    Args:
        graph: changed in place.
        found: the site.
        state: nodes of the state's buffers, in the order of its `BUFFERS`, None for one that is absent; no state at all
            means the dense op.
        settings: method, tile sizes, quantization and implementation.
        meta_key: where this kind of graph keeps fake values: "example_value" (dynamo) or "val" (export).
    """
    call, aten = found.call, torch.ops.aten

    def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit_call(graph, meta_key, call.node, target, *args, **kwargs)

    def operand(node: fx.Node, order: Sequence[int]) -> fx.Node:
        tensor = value_of(node)
        if isinstance(tensor, torch.Tensor) and tensor.dtype != found.site.dtype:
            node = emit(aten.to.dtype, node, found.site.dtype)  # as autocast does
        return emit(aten.permute.default, node, list(order))

    with graph.inserting_before(call.node):
        q = operand(call.q, call.q_permutation)
        k = operand(call.k, call.k_permutation)
        v = operand(call.v, call.v_permutation)
        key_mask = None
        if call.mask is not None:  # [B or 1, 1, 1, Sk] -> [B or 1, Sk]
            key_mask = emit(aten.select.int, emit(aten.select.int, call.mask, 1, 0), 1, 0)
        op, of_state, options = _op(found, state, settings)
        scale = None if call.scale is None else float(call.scale)
        attended = emit(operator.getitem, emit(op, q, k, v, *of_state, key_mask, scale=scale, **options), 0)
        if call.rows is not None:  # [B or 1, 1, 1, Sq], or so -> [B or 1, Sq, 1, 1]
            rows = emit(aten.flatten.using_ints, emit(aten.logical_not.default, call.rows), 1)
            for dim in (2, 3):
                rows = emit(aten.unsqueeze.default, rows, dim)
            attended = emit(aten.masked_fill.Scalar, attended, rows, 0.0)
        out = emit(aten.permute.default, attended, list(call.out_permutation))
    call.node.replace_all_uses_with(out)
    for node in (call.node, *call.inner):
        if not node.users:
            graph.erase_node(node)
    return out


def _op(
    found: GraphSite, state: Sequence[fx.Node | None] | None, settings: SkipSettings
) -> tuple[Any, list[fx.Node | None], dict[str, Any]]:
    """Return the op of a site, what it takes between the values and the key mask, and its options."""
    if state is None:
        return ATTENTION, [], {}
    tile_m, tile_n = settings.tile_shape_for(found.site)
    op, must_do = METHODS[settings.method].implementations[settings.implementation], None
    return op, [*state, must_do], {"tile_m": tile_m, "tile_n": tile_n, "quantization": settings.quantization}
