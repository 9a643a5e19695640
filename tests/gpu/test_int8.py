"""INT8 queries and keys and FP8 values on the GPU: the ops that make them against the CPU's, and what error they cost.

That the attention kernel computes what its inputs in 8 bits say, `test_kernel.py` checks along with the other variants.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lite_attention.ops import quantize
from lite_attention.ops.tiles import visit_order
from tests.support.gpu_cases import (
    HERE,
    KEY_MEAN,
    QUANTIZE_KEY,
    QUANTIZE_QUERY,
    QUANTIZE_VALUE,
    check_step,
    dense,
    kernel,
    make_case,
    processors,
    target,
)

pytestmark = pytest.mark.usefixtures("each_kernel")


def check_values(got: torch.Tensor, want: torch.Tensor) -> None:
    """A mean that is summed up in another order moves a value to the next step now and then."""
    assert got.is_contiguous()
    off = (got.int() - want.int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 1e-4


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_quantizers_match_the_cpu(data: st.DataObject) -> None:
    dim, dtype = data.draw(st.sampled_from(HERE.head_dims("int8_fp8"))), data.draw(st.sampled_from(HERE.dtypes))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (5, 1)]))
    batch, seq = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 15, 16, 17, 79, 80, 81, 128, 255, 1000]))
    generator = torch.Generator("cuda").manual_seed(data.draw(st.integers(0, 1000)))

    def tokens(heads: int) -> torch.Tensor:
        x = torch.randn(batch, seq, heads, dim, device="cuda", generator=generator)
        x = (x * data.draw(st.sampled_from([1.0, 30.0])) + data.draw(st.sampled_from([0.0, 5.0]))).to(dtype)
        layout = data.draw(st.sampled_from(["heads inside", "heads outside", "unaligned"]))
        if layout == "heads outside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.nn.functional.pad(x, (1, 0))[..., 1:] if layout == "unaligned" else x

    q, k, v = tokens(kv_heads * group), tokens(kv_heads), tokens(kv_heads)
    key_mask = None
    if data.draw(st.booleans()):
        key_mask = torch.rand(data.draw(st.sampled_from([1, batch])), seq, device="cuda", generator=generator) < 0.6
        key_mask[-1, : seq // 2] = False
        for x in (k, v):
            excluded = key_mask.logical_not()[:, :, None, None].expand_as(x)
            x[excluded] = data.draw(st.sampled_from([1e3, math.nan, math.inf]))
    mean = KEY_MEAN(k, key_mask)
    torch.testing.assert_close(mean, quantize.key_mean(k, key_mask), atol=1e-4, rtol=1e-5)
    assert torch.equal(mean, KEY_MEAN(k, key_mask))

    values, scales, norms, lse_shift = QUANTIZE_QUERY(q, mean, scale=None)
    want_values, want_scales, want_norms, want_shift = quantize.quantize_query(q, mean, scale=None)
    assert torch.equal(values, want_values)
    torch.testing.assert_close(scales, want_scales, atol=0, rtol=1e-6)
    torch.testing.assert_close(norms, want_norms, atol=0, rtol=1e-6)
    torch.testing.assert_close(lse_shift, want_shift, atol=1e-3, rtol=1e-4)

    for quantization in ("int8", "int8_fp8"):
        _, tile_n = target().tile_shape(dim, quantization)
        values, scales, norms = QUANTIZE_KEY(k, mean, key_mask, tile_n=tile_n)
        want_values, want_scales, want_norms = quantize.quantize_key(k, mean, key_mask, tile_n=tile_n)
        check_values(values, want_values)
        torch.testing.assert_close(scales, want_scales, atol=0, rtol=1e-6)
        torch.testing.assert_close(norms, want_norms, atol=0, rtol=1e-2)  # of values that differ by a step

    values, scales = QUANTIZE_VALUE(v, key_mask)
    want_values, want_scales = quantize.quantize_value(v, key_mask)
    assert values.is_contiguous()
    assert torch.equal(values.float(), want_values.float())
    torch.testing.assert_close(scales, want_scales, atol=0, rtol=1e-6)


def test_more_batch_elements_than_a_grid_has_in_y() -> None:
    """65,535; each element alone is what it is among 70,000."""
    q, k, v = (torch.randn(70_000, 2, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mean = KEY_MEAN(k, None)
    torch.testing.assert_close(mean, k.float().mean(1), atol=1e-5, rtol=1e-5)
    _, tile_n = target().tile_shape(64, "int8")
    results = (
        *QUANTIZE_QUERY(q, mean, scale=None),
        *QUANTIZE_KEY(k, mean, None, tile_n=tile_n),
        *QUANTIZE_VALUE(v, None),
    )
    for part in (slice(0, 1), slice(65_534, 65_536), slice(69_999, None)):
        of_part = (
            *QUANTIZE_QUERY(q[part], mean[part], scale=None),
            *QUANTIZE_KEY(k[part], mean[part], None, tile_n=tile_n),
            *QUANTIZE_VALUE(v[part], None),
        )
        for whole, alone in zip(results, of_part, strict=True):
            assert torch.equal(whole[part].float(), alone.float())
    out, _ = dense(q, k, v)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=0)


def test_quantizers_opcheck() -> None:
    case = make_case(seq_q=200, seq_k=333, key_mask=True, quantization="int8", heads=4)
    mean = KEY_MEAN(case.k, case.key_mask)
    torch.library.opcheck(KEY_MEAN, (case.k, case.key_mask))
    torch.library.opcheck(QUANTIZE_QUERY, (case.q, mean), {"scale": 0.1})
    torch.library.opcheck(QUANTIZE_KEY, (case.k, mean, case.key_mask), {"tile_n": case.state.tile_n})
    torch.library.opcheck(QUANTIZE_VALUE, (case.v, case.key_mask))


@pytest.mark.parametrize("which", ["q", "k", "both"])
@pytest.mark.parametrize("quantization", ["int8", "int8_fp8"])
def test_zeros(which: str, quantization: str) -> None:
    """A scale of 0, and beside it excluded keys: their scores are 0 and -inf, not NaN."""
    for key_mask in (False, True):
        case = make_case(batch=2, seq_q=300, seq_k=405, quantization=quantization, key_mask=key_mask)
        case.v[..., 7] = 0
        if which != "k":
            case.q[:, 17:120] = 0
        if which != "q":
            case.k[:] = 3.0  # the mean takes it all off
        for _ in range(2):
            with processors(3):
                check_step(case)


@pytest.mark.parametrize("magnitude", [1e-20, 1e20])
def test_scores_out_of_range_of_int8(magnitude: float) -> None:
    """Units that underflow or are large leave excluded keys out as any other."""
    case = make_case(batch=2, seq_q=300, seq_k=405, quantization="int8", key_mask=True)
    case.q, case.k = case.q * magnitude, case.k * (1e-18 if magnitude < 1 else 1e-20)
    for _ in range(2):
        check_step(case)


def test_a_bad_number_spoils_its_group_only() -> None:
    case = make_case(seq_q=500, seq_k=700, quantization="int8", threshold=-math.inf)
    want, _ = case.call(kernel(), copy.deepcopy(case.state))
    case.q[0, 333, 1, 5] = math.inf
    out, lse = case.call(kernel(), case.state)
    spoilt = torch.zeros(500, 2, dtype=torch.bool, device="cuda")
    spoilt[320:336, 1] = True
    assert torch.equal(out[0].isnan().all(-1), spoilt)
    assert torch.equal(lse[0].isnan(), spoilt.T)
    assert torch.equal(out[0][~spoilt], want[0][~spoilt])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_spoils_its_channel_only(bad: float) -> None:
    case = make_case(seq_q=500, seq_k=700, quantization="int8_fp8", threshold=-math.inf)
    want, want_lse = case.call(kernel(), copy.deepcopy(case.state))
    case.v[0, 333, 1, 5] = bad
    out, lse = case.call(kernel(), case.state)
    spoilt = torch.zeros(2, 128, dtype=torch.bool, device="cuda")
    spoilt[1, 5] = True
    assert torch.equal(out[0].isnan(), spoilt.expand(500, 2, 128))
    assert torch.equal(out[0][:, ~spoilt], want[0][:, ~spoilt])
    assert torch.equal(lse, want_lse)


def test_rows_without_keys_are_0_whatever_their_values() -> None:
    case = make_case(batch=2, seq_q=300, seq_k=405, quantization="int8_fp8", key_mask=True)
    case.v[0] = math.nan  # none of its keys is allowed
    out, lse = case.call(kernel(), case.state)
    assert not out[0].any()
    assert lse[0].isneginf().all()
    assert out[1].isfinite().all()


def test_maxima_that_creep_up_keep_weights_below_448() -> None:
    """Each tile's scores are a little higher than those before: e4m3 would saturate, were rows not rescaled in time."""
    tile_m, tile_n = target().tile_shape(128, "int8_fp8")
    case = make_case(seq_q=tile_m, seq_k=40 * tile_n, quantization="int8_fp8", threshold=-math.inf, dtype=torch.float16)
    order = torch.tensor(visit_order(0, tile_m, 40 * tile_n, tile_m, tile_n), device="cuda")
    turns = torch.empty_like(order).scatter_(0, order, torch.arange(40, device="cuda")).repeat_interleave(tile_n)
    for step in (0.3, 0.79, 0.81, 3.0):  # log2 units from tile to tile
        case.q[:], case.k[:] = 0, 0
        case.q[..., 0], case.k[..., 0] = 4.0, (turns * step * math.log(2) * 128**0.5 / 4)[:, None].half()
        check_step(case)


