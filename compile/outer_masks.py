"""Masks that are an outer product: a query is allowed, and a key is. Some models write those of padding so.

Attention under such a mask is that under the mask of the keys, with the output 0 in the rows of excluded queries: they
have no key at all. Both factors are found by data flow, never by reading the mask, which would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from lite_attention.compile.provenance import name_of, value_of, written_between
from lite_attention.ops.torch_internals import holds_for_all_sizes

__all__ = ["OuterMask", "OuterMasks", "outer_mask_of"]

_REPEATS = ("repeat", "expand", "expand_as", "broadcast_to")
_TRANSPOSES = ("transpose", "swapaxes", "swapdims")
_ANDS = ("and", "and_", "__and__", "bitwise_and", "logical_and")
_SAME = ("bool", "to", "_to_copy", "contiguous", "clone", "detach", "alias")


class OuterMask(NamedTuple):
    """A bool mask (batch, 1, seq_q, seq_k) by its factors, nodes or tensors; None = all are allowed."""

    keys: Any = None  # (batch, 1, 1, seq_k)
    rows: Any = None  # (batch, 1, seq_q, 1), or with the last two swapped


def _leaf(mask: object, value: object) -> OuterMask | None:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() != 4:
        return None
    _, heads, rows, keys = value.shape
    if not holds_for_all_sizes(heads == 1):
        return None
    if holds_for_all_sizes(rows == 1):
        return OuterMask(keys=mask)
    return OuterMask(rows=mask) if holds_for_all_sizes(keys == 1) else None


def _result_of(
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    value: torch.Tensor,
    known: Callable[[Any], OuterMask | None],
    value_of: Callable[[Any], object],
) -> OuterMask | None:
    """Return the factors of what a call gives, None if there are none for sure."""
    of = [known(arg) for arg in args[: 2 if name in _ANDS else 1]]
    if not of or None in of or value.dtype != torch.bool or value.dim() != 4:
        return None
    first = of[0] or OuterMask()
    if name in _ANDS and len(of) == 2:
        second = of[1] or OuterMask()
        twice = any(a is not None and b is not None for a, b in zip(first, second, strict=True))
        return None if twice else OuterMask(*(b if a is None else a for a, b in zip(first, second, strict=True)))
    if name in _SAME:
        return first
    if name in _TRANSPOSES:
        dims = {int(dim) % 4 for dim in (*args[1:], *kwargs.values())}
        return OuterMask(rows=first.keys) if dims == {2, 3} and first.rows is None else None
    if name in _REPEATS:  # along one dimension, in which the factor is 1
        before = value_of(args[0])
        along = 2 if first.rows is None else 3 if first.keys is None else None
        if not isinstance(before, torch.Tensor) or before.dim() != 4 or along is None:
            return None
        kept = [i for i in range(4) if i != along]
        once = all(holds_for_all_sizes(before.shape[i] == value.shape[i]) for i in kept)
        return first if once and holds_for_all_sizes(before.shape[along] == 1) else None
    return None


def outer_mask_of(mask: fx.Node, attention: fx.Node) -> OuterMask | None:
    """Return the factors of the mask of an attention call in a graph, as nodes; None if they are not known.

    Args:
        mask: its mask.
        attention: the call.
    """
    way: list[fx.Node] = []

    def known(node: Any) -> OuterMask | None:
        value = value_of(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            return None
        way.append(node)
        found = _leaf(node, value)
        if found is None and node.op in ("call_function", "call_method"):
            found = _result_of(name_of(node), node.args, node.kwargs, value, known, value_of)
        return found

    found = known(mask)
    if found is None or found.keys is None:
        return None
    first = next(node for node in attention.graph.nodes if node in way)
    return None if written_between(first, attention, way) else found


class OuterMasks:
    """The factors of the masks that one thread makes, run eagerly. It keeps no mask alive, but for its factors."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()

    def follow(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: torch.Tensor) -> None:
        """Note what a function made.

        Args:
            name: of the function.
            args: what it was given.
            kwargs: likewise.
            result: a bool tensor.
        """
        found = _result_of(name, args, kwargs, result, self.of, lambda arg: arg)
        if found is not None:
            self._known[result] = found

    def forget(self) -> None:
        """Forget all, as something writes into a mask."""
        self._known.clear()

    def of(self, mask: object) -> OuterMask | None:
        """Return the factors of a mask, None if they are not known."""
        leaf = _leaf(mask, mask)
        return self._known.get(mask) if leaf is None and isinstance(mask, torch.Tensor) else leaf
