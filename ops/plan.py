"""The kind of each step of `residual_attention`: sparse, full, or full and deciding a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lite_attention.ops.arguments import check_count, check_has_values, require, threshold_values

__all__ = ["DECIDING", "FULL", "SPARSE", "keep_values", "plan_values", "step_plan"]

SPARSE, FULL, DECIDING = 0, 1, 2

_EXPECTED_PLAN = f"integers, each {SPARSE} (sparse), {FULL} (full) or {DECIDING} (full and deciding), at least one"
_EXPECTED_KEEP = "a share from 0 to 1, or a tensor (steps,) of them"


def step_plan(steps: int, *, full_every: int = 3, first_full: int = 2, decide_every: int = 2) -> list[int]:
    """Return the kind of each step of a generation: 0 sparse, 1 full, 2 full and deciding.

    Args:
        steps: of the generation.
        full_every: steps whose number is a multiple of it are full.
        first_full: so many steps at the beginning are full too.
        decide_every: of the full steps, the first and every so many after it decide a mask.

    Raises:
        ValueError: an argument that is no integer, or below 1.
    """
    steps, full_every = check_count("steps", steps), check_count("full_every", full_every)
    first_full, decide_every = check_count("first_full", first_full), check_count("decide_every", decide_every)
    plan = [SPARSE] * steps
    full = (step for step in range(steps) if step < first_full or step % full_every == 0)
    for number, step in enumerate(full):
        plan[step] = FULL if number % decide_every else DECIDING
    return plan


def plan_values(plan: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Return a plan as an int32 tensor (steps,); numbers on the CPU, a tensor where it is.

    Raises:
        ValueError: no integers from 0 to 2, none at all, or not of one dimension.
    """
    if not isinstance(plan, torch.Tensor):
        try:
            plan = torch.as_tensor(plan, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"plan: expected {_EXPECTED_PLAN}, got {plan!r}") from None
    check_has_values("plan", plan)
    is_integer = not (plan.is_floating_point() or plan.is_complex() or plan.dtype == torch.bool)
    require(is_integer, "plan", _EXPECTED_PLAN, plan.dtype)
    require(plan.dim() == 1 and plan.numel() > 0, "plan", _EXPECTED_PLAN, f"shape {tuple(plan.shape)}")
    unknown = sorted({*plan.tolist()} - {SPARSE, FULL, DECIDING})
    require(not unknown, "plan", _EXPECTED_PLAN, unknown)
    return plan.to(torch.int32)


def keep_values(keep: float | torch.Tensor) -> torch.Tensor:
    """Return the share of tiles to keep, by step, as a float32 tensor (steps,); a number is one step.

    Raises:
        ValueError: no numbers from 0 to 1, none at all, or of more than one dimension.
    """
    values = threshold_values("keep", keep)
    require(values.dim() <= 1 and values.numel() > 0, "keep", _EXPECTED_KEEP, f"shape {tuple(values.shape)}")
    outside = [share for share in values.reshape(-1).tolist() if not 0 <= share <= 1]
    require(not outside, "keep", _EXPECTED_KEEP, outside[0] if outside else None)
    return values.reshape(-1)