@pytest.mark.parametrize("quantization", ["int8", "int8_fp8"])
@pytest.mark.parametrize("magnitude", [3.0, 10.0, 30.0, 100.0, 1000.0])
def test_large_scores(magnitude: float, quantization: str) -> None:
    """Bits of weights far below the largest would run into the sign, if not clamped: from 127 log2 units on."""
    case = make_case(seq_q=300, seq_k=2000, quantization=quantization, threshold=-math.inf)
    case.q[..., 0] *= magnitude
    case.k[..., 0] *= magnitude
    check_step(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", ["int8", "int8_fp8"])
@pytest.mark.parametrize("query", [1e-6, 1e-4, 0.0226, 0.05])
def test_small_scores_of_many_steps(query: float, quantization: str, dtype: torch.dtype) -> None:
    """Keys of 1 and -1: integer scores span 4 million steps, and together less than an octave."""
    case = make_case(seq_q=200, seq_k=960, quantization=quantization, threshold=-math.inf, dtype=dtype)
    signs = torch.randint(0, 2, (1, 960, 1, 1), device="cuda").to(dtype) * 2 - 1
    case.q[:], case.k[:], case.v[:] = query, signs, 1 + signs
    check_step(case)


@pytest.mark.parametrize("quantization", ["int8", "int8_fp8"])
def test_scores_that_overflow_are_nan(quantization: str) -> None:
    case = make_case(seq_q=200, seq_k=320, quantization=quantization, threshold=-math.inf)
    case.q[:], case.k[:] = 0, 0
    case.q[..., 0], case.k[:, :160, :, 0], case.k[:, 160:, :, 0] = 1e20, 1e20, -1e20
    out, lse = case.call(kernel(), case.state)
    assert out.isnan().all()
    assert lse.isnan().all()


def sqnr(out: torch.Tensor, want: torch.Tensor) -> float:
    return 10 * math.log10(want.double().square().mean() / (out.double() - want.double()).square().mean())


@pytest.mark.parametrize(
    ("quantization", "outliers", "least"),
    [("int8", 0.0, 25.0), ("int8", 12.0, 20.0), ("int8_fp8", 0.0, 25.0), ("int8_fp8", 12.0, 22.0)],
)
@pytest.mark.parametrize("dim", HERE.head_dims("int8_fp8"))
def test_error(dim: int, quantization: str, outliers: float, least: float) -> None:
    """Normal data, with and without channels of K that are all of one sign, far from 0."""
    q, k, v = (torch.randn(1, 2000, 4, dim, device="cuda") for _ in range(3))
    k[..., ::16] += outliers
    case = make_case(
        seq_q=2000, seq_k=2000, heads=4, kv_heads=4, dim=dim, quantization=quantization, threshold=-math.inf
    )
    case.q, case.k, case.v = (x.bfloat16() for x in (q, k, v))
    out, lse = case.call(kernel(), case.state)
    scores = torch.einsum("bihd,bjhd->bhij", case.q.double(), case.k.double()) * dim**-0.5
    want = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), case.v.double())
    assert sqnr(out, want) > least
    off = (lse - scores.logsumexp(-1)).abs() / scores.logsumexp(-1).abs().clamp(min=1)
    assert off.max() < 0.02


