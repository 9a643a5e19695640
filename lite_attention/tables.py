"""Tables as text, for reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["text_table"]


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of strings as lines of text, their columns aligned below a header."""
    from tabulate import tabulate  # half of what importing this package would take

    return tabulate(list(rows), header, disable_numparse=True)
