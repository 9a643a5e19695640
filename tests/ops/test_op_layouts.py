"""Strides in and out, and torch's own checks of the op's registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention.ops import SkipState, skip_attention
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.schema import IMPLEMENTATIONS
from tests.support.op_cases import LAYOUTS, assert_step, clustered_qkv, stride_order


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value_dim", [8, 5])
def test_any_strides_in_dense_output_in_the_order_of_q(layout: str, value_dim: int) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in clustered_qkv(2, batch=2, seq_q=37, seq_k=45, value_dim=value_dim))
    state = SkipState(batch=2, heads=2, seq_q=37, seq_k=45, tile_m=8, tile_n=8, slots=1, threshold=-3.0)
    for _ in range(2):
        out, _ = assert_step(q, k, v, state)

    assert out.shape == (2, 37, 2, value_dim)
    if layout != "one_head_for_all":  # a stride of 0 has no place in the order
        in_order = q if q.stride(3) == 1 else q.contiguous()
        assert stride_order(out) == stride_order(in_order)
    assert out.permute(stride_order(out)).is_contiguous()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v, state.skip_mask, state.control, state.threshold)]
        fake, fake_lse = IMPLEMENTATIONS[None](*fakes, None, None, None, scale=None, tile_m=8, tile_n=8)
    assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)
    assert (fake_lse.shape, fake_lse.dtype) == ((2, 2, 37), torch.float32)


def _arguments(
    layout: str = "bshd",
    value_dim: int = 8,
    kv_heads: int = 2,
    extra: int = 0,
    masks: bool = False,
    quantization: str = "none",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call of the raw op; `extra` is room in the state that the call does not need."""
    q, k, v = (
        LAYOUTS[layout](x)
        for x in clustered_qkv(2, batch=2, seq_q=37, seq_k=45, kv_heads=kv_heads, value_dim=value_dim)
    )
    state = SkipState(
        batch=2 + extra, heads=2, seq_q=37 + 9 * extra, seq_k=45 + 300 * extra, tile_m=8, tile_n=8, threshold=-3.0
    )
    initial, must_do, key_mask = (
        (pack_bits(torch.rand(1, 2, 5, 6) < 0.3), pack_bits(torch.rand(6) < 0.3), torch.rand(2, 45) < 0.7)
        if masks
        else (None, None, None)
    )
    tensors = (q, k, v, state.skip_mask, state.control, state.threshold, initial, must_do, key_mask)
    return tensors, {"scale": None, "tile_m": 8, "tile_n": 8, "quantization": quantization}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "bhsd", "value_dim": 5},
        {"layout": "fused_last", "kv_heads": 1},
        {"layout": "last_stride_not_1"},
        {"extra": 1},
        {"masks": True},
        {"quantization": "int8"},
        {"quantization": "int8", "layout": "bhsd", "kv_heads": 1, "masks": True},
        {"quantization": "int8_fp8"},
        {"quantization": "int8_fp8", "layout": "bhsd", "kv_heads": 1, "value_dim": 5, "masks": True},
    ],
    ids=str,
)
def test_opcheck(implementation: str | None, options: dict[str, Any]) -> None:
    args, kwargs = _arguments(**options)
    torch.library.opcheck(
        IMPLEMENTATIONS[implementation],
        args,
        kwargs,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("quantization", ["none", "int8", "int8_fp8"])
def test_all_implementations_are_the_same_op_on_the_cpu(quantization: str) -> None:
    results: list[tuple[torch.Tensor, ...]] = []
    for op in IMPLEMENTATIONS.values():
        args, kwargs = _arguments(quantization=quantization)
        results.append((*op(*args, **kwargs), *args[3:5]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("needs_grad", [0, 1, 2])
def test_gradients_are_refused_and_nothing_is_written(implementation: str | None, needs_grad: int) -> None:
    qkv = clustered_qkv(2, seq_q=20)
    qkv[needs_grad].requires_grad_()
    state = SkipState.for_inputs(qkv[0], qkv[1])
    before = [buffer.clone() for buffer in state.buffers()]
    with pytest.raises(RuntimeError, match=r"no backward, and q or k or v requires a gradient.*torch\.no_grad\(\)"):
        skip_attention(*qkv, state, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(before, state.buffers(), strict=True))
    with torch.no_grad():
        plain = skip_attention(*qkv, state, implementation=implementation)
    state.reset()
    with torch.inference_mode():
        assert torch.equal(skip_attention(*qkv, state, implementation=implementation), plain)
    assert not plain.requires_grad
