"""`StateOptions` and `ResidualOptions`: what a user decides about a state, declared once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

from lite_attention.ops.arguments import check_count, check_switch, require
from lite_attention.ops.plan import keep_values, plan_values
from lite_attention.ops.validate import check_threshold

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "RESIDUAL_DTYPES",
    "ResidualOptions",
    "SiteOptions",
    "StateOptions",
    "check_options",
    "check_residual_options",
]

# What residuals are stored in, by the name that users have for it.
RESIDUAL_DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16, "fp32": torch.float32}
_MEMORIES = ("device", "host")


class SiteOptions(TypedDict, total=False):
    """The arguments of all states that are not sizes."""

    slots: int
    num_steps: int | None
    refresh: int | None
    auto_step: bool
    initial_mask: torch.Tensor | None
    persistent: bool


class StateOptions(SiteOptions, total=False):
    """The arguments of `SkipState` that are not sizes."""

    threshold: float | torch.Tensor
    allow_positive: bool


class ResidualOptions(SiteOptions, total=False):
    """The arguments of `ResidualState` that are not sizes."""

    plan: Sequence[int] | torch.Tensor
    keep: float | torch.Tensor
    forecast: bool
    residual_dtype: Literal["fp8", "bf16", "fp32"]
    memory: Literal["device", "host"]


def check_options(**options: Unpack[StateOptions]) -> None:
    """Check what can be checked of the options of a `SkipState` before its sizes are known.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    _check_common(options)
    if "allow_positive" in options:
        check_switch("allow_positive", options["allow_positive"])
    if "threshold" in options:
        check_threshold(options["threshold"], allow_positive=options.get("allow_positive", False))


def check_residual_options(**options: Unpack[ResidualOptions]) -> None:
    """Check what can be checked of the options of a `ResidualState` before its sizes are known.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    _check_common(options)
    if "plan" in options:
        plan_values(options["plan"])
    if "keep" in options:
        keep_values(options["keep"])
    if "forecast" in options:
        check_switch("forecast", options["forecast"])
    for name, known in (("residual_dtype", (*RESIDUAL_DTYPES,)), ("memory", _MEMORIES)):
        value = options.get(name, known[0])
        require(value in known, name, " or ".join(map(repr, known)), repr(value))


def _check_common(options: Mapping[str, Any]) -> None:
    check_count("slots", options.get("slots", 1))
    for name in ("num_steps", "refresh"):
        if options.get(name) is not None:
            check_count(name, options[name])
    for name in ("auto_step", "persistent"):
        check_switch(name, options.get(name, False))
    mask = options.get("initial_mask")
    require(mask is None or isinstance(mask, torch.Tensor), "initial_mask", "a bool tensor", type(mask).__name__)
