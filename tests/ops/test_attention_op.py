"""`lite_attention::attention`, dense and stateless, against softmax in float64."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lite_attention
from lite_attention.ops import SkipState, attention, dense, skip_attention
from lite_attention.ops.schema import ATTENTION
from lite_attention.ops.validate import check_dense_call
from tests.support.op_cases import LAYOUTS, WRONG_QKV, Qkv, clustered_qkv, stride_order

# Of torch's kernel: it stores the weights in the dtype of v.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse in float64, of nothing but the allowed keys."""
    batch, seq_q, heads, head_dim = q.shape
    out = torch.zeros(batch, seq_q, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, seq_q), -math.inf, dtype=torch.float64)
    for b in range(batch):
        keys = slice(None) if key_mask is None else key_mask[b % len(key_mask)]
        for h in range(heads):
            kv = h * k.shape[2] // heads
            scores = q[b, :, h].double() @ k[b, keys, kv].double().T * (head_dim**-0.5 if scale is None else scale)
            if scores.shape[1]:
                lse[b, h] = scores.logsumexp(-1)
                out[b, :, h] = scores.softmax(-1) @ v[b, keys, kv].double()
    return out, lse


def _assert_attends(
    qkv: Qkv, key_mask: torch.Tensor | None = None, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = qkv
    out, lse = ATTENTION(q, k, v, key_mask, scale=scale)
    want_out, want_lse = _plain(q, k, v, key_mask, scale)
    tol = _TOLERANCE[q.dtype]
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    torch.testing.assert_close(out.double(), want_out, rtol=tol, atol=tol)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)
    return out, lse


@pytest.mark.parametrize("dtype", _TOLERANCE)
@pytest.mark.parametrize("value_dim", [8, 5, 20])
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 2, "seq_q": 37, "seq_k": 45},
        {"seq_q": 300, "seq_k": 23, "heads": 4, "kv_heads": 2},
        {"seq_q": 5, "seq_k": 700, "heads": 3, "kv_heads": 1},
        {"batch": 3, "seq_q": 1, "seq_k": 1},
    ],
    ids=str,
)
def test_softmax_attention(shape: dict[str, int], value_dim: int, dtype: torch.dtype) -> None:
    for scale in (None, 0.1):
        _assert_attends(clustered_qkv(1, **shape, value_dim=value_dim, dtype=dtype), scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_of_mask", [1, 3])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_excluded_keys_take_no_part_whatever_they_hold(value_dim: int, batch_of_mask: int, dtype: torch.dtype) -> None:
    q, k, v = clustered_qkv(2, batch=3, seq_q=37, seq_k=45, heads=4, kv_heads=2, value_dim=value_dim, dtype=dtype)
    mask = torch.rand(batch_of_mask, 45) < 0.4
    for x in (k, v):
        x[~mask.expand(3, 45)] = math.nan
    _assert_attends((q, k, v), mask)


def test_without_a_key_the_row_is_zero_and_minus_infinity() -> None:
    qkv = clustered_qkv(3, batch=3, seq_q=20, seq_k=33)
    mask = torch.ones(3, 33, dtype=torch.bool)
    mask[1] = False
    out, lse = _assert_attends(qkv, mask)
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()
    assert lse[::2].isfinite().all()
    out, lse = _assert_attends(qkv, mask[1:2])
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_minus_infinity_weigh_nothing(masked: bool) -> None:
    q, k, v = (x.abs() for x in clustered_qkv(4, batch=2, seq_q=20, seq_k=33, heads=4, kv_heads=2))
    k[1, :, 1] = -math.inf
    k[0, 3:30, 0] = -math.inf
    mask = torch.rand(2, 33) < 0.5 if masked else None
    _, lse = ATTENTION(q, k, v, mask, scale=None)
    assert (lse[1, 2:] == -math.inf).all()
    kept = torch.ones(2, 33, dtype=torch.bool) if mask is None else mask.clone()
    kept[0, 3:30] = False
    out, lse = ATTENTION(q[:1, :, :2], k[:1, :, :1], v[:1, :, :1], None if mask is None else mask[:1], scale=None)
    want_out, want_lse = _plain(q[:1, :, :2], k[:1, :, :1], v[:1, :, :1], kept[:1], None)
    torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    k[1, :, 1] = 0
    assert not ATTENTION(q[1:], k[1:, :1], v[1:, :1], None, scale=None)[1][:, 2:].any()  # log of 1


@pytest.mark.parametrize(("low", "scale"), [(-1e30, None), (-1e20, 1e20)])
def test_an_lse_of_zero_beside_rows_without_a_score(
    low: float, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's kernel says 0 of both. They are told apart part by part, however many rows there are."""
    monkeypatch.setattr(dense, "_SCORES", 64)
    without = torch.rand(2, 300, 4) < 0.5
    q = torch.where(without.unsqueeze(-1), -low, torch.zeros(8))
    k = torch.full((2, 1, 2, 8), low)
    without[1, :, :2], k[1, :, 0] = False, 0
    out, lse = ATTENTION(q, k, torch.ones(2, 1, 2, 8), None, scale=scale)
    assert torch.equal(lse, torch.where(without, -math.inf, 0.0).transpose(1, 2))
    assert torch.equal(out, torch.where(without, 0.0, 1.0).unsqueeze(-1).expand_as(out))


def test_rows_are_not_looked_at_one_by_one() -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for seq_q in (2, 500):
        with Count() as count:
            dense.attention_cpu(torch.zeros(1, seq_q, 2, 8), *torch.zeros(2, 1, 1, 2, 8), None, scale=None)
        counts.append(count.calls)
    assert counts[0] == counts[1]


def test_large_scores_do_not_overflow() -> None:
    q, k, v = clustered_qkv(4, seq_q=40, gain=1000.0)
    out, lse = _assert_attends((q, k, v))
    assert lse.abs().max() > 1e4
    assert out.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value_dim", [8, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_any_strides_in_dense_output_in_the_order_of_q(layout: str, value_dim: int, masked: bool) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in clustered_qkv(2, batch=2, seq_q=37, seq_k=45, value_dim=value_dim))
    mask = torch.rand(2, 45) < 0.7 if masked else None
    out, lse = _assert_attends((q, k, v), mask)
    if layout != "one_head_for_all":  # a stride of 0 has no place in the order
        assert stride_order(out) == stride_order(q if q.stride(3) == 1 else q.contiguous())
    assert out.permute(stride_order(out)).is_contiguous()
    with FakeTensorMode() as mode:
        fakes = [None if x is None else mode.from_tensor(x) for x in (q, k, v, mask)]
        fake, fake_lse = ATTENTION(*fakes, scale=None)
    assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)
    assert (fake_lse.shape, fake_lse.stride(), fake_lse.dtype) == (lse.shape, lse.stride(), lse.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "bhsd", "value_dim": 5}, {"layout": "fused_last", "kv_heads": 1}, {"masked": True}],
    ids=str,
)
def test_opcheck(options: dict[str, Any], dtype: torch.dtype) -> None:
    layout, masked = LAYOUTS[options.pop("layout", "bshd")], options.pop("masked", False)
    q, k, v = map(layout, clustered_qkv(2, **{"batch": 2, "seq_q": 37, "seq_k": 45, "dtype": dtype, **options}))
    mask = torch.rand(2, 45) < 0.7 if masked else None
    torch.library.opcheck(ATTENTION, (q, k, v, mask), {"scale": 0.3})


