"""Which step of a sampling run a noise level belongs to, and which steps may skip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Schedule"]

_ROUNDING = 1e-5


class Schedule(NamedTuple):
    """The noise levels of a sampling run, and the span of them in which attention may skip.

    Args:
        sigmas: of all steps, falling; without the last, at which no step begins.
        highest: no noise above it skips.
        lowest: none below it does.
    """

    sigmas: Sequence[float]
    highest: float
    lowest: float

    @property
    def skipping(self) -> list[int]:
        """The steps that begin within the span."""
        return [step for step, sigma in enumerate(self.sigmas) if self._holds(sigma)]

    def step(self, sigma: float) -> int | None:
        """Return the step within the span that a noise level belongs to, from 0; None = it is to be dense.

        A solver that comes to a level between two steps is still in the first of them.
        """
        if not (self.skipping and self._holds(sigma)):
            return None
        begun = sum(at_least >= sigma for at_least in self.sigmas)
        return max(begun - 1 - self.skipping[0], 0)

    def _holds(self, sigma: float) -> bool:
        # Samplers round levels to float32, percents are not rounded.
        return self.lowest * (1 - _ROUNDING) <= sigma <= self.highest * (1 + _ROUNDING)
