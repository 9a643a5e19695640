"""Votes at equality, infinities, NaN, and rows that see no key."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lite_attention.ops import SkipState, skip_attention
from lite_attention.ops import control as c
from tests.support.op_cases import assert_step, clustered_qkv

LN_2 = math.log(2)  # as a scale it leaves dot products as they are: the op works in log2 units


def _state(threshold: float, **options: Any) -> SkipState:
    return SkipState(batch=2, heads=2, seq_q=40, seq_k=40, tile_m=8, tile_n=8, slots=1, threshold=threshold, **options)


def _kept_of_scores(tile_scores: list[float], threshold: float, dtype: torch.dtype) -> list[bool]:
    """Return which k-tiles one q-tile keeps whose scores are these, the same for all rows."""
    q = torch.ones(1, 4, 1, 1, dtype=dtype)
    k = torch.tensor(tile_scores, dtype=dtype).repeat_interleave(4).view(1, -1, 1, 1)
    state = SkipState(
        batch=1, heads=1, seq_q=4, seq_k=k.shape[1], tile_m=4, tile_n=4, threshold=threshold, allow_positive=True
    )
    skip_attention(q, k, k, state, scale=LN_2)
    return state.kept_tiles()[0, 0, 0, 0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("scores", "threshold", "kept"),
    [
        # One q-tile of five: the diagonal is tile 2; then come 0, 4, 1, 3.
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0.0, [False, False, True, False, False]),  # equality drops, the first stays
        ([-3.0, -2.5, 0.0, -3.5, -3.0], -3.0, [False, True, True, False, False]),
        ([1.0, 2.0, 0.0, 3.0, 4.0], 0.0, [True, False, True, False, True]),  # each against the maximum so far
        ([4.0, 5.0, 9.0, 6.0, 7.0], 0.0, [False, False, True, False, False]),
        ([1.0, 2.0, 0.0, 3.0, 4.0], 1.0, [False, False, True, False, True]),
        ([4.0, 5.0, 9.0, 6.0, 7.0], -math.inf, [True] * 5),
    ],
)
def test_votes_are_those_of_the_contract(
    scores: list[float], threshold: float, kept: list[bool], dtype: torch.dtype
) -> None:
    assert _kept_of_scores(scores, threshold, dtype) == kept


@pytest.mark.parametrize(("last_row", "seq_q", "kept"), [(1.0, 4, False), (-1.0, 4, True), (-1.0, 3, False)])
def test_one_row_keeps_a_tile_and_rows_past_the_end_have_no_vote(last_row: float, seq_q: int, kept: bool) -> None:
    k = torch.tensor([0.0] * 4 + [5.0] * 4).view(1, 8, 1, 1)  # the second tile is the diagonal one
    q = torch.tensor([1.0, 1.0, 1.0, last_row])[:seq_q].view(1, seq_q, 1, 1)
    state = SkipState(batch=1, heads=1, seq_q=seq_q, seq_k=8, tile_m=8, tile_n=4, threshold=-2.0)
    skip_attention(q, k, k, state, scale=LN_2)
    assert state.kept_tiles()[0, 0, 0, 0].tolist() == [kept, True]


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("where", ["q", "k"])
def test_threshold_minus_infinity_skips_nothing_whatever_the_scores(value: float, where: str) -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    q, k = q.abs(), k.abs()  # infinite keys then give infinite scores of their sign
    (q if where == "q" else k)[:, 8:19, :, 0] = value
    state = _state(-math.inf)
    for _ in range(3):
        skip_attention(q, k, v, state)
        assert state.kept_tiles()[0].all()
        assert state.step(0) > 0


def test_scores_of_minus_infinity_weigh_nothing() -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    q, k = q.abs(), k.abs()
    k[:, 8:19] = -math.inf
    for threshold in (-math.inf, -3.0):
        out, _ = assert_step(q, k, v, _state(threshold))
        by_head = (x.transpose(1, 2) for x in (q, k, v))
        plain = torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)


def test_nan_keeps_its_tiles() -> None:
    clean, in_q, in_k = _state(-3.0), _state(-3.0), _state(-3.0)
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    assert_step(q, k, v, clean)
    assert not clean.kept_tiles()[0, 0, 1, 2].all()

    bad_q = q.clone()
    bad_q[0, 20, 1] = math.nan  # q-tile 2 of head 1
    assert_step(bad_q, k, v, in_q)
    expected = clean.kept_tiles()
    expected[0, 0, 1, 2] = True
    assert torch.equal(in_q.kept_tiles(), expected)

    bad_k = k.clone()
    bad_k[0, 30, 1] = math.nan  # k-tile 3 of head 1
    assert_step(q, bad_k, v, in_k)
    assert in_k.kept_tiles()[0, 0, 1, :, 3].all()
    assert torch.equal(in_k.kept_tiles()[0, 1], clean.kept_tiles()[0, 1])


def test_rows_without_a_key_give_zero() -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0] = False
    state = _state(-3.0)
    out, lse = skip_attention(q, k, v, state, key_mask=mask, return_lse=True)
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert out[1].ne(0).all()
    assert state.kept_tiles()[0, 0].all()  # no key, no vote
    assert not state.kept_tiles()[0, 1].all()

    nothing = _state(-3.0, initial_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    out, lse = skip_attention(q, k, v, nothing, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_tile_without_an_allowed_key_keeps_its_bit() -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    state = _state(-3.0)
    skip_attention(q, k, v, state)
    before = state.kept_tiles()
    dropped = int((~before[0, 0, 0, 0]).nonzero()[0])
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 8 * dropped : 8 * dropped + 8] = False
    skip_attention(q, k, v, state, key_mask=mask)
    assert torch.equal(state.kept_tiles()[..., dropped], before[..., dropped])


def test_skipped_tiles_are_not_read() -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    initial = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    initial[..., 3] = True
    without, _ = assert_step(q, k, v, _state(-3.0, initial_mask=initial))
    for x in (k, v):
        x[:, 24:32] = math.nan
    assert torch.equal(skip_attention(q, k, v, _state(-3.0, initial_mask=initial)), without)


def test_large_scores_neither_overflow_nor_lose_the_maximum() -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    out, _ = assert_step(30 * q, 30 * k, v, _state(-3.0))
    assert out.isfinite().all()


def test_dense_flag_equals_threshold_minus_infinity_bit_for_bit() -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    dense, kept = _state(-3.0), _state(-math.inf)
    dense.set_flag(c.FLAG_DENSE, True)
    buffers = [buffer.clone() for buffer in dense.buffers()]
    assert torch.equal(skip_attention(q, k, v, dense), skip_attention(q, k, v, kept))
    assert all(torch.equal(a, b) for a, b in zip(buffers, dense.buffers(), strict=True))
