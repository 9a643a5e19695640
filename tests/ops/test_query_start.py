"""A part of the queries against all keys: `query_start` says where they stand, and all is as it is in the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lite_attention.ops import ResidualState, SkipState
from lite_attention.ops import control as c
from lite_attention.ops.functional import residual_attention, skip_attention
from lite_attention.ops.tiles import ceil_div, diagonal_tile, sampled_tiles, visit_order
from tests.support.op_cases import assert_step, clustered_qkv
from tests.support.residual_cases import assert_residual_step, residual_state

TOKENS, TILE_M, TILE_N = 192, 16, 12


def of_part(state_of: Any, ranks: int, rank: int, **options: Any) -> Any:
    state = state_of(seq_q=TOKENS // ranks, seq_k=TOKENS, tile_m=TILE_M, tile_n=TILE_N, **options)
    state.query_start = rank * TOKENS // ranks
    return state


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_the_order_of_a_part_is_that_of_its_rows(ranks: int) -> None:
    part = TOKENS // ranks
    for i in range(ceil_div(TOKENS, TILE_M)):
        rank, first = divmod(i * TILE_M, part)
        here = (first // TILE_M, part, TOKENS, TILE_M, TILE_N, rank * part)
        for function in (visit_order, sampled_tiles, diagonal_tile):
            assert function(*here) == function(i, TOKENS, TOKENS, TILE_M, TILE_N)  # type: ignore[operator]


def test_queries_of_their_own_number_stand_where_they_always_did() -> None:
    for i in range(9):
        assert diagonal_tile(i, 131, 131, 16, 12, 0) == diagonal_tile(i, 131, 131, 16, 12)


def test_queries_past_the_keys_meet_the_last_tile_first() -> None:
    assert diagonal_tile(3, 64, 100, 16, 16, 90) == 6


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_masks_of_parts_are_the_rows_of_the_whole(ranks: int, quantization: str) -> None:
    common = {"batch": 1, "heads": 2, "slots": 1, "threshold": -3.0}
    whole = SkipState(seq_q=TOKENS, seq_k=TOKENS, tile_m=TILE_M, tile_n=TILE_N, **common)
    parts = [of_part(SkipState, ranks, rank, **common) for rank in range(ranks)]
    for step in range(4):
        q, k, v = clustered_qkv(5, batch=1, seq_q=TOKENS, seq_k=TOKENS, heads=2, kv_heads=2, step=step)
        want = skip_attention(q, k, v, whole, quantization=quantization)
        got = [
            assert_step(rows.contiguous(), k, v, part, quantization=quantization)[0]
            for rows, part in zip(q.chunk(ranks, 1), parts, strict=True)
        ]
        torch.testing.assert_close(torch.cat(got, 1), want)
        assert torch.equal(torch.cat([part.skip_mask for part in parts], 3), whole.skip_mask)
    assert 0.3 < whole.sparsity() < 0.8
    # Without it, queries spread over the keys, and other tiles come first.
    parts[0].query_start = None
    parts[0].reset()
    skip_attention(q[:, : TOKENS // ranks], k, v, parts[0], quantization=quantization)
    whole.reset()
    skip_attention(q, k, v, whole, quantization=quantization)
    assert not torch.equal(parts[0].skip_mask, whole.skip_mask[:, :, :, : TOKENS // ranks // TILE_M])


@pytest.mark.parametrize("start", [None, 0, 40, 96, 180])
def test_a_residual_of_a_part_is_what_the_oracle_says(start: int | None) -> None:
    """The sample of a fresh step, and the tile that always stays, follow the diagonal."""
    q, k, v = clustered_qkv(2, batch=1, seq_q=96, seq_k=TOKENS, heads=2, kv_heads=2, step=0)
    state = residual_state(q, k, v, plan=[2, 1, 0, 2, 0], tile_m=TILE_M, tile_n=TILE_N, keep=0.2)
    state.query_start = start
    for step in range(5):
        q, k, v = clustered_qkv(2, batch=1, seq_q=96, seq_k=TOKENS, heads=2, kv_heads=2, step=step)
        assert_residual_step(q, k, v, state)
    kept = state.kept_tiles()[0, 0]
    diagonal = [diagonal_tile(i, 96, TOKENS, TILE_M, TILE_N, start) for i in range(6)]
    assert kept[:, range(6), diagonal].all()


def test_a_residual_of_a_part_is_its_rows_where_all_tiles_are_kept() -> None:
    q, k, v = clustered_qkv(2, batch=1, seq_q=TOKENS, seq_k=TOKENS, heads=2, kv_heads=2, step=0)
    part = residual_state(q[:, 96:], k, v, plan=[2, 1, 0], tile_m=TILE_M, tile_n=TILE_N, keep=1.0)
    part.query_start = 96
    for _ in range(3):
        out = residual_attention(q[:, 96:].contiguous(), k, v, part)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, dense[:, 96:], rtol=1e-4, atol=1e-4)


def test_it_is_a_word_of_the_state() -> None:
    state = SkipState(batch=1, heads=1, seq_q=32, seq_k=64, tile_m=16, tile_n=16)
    assert state.query_start is None
    assert state.control[c.QUERY_START] == 0  # as version 0.1 wrote it
    state.query_start = 0
    assert state.control[c.QUERY_START] == 1
    state.query_start = 32
    state.reset()
    assert state.query_start == 32
    assert SkipState.from_state_dict(state.state_dict()).query_start == 32
    residual = ResidualState(batch=1, heads=1, seq_q=32, seq_k=64, tile_m=16, tile_n=16, value_dim=8, plan=[2, 1, 0])
    residual.query_start = 16
    assert residual.query_start == 16


@pytest.mark.parametrize("start", [-1, 1 << 30, 1.5, True, "0"])
def test_a_place_that_is_none_is_refused(start: object) -> None:
    state = SkipState(batch=1, heads=1, seq_q=32, seq_k=64, tile_m=16, tile_n=16)
    with pytest.raises(ValueError, match=r"query_start: expected .*0 to 1073741823, got"):
        state.query_start = start  # type: ignore[assignment]
    assert state.query_start is None
