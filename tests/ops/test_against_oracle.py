"""The op on the CPU against the float64 oracle, step after step, each step from the same input state."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lite_attention.ops import SkipState
from lite_attention.ops.oracle import skip_attention_oracle
from tests.support.drawn_calls import DrawnCall, DrawnCase, fields_of_calls, fields_of_case, sizes
from tests.support.op_cases import assert_step, clustered_qkv, live_sparsity, too_close


@dataclass(kw_only=True)
class Case(DrawnCase):
    threshold: tuple[bool, int, bool]  # by slot, steps, by head
    calls: list[DrawnCall]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    of, slots = draw(sizes()), draw(st.integers(1, 3))
    any_slot = st.integers(0, slots - 1) if draw(st.booleans()) else st.just(0)
    call = st.builds(DrawnCall, **fields_of_calls(of, any_slot))
    return Case(
        **draw(fields_of_case(of, slots)),
        num_steps=draw(st.sampled_from([None, None, 2, 3])),
        refresh=draw(st.sampled_from([None, None, 2])),
        auto_step=draw(st.sampled_from([True, True, False])),
        threshold=(draw(st.booleans()), draw(st.integers(1, 3)), draw(st.booleans())),
        calls=draw(st.lists(call, min_size=2, max_size=4)),
    )


def _make_state(case: Case, rng: torch.Generator) -> SkipState:
    state, heads = SkipState(**case.state_options(rng)), case.heads
    by_slot, steps, by_head = case.threshold
    values = torch.tensor([-torch.inf, -6.0, -3.0, -3.0, -1.5, -1.0, 0.0, 2.0])
    index = torch.randint(len(values), (case.slots if by_slot else 1, steps, heads if by_head else 1), generator=rng)
    state.threshold = values[index]  # the op also takes tables with sizes of 1
    return state


@pytest.mark.slow
@settings(max_examples=300, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_equals_the_oracle(case: Case) -> None:
    rng = torch.Generator().manual_seed(case.seed)
    state = _make_state(case, rng)
    for number, call in enumerate(case.calls):
        assert_step(*case.inputs(call, number), state, **case.prepared(call, state, rng))
    event(f"tiles skipped at the end: {10 * int(10 * live_sparsity(state))} %")


# Sq and Sk off the tiles, and unlike each other; the last has more k-tiles than a word has bits.
RAGGED = [(61, 61, 8, 8), (90, 131, 16, 8), (133, 75, 8, 12), (33, 161, 16, 4)]


@pytest.mark.parametrize(("seq_q", "seq_k", "tile_m", "tile_n"), RAGGED)
@pytest.mark.parametrize("quantization", ["none", "int8", "int8_fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ragged_shapes_drop_30_to_80_percent(
    seq_q: int, seq_k: int, tile_m: int, tile_n: int, dtype: torch.dtype, quantization: str
) -> None:
    state = SkipState(batch=2, heads=4, seq_q=seq_q, seq_k=seq_k, tile_m=tile_m, tile_n=tile_n, slots=1, threshold=-3.0)
    for step in range(4):
        q, k, v = clustered_qkv(
            7, batch=2, seq_q=seq_q, seq_k=seq_k, heads=4, kv_heads=2, value_dim=5, dtype=dtype, step=step
        )
        _, want = assert_step(q, k, v, state, quantization=quantization)
        # The mask is compared but for these, so they must be few.
        assert (want.margin < too_close(q, k)).float().mean() < 0.01
        assert 0.3 < live_sparsity(state) < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("seq_q", "seq_k", "tile_m", "tile_n"), RAGGED)
def test_half_precision_stays_in_the_budget(
    seq_q: int, seq_k: int, tile_m: int, tile_n: int, dtype: torch.dtype
) -> None:
    """FlashAttention's budget: twice the error of plain attention in that dtype, and a rounding band."""
    state = SkipState(batch=1, heads=2, seq_q=seq_q, seq_k=seq_k, tile_m=tile_m, tile_n=tile_n, slots=1, threshold=-3.0)
    for step in range(3):
        q, k, v = clustered_qkv(3, seq_q=seq_q, seq_k=seq_k, dtype=dtype, step=step)
        kept = state.kept_tiles()[0] if step else torch.ones_like(state.kept_tiles()[0])
        seen = kept.repeat_interleave(tile_m, 2)[:, :, :seq_q].repeat_interleave(tile_n, 3)[..., :seq_k]
        out, want = assert_step(q, k, v, state)

        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        plain = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        band = 2 * ((want.out + 0.3 - 0.3).to(dtype).double() - want.out).abs().max()
        error, plain_error = (out - want.out).abs(), (plain - want.out).abs()
        assert error.max() <= 2 * plain_error.max() + band
        assert error.mean() <= 1.2 * plain_error.mean()
    assert live_sparsity(state) > 0.3


@pytest.mark.parametrize("group", [1, 2, 4])
def test_without_skipping_it_is_grouped_sdpa(group: int) -> None:
    q, k, v = clustered_qkv(1, batch=2, seq_q=37, seq_k=50, heads=4, kv_heads=4 // group, value_dim=5)
    state = SkipState(batch=2, heads=4, seq_q=37, seq_k=50, tile_m=8, tile_n=8, threshold=-torch.inf)
    out, _ = assert_step(q, k, v, state)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
    )
    torch.testing.assert_close(out, plain.transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fresh", [True, False])
def test_bits_that_are_no_tiles_are_zero(fresh: bool) -> None:
    """A state made for more keys than a call has, its initial mask and its row set beyond the call's tiles."""
    q = torch.randn(1, 40, 1, 16)
    mask = torch.ones(1, 1, 3, 20, dtype=torch.bool)
    mask[..., 0] = False
    state = SkipState(
        batch=1, heads=1, seq_q=40, seq_k=320, tile_m=16, tile_n=16, slots=1, threshold=-4.0, initial_mask=mask
    )
    arguments = (q, q, q, state.skip_mask, state.control, state.threshold, state.initial_mask, None, None)
    if not fresh:
        torch.ops.lite_attention.skip_attention(*arguments, scale=None, tile_m=16, tile_n=16)
        state.skip_mask.fill_(0b110_1111_0000_0000_0010)
    want = skip_attention_oracle(*arguments, scale=None, tile_m=16, tile_n=16)
    torch.ops.lite_attention.skip_attention(*arguments, scale=None, tile_m=16, tile_n=16)
    assert torch.equal(state.skip_mask, want.skip_mask)
    assert not (state.skip_mask >> 3).any()  # 40 keys are three tiles
    assert (state.skip_mask & 0b010).all()
