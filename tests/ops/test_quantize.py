"""The ops that quantize queries, keys and values against their contract in float64, one group at a time."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.op_cases import LAYOUTS, clustered_qkv, dequantized_value

OPS = torch.ops.lite_attention
LOG2_E = math.log2(math.e)
SHAPES: list[dict[str, int]] = [
    {"batch": 2, "seq_q": 37, "seq_k": 45},
    {"batch": 1, "seq_q": 16, "seq_k": 24, "heads": 4, "kv_heads": 2},
    {"batch": 3, "seq_q": 1, "seq_k": 1, "heads": 3, "kv_heads": 1},
    {"batch": 1, "seq_q": 100, "seq_k": 130, "heads": 1, "head_dim": 64},
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def _key_mask(kind: str, batch: int, seq: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.rand(1 if kind == "one for all" else batch, seq) < 0.6
    if kind == "some without":
        mask[0] = False
    return mask


def _assert_group(
    x: torch.Tensor,
    counted: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    norm: torch.Tensor,
    factor: float = 1.0,
) -> None:
    """Hold a group, [rows, D], to the contract: its scale is that of the rows that count, its norm of the longest."""
    largest = float(x[counted].abs().max()) if counted.any() else 0.0
    torch.testing.assert_close(float(scale), largest / 127 * factor, rtol=1e-5, atol=0)
    exact = (x * 127 / largest if largest else 0 * x).clamp(-127, 127)
    # Either neighbor of a tie, which rounding before may decide.
    assert ((values - exact).abs() <= 0.5 + 1e-4).all()
    longest = max(math.hypot(*row) for row in values.tolist())
    torch.testing.assert_close(float(norm), longest * float(scale), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", ["none", "each", "one for all", "some without"])
def test_keys(shape: dict[str, int], masked: str, dtype: torch.dtype) -> None:
    _, k, _ = clustered_qkv(0, **shape, dtype=dtype)
    k = k + torch.linspace(-9, 9, k.shape[3]).to(dtype)
    batch, seq, heads, _ = k.shape
    mask, tile_n = _key_mask(masked, batch, seq), 7
    mean = OPS.key_mean(k, mask)
    values, scales, norms = OPS.quantize_key(k, mean, mask, tile_n=tile_n)
    assert (mean.dtype, scales.dtype, values.dtype) == (torch.float32, torch.float32, torch.int8)
    assert (values.shape, scales.shape) == (k.shape, (batch, heads, math.ceil(seq / tile_n)))
    assert (norms.dtype, norms.shape) == (scales.dtype, scales.shape)
    for b in range(batch):
        allowed = torch.ones(seq, dtype=torch.bool) if mask is None else mask[b % len(mask)]
        for h in range(heads):
            keys = k[b, :, h].double()
            want = keys[allowed].mean(0) if allowed.any() else torch.zeros(k.shape[3]).double()
            torch.testing.assert_close(mean[b, h].double(), want, rtol=1e-5, atol=1e-5)
            for j in range(scales.shape[2]):
                tile = slice(j * tile_n, (j + 1) * tile_n)
                shifted = (keys[tile].float() - mean[b, h]).double()
                _assert_group(shifted, allowed[tile], values[b, tile, h], scales[b, h, j], norms[b, h, j])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_queries(shape: dict[str, int], scale: float | None, dtype: torch.dtype) -> None:
    q, k, _ = clustered_qkv(0, **shape, dtype=dtype)
    batch, seq, heads, dim = q.shape
    mean = torch.randn(batch, k.shape[2], dim)
    values, scales, norms, lse_shift = OPS.quantize_query(q, mean, scale=scale)
    assert (values.dtype, scales.dtype, lse_shift.dtype) == (torch.int8, torch.float32, torch.float32)
    assert (values.shape, scales.shape) == (q.shape, (batch, heads, math.ceil(seq / 16)))
    assert (norms.dtype, norms.shape) == (scales.dtype, scales.shape)
    assert lse_shift.shape == (batch, heads, seq)
    factor = dim**-0.5 if scale is None else scale
    for b in range(batch):
        for h in range(heads):
            rows = q[b, :, h].double()
            lost = rows @ mean[b, h * k.shape[2] // heads].double() * factor
            torch.testing.assert_close(lse_shift[b, h].double(), lost, rtol=1e-5, atol=1e-5)
            for i in range(scales.shape[2]):
                group = slice(i * 16, (i + 1) * 16)
                everyone = torch.ones(len(rows[group]), dtype=torch.bool)
                _assert_group(
                    rows[group], everyone, values[b, group, h], scales[b, h, i], norms[b, h, i], factor * LOG2_E
                )


# What e4m3 has, 0 to 448: a step of 2^-9 up to 2^-6, then eight to each power of two. The last 480 would be NaN.
E4M3 = torch.tensor([m / 512 for m in range(8)] + [(8 + m) / 8 * 2.0**e for e in range(-6, 9) for m in range(8)][:-1])


def _nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return the number of e4m3 next to each of x, float64; of two as near, the one whose last bit is 0."""
    distances = (x.abs().unsqueeze(-1) - E4M3.double()).abs()
    above = len(E4M3) - 1 - distances.flip(-1).argmin(-1)
    below = distances.argmin(-1)
    return E4M3.double()[torch.where(below % 2 == 0, below, above)] * x.sign()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", ["none", "each", "one for all", "some without"])
