"""The methods of leaving tiles out: what the memory of a site is, and what runs a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lite_attention.ops.functional import residual_attention, skip_attention
from lite_attention.ops.residual_state import ResidualState
from lite_attention.ops.schema import IMPLEMENTATIONS, RESIDUAL_IMPLEMENTATIONS
from lite_attention.ops.state import SkipState

__all__ = ["METHODS", "METHOD_OF_OP", "Method"]


class Method(NamedTuple):
    """One method."""

    state: type[SkipState] | type[ResidualState]
    attend: Callable[..., Any]  # the functional form
    implementations: Mapping[str | None, Any]  # ops by the name of the implementation


METHODS = {
    "votes": Method(SkipState, skip_attention, IMPLEMENTATIONS),
    "residual": Method(ResidualState, residual_attention, RESIDUAL_IMPLEMENTATIONS),
}
METHOD_OF_OP = {op: method for method in METHODS.values() for op in method.implementations.values()}
