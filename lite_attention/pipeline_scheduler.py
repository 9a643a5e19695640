"""`PipelineScheduler`: at which step, and which time of the flow, the scheduler of a diffusers pipeline is."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["PipelineScheduler"]


class PipelineScheduler:
    """Asks the scheduler that a pipeline has at the moment.

    It says nothing before its first step, so a pipeline that goes by copies of it says nothing at all.

    Args:
        pipe: the pipeline; it is not kept alive.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._read: tuple[Any, list[float]] = None, []  # what the scheduler goes by, and its times

    @property
    def step(self) -> int | None:
        """The call of the model that is to come: a solver of second order counts two a step; None = it does not say."""
        step: int | None = getattr(self._scheduler, "step_index", None)
        return step

    @property
    def time(self) -> float | None:
        """The flow's time of that call; None = it does not say.

        It is the noise level of flow matching, 0 to 1. For other schedulers it is the timestep as a share of those in
        training, which for flow matching is the same number.
        """
        step, scheduler = self.step, self._scheduler
        if step is None:
            return None
        if scheduler.timesteps is not self._read[0]:  # reading them waits for the device: once for each generation
            self._read = scheduler.timesteps, _times_of(scheduler)
        times = self._read[1]
        return times[step] if step < len(times) else None

    @property
    def _scheduler(self) -> Any:
        return getattr(self._pipe(), "scheduler", None)


def _times_of(scheduler: Any) -> list[float]:
    sigmas = scheduler.sigmas.tolist() if hasattr(scheduler, "sigmas") else []
    if sigmas and max(sigmas) <= 1:
        return [float(sigma) for sigma in sigmas]
    in_training = getattr(scheduler.config, "num_train_timesteps", 1)
    return [timestep / in_training for timestep in scheduler.timesteps.tolist()]