@pytest.mark.parametrize("needs_grad", [0, 1, 2])
def test_gradients_are_refused(needs_grad: int) -> None:
    qkv = clustered_qkv(2, seq_q=20)
    qkv[needs_grad].requires_grad_()
    with pytest.raises(RuntimeError, match=r"lite_attention::attention has no backward.*torch\.no_grad\(\)"):
        attention(*qkv)
    with torch.no_grad():
        plain = attention(*qkv)
    with torch.inference_mode():
        assert torch.equal(attention(*qkv), plain)
    assert not plain.requires_grad


# ---- the functional form -------------------------------------------------------------------------------------------


def test_key_lengths_and_key_mask_are_joined() -> None:
    assert lite_attention.attention is attention
    q, k, v = clustered_qkv(5, batch=2, seq_q=37, seq_k=45)
    lengths, mask = torch.tensor([30, 0]), torch.rand(1, 45) < 0.7
    joined = mask & (torch.arange(45) < lengths[:, None])
    out, lse = attention(q, k, v, scale=0.2, return_lse=True, key_lengths=lengths, key_mask=mask)
    want_out, want_lse = _plain(q, k, v, joined, 0.2)
    torch.testing.assert_close(out.double(), want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(attention(q, k, v, scale=0.2, key_mask=joined), out)


def test_as_skip_attention_that_skips_nothing() -> None:
    q, k, v = clustered_qkv(6, batch=2, seq_q=150, seq_k=170, heads=4, kv_heads=2, value_dim=5)
    options: dict[str, Any] = {"key_lengths": torch.tensor([100, 170]), "scale": 0.5, "return_lse": True}
    state = SkipState.for_inputs(q, k, threshold=-math.inf)
    for got, want in zip(attention(q, k, v, **options), skip_attention(q, k, v, state, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


_MASKS = [
    ("key_mask", torch.ones(36, dtype=torch.bool), "key_mask: expected 2 dimensions, got 1"),
    ("key_mask", torch.zeros(2, 36), "dtype of key_mask: expected torch.bool, got torch.float32"),
    ("key_mask", torch.ones(3, 36, dtype=torch.bool), "key_mask: expected (1 or 2, 36), got (3, 36)"),
    ("scale", 0.0, "scale: expected a number above 0, got 0.0"),
    ("scale", math.nan, "scale: expected a number above 0, got nan"),
]


@pytest.mark.parametrize(("argument", "value", "message"), WRONG_QKV + _MASKS)
def test_a_call_that_does_not_fit(argument: str, value: Any, message: str) -> None:
    call = {"q": torch.randn(2, 20, 4, 8), "k": torch.randn(2, 36, 2, 8), "v": torch.randn(2, 36, 2, 5)}
    call |= {"key_mask": None, "scale": None, argument: value}
    with pytest.raises(ValueError, match=re.escape(message)):
        check_dense_call(**call)
    if not (isinstance(value, torch.Tensor) and value.is_meta):  # which would be dispatched to another device
        for form in (attention, ATTENTION):
            with pytest.raises(ValueError, match=re.escape(message)):
                form(**call)


def test_key_lengths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=re.escape("key_lengths: expected shape (2,), got (3,)")):
        attention(*clustered_qkv(0, batch=2, seq_q=8), key_lengths=torch.ones(3, dtype=torch.int64))


def test_the_fake_refuses_what_the_kernel_does() -> None:
    q, k, v = (torch.randn(2, 20, 4, 8, device="meta") for _ in range(3))
    with pytest.raises(ValueError, match="head_dim of k: expected that of q, 8, got 7"):
        ATTENTION(q, k[..., :7], v, None, scale=None)
