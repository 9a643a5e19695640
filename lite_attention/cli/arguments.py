"""Types for `argparse`: what is out of range is refused in a line, before any work."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["add_device", "integer", "new_file", "number", "picture", "shape", "threshold"]

_Number = TypeVar("_Number", int, float)


def _parsed(convert: Callable[[str], _Number], text: str, holds: Callable[[_Number], bool], what: str) -> _Number:
    try:
        value = convert(text)
        if holds(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")


def integer(least: int) -> Callable[[str], int]:
    """Return a type of integers from `least` on."""
    return lambda text: _parsed(int, text, lambda value: value >= least, f"an integer of at least {least}")


def number(*, least: float = -math.inf, above: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """Return a type of finite numbers that are at least `least`, more than `above`, and at most `most`."""
    bounds = [("at least", least), ("above", above), ("at most", most)]
    said = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
    what = f"a number {said}".strip()
    return lambda text: _parsed(
        float, text, lambda value: math.isfinite(value) and least <= value <= most and value > above, what
    )


def shape(text: str) -> tuple[int, ...]:
    """Return batch, heads, tokens and head dim, out of "B,H,S,D"."""
    sizes = tuple(integer(1)(size) for size in text.split(","))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"expected four sizes B,H,S,D, got {text!r}")
    return sizes


def new_file(text: str) -> Path:
    """Return the path of a file to write, whose folder is there."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def picture(text: str) -> Path:
    """Return the path of a picture to draw, if there is what draws it: missing it after minutes of work is too late."""
    from lite_attention.plot import require_matplotlib

    try:
        require_matplotlib()
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text!r}") from None
    return new_file(text)


def threshold(text: str) -> float:
    """Return a threshold in log2 units: at most 0, and perhaps -inf."""
    return _parsed(float, text, lambda value: value <= 0, "a threshold in log2 units, at most 0")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`: cuda where PyTorch finds it, cpu elsewhere."""
    parser.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu"
    )


def _device(text: str) -> str:
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {text!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"expected cpu, since PyTorch finds no CUDA device, got {text!r}")
    return text
