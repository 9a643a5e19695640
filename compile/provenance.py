"""Where a value in an FX graph comes from: tells self-attention from cross-attention, and finds who owns a site.

Works on the graphs of dynamo and of `torch.export` (training IR). Neither is functional: a node may write into the
memory of another, so whoever reads that memory afterwards depends on the writer too.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import fx

from lite_attention.ops.torch_internals import is_op, op_name, storage_key, written_arguments

__all__ = ["Provenance", "name_of", "value_of", "written_between"]

_MAX_OWNERS = 8


def value_of(node: fx.Node) -> object:
    """Return the fake value of a node, None if it has none."""
    return node.meta.get("example_value", node.meta.get("val"))


def _storage(node: fx.Node) -> int | None:
    value = value_of(node)
    return storage_key(value) if isinstance(value, torch.Tensor) else None


def name_of(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, in dynamo's graph or in export's."""
    target = node.target
    if is_op(target):
        return op_name(target).removeprefix("aten::")
    return target if isinstance(target, str) else getattr(target, "__name__", "")


_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")  # tokens first, then weights


def _is_product(name: str) -> bool:
    return name in ("matmul", "einsum", *_LAYERS) or name.endswith("mm")


def _is_weight_by_use(node: fx.Node) -> bool:
    """Return whether all uses are as a layer's weight or bias, as in a functional call of a module."""
    return bool(node.users) and all(
        name_of(user) in _LAYERS and node is not next(iter(user.all_input_nodes)) for user in node.users
    )


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the nodes into whose memory a node writes."""
    target, args = node.target, node.args
    candidates: list[object] = []
    if is_op(target):
        candidates = written_arguments(target, args, node.kwargs)
    elif node.op == "call_method" and isinstance(target, str):
        candidates = [args[0]] if target.endswith("_") and not target.endswith("__") else []
    elif node.op == "call_function":
        name = getattr(target, "__name__", "")
        if target is getattr(operator, name, None):  # and_, or_ and not_ are named so for Python's sake
            in_place = target is operator.setitem or (name.startswith("i") and name[1:] in _BINARY)
        else:
            in_place = name.endswith("_") and not name.endswith("__")
        candidates = [args[0] if in_place or node.kwargs.get("inplace") else None, node.kwargs.get("out")]
    return [c for c in candidates if isinstance(c, fx.Node)]


_BINARY = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"}


def written_between(first: fx.Node, last: fx.Node, nodes: Iterable[fx.Node]) -> bool:
    """Return whether anything after `first` and before `last` writes into the memory of one of the nodes."""
    storages = {_storage(node) for node in nodes} - {None}
    node = first.next
    while node is not last:
        if any(_storage(target) in storages for target in _written(node)):
            return True
        node = node.next
    return False


class Provenance:
    """Ancestors of the nodes of one graph. Attention is a leaf: what went into an earlier one does not count.

    Args:
        graph: the graph, before anything in it is replaced.
        is_attention: tells the outputs of attention.
        is_weight: tells the placeholders and attributes that hold parameters and buffers: they are no origin.
        is_parameter: tells those that hold parameters.
    """

    def __init__(
        self,
        graph: fx.Graph,
        is_attention: Callable[[fx.Node], bool],
        is_weight: Callable[[fx.Node], bool],
        is_parameter: Callable[[fx.Node], bool],
    ) -> None:
        self._is_attention = is_attention
        self._is_weight: Callable[[fx.Node], bool] = lambda node: is_weight(node) or _is_weight_by_use(node)
        self._is_parameter = is_parameter
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            for target in _written(node):
                storage = _storage(target)
                if storage is not None:
                    self._writers[storage].append(node)

    def _parents(self, node: fx.Node, before: int) -> list[fx.Node]:
        """Return what a node depends on when the node at position `before` runs."""
        if self._is_attention(node):
            return []
        storage = _storage(node)
        writers = self._writers.get(storage, []) if storage is not None else []
        return [*node.all_input_nodes, *(w for w in writers if w is not node and self._position[w] < before)]

    def _walk(self, start: Iterable[fx.Node], before: int, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """Return what is upstream of the start, breadth first, the start included; do not go past stops."""
        seen = dict.fromkeys(start)
        queue = list(seen)
        for node in queue:  # grows while it is read
            if stop(node):
                continue
            for parent in self._parents(node, before):
                if parent not in seen:
                    seen[parent] = None
                    queue.append(parent)
        return queue

    def ancestors(self, node: fx.Node, site: fx.Node) -> set[fx.Node]:
        """Return the node and all that it depends on when the site runs."""
        return set(self._walk([node], self._position[site], lambda _: False))

    def _is_origin(self, node: fx.Node) -> bool:
        value = value_of(node)
        # Tokens are not made of a number: with dynamic shapes dynamo makes inputs of floats, such as an epsilon.
        is_input = node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim() > 0
        return self._is_attention(node) or (is_input and not self._is_weight(node))

    def _is_projection(self, node: fx.Node) -> bool:
        """Return whether a node multiplies tokens with a matrix of weights: what makes queries and keys of them."""
        if not (_is_product(name_of(node)) or (is_op(node.target) and "::" in name_of(node))):  # or an op of others
            return False
        return any(self._is_matrix_of_weights(operand) for operand in node.all_input_nodes)

    def _is_matrix_of_weights(self, node: fx.Node) -> bool:
        made_of = self._walk([node], self._position[node], lambda _: False)
        weights = (value_of(n) for n in made_of if self._is_weight(n))
        is_matrix = any(isinstance(weight, torch.Tensor) and weight.dim() > 1 for weight in weights)
        return is_matrix and not any(map(self._is_origin, made_of))

    def _origins_outside(self, node: fx.Node, other: set[fx.Node], site: fx.Node) -> tuple[bool, bool]:
        """Return whether the node has origins that are not among the others: projected ones, and ready-made ones."""

        before = self._position[site]

        def is_end(n: fx.Node) -> bool:
            return n in other or self._is_origin(n)

        near = self._walk([node], before, lambda n: is_end(n) or self._is_projection(n))
        far = self._walk([n for n in near if not is_end(n) and self._is_projection(n)], before, is_end)
        projected, ready = ({n for n in walk if n not in other and self._is_origin(n)} for walk in (far, near))
        return bool(projected), bool(ready - projected)

    def is_self_attention(self, q: fx.Node, k: fx.Node, site: fx.Node) -> bool | None:
        """Return whether q and k are made of the same tokens; None without evidence.

        Tokens are told apart before they are projected. What reaches the graph behind its projection, ready-made, may
        be of any tokens: a graph break lies between, as hooks on the projections cause. Weights that only scale, as
        those of norms, say nothing.
        """
        of_q, of_k = self.ancestors(q, site), self.ancestors(k, site)
        projected_q, ready_q = self._origins_outside(q, of_k, site)
        projected_k, ready_k = self._origins_outside(k, of_q, site)
        if projected_q and projected_k:
            return False
        if ready_q or ready_k or not any(map(self._is_origin, of_q | of_k)):
            return None
        return not (projected_q or projected_k)

    def owners(self, qkv: Iterable[fx.Node], site: fx.Node) -> list[fx.Node]:
        """Return the nearest parameters that feed q, k and v, or, if none does, those that the output meets first.

        One parameter is not enough: blocks may share a norm. A few tell the layers apart.
        """
        upstream = self._walk(qkv, self._position[site], self._is_attention)
        owners = [n for n in upstream if self._is_parameter(n)]
        return (owners or self._downstream_parameters(site))[:_MAX_OWNERS]

    def _downstream_parameters(self, site: fx.Node) -> list[fx.Node]:
        seen = {site: None}
        queue = [site]
        for node in queue:
            for user in node.users:
                if user not in seen and not self._is_attention(user):
                    found = [n for n in user.all_input_nodes if self._is_parameter(n)]
                    if found:
                        return found
                    seen[user] = None
                    queue.append(user)
        return []
