"""What the commands of this example, and benchmarks of it, take from a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from examples.moving_shapes.model import PATCH
from examples.moving_shapes.scenes import prompt_ids

__all__ = ["VideoSize", "prompt_field"]


class VideoSize(argparse.Action):
    """Three integers: frames, and height and width in multiples of the patch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nargs=3, type=int, metavar=("FRAMES", "HEIGHT", "WIDTH"), **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Keep the size, or refuse it."""
        frames, *sides = size = [int(value) for value in values or ()]
        if frames < 1 or any(side < PATCH or side % PATCH for side in sides):
            said = f"expected at least 1 frame, and height and width in multiples of {PATCH}, got {size}"
            raise argparse.ArgumentError(self, said)
        setattr(namespace, self.dest, tuple(size))


def prompt_field(text: str) -> str:
    """Return a field of a prompt, such as "shape=star", if there is one with this value."""
    name, _, value = text.partition("=")
    try:
        prompt_ids(**{name: value})
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
