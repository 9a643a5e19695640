"""Finding attention in an FX graph: calls of `scaled_dot_product_attention`, and attention written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lite_attention.compile.provenance import name_of, value_of, written_between
from lite_attention.ops.methods import METHOD_OF_OP

__all__ = [
    "ATTENTION_OPS",
    "SDPA",
    "SKIP_ATTENTION_OPS",
    "AttentionCall",
    "find_attention_calls",
    "is_our_attention",
    "is_sdpa",
    "is_skip_attention",
]

SDPA: tuple[Any, ...] = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
SKIP_ATTENTION_OPS = tuple(METHOD_OF_OP)
ATTENTION_OPS = (*SKIP_ATTENTION_OPS, torch.ops.lite_attention.attention.default)

_BHSD_TO_BSHD = (0, 2, 1, 3)


@dataclass
class AttentionCall:
    """One attention in a graph, whatever way it is written.

    The permutations bring q, k, v to (batch, seq_len, heads, head_dim), and an output of that order back to `node`'s.
    """

    node: fx.Node  # the output, to be replaced
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: Any = None
    mask: fx.Node | None = None
    rows: fx.Node | None = None  # of an outer mask, whose keys are then `mask`: queries whose output is not 0
    dropout_p: Any = 0.0
    is_causal: Any = False
    enable_gqa: Any = True
    q_permutation: tuple[int, ...] = _BHSD_TO_BSHD
    k_permutation: tuple[int, ...] = _BHSD_TO_BSHD
    v_permutation: tuple[int, ...] = _BHSD_TO_BSHD
    out_permutation: tuple[int, ...] = _BHSD_TO_BSHD
    inner: Sequence[fx.Node] = ()  # nodes of attention written by hand that are dead without `node`, last one first


def is_sdpa(node: fx.Node) -> bool:
    """Return whether a node calls PyTorch's scaled_dot_product_attention."""
    return node.op == "call_function" and node.target in SDPA


def is_skip_attention(node: fx.Node) -> bool:
    """Return whether a node already calls our skip-aware op."""
    return node.op == "call_function" and node.target in SKIP_ATTENTION_OPS


def is_our_attention(node: fx.Node) -> bool:
    """Return whether a node already calls an op of ours, skip-aware or dense."""
    return node.op == "call_function" and node.target in ATTENTION_OPS


def find_attention_calls(graph: fx.Graph) -> list[AttentionCall]:
    """Return the attention of a graph, in order."""
    calls = []
    for node in graph.nodes:
        call = _read_sdpa(node) if is_sdpa(node) else _match_handwritten(node)
        if call is not None:
            calls.append(call)
    return calls


def _read_sdpa(node: fx.Node) -> AttentionCall:
    given: dict[str, Any] = dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
    return AttentionCall(
        node, given["query"], given["key"], given["value"], scale=given.get("scale"), mask=given.get("attn_mask"),
        dropout_p=given.get("dropout_p", 0.0), is_causal=given.get("is_causal", False),
        enable_gqa=given.get("enable_gqa", False),
    )  # fmt: skip


# ---- attention written by hand: product of q and k, scale, softmax, product with v ---------------------------------


def _called(node: object, *names: str) -> bool:
    """Return whether a node calls a function or method of one of these names, in dynamo's graph or in export's."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return name_of(node) in names


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _checks(node: fx.Node) -> list[fx.Node]:
    """Return the checks that export puts on what is cast: no use of the value."""
    return [user for user in node.users if _called(user, "_assert_tensor_metadata")]


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [user for user in node.users if not _called(user, "_assert_tensor_metadata")]
    return users[0] if len(users) == 1 else None


def _is_cast(node: fx.Node) -> bool:
    return _called(node, "float", "to", "type_as", "type", "half", "bfloat16", "_to_copy", "contiguous")


def _are_no_narrower(nodes: Sequence[fx.Node], than: fx.Node) -> bool:
    """Return whether values are floats, on one device, none of fewer digits or of a smaller range than another's."""
    of = [value for node in (than, *nodes) if isinstance(value := value_of(node), torch.Tensor)]
    if len(of) <= len(nodes) or not all(t.is_floating_point() and t.device == of[0].device for t in of):
        return False
    least, *others = (torch.finfo(t.dtype) for t in of)
    # The largest bfloat16 is a little below that of float32, though the exponents are the same.
    return all(info.eps <= least.eps and info.max >= 0.99 * least.max for info in others)


def _is_idle_dropout(node: fx.Node) -> bool:
    if not _called(node, "dropout"):
        return False
    return _argument(node, 1, "p", 0.5) == 0 or _argument(node, 2, "training", True) is False


def _peel_scores(node: object) -> tuple[list[fx.Node], float | None] | None:
    """Go up from the softmax to the product of q and k, collecting constant factors.

    Returns:
        The nodes on the way, the product last, and the scale; None if anything else is there.
    """
    scale: float | None = None
    way = []
    while isinstance(node, fx.Node):
        way.append(node)
        if _is_product(node):
            return way, scale
        if _is_cast(node):
            (node, *_) = node.args
        elif _called(node, "mul", "truediv", "div") and len(node.args) == 2 and not node.kwargs:
            numbers = [a for a in node.args if isinstance(a, (int, float)) and a != 0]
            tensors = [a for a in node.args if isinstance(a, fx.Node)]
            divides = not _called(node, "mul")
            if len(numbers) != 1 or len(tensors) != 1 or (divides and tensors[0] is not node.args[0]):
                return None
            scale = (1.0 if scale is None else scale) * (1 / numbers[0] if divides else numbers[0])
            node = tensors[0]
        else:
            return None
    return None


