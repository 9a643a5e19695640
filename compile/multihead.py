"""`nn.MultiheadAttention` in parts: torch calls its attention as a whole, in which no swap could reach it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lite_attention.compile.provenance import value_of
from lite_attention.compile.swap import emit_call
from lite_attention.ops.torch_internals import copy_of_graph

__all__ = ["attend_in_parts", "reason_against", "take_apart"]

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_Call = Callable[..., Any]


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def reason_against(args: tuple[Any, ...], kwargs: dict[str, Any], *, uses_weights: bool | None = None) -> str | None:
    """Return why a call of `multi_head_attention_forward` stays whole, None if it may be taken apart.

    Args:
        args: of the call; tensors may be nodes of a graph.
        kwargs: likewise.
        uses_weights: whether anybody reads the weights that it returns; None = not known.
    """
    given = _arguments(args, kwargs)
    query = value_of(given["query"]) if isinstance(given["query"], fx.Node) else given["query"]
    if given["need_weights"] and uses_weights is not False:
        return "nn.MultiheadAttention returns its weights: give it need_weights=False"
    if not isinstance(query, torch.Tensor) or query.dim() != 3:
        return "nn.MultiheadAttention without a batch"
    if given["attn_mask"] is not None or given["is_causal"]:
        return "nn.MultiheadAttention with a mask that may differ per query"
    mask = given["key_padding_mask"]
    mask = value_of(mask) if isinstance(mask, fx.Node) else mask
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool):
        return "nn.MultiheadAttention with a float key_padding_mask"
    unusual = ("bias_k", "bias_v", "static_k", "static_v")
    if any(given[name] is not None for name in unusual) or given["add_zero_attn"]:
        return "nn.MultiheadAttention with keys of its own (add_bias_kv, add_zero_attn)"
    return None


def _in_parts(given: dict[str, Any], call: _Call) -> Any:
    """Compute the output by `scaled_dot_product_attention`; all tensors are (seq_len, batch, embed_dim)."""
    if given["use_separate_proj_weight"]:
        weights = [given[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = _thirds(given["in_proj_weight"], call)
    biases = [None] * 3 if given["in_proj_bias"] is None else _thirds(given["in_proj_bias"], call)
    heads = []
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        projected = call(F.linear, given[name], weight, bias)
        heads.append(call(torch.permute, call(torch.unflatten, projected, -1, (given["num_heads"], -1)), (1, 2, 0, 3)))
    mask = given["key_padding_mask"]
    if mask is not None:  # True = left out; (batch, seq_k)
        mask = call(torch.unsqueeze, call(torch.unsqueeze, call(torch.logical_not, mask), 1), 1)
    dropout = given["dropout_p"] if given["training"] else 0.0
    attended = call(F.scaled_dot_product_attention, *heads, attn_mask=mask, dropout_p=dropout)
    joined = call(torch.flatten, call(torch.permute, attended, (2, 0, 1, 3)), 2)
    return call(F.linear, joined, given["out_proj_weight"], given["out_proj_bias"])


def _thirds(tensor: Any, call: _Call) -> list[Any]:
    chunks = call(torch.chunk, tensor, 3)
    return [call(operator.getitem, chunks, i) for i in range(3)]


def attend_in_parts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, None]:
    """Compute a call of `multi_head_attention_forward` by calls that a mode sees."""
    return _in_parts(_arguments(args, kwargs), lambda target, *a, **k: target(*a, **k)), None


def take_apart(gm: fx.GraphModule) -> fx.GraphModule:
    """Return dynamo's graph with each `multi_head_attention_forward` in parts, where that is the same.

    The graph itself is left as it is.
    """
    found = [node for node in gm.graph.nodes if _reason_of(node) is None]
    if not found:
        return gm
    gm, copies = copy_of_graph(gm)
    for original in found:
        node = copies[original]

        def call(target: Any, *args: Any, node: fx.Node = node, **kwargs: Any) -> fx.Node:
            return emit_call(gm.graph, "example_value", node, target, *args, **kwargs)

        with gm.graph.inserting_before(node):
            out = _in_parts(_arguments(node.args, node.kwargs), call)
        for user in [*node.users]:
            if user.args[1] == 0:
                user.replace_all_uses_with(out)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _reason_of(node: fx.Node) -> str | None:
    if node.target is not F.multi_head_attention_forward:
        return "another function"
    users = [*node.users]
    if not all(user.target is operator.getitem for user in users):
        return "its result is not taken apart"
    used = any(user.args[1] == 1 and user.users for user in users)
    return reason_against(node.args, node.kwargs, uses_weights=used)
