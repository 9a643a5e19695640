"""All reasons for which attention is left to PyTorch, read from the functions that give them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from lite_attention.compile import layers, multihead, sites

__all__ = ["MEANINGS", "reasons"]

_GIVEN_BY: list[Callable[..., Any]] = [
    sites.unsupported_call, sites.choice_reason, sites.find_sites, sites.sites_in_subgraphs, multihead.reason_against,
    layers.runtime_sites,
]  # fmt: skip

_NAMES = ("reason", "kind")

# What to do about each.
MEANINGS = {
    "q, k and v are not all of rank 4": "the op wants (batch, heads, tokens, channels)",
    "no queries or keys": "nothing to do",
    "needs gradients: run it under torch.no_grad()": "as it says",
    "dtype ...": "run the model in bf16, fp16 or float32",
    "causal": "the method is for attention that looks both ways",
    "dropout": "call `model.eval()`",
    "scale is not a number above 0: ...": "a scale that is a tensor is not known beforehand",
    "batch or heads are broadcast": "expand keys and values before the call",
    "number of heads or head_dim is dynamic": "compile with `dynamic=False`, or mark only lengths as dynamic",
    "... query heads and ... key heads without enable_gqa": "PyTorch refuses such a call, too",
    "... query heads are no multiple of ... key heads": "PyTorch refuses such a call, too",
    "bool mask that differs per query": "only masks of keys are exact to the token",
    "... mask": "give a bool mask of keys; a float one may hold any bias",
    "a ... with layout ..., which the op does not know": "nested and sparse tensors stay with PyTorch",
    "not selected": "your `select` said False",
    "cross-attention": "it has few keys; `select=lambda site: True` swaps it all the same",
    "no evidence of self-attention in the graph, and lengths differ": "`select` may say True",
    "only ... k-tile(s), fewer than min_tiles=...": "with one tile of keys nothing can be skipped",
    "queries and keys of one origin but of different number, as where tokens are pooled": "`select` may say True",
    "owner unknown: no parameter in this graph, and no module runs it": "put the call into a module with parameters",
    "inside a nested region": "such as a checkpoint or a loop of `torch.cond`; use `compile=False`",
    "nn.MultiheadAttention returns its weights: give it need_weights=False": "as it says",
    "nn.MultiheadAttention without a batch": "give it three dimensions",
    "nn.MultiheadAttention with a mask that may differ per query": "use `key_padding_mask`",
    "nn.MultiheadAttention with a float key_padding_mask": "make it bool",
    "nn.MultiheadAttention with keys of its own (add_bias_kv, add_zero_attn)": "nothing to do",
    "sizes are not known before the call": "a length comes out of the data; use `compile=False`",
}


def reasons() -> list[str]:
    """Return the reasons in the order of the sources; "..." stands for what differs from call to call."""
    found = [reason for function in _GIVEN_BY for reason in _of(function)]
    return [reason for reason in dict.fromkeys(found) if not reason.startswith("...,")]  # which follows another


def _of(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the texts that a function returns, or assigns to a `reason`."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        is_reason = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).rpartition(".")[2] in _NAMES
        if isinstance(node, ast.Return) or is_reason:
            yield from _texts(node.value)  # type: ignore[attr-defined]


def _texts(value: ast.AST | None) -> Iterator[str]:
    if isinstance(value, ast.IfExp):
        yield from _texts(value.body)
        yield from _texts(value.orelse)
    elif isinstance(value, ast.BinOp):
        yield from _texts(value.left)
    elif isinstance(value, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in value.values)
    elif isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
