"""Token ranges, key lengths and key masks: each against the set of tokens that it names."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention.ops import SkipState, skip_attention
from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.ranges import merge_ranges, must_do_words, must_skip_mask
from lite_attention.ops.tiles import ceil_div
from tests.support.op_cases import assert_step, clustered_qkv

SEQ_K = 45


def _tokens(ranges: list[int]) -> set[int]:
    return {token for start, end in zip(ranges[::2], ranges[1::2], strict=True) for token in range(start, end)}


_pair = st.tuples(st.integers(0, SEQ_K), st.integers(0, SEQ_K)).map(sorted)
_ranges = st.lists(_pair, max_size=5).map(lambda pairs: list(itertools.chain(*pairs)))


@settings(max_examples=200, deadline=None, print_blob=True)
@given(_ranges, st.integers(1, 16))
def test_unsorted_nested_and_empty_ranges_name_a_set_of_tokens(ranges: list[int], tile_n: int) -> None:
    given_ranges, tokens = list(ranges), _tokens(ranges)
    merged = merge_ranges("must_do", ranges, SEQ_K)
    flat = list(itertools.chain(*merged))
    assert _tokens(flat) == tokens
    assert all(a < b for a, b in itertools.pairwise(flat))  # sorted, apart, none empty

    k_tiles = ceil_div(SEQ_K, tile_n)
    tiles = unpack_bits(must_do_words(ranges, SEQ_K, tile_n), k_tiles)
    assert set(tiles.nonzero().flatten().tolist()) == {token // tile_n for token in tokens}
    allowed = must_skip_mask(ranges, SEQ_K)
    assert allowed.shape == (1, SEQ_K)
    assert set((~allowed[0]).nonzero().flatten().tolist()) == tokens
    assert ranges == given_ranges


@pytest.mark.parametrize("name", ["must_do", "must_skip"])
@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([1, 2, 3], r"pairs of start and end, got 3 numbers: \[1, 2, 3\]"),
        ([0, 46], r"0 <= start <= end <= 45 keys, got \[0, 46\)"),
        ([-1, 4], r"0 <= start <= end <= 45 keys, got \[-1, 4\)"),
        ([0, 4, 9, 7], r"0 <= start <= end <= 45 keys, got \[9, 7\)"),
    ],
)
def test_ranges_that_are_none(name: str, ranges: list[int], message: str) -> None:
    q, k, v = clustered_qkv(0, seq_q=SEQ_K)
    state = SkipState.for_inputs(q, k)
    before, given_ranges = state.control.clone(), list(ranges)
    with pytest.raises(ValueError, match=f"^{name} .*{message}"):
        skip_attention(q, k, v, state, **{name: ranges})  # type: ignore[arg-type]
    assert torch.equal(state.control, before)
    assert ranges == given_ranges


def test_the_functional_form_joins_ranges_lengths_and_mask() -> None:
    q, k, v = clustered_qkv(5, batch=2, seq_q=SEQ_K)
    must_do, must_skip = [40, 42, 3, 3, 9, 12], [20, 23, 11, 30]
    key_lengths, key_mask = torch.tensor([44, 33]), torch.rand(2, SEQ_K) < 0.8
    words = must_do_words(must_do, SEQ_K, 8)
    token = torch.arange(SEQ_K)
    allowed = key_mask & (token < key_lengths[:, None]) & ~((token >= 11) & (token < 30))

    states = [
        SkipState(batch=2, heads=2, seq_q=SEQ_K, seq_k=SEQ_K, tile_m=8, tile_n=8, threshold=-3.0) for _ in range(2)
    ]
    for _ in range(2):
        out, lse = skip_attention(
            q, k, v, states[0], return_lse=True, must_do=must_do, must_skip=must_skip, key_lengths=key_lengths,
            key_mask=key_mask,
        )  # fmt: skip
        want, oracle = assert_step(q, k, v, states[1], must_do=words, key_mask=allowed)
        assert torch.equal(out, want)
        torch.testing.assert_close(lse.double(), oracle.lse, rtol=1e-4, atol=1e-4)
        assert torch.equal(states[0].skip_mask, states[1].skip_mask)
    kept = states[0].kept_tiles()[0]
    assert kept[..., [1, 5]].all()  # what must_do touches
    assert not kept.all()


@pytest.mark.parametrize("argument", ["must_skip", "key_lengths", "key_mask"])
def test_each_way_to_exclude_keys_equals_attention_without_them(argument: str) -> None:
    q, k, v = clustered_qkv(5, batch=2, seq_q=SEQ_K)
    value = {
        "must_skip": [30, SEQ_K],
        "key_lengths": torch.tensor([30, 30]),
        "key_mask": (torch.arange(SEQ_K) < 30)[None],
    }[argument]
    state = SkipState.for_inputs(q, k, threshold=-torch.inf)
    out = skip_attention(q, k, v, state, **{argument: value})  # type: ignore[arg-type]
    by_head = (x.transpose(1, 2) for x in (q, k[:, :30], v[:, :30]))
    plain = torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)


def test_what_is_remembered_of_ranges_is_never_fake() -> None:
    """Tracing by hand must not leave a fake tensor in the cache, which then would make real results fake."""
    q, k, v = clustered_qkv(5, seq_q=SEQ_K)
    ranges, state = [3, 17], SkipState.for_inputs(q, k)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        skip_attention(*fakes, state, must_do=ranges, must_skip=ranges)
    assert type(skip_attention(q, k, v, state, must_do=ranges, must_skip=ranges)) is torch.Tensor
