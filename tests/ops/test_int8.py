"""`quantization="int8"` and "int8_fp8": how far from exact, what they must not see, and what they must leave as it was.

That they attend with what the quantized values stand for, votes included, is held against the oracle in
`test_against_oracle.py`; how "int8_fp8" rounds weights is held to its rule here.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lite_attention.ops import SkipState, skip_attention
from tests.support.op_cases import LAYOUTS, Qkv, assert_step, clustered_qkv, dequantized, dequantized_value

OPS = torch.ops.lite_attention
BOTH = pytest.mark.parametrize("quantization", ["int8", "int8_fp8"])


def _dense(quantization: str, *qkv: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse of a call that skips nothing."""
    q, k, _ = qkv
    state = SkipState.for_inputs(q, k, quantization=quantization, threshold=-math.inf)
    out, lse = skip_attention(*qkv, state, quantization=quantization, return_lse=True, **options)
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    return out, lse


def _exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def _sqnr(out: torch.Tensor, want: torch.Tensor) -> float:
    """Signal to noise, in dB."""
    return float(10 * torch.log10(want.square().sum() / (out - want).square().sum()))


def _qkv(kind: str, head_dim: int, seed: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> Qkv:
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, 384, heads, head_dim, generator=rng) for heads in (4, 2, 2))
    if kind == "outliers":  # channels with an offset that all keys share, and single keys far off
        k[..., [3, 17, 40]] += torch.tensor([20.0, -35.0, 50.0])
        k[:, torch.randint(384, (5,), generator=rng), :, 3] += 10
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scale", [None, 0.07])
@pytest.mark.parametrize(("kind", "least"), [("normal", 25), ("outliers", 20)])
@BOTH
def test_near_exact_attention(
    quantization: str, kind: str, least: float, scale: float | None, head_dim: int, dtype: torch.dtype
) -> None:
    qkv = _qkv(kind, head_dim, seed=0, dtype=dtype)
    (out, lse), (want, want_lse) = _dense(quantization, *qkv, scale=scale), _exact(*qkv, scale=scale)
    assert _sqnr(out, want) > least
    assert ((lse - want_lse).abs() <= 0.02 * want_lse.abs().clamp(min=1)).all()


@pytest.mark.parametrize("kind", ["normal", "outliers"])
@BOTH
def test_near_exact_attention_over_the_allowed_keys(quantization: str, kind: str) -> None:
    qkv, mask = _qkv(kind, 64, seed=1, batch=2), torch.rand(2, 384) < 0.6
    (out, lse), (want, want_lse) = _dense(quantization, *qkv, key_mask=mask), _exact(*qkv, mask)
    assert _sqnr(out, want) > 25
    assert ((lse - want_lse).abs() <= 0.02 * want_lse.abs().clamp(min=1)).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "gain"), [("normal", -0.3), ("outliers", 10)])  # a rounding may fall either way
def test_the_mean_taken_off_makes_it_better_and_never_worse(kind: str, gain: float, seed: int) -> None:
    q, k, v = _qkv(kind, 64, seed)
    want, _ = _exact(q, k, v)
    k_values, k_scales, _ = OPS.quantize_key(k, torch.zeros(1, 2, 64), None, tile_n=64)
    as_they_are = k_values * k_scales.repeat_interleave(64, 2).transpose(1, 2).unsqueeze(-1)
    seen_q, smooth, _ = dequantized(q, k, None, None, 64)
    with_mean, without = (_sqnr(_exact(seen_q, keys, v, scale=math.log(2))[0], want) for keys in (smooth, as_they_are))
    assert with_mean > without + gain


@BOTH
def test_partial_results_merge(quantization: str) -> None:
    """The LSE is that of the scores as they were, although each part had a mean of its own."""
    q, k, v = _qkv("outliers", 64, seed=2)
    first, second = (_dense(quantization, q, k[:, part], v[:, part]) for part in (slice(0, 200), slice(200, 384)))
    share = torch.sigmoid(first[1] - second[1]).transpose(1, 2).unsqueeze(-1)
    merged = share * first[0] + (1 - share) * second[0]
    assert _sqnr(merged, _exact(q, k, v)[0]) > 20


