"""Slices of a sequence of tokens, as users write them: pairs, or text such as "0:256, -512:"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lite_attention.ops.arguments import require
from lite_attention.ops.ranges import merge_ranges

__all__ = ["TokenSlice", "check_slices", "ranges_of", "slice_in"]

TokenSlice = tuple[int | None, int | None]  # a negative number counts from the end; None is the start or the end


def check_slices(name: str, given: object) -> tuple[TokenSlice, ...]:
    """Return pairs (start, end) out of an argument that holds such pairs.

    Args:
        name: of the argument, for messages.
        given: a sequence of pairs.

    Raises:
        ValueError: something else, or a pair that holds no token in any sequence.
    """
    listed = given if isinstance(given, Sequence) and not isinstance(given, str) else [None]
    pairs = [tuple(pair) if isinstance(pair, Sequence) else () for pair in listed]
    right = all(len(pair) == 2 and all(end is None or type(end) is int for end in pair) for pair in pairs)
    require(right, name, "a list of pairs [start, end] of integers or None", repr(given))
    return tuple(_checked(name, start, end, repr([start, end])) for start, end in pairs)


def slice_in(name: str, text: str, expected: str) -> TokenSlice:
    """Return the slice that a text such as "0:256" or "-512:" is.

    Raises:
        ValueError: other text, or a slice that holds no token in any sequence.
    """
    found = re.fullmatch(r"(-?\d+)?\s*:\s*(-?\d+)?", text)
    if found is None:
        raise ValueError(f"{name}: expected {expected}, got {text!r}")
    start, end = (int(number) if number else None for number in found.groups())
    return _checked(name, start, end, repr(text))


def _checked(name: str, start: int | None, end: int | None, got: str) -> TokenSlice:
    first = start or 0
    is_empty = end is not None and (first < 0) == (end < 0) and first >= end
    require(not is_empty, name, "a start before its end", got)
    return start, end


def ranges_of(slices: Iterable[TokenSlice], tokens: int) -> list[tuple[int, int]]:
    """Return the ranges (start, end) of slices in so many tokens: sorted, without empty ones and without overlap."""
    bounds = [slice(*pair).indices(tokens)[:2] for pair in slices]
    return merge_ranges("slices", [end for pair in bounds if pair[0] < pair[1] for end in pair], tokens)
