"""What the GPU benchmarks share: that there is a GPU, what they ran on, and going on after a failure."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Iterator
from typing import Any

import torch

from lite_attention.cli.check import driver


def require_gpu() -> None:
    """Leave with a line where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU, and PyTorch finds no CUDA device")


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
