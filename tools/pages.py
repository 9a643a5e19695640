"""Writes the pages that are made from the code, so that they say what it does.

python -m tools.pages
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools import cards, command_line, drawings, pays, troubles

__all__ = ["PAGES", "main"]

DOCS = Path(__file__).parents[1] / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "does-it-pay.md": pays.page,
    "images/residual.svg": drawings.residual,
    "images/votes.svg": drawings.votes,
    "reference/cards.md": cards.page,
    "reference/command-line.md": command_line.page,
    "troubleshooting.md": troubles.page,
}


def main() -> None:
    """Write all of them."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(DOCS / name)


if __name__ == "__main__":
    main()
