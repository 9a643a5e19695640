"""The flow's time on its way to the states: who tells it, and that times of two sources are never mixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lite_attention.ops import ResidualState, Session, SkipState, residual_attention
from lite_attention.ops.session import Place
from tests.support.op_cases import clustered_qkv

NAN, INF = math.nan, math.inf
PLAN = [2, 1, 1, 0]  # the first two full steps after a mask is in use leave two residuals


def _state(slots: int = 2, **options: Any) -> ResidualState:
    return ResidualState(
        batch=1, heads=2, seq_q=40, seq_k=40, value_dim=8, tile_m=8, tile_n=8, slots=slots, plan=PLAN, keep=0.3,
        residual_dtype="fp32", **options,
    )  # fmt: skip


def _now(state: ResidualState, slot: int = 0) -> float:
    return float(state.times[slot, 0])


def _same(got: Sequence[float], want: Sequence[float]) -> bool:
    return np.array_equal(np.float32(got), np.float32(want), equal_nan=True)


# By hand: (step, time) of each call of a branch, what the device reads, and what is written when it is over.
BY_HAND: dict[str, tuple[list[tuple[int | None, float | None]], list[float], float]] = {
    "told": ([(0, 1.0), (1, 0.75), (2, 0.25)], [1.0, 0.75, 0.25], INF),
    "told without steps": ([(None, 1.0), (None, 0.5)], [1.0, 0.5], INF),
    "not told": ([(0, None), (1, None)], [NAN, NAN], NAN),
    "told first, then not": ([(0, 1.0), (1, None), (2, 0.5)], [1.0, INF, 0.5], INF),
    "not told first, then told": ([(0, None), (1, 0.5), (2, 0.25)], [NAN, NAN, NAN], NAN),
    "another generation tells": ([(0, None), (1, None), (0, 1.0), (1, 0.5)], [NAN, NAN, 1.0, 0.5], INF),
    "another generation does not": ([(0, 1.0), (1, 0.5), (0, None), (1, 0.25)], [1.0, 0.5, NAN, NAN], NAN),
    "the same step twice": ([(0, 1.0), (1, 0.5), (1, 0.5), (1, 0.25)], [1.0, 0.5, 0.5, 0.25], INF),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND, ids=str)
def test_a_branch_by_hand(case: str) -> None:
    calls, want, after = BY_HAND[case]
    session, state = Session(), _state()
    session.follow(state)
    got = []
    for step, time in calls:
        with session.branch("cond", step, time):
            got.append(_now(state))
    assert _same(got, want)
    assert _same([_now(state)], [after])
    assert math.isnan(_now(state, 1))


def test_a_time_holds_for_all_branches_inside() -> None:
    session, state = Session(), _state(3)
    session.follow(state)
    with session.branch("whole", time=0.5), session.branch("cond"):
        assert _now(state, 1) == 0.5
        with session.branch("uncond", time=0.25):
            assert _now(state, 2) == 0.25
    assert _now(state) == INF


@pytest.mark.parametrize("time", [math.nan, math.inf, "soon", True, [1.0, 2.0], 10**400])
def test_what_is_no_time(time: Any) -> None:
    session, state = Session(), _state()
    session.follow(state)
    with pytest.raises(ValueError, match="time: expected a finite number, got"), session.branch("cond", time=time):
        pass
    assert session.branches == {}
    assert math.isnan(_now(state))


@pytest.mark.parametrize("time", [np.float32(0.5), torch.tensor(0.5), 1])
def test_what_is_one(time: Any) -> None:
    session, state = Session(), _state()
    session.follow(state)
    with session.branch("cond", time=time):
        assert _now(state) == float(time)


# Forwards that a runner places: what each source tells, and what the device reads.
PLACED: dict[str, tuple[list[dict[str, float]], list[float], str]] = {
    "the surest": ([{"scheduler": 1.0, "timestep": 90.0}, {"scheduler": 0.5, "timestep": 50.0}], [1, 0.5], "scheduler"),
    "the first stays": ([{"timestep": 900.0}, {"scheduler": 0.5, "timestep": 500.0}], [900.0, 500.0], "timestep"),
    "one falls silent": ([{"scheduler": 1.0}, {"timestep": 500.0}, {"scheduler": 0.2}], [1, INF, 0.2], "scheduler"),
    "none": ([{}, {}], [NAN, NAN], "step"),
    "none at first": ([{}, {"timestep": 500.0}], [NAN, NAN], "step"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_forwards_that_are_placed(case: str) -> None:
    told, want, source = PLACED[case]
    session, state = Session(), _state()
    session.follow(state)
    for generation in (1, 2):
        got = []
        for step, times in enumerate(told):
            assert session.enter(Place("cond", 1 + step, generation, False, times))
            got.append(_now(state))
        assert _same(got, want)
        assert session.time_sources == {0: source}


def test_the_first_step_does_not_bind() -> None:
    session, state = Session(), _state()
    session.follow(state)
    got = []
    for step, times in enumerate([{"timestep": 900.0}, {"scheduler": 0.5, "timestep": 500.0}, {"timestep": 250.0}]):
        session.enter(Place("cond", step, 1, False, times))
        got.append(_now(state))
    assert _same(got, [900.0, 0.5, INF])
    assert session.time_sources == {0: "scheduler"}


def test_each_branch_has_a_source_of_its_own() -> None:
    session, state = Session(), _state()
    session.follow(state)
    for step in range(2):
        session.enter(Place("cond", step, 1, False, {"cache_context": 0.5 - 0.1 * step}))
        session.enter(Place("uncond", step, 1, False, {}))
    assert _same([_now(state, 0), _now(state, 1)], [0.4, NAN])
    assert session.time_sources == {0: "cache_context", 1: "step"}


def test_a_reset_lets_the_next_generation_begin_with_the_same_time() -> None:
    session, state = Session(), _state()
    session.follow(state)
    for _ in range(2):
        with session.branch("cond", 0, 1.0):
            assert _now(state) == 1.0
        session.reset()
        state.reset()


def test_a_reset_forgets_a_time_that_nobody_tells_again() -> None:
    session, state = Session(), _state()
    session.follow(state)
    for name in ("cond", "uncond"):
        with session.branch(name, 0, 1.0):
            pass
    assert _same([_now(state, 0), _now(state, 1)], [INF, INF])
    session.reset()
    assert _same([_now(state, 0), _now(state, 1)], [NAN, NAN])
    with session.branch("cond", time=0.5):  # whoever is inside is told still
        session.reset()
        assert _now(state) == 0.5


def test_a_state_that_follows_later_is_told() -> None:
    session, early, late = Session(), _state(), _state()
    session.follow(early)
    session.follow(SkipState(batch=1, heads=2, seq_q=40, seq_k=40, tile_m=8, tile_n=8))  # has no time
    with session.branch("cond"), session.branch("uncond", time=0.5):
        session.follow(late)
        assert _same([_now(late, 0), _now(late, 1)], [NAN, 0.5])


def test_the_number_of_the_step_counts_while_a_graph_is_captured() -> None:
    session, state = Session(), _state()
    session.follow(state)
    session.enter(Place("cond", 0, 1, False, {"timestep": 900.0}))
    session.let_the_op_count()
    assert _same([_now(state, 0), _now(state, 1)], [NAN, NAN])
    with session.branch("cond"):
        assert math.isnan(_now(state))
    session.enter(Place("cond", 1, 1, False, {"timestep": 500.0}))
    assert math.isnan(_now(state))  # of the same generation
    session.enter(Place("cond", 0, 2, False, {"timestep": 900.0}))
    assert _now(state) == 900.0


def _run(state: ResidualState, times: Sequence[float | None]) -> torch.Tensor:
    """Return what the last of some steps gives, each with its time told by hand, or not."""
    session = Session()
    session.follow(state)
    out = torch.empty(0)
    for step, time in enumerate(times):
        with session.branch("cond", step, time):
            out = residual_attention(*clustered_qkv(3, seq_q=40, step=step), state)
    return out


LINE = [1.0, 0.9, 0.7, 0.4]


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_times_of_two_sources_are_not_extrapolated(missing: int) -> None:
    """A sparse step without a time, or beside a residual without one, adds the last residual as it is."""
    times: list[float | None] = [None if step == missing else time for step, time in enumerate(LINE)]
    flat = _run(_state(forecast=False), LINE)
    assert (_run(_state(), LINE) - flat).abs().max() > 1e-2  # a forecast is something else
    torch.testing.assert_close(_run(_state(), times), flat)


def test_a_forecast_is_by_the_time_in_any_unit() -> None:
    want = _run(_state(), LINE)
    torch.testing.assert_close(_run(_state(), [1000 * time for time in LINE]), want)
    by_step = _run(_state(), [None] * 4)
    torch.testing.assert_close(_run(_state(), [-5.0 * step for step in range(4)]), by_step)
    assert (by_step - want).abs().max() > 1e-2


def test_equal_times_forecast_nothing() -> None:
    """As where a solver of second order evaluates twice at one time."""
    flat = _run(_state(forecast=False), LINE)
    torch.testing.assert_close(_run(_state(), [1.0, 0.7, 0.7, 0.4]), flat)
