"""The time of a call, on a GPU by its own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Call", "block"]

Call = Callable[[], Any]


def block(
    call: Call, seconds: float, device: torch.device | str = "cuda", *, in_a_row: int = 1, least: int = 3
) -> float:
    """Return the median time of a call in ms, over the second half of a block of this length.

    Cards that are limited by power need some time until their clock is that of the call; hence the second half.

    Args:
        call: what is timed; a first call of it, which may compile, is not.
        seconds: length of the block.
        device: where it runs.
        in_a_row: so many calls are timed as one, for those that are short.
        least: so many times are taken, however long they are.
    """
    once = _once_on_gpu if torch.device(device).type == "cuda" else _once
    repeated = call if in_a_row == 1 else lambda: [call() for _ in range(in_a_row)]
    once(repeated)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        times.append(once(repeated))
    return statistics.median(times[len(times) // 2 :]) / in_a_row


def _once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _once_on_gpu(call: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
