"""`Place`: where in a generation a forward is; `Told`: what its caller says of that."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

__all__ = ["Place", "Told"]


class Place(NamedTuple):
    """Where in a generation one forward of a model is."""

    branch: str | int  # a name, or, for passes that nobody names, how many came before it in the step
    step: int
    generation: int  # another one than before: everything starts fresh
    is_told: bool  # the caller says the step, and will say the next one
    times: Mapping[str, float] = MappingProxyType({})  # the flow's time, by who tells it, the surest first


class Told(NamedTuple):
    """What a caller says of the forwards inside a branch."""

    branch: str
    step: int | None
    times: dict[str, Any]  # the flow's time, by who tells it: a number, or a tensor that holds one
