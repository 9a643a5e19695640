"""`ResidualSettings`: what a user decides about the method "residual", whoever runs it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lite_attention.ops.arguments import require
from lite_attention.ops.options import RESIDUAL_DTYPES, check_residual_options
from lite_attention.ops.plan import FULL, keep_values, step_plan

if TYPE_CHECKING:
    from lite_attention.ops.options import ResidualOptions
    from lite_attention.ops.residual_state import ResidualState

__all__ = ["UNKNOWN_STEPS", "ResidualSettings", "check_keep", "require_residual", "require_votes", "residual_of"]

UNKNOWN_STEPS = 200  # so many steps a plan has where nobody says how many a generation has


@dataclass(frozen=True)
class ResidualSettings:
    """Options of the method "residual".

    Args:
        keep: the share of tiles that a sparse step computes, above 0 and at most 1: a number, or a tensor (steps,),
            past whose end the last holds. Deciding steps read theirs.
        full_every: steps whose number is a multiple of it compute everything.
        first_full: so many steps at the beginning do too.
        decide_every: of the full steps, the first and every so many after it decide which tiles are kept.
        forecast: extend what skipped tiles gave along the flow's time; it takes two residuals a branch, without one.
        residual_dtype: what residuals are stored in, "fp8" (e4m3), "bf16" or "fp32"; None = "fp8" on CUDA, else "bf16".
        memory: where residuals live, "device" or "host", which is pinned memory that a GPU reads over the bus.

    Raises:
        ValueError: an option out of range.
    """

    keep: float | torch.Tensor = 0.3
    full_every: int = 3
    first_full: int = 2
    decide_every: int = 2
    forecast: bool = True
    residual_dtype: str | None = None
    memory: str = "device"

    def __post_init__(self) -> None:
        self.plan(1)
        known = (None, *RESIDUAL_DTYPES)
        require(self.residual_dtype in known, "residual_dtype", f"one of {known}", repr(self.residual_dtype))
        options: Any = {"keep": self.keep, "forecast": self.forecast, "memory": self.memory}
        check_residual_options(**options)
        check_keep(self.keep)

    def plan(self, steps: int) -> list[int]:
        """Return the kind of each step of a generation, see `step_plan`."""
        return step_plan(steps, full_every=self.full_every, first_full=self.first_full, decide_every=self.decide_every)

    def write_plan(self, state: ResidualState) -> None:
        """Write the plan into a state; what comes after its steps is full, or a forecast would go on and on."""
        state.set_plan([*self.plan(len(state.plan) - 1), FULL])

    @property
    def steps(self) -> int:
        """Steps that `keep` tells apart."""
        return len(keep_values(self.keep))

    def dtype_on(self, device: torch.device | str) -> str:
        """Return the name of what residuals are stored in on a device."""
        return self.residual_dtype or ("fp8" if torch.device(device).type == "cuda" else "bf16")

    def options(self, steps: int, device: torch.device | str) -> ResidualOptions:
        """Return what a `ResidualState` on a device, of generations of at most so many steps, is made with."""
        options: Any = {
            "plan": self.plan(steps), "keep": self.keep, "forecast": self.forecast,
            "residual_dtype": self.dtype_on(device), "memory": self.memory,
        }  # fmt: skip
        return options  # type: ignore[no-any-return]


def check_keep(keep: float | torch.Tensor) -> None:
    """Raise ValueError unless a share to keep, or all of a tensor (steps,), are above 0 and at most 1."""
    least = float(keep_values(keep).min())
    require(least > 0, "keep", "a share above 0 and at most 1, or a tensor (steps,) of them", least)


def require_residual(residual: ResidualSettings | None) -> None:
    """Raise ValueError where shares to keep are for a site with the method "votes", which keeps none."""
    expected, got = "a model with method='residual'", "one with method='votes', which has none; set a threshold instead"
    require(residual is not None, "keep", expected, got)


def require_votes(residual: ResidualSettings | None) -> None:
    """Raise ValueError where thresholds are for a site with the method "residual", which has none."""
    expected, got = "a model with method='votes'", "one with method='residual', which has none; set keep= instead"
    require(residual is None, "threshold", expected, got)


def residual_of(method: str, of_votes: Mapping[str, Any], of_residual: Mapping[str, Any]) -> ResidualSettings | None:
    """Return the settings of the method "residual", None for "votes".

    Args:
        method: which one it is.
        of_votes: options that only votes have, by name; None = not given.
        of_residual: options that only the residual has, likewise.

    Raises:
        ValueError: no such method, an option of the other one, or one out of range.
    """
    options = {"votes": of_votes, "residual": of_residual}
    require(method in (*options,), "method", "'votes' or 'residual'", repr(method))
    for other, given in options.items():
        for name, value in given.items() if other != method else ():
            got = f"{reprlib.repr(value)}, an option of method={other!r}"
            require(value is None, name, f"none with method={method!r}", got)
    known = {name: value for name, value in of_residual.items() if value is not None}
    return ResidualSettings(**known) if method == "residual" else None
