"""What the GPU benchmarks share: timing in blocks, what they ran on, and going on after a failure."""

from __future__ import annotations

import contextlib
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

Call = Callable[[], Any]


def block(call: Call, seconds: float, in_a_row: int = 1) -> float:
    """Return the median time of a call in ms, over the second half of a block; `in_a_row` calls are timed as one."""
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 4:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(in_a_row):
            call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / in_a_row)
    return statistics.median(times[len(times) // 2 :])


def require_gpu() -> None:
    """Leave with a line where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU, and PyTorch finds no CUDA device")


def driver() -> str:
    """Return the version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


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
