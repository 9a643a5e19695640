"""The page of the command line, from its parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from lite_attention.cli import build_parser

__all__ = ["page"]

_TOP = """# Command line

`lite-attention COMMAND`, or `python -m lite_attention COMMAND`. The exit status is 0 where all went well. What is wrong
is told in a line.

This page is made from the parsers by `python -m tools.pages`.
"""


def page() -> str:
    """Return the page: a section for each command."""
    return "\n".join([_TOP, *(_section(name, parser) for name, parser in _commands(build_parser()))])


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    rows = [_row(action) for action in parser._actions if action.dest != "help"]
    table = ["| argument | |", "|---|---|", *rows]
    return "\n".join([f"## {name}\n", f"{parser.description}\n", *table, ""])


def _row(action: argparse.Action) -> str:
    name = action.option_strings[0] if action.option_strings else str(action.dest)
    value = action.metavar or (action.dest.upper() if action.nargs != 0 and action.option_strings else "")
    said = f"{action.help}; required" if action.required and action.option_strings else str(action.help)
    if action.choices:
        said += ": " + ", ".join(f"`{choice}`" for choice in action.choices)
    return f"| `{name}{f' {value}' if value else ''}` | {said} |".replace("* ", "\\* ")
