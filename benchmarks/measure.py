"""What the GPU benchmarks share: their options, that there is a GPU, what they ran on, and going on after a failure."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch

from lite_attention.cli.arguments import number, shape
from lite_attention.cli.check import driver


def parser_of_calls(
    description: str | None, shapes: Sequence[tuple[int, ...]], seconds: float
) -> argparse.ArgumentParser:
    """Return a parser of a command that times attention calls, with these shapes and seconds for defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument(
        "--shapes", type=shape, nargs="+", default=shapes, metavar="B,H,S,D",
        help=f"batch, heads, tokens and head dim; {len(shapes)} unless given",
    )  # fmt: skip
    parser.add_argument("--seconds", type=number(above=0), default=seconds, help="length of a block")
    return parser


def begin(*packages: str) -> dict[str, Any]:
    """Print what is measured on, with the versions of packages, and return it; leave with a line without a GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU, and PyTorch finds no CUDA device")
    about = {**where(), **{name: version(name) for name in packages}}
    print(one_line(about))
    return about


def where() -> dict[str, Any]:
    """Return what a figure of today was measured on."""
    return {
        "device": torch.cuda.get_device_name(), "driver": driver(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def one_line(about: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items())


@contextlib.contextmanager
def going_on(what: str) -> Iterator[None]:
    """Say which contender failed and why, and go on with the others."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        print(f"  ({what}: left out, {type(error).__name__}: {reason[:200]})", flush=True)
        del error
        torch.cuda.empty_cache()