@pytest.mark.parametrize("seq_k", [1_500, 32_760, 75_600])
def test_error_of_long_sums_in_fp8(seq_k: int) -> None:
    """FP8 products keep 13 bits: not promoted, a row this long loses half of its sum, and other parts of values."""
    case = make_case(seq_q=192, seq_k=seq_k, quantization="int8_fp8", threshold=-math.inf)
    for x, mean in ((case.q, 0.0), (case.k, 0.0), (case.v, 1.0)):
        x.normal_(mean)
    out, lse = case.call(kernel(), case.state)
    want, want_lse = case.reference(case.state)
    assert sqnr(out, want) > 30  # 17 without promotion; bf16 rounds to 55
    assert (lse - want_lse).abs().max() < 0.01  # 0.5 without


@pytest.mark.parametrize("sink", [6.0, 8.0, 10.0])
def test_small_weights_beside_a_sink_count_in_fp8(sink: float) -> None:
    """One key outweighs any other by e^sink, and all of them together weigh as much: e4m3 still has their weights."""
    case = make_case(seq_q=192, seq_k=32_760, quantization="int8_fp8", threshold=-math.inf)
    case.q.normal_(0, 0.02)
    case.k.normal_()
    case.q[..., 0], case.k[..., 0] = 4.0, 0.0
    case.k[:, 77, :, 0] = sink * 128**0.5 / 4
    case.v.normal_(1.0)
    case.v[:, 77] += 3.0
    out, lse = case.call(kernel(), case.state)
    want, want_lse = case.reference(case.state)
    assert sqnr(out, want) > 25
    assert (lse - want_lse).abs().max() < 0.05


