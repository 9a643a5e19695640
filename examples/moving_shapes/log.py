"""Draw what train.py logged: the loss of each size of video over the steps.

python -m examples.moving_shapes.log [--log examples/moving_shapes/log.jsonl] --output loss.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_attention import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LOG", "draw_log"]

LOG = Path(__file__).with_name("log.jsonl")  # of the trained weights
_SMOOTH = 10  # lines that a point of a curve is the mean of


def draw_log(lines: Sequence[dict[str, Any]]) -> Figure:
    """Return a figure of the loss over the steps, a curve for each size.

    Args:
        lines: those of log.jsonl; one that had no video of a size says nothing of it.
    """
    figure = plot.new_figure(8, 4, f"Training: {lines[-1]['step']:,} steps, {lines[-1]['minutes']:g} minutes")
    axes = figure.subplots()
    for size in sorted({size for line in lines for size in line["loss"]}):
        points = [(line["step"], line["loss"][size]) for line in lines if size in line["loss"]]
        groups = [points[i : i + _SMOOTH] for i in range(0, len(points), _SMOOTH)]
        means = [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]
        axes.plot(*zip(*means, strict=True), label=size)
    axes.set(xlabel="step", ylabel=f"loss, mean of {_SMOOTH} lines of the log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw a log as the command line asks."""
    parser = argparse.ArgumentParser(description="Draw what train.py logged.")
    parser.add_argument("--log", type=Path, default=LOG, help="log.jsonl of train.py")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    args = parser.parse_args(arguments)
    draw_log([json.loads(line) for line in args.log.read_text().splitlines()]).savefig(args.output)


if __name__ == "__main__":
    main()