def test_values(shape: dict[str, int], masked: str, dtype: torch.dtype) -> None:
    _, _, v = clustered_qkv(0, **shape, value_dim=5, dtype=dtype)
    v = v * torch.logspace(-12, 12, 5).to(dtype)  # of float16, channels of 0 and of infinity
    batch, seq, heads, dim = v.shape
    mask = _key_mask(masked, batch, seq)
    values, scales = OPS.quantize_value(v, mask)
    padded = 32 * math.ceil(seq / 32)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, (batch, heads, dim, padded))
    assert (scales.dtype, scales.shape) == (torch.float32, (batch, heads, dim))
    in_order = torch.empty(values.shape, dtype=torch.float64)
    for first, t, j in itertools.product(range(0, padded, 16), range(4), range(4)):
        in_order[..., first + 8 * (j // 2) + 2 * t + j % 2] = values[..., first + 4 * t + j].double()
    assert not in_order[..., seq:].any()
    for b in range(batch):
        allowed = torch.ones(seq, dtype=torch.bool) if mask is None else mask[b % len(mask)]
        for h in range(heads):
            assert not in_order[b, h, :, :seq][:, ~allowed].any()
            for d in range(dim):
                channel, got = v[b, allowed, h, d].double(), in_order[b, h, d, :seq][allowed]
                largest = float(channel.abs().max()) if len(channel) else 0.0
                torch.testing.assert_close(float(scales[b, h, d]), largest / 448, rtol=1e-6, atol=0)
                if not 0 < largest < math.inf:
                    assert not got.any()
                    continue
                exact = channel * 448 / largest
                near = torch.stack([_nearest_e4m3(exact * (1 + nudge)) for nudge in (-1e-6, 0, 1e-6)])
                assert (got == near).any(0).all()
                assert got.abs().max() == 448


def test_ties_go_to_even() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -126.5]).view(1, 1, 1, 8)
    want = [127, 0, 2, 2, 0, -2, -2, -126]
    mean = torch.zeros(1, 1, 8)
    assert OPS.quantize_query(x, mean, scale=None)[0].flatten().tolist() == want
    assert OPS.quantize_key(x, mean, None, tile_n=4)[0].flatten().tolist() == want


def test_ties_of_e4m3_go_to_even_and_small_values_lose_bits() -> None:
    x = torch.tensor([448, 17, 19, -17, 2**-9, 1.5 * 2**-9, -2.5 * 2**-9, 2**-10, 1.1 * 2**-10])
    want = [448, 16, 20, -16, 2**-9, 2**-8, -(2**-8), 0, 2**-9]
    assert dequantized_value(x.view(1, 9, 1, 1), None).flatten().tolist() == want  # the scale is 1