def test_an_offset_of_the_keys_costs_nothing() -> None:
    case = make_case(seq_q=700, seq_k=900, quantization="int8", threshold=-math.inf, dtype=torch.float16)
    out, lse = case.call(kernel(), copy.deepcopy(case.state))
    offset = torch.randn(128, device="cuda").sign().half() * 2
    case.k = case.k + offset
    moved, moved_lse = case.call(kernel(), case.state)
    assert sqnr(moved, out) > 30  # the offset rounds the keys once more
    shift = torch.einsum("bihd,d->bhi", case.q.double(), offset.double()) * 128**-0.5
    torch.testing.assert_close(moved_lse.double(), lse + shift, atol=0.05, rtol=0)


def test_what_is_not_supported_says_why() -> None:
    q = torch.randn(1, 100, 2, 96, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected head dims"):
        KEY_MEAN(q, None)
    with pytest.raises(RuntimeError, match="bfloat16 and float16"):
        KEY_MEAN(q.float(), None)
    q = torch.randn(1, 100, 2, 128, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="bfloat16 and float16"):
        QUANTIZE_VALUE(q.float(), None)
    with pytest.raises(ValueError, match=r"tile_n: expected \d+.* on cuda:0, got 56"):
        QUANTIZE_KEY(q, KEY_MEAN(q, None), None, tile_n=56)
