"""`residual_attention` on the CPU against the float64 oracle, step after step, each step from the same input state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lite_attention.ops import ResidualState
from tests.support.drawn_calls import DrawnCall, DrawnCase, fields_of_calls, fields_of_case, sizes
from tests.support.residual_cases import assert_residual_step


@dataclass(kw_only=True)
class Call(DrawnCall):
    time: float | None


@dataclass(kw_only=True)
class Case(DrawnCase):
    plan: list[int]
    keep: list[float]
    forecast: bool
    residual_dtype: Literal["fp8", "bf16", "fp32"]
    calls: list[Call]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    of, slots = draw(sizes()), draw(st.integers(1, 2))
    calm = draw(st.sampled_from([True, True, False]))  # then there are sparse steps, and residuals to forecast from
    any_slot = st.integers(0, slots - 1) if draw(st.booleans()) else st.just(0)
    as_state = {"before": "", "batch": of.batch, "seq_q": of.seq_q, "seq_k": of.seq_k} if calm else {}
    fields = fields_of_calls(of, any_slot) | {name: st.just(value) for name, value in as_state.items()}
    call = st.builds(Call, time=st.sampled_from([None, None, None, 0.9, 0.7, 0.4]), **fields)
    return Case(
        **draw(fields_of_case(of, slots)),
        plan=draw(st.sampled_from([[0], [2, 1, 0], [2, 1, 1, 0, 2, 0, 1, 0], [2, 1, 0, 1, 0, 2, 0], [1], [2], [1, 0]])),
        keep=draw(st.sampled_from([[0.3], [0.3], [0.0], [1.0], [0.6, 0.2, 0.5]])),
        forecast=draw(st.booleans()),
        residual_dtype=draw(st.sampled_from(["fp8", "bf16", "fp32"])),
        num_steps=None if calm else draw(st.sampled_from([None, 5])),
        refresh=None if calm else draw(st.sampled_from([None, 4])),
        auto_step=calm or draw(st.booleans()),
        calls=draw(st.lists(call, min_size=4, max_size=8)),
    )


def _make_state(case: Case, rng: torch.Generator) -> ResidualState:
    return ResidualState(
        **case.state_options(rng), value_dim=case.value_dim, plan=case.plan, keep=torch.tensor(case.keep),
        forecast=case.forecast, residual_dtype=case.residual_dtype,
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=150, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_equals_the_oracle(case: Case) -> None:
    rng = torch.Generator().manual_seed(case.seed)
    state = _make_state(case, rng)
    for number, call in enumerate(case.calls):
        options = case.prepared(call, state, rng)
        state.set_time(call.time)
        _, want = assert_residual_step(*case.inputs(call, number), state, **options)
        event(want.kind)
        event(f"certain: {10 * int(10 * want.certain.float().mean())} %")
