"""`numbers_in`: which layers or blocks a text names."""

from __future__ import annotations

import re

from lite_attention.ops.arguments import require

__all__ = ["numbers_in"]

_LARGEST = 9999  # no model has so many, and a slip of the finger does not fill the memory


def numbers_in(name: str, text: str) -> frozenset[int]:
    """Return the numbers that a text such as "0, 1, 38-39" names; ends are included.

    Args:
        name: of the option, for messages.
        text: numbers and ranges with commas between; empty is none.

    Raises:
        ValueError: other text, a range that ends before it starts, or a number above 9999.
    """
    return frozenset(number for part in text.split(",") if part.strip() for number in _range(name, part.strip()))


def _range(name: str, part: str) -> range:
    expected = "numbers and ranges, such as '0, 1, 38-39'"
    found = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
    if found is None:
        raise ValueError(f"{name}: expected {expected}, got {part!r}")
    first, last = int(found[1]), int(found[2] or found[1])
    require(first <= last, name, "a range whose end is not before its start", repr(part))
    require(last <= _LARGEST, name, f"numbers up to {_LARGEST}", repr(part))
    return range(first, last + 1)
