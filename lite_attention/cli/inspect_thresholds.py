"""The command `inspect`: a threshold file, printed and drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lite_attention.cli.arguments import picture
from lite_attention.threshold_table import ThresholdTable

__all__ = ["add_parser", "main"]


def add_parser(commands: Any) -> None:
    """Add the command to what `argparse.ArgumentParser.add_subparsers` returned."""
    parser = commands.add_parser(
        "inspect",
        help="print a threshold file, and draw it",
        description="Prints what a threshold file was found on, and the thresholds of each site, in log2 units. "
        "Files of the original project are read, too.",
    )
    parser.add_argument("file", type=Path, help="the threshold file, TOML")
    parser.add_argument("--plot", type=picture, metavar="FILE.png", help='picture to write; needs the extra "plot"')
    parser.set_defaults(command=main)


def main(args: argparse.Namespace) -> int:
    """Print, and draw, the file that the command line names, and return the exit status."""
    table = ThresholdTable.load(args.file)
    print(table)
    if args.plot is not None:
        from lite_attention import plot

        plot.thresholds(table, path=args.plot)
        print(f"picture: {args.plot}")
    return 0