def test_products_are_scores_in_log2_units_and_norms_bound_them() -> None:
    q, k, _ = clustered_qkv(1, seq_q=16, heads=1, head_dim=64)
    mean = OPS.key_mean(k, None)
    (q8, q_scales, q_norms, _), (k8, k_scales, k_norms) = (
        OPS.quantize_query(q, mean, scale=None),
        OPS.quantize_key(k, mean, None, tile_n=16),
    )
    scores = (q8[0, :, 0].int() @ k8[0, :, 0].int().T) * q_scales * k_scales
    assert scores.abs().max() <= (q_norms * k_norms).max() * (1 + 1e-6)
    want = q[0, :, 0].double() @ (k - mean)[0, :, 0].double().T / 8 * LOG2_E
    torch.testing.assert_close(scores[0].double(), want, rtol=0, atol=0.02 * float(want.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_in_contiguous_out_as_the_fakes_say(layout: str) -> None:
    qkv = [LAYOUTS[layout](x) for x in clustered_qkv(2, batch=2, seq_q=37, seq_k=45)]
    mask = torch.rand(2, 45) < 0.7

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean = OPS.key_mean(k, mask)
        keys, values = OPS.quantize_key(k, mean, mask, tile_n=8), OPS.quantize_value(v, mask)
        return mean, *OPS.quantize_query(q, mean, scale=None), *keys, *values

    results, plain = run(*qkv, mask), run(*(x.contiguous() for x in qkv), mask)
    with FakeTensorMode() as mode:
        fakes = run(*(mode.from_tensor(x) for x in (*qkv, mask)))
    for result, want, fake in zip(results, plain, fakes, strict=True):
        assert torch.equal(result.float(), want.float())
        assert result.is_contiguous()
        assert (fake.shape, fake.stride(), fake.dtype) == (result.shape, result.stride(), result.dtype)


@pytest.mark.parametrize("value", [1e30, -math.inf, math.nan])
def test_excluded_keys_count_neither_in_the_mean_nor_in_a_scale(value: float) -> None:
    _, k, _ = clustered_qkv(3, batch=2, seq_q=45)
    mask = torch.rand(2, 45) < 0.7
    mask[1, 8:16] = False  # a whole tile
    other = k.clone()
    other[~mask] = value
    mean = OPS.key_mean(k, mask)
    assert torch.equal(OPS.key_mean(other, mask), mean)
    values, scales, _ = OPS.quantize_key(k, mean, mask, tile_n=8)
    other_values, other_scales, _ = OPS.quantize_key(other, mean, mask, tile_n=8)
    assert torch.equal(other_scales, scales)
    assert torch.equal(other_values[mask], values[mask])
    assert not scales[1, :, 1].any()
    assert not other_values[1, 8:16].any()
    assert other_values.abs().max() <= 127


@pytest.mark.parametrize("value", [1e30, -math.inf, math.nan])
def test_excluded_values_are_zero_and_not_in_a_scale(value: float) -> None:
    _, _, v = clustered_qkv(3, batch=2, seq_q=45)
    mask = torch.rand(2, 45) < 0.7
    other = v.clone()
    other[~mask] = value
    for got, want in zip(OPS.quantize_value(other, mask), OPS.quantize_value(v, mask), strict=True):
        assert torch.equal(got.float(), want.float())
    assert not dequantized_value(other, mask)[~mask].any()


def test_nothing_but_zeros() -> None:
    x, mean = torch.zeros(1, 40, 2, 8), torch.zeros(1, 2, 8)
    x[:, 16:32, 0] = 1
    values, scales, _, _ = OPS.quantize_query(x, mean, scale=None)
    assert scales.ne(0).tolist() == [[[False, True, False], [False, False, False]]]
    assert values.unique().tolist() == [0, 127]
    assert not any(x.any() for x in OPS.quantize_key(mean[:, None].expand(1, 40, 2, 8), mean, None, tile_n=8))
    values, scales = OPS.quantize_value(x, None)
    assert scales.ne(0).flatten(0, 1).tolist() == [[True] * 8, [False] * 8]
    assert values.float().unique().tolist() == [0, 448]
    tiny = torch.full((1, 3, 1, 8), 1e-42)  # 127 / it is infinite
    assert all(x.isfinite().all() for x in OPS.quantize_query(tiny, torch.zeros(1, 1, 8), scale=None))
    assert dequantized_value(torch.cat([tiny, 0 * tiny]), None).isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_in_the_scale_of_its_group(value: float) -> None:
    q, k, v = clustered_qkv(4, batch=2, seq_q=45)
    mean = OPS.key_mean(k, None)
    clean, clean_scales, _, _ = OPS.quantize_query(q, mean, scale=None)
    q[1, 20, 1, 3] = value
    values, scales, _, _ = OPS.quantize_query(q, mean, scale=None)
    assert (~scales.isfinite()).nonzero().tolist() == [[1, 1, 1]]
    assert not values[1, 16:32, 1].any()
    values[1, 16:32, 1], scales[1, 1, 1] = clean[1, 16:32, 1], clean_scales[1, 1, 1]
    assert torch.equal(values, clean)
    assert torch.equal(scales, clean_scales)

    k[0, 30, 1, 3] = value
    mean = OPS.key_mean(k, None)
    assert (~mean.isfinite()).nonzero().tolist() == [[0, 1, 3]]
    values, scales, _ = OPS.quantize_key(k, mean, None, tile_n=8)
    assert not scales[0, 1].isfinite().any()
    assert not values[0, :, 1].any()
    assert scales[1].isfinite().all()
    assert scales[0, 0].isfinite().all()

    clean, clean_scales = OPS.quantize_value(v, None)
    v[0, 30, 1, 3] = value
    values, scales = OPS.quantize_value(v, None)
    assert (~scales.isfinite()).nonzero().tolist() == [[0, 1, 3]]
    torch.testing.assert_close(float(scales[0, 1, 3]), abs(value), equal_nan=True)
    values, clean = values.float(), clean.float()
    assert not values[0, 1, 3].any()
    values[0, 1, 3], scales[0, 1, 3] = clean[0, 1, 3], clean_scales[0, 1, 3]
    assert torch.equal(values, clean)
    assert torch.equal(scales, clean_scales)


# ---- registration and errors ---------------------------------------------------------------------------------------


def _calls() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Return each op with arguments that are in order, positional and by name."""
    q, k, v = clustered_qkv(5, batch=2, seq_q=37, seq_k=45, heads=4, kv_heads=2, value_dim=5)
    mask, mean = torch.rand(2, 45) < 0.7, torch.randn(2, 2, 8)
    return {
        "key_mean": (OPS.key_mean.default, {"k": k, "key_mask": mask}, {}),
        "quantize_query": (OPS.quantize_query.default, {"q": q, "mean": mean}, {"scale": None}),
        "quantize_key": (OPS.quantize_key.default, {"k": k, "mean": mean, "key_mask": mask}, {"tile_n": 8}),
        "quantize_value": (OPS.quantize_value.default, {"v": v, "key_mask": mask}, {}),
    }


@pytest.mark.parametrize("name", _calls())
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "fused_last", "last_stride_not_1"])
def test_opcheck(name: str, layout: str) -> None:
    op, tensors, options = _calls()[name]
    tensors = {key: LAYOUTS[layout](x) if x.dim() == 4 else x for key, x in tensors.items()}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, tuple(tensors.values()), options, test_utils=checks)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("key_mean", "k"),
        ("quantize_query", "q"),
        ("quantize_query", "mean"),
        ("quantize_key", "mean"),
        ("quantize_value", "v"),
    ],
)
def test_gradients_are_refused(name: str, argument: str) -> None:
    op, tensors, options = _calls()[name]
    tensors[argument].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name} has no backward, and .*{argument}.* requires a gradient"):
        op(*tensors.values(), **options)
    with torch.no_grad():
        op(*tensors.values(), **options)


_K, _MEAN = torch.randn(2, 45, 2, 8), torch.randn(2, 2, 8)
ERRORS = [
    ("key_mean", "k", _K[0], "k: expected (batch, seq_len, heads, head_dim), got 3 dimensions"),
    ("key_mean", "k", _K.int(), "dtype of k: expected float16, bfloat16, float32 or float64, got torch.int32"),
    ("key_mean", "k", _K[:, :0], "seq_len of k: expected at least 1, got 0"),
    ("key_mean", "key_mask", torch.ones(2, 44, dtype=torch.bool), "key_mask: expected (1 or 2, 45), got (2, 44)"),
    ("key_mean", "key_mask", torch.ones(2, 45), "dtype of key_mask: expected torch.bool, got torch.float32"),
    ("quantize_query", "q", torch.randn(2, 37, 3, 8), "heads of q: expected a multiple of those of mean, 2, got 3"),
    ("quantize_query", "mean", _MEAN[0], "mean: expected (batch, kv_heads, head_dim), got 2 dimensions"),
    ("quantize_query", "mean", _MEAN.double(), "dtype of mean: expected torch.float32, got torch.float64"),
    ("quantize_query", "mean", _MEAN[:1], "batch of mean: expected that of q, 2, got 1"),
    ("quantize_query", "mean", _MEAN[..., :7], "head_dim of mean: expected that of q, 8, got 7"),
    ("quantize_query", "scale", 0.0, "scale: expected a number above 0, got 0.0"),
    ("quantize_key", "mean", torch.randn(2, 1, 8), "heads of mean: expected those of k, 2, got 1"),
    ("quantize_key", "mean", _MEAN.half(), "dtype of mean: expected torch.float32, got torch.float16"),
    ("quantize_key", "key_mask", torch.ones(45, dtype=torch.bool), "key_mask: expected 2 dimensions, got 1"),
    ("quantize_key", "tile_n", 0, "tile_n: expected at least 1, got 0"),
    ("quantize_value", "v", _K[0], "v: expected (batch, seq_len, heads, head_dim), got 3 dimensions"),
    ("quantize_value", "v", _K.int(), "dtype of v: expected float16, bfloat16, float32 or float64, got torch.int32"),
    ("quantize_value", "v", _K[..., :0], "head_dim of v: expected at least 1, got 0"),
    ("quantize_value", "key_mask", torch.ones(2, 44, dtype=torch.bool), "key_mask: expected (1 or 2, 45), got (2, 44)"),
    ("quantize_value", "key_mask", torch.ones(2, 45), "dtype of key_mask: expected torch.bool, got torch.float32"),
]


@pytest.mark.parametrize(("name", "argument", "value", "message"), ERRORS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_call_that_does_not_fit(name: str, argument: str, value: Any, message: str, device: str) -> None:
    op, tensors, options = _calls()[name]
    (options if argument in options else tensors)[argument] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        op(*(x.to(device) for x in tensors.values()), **options)
