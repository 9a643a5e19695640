"""Thresholds and shares to keep: what a value that a user sets is for a state, and writing it."""

from __future__ import annotations

import torch

from lite_attention.ops import ResidualState, SkipState
from lite_attention.ops.residual_settings import check_keep
from lite_attention.ops.site import SiteKeep, SiteThreshold
from lite_attention.ops.site_state import SiteState

__all__ = ["SiteValue", "table_of", "write_table"]

SiteValue = SiteThreshold | SiteKeep


def table_of(state: SiteState, value: float | torch.Tensor) -> torch.Tensor:
    """Return the table of thresholds, or of shares to keep, that a value is for a state, which it need not hold yet."""
    if isinstance(state, ResidualState):
        check_keep(value)
        return state.keep_table(value)
    assert isinstance(state, SkipState)
    return state.threshold_table(value)


def write_table(state: SiteState, table: torch.Tensor) -> None:
    """Write what `table_of` returned, in place."""
    if isinstance(state, ResidualState):
        state.set_keep(table)
    elif isinstance(state, SkipState):
        state.set_threshold(table)
