"""`add_member`: one name more in a closed enumeration of a host."""

from __future__ import annotations

from enum import Enum
from typing import Any, TypeVar, cast

__all__ = ["add_member"]

_E = TypeVar("_E", bound=Enum)


def add_member(enum: type[_E], name: str, value: object) -> _E:
    """Return the member of an enumeration with a name, added if there is none.

    Hosts look attention backends up in an `Enum`, which plug-ins cannot extend by its own means. The member is found
    by name and by value, is part of every iteration, and pickles where the same was done.

    Raises:
        ValueError: the value is another member's.
    """
    if name in enum.__members__:
        return enum.__members__[name]
    if value in enum._value2member_map_:
        raise ValueError(f"value: expected one that {enum.__name__} does not have, got {value!r}")
    kind: Any = enum._member_type_  # type: ignore[attr-defined]
    member: Any = object.__new__(enum) if kind is object else kind.__new__(enum, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = enum
    member._sort_order_ = len(enum.__members__)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    type.__setattr__(enum, name, member)  # the way that an enumeration refuses
    return cast(_E, member)
