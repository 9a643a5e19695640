"""The command line: `lite-attention`, or `python -m lite_attention`. A module a command.

What commands and benchmarks share: `arguments` parses, `timing` times, `planted` makes what is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from lite_attention._version import __version__
from lite_attention.cli import bench, check, compile_kernels, inspect_thresholds

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; what it parses has the command's function as `command`."""
    parser = argparse.ArgumentParser(prog="lite-attention", description="Skip-aware attention for diffusion models.")
    parser.add_argument("--version", action="version", version=f"lite-attention {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in (bench, check, compile_kernels, inspect_thresholds):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: arguments without the program's name; None = those of the process.
    """
    args = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    # What says what to do; a traceback would bury it.
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        print(f"lite-attention: {error}", file=sys.stderr)
        return 1
