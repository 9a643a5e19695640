"""`residual_attention` on the CPU against the float64 oracle, step after step, each step from the same input state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lite_attention.ops import ResidualState
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.tiles import ceil_div
from tests.support.op_cases import clustered_qkv
from tests.support.residual_cases import assert_residual_step


@dataclass
class Call:
    """One step: what is asked of the op, and what happens to the state before."""

    before: str
    slot: int
    batch: int
    seq_q: int
    seq_k: int
    time: float | None
    must_do: bool
    key_mask: str
    scale: float | None


@dataclass
class Case:
    seed: int
    dtype: torch.dtype
    quantization: str
    capacity: tuple[int, int, int]  # batch, seq_q, seq_k
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    tile_m: int
    tile_n: int
    slots: int
    plan: list[int]
    keep: list[float]
    forecast: bool
    residual_dtype: Literal["fp8", "bf16", "fp32"]
    num_steps: int | None
    refresh: int | None
    auto_step: bool
    initial_mask: tuple[bool, bool] | None  # one for each batch, one for each head
    calls: list[Call]


def _near_tile_edges(tile: int, tiles: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    edge = st.sampled_from([0, 0, -1, 1, tile // 2])
    return st.builds(lambda n, off: max(1, n * tile + off), tiles, edge)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tile_m, tile_n = draw(st.integers(4, 16)), draw(st.integers(4, 16))
    many_tiles = draw(st.sampled_from([False] * 7 + [True]))  # more than one word of bits, and than a sample has
    if many_tiles:
        tile_n = 4
    batch = 1 if many_tiles else draw(st.integers(1, 2))
    few = st.integers(1, 5)
    seq_q = draw(_near_tile_edges(tile_m, st.integers(1, 2) if many_tiles else few))
    seq_k = draw(_near_tile_edges(tile_n, st.integers(33, 66) if many_tiles else few))
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
    (batch, seq_q, seq_k), heads = case.capacity, case.kv_heads * case.group
    initial = None
    if case.initial_mask is not None:
        tiles = ceil_div(seq_q, case.tile_m), ceil_div(seq_k, case.tile_n)
        shape = (batch if case.initial_mask[0] else 1, heads if case.initial_mask[1] else 1, *tiles)
        initial = torch.rand(shape, generator=rng) < 0.3
    return ResidualState(
        batch=batch, heads=heads, seq_q=seq_q, seq_k=seq_k, value_dim=case.value_dim, tile_m=case.tile_m,
        tile_n=case.tile_n, slots=case.slots, plan=case.plan, keep=torch.tensor(case.keep), forecast=case.forecast,
        residual_dtype=case.residual_dtype, num_steps=case.num_steps, refresh=case.refresh, auto_step=case.auto_step,
        initial_mask=initial,
    )  # fmt: skip


def _draw_key_mask(kind: str, call: Call, tile_n: int, rng: torch.Generator) -> torch.Tensor | None:
    if not kind:
        return None
    batch = 1 if kind == "one for all" else call.batch
    if kind == "tokens":
        return torch.rand(batch, call.seq_k, generator=rng) < 0.7
    tiles = torch.rand(batch, ceil_div(call.seq_k, tile_n), generator=rng) < 0.6
    mask = tiles.repeat_interleave(tile_n, 1)[:, : call.seq_k].clone()
    mask[:, -1] = False  # an excluded token in a tile that otherwise takes part
    if kind == "nothing":
        mask[0] = False
    return mask


def _prepare(state: ResidualState, call: Call, rng: torch.Generator) -> None:
    state.slot = call.slot
    state.set_flag(c.FLAG_DENSE, call.before == "dense")
    if call.before == "fresh":
        state.start_fresh(call.slot)
    elif call.before == "jump":
        state.set_step(int(torch.randint(6, (), generator=rng)), call.slot)
    elif call.before == "reset":
        state.reset(call.slot)
    state.set_time(call.time)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_equals_the_oracle(case: Case) -> None:
    rng = torch.Generator().manual_seed(case.seed)
    state = _make_state(case, rng)
    for number, call in enumerate(case.calls):
        q, k, v = clustered_qkv(
            case.seed, batch=call.batch, seq_q=call.seq_q, seq_k=call.seq_k, heads=case.kv_heads * case.group,
            kv_heads=case.kv_heads, head_dim=case.head_dim, value_dim=case.value_dim, dtype=case.dtype, step=number,
        )  # fmt: skip
        must_do = None
        if call.must_do:
            must_do = pack_bits(torch.rand(ceil_div(call.seq_k, case.tile_n), generator=rng) < 0.3)
        _prepare(state, call, rng)
        key_mask = _draw_key_mask(call.key_mask, call, case.tile_n, rng)
        options = {"scale": call.scale, "must_do": must_do, "key_mask": key_mask, "quantization": case.quantization}
        _, want = assert_residual_step(q, k, v, state, **options)
        event(want.kind)
        event(f"certain: {10 * int(10 * want.certain.float().mean())} %")
