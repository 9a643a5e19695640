"""`residual_attention` on the CPU against the float64 oracle, step after step, each step from the same input state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lite_attention.ops import ResidualState
from tests.support.drawn_calls import DrawnCall, DrawnCase, near_tile_edges
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
    tile_m, tile_n = draw(st.integers(4, 16)), draw(st.integers(4, 16))
    many_tiles = draw(st.sampled_from([False] * 7 + [True]))  # more than one word of bits, and than a sample has
    if many_tiles:
        tile_n = 4
    batch = 1 if many_tiles else draw(st.integers(1, 2))
    few = st.integers(1, 5)
    seq_q = draw(near_tile_edges(tile_m, st.integers(1, 2) if many_tiles else few))
    seq_k = draw(near_tile_edges(tile_n, st.integers(33, 66) if many_tiles else few))
    slots = draw(st.integers(1, 2))
    calm = draw(st.sampled_from([True, True, False]))  # then there are sparse steps, and residuals to forecast from
    call = st.builds(
        Call,
        before=st.just("") if calm else st.sampled_from([""] * 8 + ["fresh", "dense", "jump", "reset"]),
        slot=st.integers(0, slots - 1) if draw(st.booleans()) else st.just(0),
        batch=st.just(batch) if calm else st.sampled_from([batch] * 5 + [1]),
        seq_q=st.just(seq_q) if calm else st.sampled_from([seq_q] * 5 + [max(1, seq_q - tile_m)]),
        seq_k=st.just(seq_k) if calm else st.sampled_from([seq_k] * 5 + [max(1, seq_k - tile_n - 1)]),
        time=st.sampled_from([None, None, None, 0.9, 0.7, 0.4]),
        must_do=st.sampled_from([False, False, True]),
        key_mask=st.sampled_from([""] * 5 + ["tokens", "tiles", "one for all", "nothing"]),
        scale=st.sampled_from([None, None, 0.7]),
        query_start=st.one_of(st.none(), st.none(), st.integers(0, seq_k)),
    )
    return Case(
        seed=draw(st.integers(0, 2**16)),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
        quantization=draw(st.sampled_from(["none", "none", "int8", "int8_fp8"])),
        capacity=(batch, seq_q, seq_k),
        kv_heads=draw(st.integers(1, 2)),
        group=1 if many_tiles else draw(st.sampled_from([1, 1, 2])),
        head_dim=draw(st.sampled_from([2, 4, 7, 8])),
        value_dim=draw(st.sampled_from([1, 4, 8, 16])),
        tile_m=tile_m,
        tile_n=tile_n,
        slots=slots,
        plan=draw(st.sampled_from([[0], [2, 1, 0], [2, 1, 1, 0, 2, 0, 1, 0], [2, 1, 0, 1, 0, 2, 0], [1], [2], [1, 0]])),
        keep=draw(st.sampled_from([[0.3], [0.3], [0.0], [1.0], [0.6, 0.2, 0.5]])),
        forecast=draw(st.booleans()),
        residual_dtype=draw(st.sampled_from(["fp8", "bf16", "fp32"])),
        num_steps=None if calm else draw(st.sampled_from([None, 5])),
        refresh=None if calm else draw(st.sampled_from([None, 4])),
        auto_step=calm or draw(st.booleans()),
        initial_mask=draw(st.sampled_from([None, None, (False, False), (True, True), (True, False)])),
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
