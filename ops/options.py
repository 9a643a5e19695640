"""`StateOptions`: what a user decides about a skip state, declared once."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch

from lite_attention.ops.arguments import check_count, check_switch, require
from lite_attention.ops.validate import check_threshold

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["StateOptions", "check_options"]


class StateOptions(TypedDict, total=False):
    """The arguments of `SkipState` that are not sizes."""

    slots: int
    threshold: float | torch.Tensor
    num_steps: int | None
    refresh: int | None
    auto_step: bool
    initial_mask: torch.Tensor | None
    persistent: bool
    allow_positive: bool


def check_options(**options: Unpack[StateOptions]) -> None:
    """Check what can be checked of the options of a `SkipState` before its sizes are known.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    for name, value in options.items():
        if name in ("slots", "num_steps", "refresh"):
            if value is not None or name == "slots":
                check_count(name, value)
        elif name in ("auto_step", "persistent", "allow_positive"):
            check_switch(name, value)
    mask = options.get("initial_mask")
    require(mask is None or isinstance(mask, torch.Tensor), "initial_mask", "a bool tensor", type(mask).__name__)
    if "threshold" in options:
        check_threshold(options["threshold"], allow_positive=options.get("allow_positive", False))
