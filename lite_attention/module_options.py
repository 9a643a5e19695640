"""`ModuleOptions`: what a `LiteAttention` was told, and the states that are made of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from lite_attention.ops import DEFAULT_THRESHOLD, ResidualState, SkipState
from lite_attention.ops.buffers import readable
from lite_attention.ops.methods import METHODS
from lite_attention.ops.options import check_options
from lite_attention.ops.residual_settings import (
    UNKNOWN_STEPS,
    ResidualSettings,
    check_keep,
    require_residual,
    require_votes,
    residual_of,
)
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.validate import check_threshold

__all__ = ["ModuleOptions"]

_log = logging.getLogger("lite_attention")

_Value = TypeVar("_Value")


@dataclass
class ModuleOptions:
    """The options of the states of one `LiteAttention`; thresholds and shares to keep may be set later."""

    method: str
    residual: ResidualSettings | None  # None: the method is "votes"
    of_state: dict[str, Any]  # as the state class of the method takes them, but for those of `residual`

    @classmethod
    def of(cls, method: str, votes: dict[str, Any], residual: dict[str, Any], common: dict[str, Any]) -> ModuleOptions:
        """Return options as a user gives them: of votes, of the residual, None where not given, and of both.

        Raises:
            ValueError: one is out of range, or belongs to the other method.
        """
        settings = residual_of(method, votes, {name: _own(value) for name, value in residual.items()})
        of_state = dict(common)
        if settings is None:
            threshold = DEFAULT_THRESHOLD if votes["threshold"] is None else _own(votes["threshold"])
            of_state |= {"threshold": threshold, "allow_positive": votes["allow_positive"] or False}
        check_options(**of_state)
        return cls(method, settings, of_state)

    def copy(self) -> ModuleOptions:
        """Return options that are set apart from these."""
        return replace(self, of_state={**self.of_state})

    @property
    def num_steps(self) -> int | None:
        """Denoising steps of a generation, as given."""
        num_steps: int | None = self.of_state["num_steps"]
        return num_steps

    # ---- states ----------------------------------------------------------------------------------------------------

    def new_state(self, sizes: dict[str, Any], value_dim: int, device: torch.device | str) -> SiteState:
        """Return a fresh state; value_dim is the width of a value vector."""
        if self.residual is None:
            return SkipState(**sizes, device=device, **self.of_state)
        planned = self.residual.options(self.num_steps or UNKNOWN_STEPS, device)
        state = ResidualState(**sizes, value_dim=value_dim, device=device, **planned, **self.of_state)
        self.residual.write_plan(state)
        _log.info("residual of a LiteAttention: %s", readable(state.nbytes))
        return state

    def passing_state(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        quantization: str,
        implementation: str | None,
    ) -> SiteState:
        """Return a state for one call of which the shapes alone matter."""
        if self.residual is None:
            return SkipState.for_inputs(query, key, quantization=quantization, implementation=implementation)
        options = self.residual.options(1, query.device)
        return ResidualState.for_inputs(
            query, key, value, quantization=quantization, implementation=implementation, **options
        )

    def loaded_state(self, saved: Mapping[str, Any], device: torch.device | None) -> SiteState:
        """Return a state that holds what was saved, in a `state_dict`.

        Raises:
            ValueError: it was saved by another method, or is none.
        """
        options: dict[str, Any] = {"device": device, "persistent": True, "auto_step": self.of_state["auto_step"]}
        if self.residual is not None:
            options["memory"] = self.residual.memory
        elif self.of_state["allow_positive"]:
            options["allow_positive"] = True
        return METHODS[self.method].state.from_state_dict(saved, **options)

    # ---- thresholds and shares to keep -----------------------------------------------------------------------------

    def check_value(self, name: Literal["threshold", "keep"], value: Any, state: SiteState | None) -> None:
        """Raise ValueError where a threshold, or a share to keep, is not of this method or does not fit the state."""
        require_residual(self.residual) if name == "keep" else require_votes(self.residual)
        if isinstance(state, SkipState):
            state.threshold_table(value)
        elif name == "threshold":
            check_threshold(value, allow_positive=self.of_state["allow_positive"])
        else:
            check_keep(value)
            if isinstance(state, ResidualState):
                state.keep_table(value)

    def remember(self, value: Any) -> None:
        """Set the threshold, or the share to keep, of states to come."""
        if self.residual is not None:
            self.residual = replace(self.residual, keep=_own(value))
        else:
            self.of_state["threshold"] = _own(value)

    @staticmethod
    def write(value: Any, state: SiteState | None) -> None:
        """Set the threshold, or the share to keep, of a state."""
        if isinstance(state, SkipState):
            state.set_threshold(value)
        elif isinstance(state, ResidualState):
            state.set_keep(value)

    def __str__(self) -> str:
        """Return what matters most."""
        if self.residual is None:
            return f"threshold={self.of_state['threshold']}"
        return f"method={self.method!r}, keep={self.residual.keep}, full_every={self.residual.full_every}"


def _own(value: _Value) -> _Value | torch.Tensor:
    """Return a value that stays as it is when the user's tensor is written to or trained."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
