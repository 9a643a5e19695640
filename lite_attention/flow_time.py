"""`SchedulerTime`: the flow's time at which the scheduler of a diffusers pipeline is."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["SchedulerTime"]


class SchedulerTime:
    """Tells the flow's time of the forward that is about to run; None where the scheduler does not say its step.

    Times are the noise levels of flow matching, 0 to 1. For other schedulers they are timesteps as a share of those in
    training, which for flow matching is the same number.

    Args:
        pipe: the pipeline; it is not kept alive.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._read: tuple[Any, list[float]] = None, []  # what the scheduler goes by, and its times

    def __call__(self) -> float | None:
        """Return the time; nobody else may move the scheduler between two forwards."""
        scheduler: Any = getattr(self._pipe(), "scheduler", None)
        if not hasattr(scheduler, "step_index"):
            return None
        index = scheduler.step_index
        if index is None:  # before its first step
            index = getattr(scheduler, "begin_index", None) or 0
        times = self._times(scheduler)
        return times[index] if index < len(times) else None

    def _times(self, scheduler: Any) -> list[float]:
        if scheduler.timesteps is not self._read[0]:  # reading them waits for the device: once for each generation
            self._read = scheduler.timesteps, _times_of(scheduler)
        return self._read[1]


def _times_of(scheduler: Any) -> list[float]:
    sigmas = scheduler.sigmas.tolist() if hasattr(scheduler, "sigmas") else []
    if sigmas and max(sigmas) <= 1:
        return [float(sigma) for sigma in sigmas]
    in_training = getattr(scheduler.config, "num_train_timesteps", 1)
    return [timestep / in_training for timestep in scheduler.timesteps.tolist()]
