"""Each private name of torch that swapping relies on, and why: a new version of torch is this file's work.

Light to import: dynamo, inductor and sympy load with the first call that needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode

__all__ = [
    "AUTO_FUNCTIONALIZED",
    "FakeTensor",
    "FakeTensorMode",
    "fake_mode_of",
    "holds_for_all_sizes",
    "holds_unless_unknown",
    "is_op",
    "module_ids",
    "op_name",
    "storage_key",
    "uncompiled",
    "upper_bound",
    "written_arguments",
]

# What `run_decompositions` makes of an op that writes into its arguments.
AUTO_FUNCTIONALIZED: Any = torch.ops.higher_order.auto_functionalized_v2

# ---- tensors and ops -----------------------------------------------------------------------------------------------


def storage_key(tensor: torch.Tensor) -> int:
    """Return what tells the storage of a tensor from all others alive. Fake tensors have no data_ptr to go by."""
    return int(tensor.untyped_storage()._cdata)


def fake_mode_of(values: Sequence[object]) -> FakeTensorMode | None:
    """Return the mode that the fake tensors among the values belong to: new ones must be of the same."""
    return detect_fake_mode(values)


def is_op(target: object) -> bool:
    """Return whether a node's target is an op of torch.library, which has a schema."""
    return isinstance(target, torch._ops.OpOverload)


def op_name(target: Any) -> str:
    """Return "namespace::name" of an op, without the overload."""
    return str(target._schema.name)


def written_arguments(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments of an op that its schema says it writes into."""
    schema = target._schema.arguments
    given = {a.name: x for a, x in zip(schema, args, strict=False)} | kwargs
    return [given.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write]


# ---- sizes that are symbols ----------------------------------------------------------------------------------------


def holds_for_all_sizes(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes is true whatever the sizes; unlike bool(), it adds no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def holds_unless_unknown(condition: bool | torch.SymBool) -> bool:
    """Return whether a condition on sizes is true, guarding on it; False where only the call tells the sizes."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(condition))


def upper_bound(size: int | torch.SymInt) -> int | None:
    """Return the largest value of a size, None if it has none below 2^31."""
    if isinstance(size, int):
        return size
    from torch.utils._sympy.value_ranges import bound_sympy

    upper = bound_sympy(size.node.expr, size.node.shape_env.var_to_range).upper
    return int(upper) if upper.is_Integer and int(upper) < 1 << 31 else None


# ---- where dynamo and export found a node --------------------------------------------------------------------------


def module_ids(node: fx.Node) -> Iterable[int]:
    """Return the `id`s of the modules around a node in dynamo's graph, innermost first; nothing in export's."""
    keys = reversed(node.meta.get("nn_module_stack") or {})
    ids = (str(key).partition("@")[0] for key in keys)  # "@1" and so on for further calls of one module
    return [int(key) for key in ids if key.isdecimal()]


# ---- running modules -----------------------------------------------------------------------------------------------


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a function as it is also under torch.compile.

    As `torch.compiler.disable`, which takes seconds to import dynamo: here only who compiles pays for that.
    """
    disabled: list[Callable[..., Any]] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # dynamo does not look into it
    return run