@pytest.mark.parametrize("value", [1e4, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("how", ["key_mask", "key_lengths", "must_skip"])
@BOTH
def test_excluded_keys_change_nothing_whatever_they_hold(quantization: str, how: str, value: float) -> None:
    """Nor do their values in FP8, which are 0; others must be finite, whatever the scores are made of."""
    allowed = torch.ones(2, 45, dtype=torch.bool)
    options: dict[str, Any] = {}
    if how == "key_mask":
        allowed = torch.rand(2, 45) < 0.7
        options = {how: allowed}
    elif how == "key_lengths":
        allowed[0, 30:] = False
        options = {how: torch.tensor([30, 45])}
    else:
        allowed[:, 11:19] = False
        options = {how: [11, 19]}
    states = [SkipState(batch=2, heads=2, seq_q=37, seq_k=45, tile_m=8, tile_n=8, threshold=-3.0) for _ in range(2)]
    for step in range(3):
        q, k, v = clustered_qkv(1, batch=2, seq_q=37, seq_k=45, step=step)
        other_k, other_v = k.clone(), v.clone()
        other_k[~allowed] = value
        if quantization == "int8_fp8":
            other_v[~allowed] = value
        a, b = (
            skip_attention(q, *kv, state, quantization=quantization, return_lse=True, **options)
            for kv, state in zip(((k, v), (other_k, other_v)), states, strict=True)
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(states[0].skip_mask, states[1].skip_mask)
    assert not states[0].kept_tiles().all()


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
@BOTH
def test_rows_without_a_key_give_zero_and_minus_infinity(quantization: str, value: float) -> None:
    """Also where the mean's share of the LSE, or a channel of v, is NaN."""
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)
    q[0, 3:20] += value
    v[0, 3, 0, 0] += value
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0] = False
    out, lse = _dense(quantization, q, k, v, key_mask=mask)
    assert (out[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    assert out[1].ne(0).all()
    assert lse[1].isfinite().all()
    state = SkipState.for_inputs(q, k, initial_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))
    out, lse = skip_attention(q, k, v, state, quantization=quantization, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@BOTH
def test_what_is_not_finite_gives_nan_and_keeps_its_tiles(quantization: str, value: float) -> None:
    q, k, v = clustered_qkv(0, batch=2, seq_q=40)

    def run(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = SkipState(batch=2, heads=2, seq_q=40, seq_k=40, tile_m=8, tile_n=8, slots=1, threshold=-3.0)
        out, lse = skip_attention(q, k, v, state, quantization=quantization, return_lse=True)
        assert torch.equal(out.isnan().all(-1).transpose(1, 2), lse.isnan())
        return out, lse, state.kept_tiles()[0]

    out, _, kept = run(q, k)
    assert not kept[0, 1, 2:4].all()
    assert not kept[0, 1].all()
    bad_q = q.clone()
    bad_q[0, 20, 1, 3] = value  # of the rows 16 to 31, which share a scale: q-tiles 2 and 3
    of_q, lse, kept_of_q = run(bad_q, k)
    wrong = torch.zeros(2, 2, 40, dtype=torch.bool)
    wrong[0, 1, 16:32] = True
    assert torch.equal(lse.isnan(), wrong)
    assert torch.equal(of_q.transpose(1, 2)[~wrong], out.transpose(1, 2)[~wrong])
    want = kept.clone()
    want[0, 1, 2:4] = True
    assert torch.equal(kept_of_q, want)

    bad_k = k.clone()
    bad_k[0, 30, 1, 3] = value  # the mean spreads it over its head
    of_k, lse, kept_of_k = run(q, bad_k)
    wrong[0, 1] = True
    assert torch.equal(lse.isnan(), wrong)
    assert torch.equal(of_k.transpose(1, 2)[~wrong], out.transpose(1, 2)[~wrong])
    want = kept.clone()
    want[0, 1] = True
    assert torch.equal(kept_of_k, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
@BOTH
def test_any_strides(quantization: str, layout: str, masked: bool) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in clustered_qkv(2, batch=2, seq_q=37, seq_k=45, value_dim=5))
    mask = torch.rand(2, 45) < 0.7 if masked else None
    states = [SkipState(batch=2, heads=2, seq_q=37, seq_k=45, tile_m=8, tile_n=8, threshold=-3.0) for _ in range(2)]
    for _ in range(2):
        out, _ = assert_step(q, k, v, states[0], key_mask=mask, quantization=quantization)
        plain = (x.contiguous() for x in (q, k, v))
        assert torch.equal(skip_attention(*plain, states[1], key_mask=mask, quantization=quantization), out)
    assert torch.equal(states[0].skip_mask, states[1].skip_mask)


def test_it_is_another_computation_and_none_is_the_default() -> None:
    q, k, v = clustered_qkv(2, seq_q=37)
    default, none, int8, fp8 = (
        skip_attention(q, k, v, SkipState.for_inputs(q, k), **options)
        for options in ({}, *({"quantization": name} for name in ("none", "int8", "int8_fp8")))
    )
    assert torch.equal(default, none)
    assert not torch.equal(default, int8)
    assert not torch.equal(int8, fp8)


@BOTH
def test_the_inputs_are_left_as_they_are(quantization: str) -> None:
    qkv = clustered_qkv(2, seq_q=37)
    mask = torch.rand(1, 37) < 0.5
    before = [x.clone() for x in (*qkv, mask)]
    _dense(quantization, *qkv, key_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (*qkv, mask), strict=True))


# ---- FP8 weights and values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.4])  # flat weights, and steep ones, down to what e4m3 does not have
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_weights_are_rounded_to_e4m3_and_summed_as_rounded(kind: str, masked: bool, scale: float | None) -> None:
    q, k, v = _qkv(kind, 64, seed=3, batch=2)
    mask = torch.rand(2, 384) < 0.6 if masked else None
    seen_q, seen_k, lse_shift = dequantized(q, k, mask, scale, 64)
    seen_k, seen_v = (x.repeat_interleave(2, 2) for x in (seen_k, dequantized_value(v, mask)))
    scores = torch.einsum("bihd,bjhd->bhij", seen_q, seen_k)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    row_max = scores.amax(-1)
    weights = (scores - row_max.unsqueeze(-1) + 8).exp2().to(torch.float8_e4m3fn).double()
    total = weights.sum(-1)
    want = (torch.einsum("bhij,bjhd->bhid", weights, seen_v) / total.unsqueeze(-1)).transpose(1, 2)
    want_lse = (row_max + total.log2() - 8) * math.log(2) + lse_shift
    (out, lse), (int8_out, int8_lse) = (
        _dense(name, q, k, v, key_mask=mask, scale=scale) for name in ("int8_fp8", "int8")
    )
    assert _sqnr(out, want) > 60 > 40 > _sqnr(int8_out, want)  # but for weights between two e4m3 numbers
    assert (lse - want_lse).abs().mean() < 1e-5 < 1e-4 < (int8_lse - want_lse).abs().mean()


def test_votes_are_those_of_int8() -> None:
    """Bit for bit, also with values that are not finite."""
    states = [SkipState(batch=2, heads=4, seq_q=90, seq_k=131, tile_m=16, tile_n=8, threshold=-3.0) for _ in range(2)]
    for step in range(4):
        q, k, v = clustered_qkv(7, batch=2, seq_q=90, seq_k=131, heads=4, kv_heads=2, step=step)
        v[0, 3, 0, 1] = math.nan
        for state, quantization in zip(states, ("int8", "int8_fp8"), strict=True):
            skip_attention(q, k, v, state, quantization=quantization, key_mask=torch.arange(131)[None] < 120)
        assert torch.equal(states[0].skip_mask, states[1].skip_mask)
    assert 0.2 < states[1].sparsity() < 0.8


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_makes_its_channel_nan(value: float) -> None:
    """In all rows that attend with its head, those too that have skipped its tile."""
    q, k, v = clustered_qkv(0, batch=2, seq_q=40, heads=4, kv_heads=2)
    skipped = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    skipped[..., 1:, 3] = True
    skipped[:, :, 4] = True  # attends to nothing
    wrong = torch.zeros(2, 40, 4, 8, dtype=torch.bool)
    wrong[0, :32, 2:, 3] = True

    def run(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = SkipState(batch=2, heads=4, seq_q=40, seq_k=40, tile_m=8, tile_n=8, initial_mask=skipped)
        return skip_attention(q, k, v, state, quantization="int8_fp8", return_lse=True)

    clean, clean_lse = run(v)
    v[0, 30, 1, 3] = value
    out, lse = run(v)
    assert torch.equal(out.isnan(), wrong)
    assert torch.equal(out[~wrong], clean[~wrong])
    assert torch.equal(lse, clean_lse)


def test_channels_of_any_size() -> None:
    """A channel's scale is its own: large ones cost small ones nothing."""
    q, k, v = _qkv("normal", 64, seed=4)
    sizes = 2.0 ** torch.arange(-64, 64, 2)
    out, _ = _dense("int8_fp8", q, k, v)
    assert torch.equal(_dense("int8_fp8", q, k, v * sizes)[0], out * sizes)
