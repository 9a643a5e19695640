"""Solvers of the flow dx/dt = v, from noise at time 1 to a video at time 0. Each makes one generation."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from examples.moving_shapes.model import time_shift
from examples.moving_shapes.sample import time_steps
from examples.moving_shapes.scenes import Size


class Solver(Protocol):
    """Says when the model is asked, and goes on from what it answers.

    Args:
        steps: of the generation.
        size: frames, height and width of the video, which decide how the times are spread.
    """

    times: list[float]  # by step, from 1 down

    def __init__(self, steps: int, size: Size) -> None: ...

    def step(self, video: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Return the video of the next time, from the one of this time and its velocity."""


class Euler:
    """The first order: a step along the velocity."""

    def __init__(self, steps: int, size: Size) -> None:
        *self.times, self._end = time_steps(steps, size).tolist()
        self._done = 0

    def step(self, video: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Go on to the next time."""
        now, then = [*self.times, self._end][self._done : self._done + 2]
        video = video + (then - now) * self._slope(velocity, then - now)
        self._done += 1
        return video

    def _slope(self, velocity: torch.Tensor, width: float) -> torch.Tensor:
        return velocity


class AdamsBashforth(Euler):
    """The second order, from the velocity of the step before (Hairer, Norsett, Wanner 1993, III.1); Euler at first."""

    def __init__(self, steps: int, size: Size) -> None:
        super().__init__(steps, size)
        self._before: torch.Tensor | None = None

    def _slope(self, velocity: torch.Tensor, width: float) -> torch.Tensor:
        before, self._before = self._before, velocity
        if before is None:
            return velocity
        width_before = self.times[self._done] - self.times[self._done - 1]
        slope: torch.Tensor = velocity + width / (2 * width_before) * (velocity - before)
        return slope


class UniPC:
    """UniPC (arXiv 2302.04867) as pipelines of Wan have it: diffusers' scheduler, order 2, sigmas of the flow."""

    def __init__(self, steps: int, size: Size) -> None:
        from diffusers import UniPCMultistepScheduler

        shift = time_shift(size)
        make: Any = UniPCMultistepScheduler
        self._scheduler = make(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        self._scheduler.set_timesteps(steps)
        self._timesteps = iter(self._scheduler.timesteps)
        self.times = self._scheduler.sigmas[:-1].tolist()

    def step(self, video: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Go on to the next time."""
        after: torch.Tensor = self._scheduler.step(velocity, next(self._timesteps), video, return_dict=False)[0]
        return after


SOLVERS: dict[str, type[Solver]] = {"euler": Euler, "ab2": AdamsBashforth, "unipc": UniPC}