def _is_product(node: object) -> bool:
    return isinstance(node, fx.Node) and _called(node, "matmul", "einsum") and _rank(node) == 4 and len(node.args) > 1


def _rank(node: object) -> int | None:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else None


def _match_handwritten(softmax: fx.Node) -> AttentionCall | None:
    """Match from the softmax outwards; whatever differs from the plain pattern is left alone."""
    if not _called(softmax, "softmax", "_softmax") or _rank(softmax) != 4:
        return None
    if _argument(softmax, 1, "dim") not in (-1, 3):
        return None
    peeled = _peel_scores(_argument(softmax, 0, "input"))
    weights: fx.Node = softmax
    inner = [softmax]
    user = _only_user(weights)
    while user is not None and (_is_cast(user) or _is_idle_dropout(user)):
        inner.insert(0, user)
        weights, user = user, _only_user(user)
    if peeled is None or user is None or not _is_product(user):
        return None
    way, scale = peeled
    left = _operands_of_scores(way[-1])
    right = _operand_of_output(user, weights)
    if left is None or right is None:
        return None
    (q, q_permutation), (k, k_permutation) = left
    v, v_permutation, out_permutation = right
    if written_between(way[-1], user, (q, k, *inner, *way)):  # a mask filled in, or memory used again
        return None
    # On the way, scores may be kept more exactly than they were computed, and weights than they are used.
    if not (_are_no_narrower([softmax, *way], way[-1]) and _are_no_narrower(inner, weights)):
        return None
    return AttentionCall(
        user, q, k, v, scale=1.0 if scale is None else scale, q_permutation=q_permutation,
        k_permutation=k_permutation, v_permutation=v_permutation, out_permutation=out_permutation,
        inner=[n for node in (*inner, *way) for n in (*_checks(node), node)],
    )  # fmt: skip


_Operand = tuple[fx.Node, tuple[int, ...]]


def _operands_of_scores(node: fx.Node) -> tuple[_Operand, _Operand] | None:
    """Return q and k of a product that gives scores (batch, heads, seq_q, seq_k)."""
    if _called(node, "einsum"):
        parsed = _parse_einsum(node)
        if parsed is None:
            return None
        (q, q_axes), (k, k_axes), scores_axes = parsed
        batch, head, i, j = tuple(scores_axes)
        depth = (set(q_axes) & set(k_axes)) - {batch, head}
        if set(q_axes) != {batch, head, i, *depth} or set(k_axes) != {batch, head, j, *depth}:
            return None
        (d,) = depth
        return (q, _permutation(q_axes, (batch, i, head, d))), (k, _permutation(k_axes, (batch, j, head, d)))
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    # k arrives as (batch, heads, head_dim, seq_k): one more permutation, which costs nothing.
    return (left, _BHSD_TO_BSHD), (right, (0, 3, 1, 2))


def _operand_of_output(node: fx.Node, weights: fx.Node) -> tuple[fx.Node, tuple[int, ...], tuple[int, ...]] | None:
    """Return v, its permutation, and that of the output, of the product of weights and v."""
    if not _called(node, "einsum"):
        first, v = node.args[0], node.args[1]
        return (v, _BHSD_TO_BSHD, _BHSD_TO_BSHD) if first is weights and isinstance(v, fx.Node) else None
    parsed = _parse_einsum(node)
    if parsed is None:
        return None
    (first, first_axes), (second, second_axes), out_axes = parsed
    if (first is weights) == (second is weights):
        return None
    w_axes, v, v_axes = (first_axes, second, second_axes) if first is weights else (second_axes, first, first_axes)
    batch, head, i, j = tuple(w_axes)
    depth = set(v_axes) - {batch, head, j}
    if len(depth) != 1 or set(out_axes) != {batch, head, i, *depth}:
        return None
    (d,) = depth
    # From (batch, i, head, d) to the order of the output.
    return v, _permutation(v_axes, (batch, j, head, d)), _permutation((batch, i, head, d), tuple(out_axes))


def _parse_einsum(node: fx.Node) -> tuple[tuple[fx.Node, Sequence[str]], tuple[fx.Node, Sequence[str]], str] | None:
    """Return the two operands with their axes, and the axes of the result; None if not of rank 4 throughout."""
    equation = node.args[0]
    operands = node.args[1] if len(node.args) == 2 else node.args[1:]
    if not isinstance(equation, str) or not isinstance(operands, (tuple, list)) or len(operands) != 2:
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow or len(inputs) != 2 or any(len(set(axes)) != 4 or len(axes) != 4 for axes in (*inputs, out)):
        return None
    a, b = operands
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not set(out) < set(left):
        return None
    return (a, inputs[0]), (b, inputs[1]), out


def _permutation(axes: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...]:
    return tuple(list(axes).index(axis) for axis in wanted)
