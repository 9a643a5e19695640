"""Plans of steps, and the shares that deciding steps keep."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import lite_attention
from lite_attention.ops.plan import keep_values, plan_values, step_plan


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({"steps": 1}, [2]),
        ({"steps": 10}, [2, 1, 0, 2, 0, 0, 1, 0, 0, 2]),
        ({"steps": 8, "full_every": 2}, [2, 1, 2, 0, 1, 0, 2, 0]),
        ({"steps": 8, "full_every": 4, "first_full": 1}, [2, 0, 0, 0, 1, 0, 0, 0]),
        ({"steps": 6, "full_every": 1, "decide_every": 3}, [2, 1, 1, 2, 1, 1]),
        ({"steps": 7, "first_full": 4, "decide_every": 1}, [2, 2, 2, 2, 0, 0, 2]),
        ({"steps": 3, "first_full": 9}, [2, 1, 2]),
    ],
    ids=str,
)
def test_step_plan(options: dict[str, int], plan: list[int]) -> None:
    assert lite_attention.step_plan is step_plan
    assert step_plan(**options) == plan


@pytest.mark.parametrize("name", ["steps", "full_every", "first_full", "decide_every"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, "3"])
def test_numbers_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected "):
        step_plan(**{"steps": 5, name: value})


@pytest.mark.parametrize("plan", [[0], (2, 1, 0), torch.tensor([2, 1]), torch.tensor([1], dtype=torch.uint8)])
def test_plans(plan: Any) -> None:
    values = plan_values(plan)
    assert values.dtype == torch.int32
    assert values.tolist() == list(plan)


@pytest.mark.parametrize(
    ("plan", "got"),
    [
        ([], "torch.float32"), ([0, 3], "[3]"), ([-1], "[-1]"), ([0.0, 1.0], "torch.float32"),
        ([True, False], "torch.bool"), (torch.zeros(2, 2, dtype=torch.int32), "shape (2, 2)"),
        (torch.zeros(0, dtype=torch.int32), "shape (0,)"), (1, "shape ()"), ("full", "'full'"), (None, "None"),
        ([[0], [1, 2]], "[[0], [1, 2]]"), (torch.zeros(1, dtype=torch.int32, device="meta"), "one on the meta device"),
    ],
    ids=str,
)  # fmt: skip
def test_plans_that_are_none(plan: Any, got: str) -> None:
    with pytest.raises(ValueError, match=r"plan: expected .*, got " + re.escape(got)):
        plan_values(plan)


@pytest.mark.parametrize("keep", [0, 1, 0.3, torch.tensor(0.25), torch.tensor([0.5, 0.2]), [0.1, 0.2]])
def test_shares(keep: Any) -> None:
    values = keep_values(keep)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.as_tensor(keep, dtype=torch.float32).reshape(-1))


@pytest.mark.parametrize(
    "keep", [-0.1, 1.1, math.nan, math.inf, True, "half", None, torch.zeros(0), torch.zeros(2, 2), [0.1, 2.0]], ids=str
)
def test_shares_that_are_none(keep: Any) -> None:
    with pytest.raises(ValueError, match="keep: expected "):
        keep_values(keep)
