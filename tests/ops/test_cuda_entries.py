"""On a CUDA device each op calls its kernel, with all that it was given. Needs no GPU: the dispatcher is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lite_attention import cute_kernels
from lite_attention.ops import ResidualState, SkipState
from tests.support.op_cases import clustered_qkv

_Q, _K, _V = clustered_qkv(0, seq_q=40)
_STATE = SkipState.for_inputs(_Q, _K)
_RESIDUAL = ResidualState.for_inputs(_Q, _K, _V, plan=[2])
_KEY_MASK = torch.ones(1, 40, dtype=torch.bool)

CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {  # op -> kernel, arguments
    "skip_attention": (
        "skip_attention_forward",
        (_Q, _K, _V, _STATE.skip_mask, _STATE.control, _STATE.threshold, None, None, _KEY_MASK),
        {"scale": 0.5, "tile_m": 64, "tile_n": 64, "quantization": "int8"},
    ),
    "residual_attention": (
        "residual_attention_forward",
        (_Q, _K, _V, *(_RESIDUAL._buffers[name] for name in _RESIDUAL.BUFFERS), None, _KEY_MASK),
        {"scale": 0.5, "tile_m": 64, "tile_n": 64, "quantization": "int8"},
    ),
    "attention": ("attention_forward", (_Q, _K, _V, _KEY_MASK), {"scale": 0.5}),
    "key_mean": ("key_mean", (_K, _KEY_MASK), {}),
    "quantize_query": ("quantize_query", (_Q, _K[:, 0]), {"scale": 0.5}),
    "quantize_key": ("quantize_key", (_K, _K[:, 0], _KEY_MASK), {"tile_n": 32}),
    "quantize_value": ("quantize_value", (_V, _KEY_MASK), {}),
}


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """Return what can be compared: times are NaN, and FP8 cannot."""
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("op", CALLS)
def test_the_kernel_gets_the_arguments_and_its_outputs_are_the_ops(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, args, options = CALLS[op]
    overload = getattr(torch.ops.lite_attention, op).default
    outputs = tuple(torch.full((1,), float(i)) for i, _ in enumerate(overload._schema.returns))
    asked = []

    def run(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return outputs if len(outputs) > 1 else outputs[0]

    monkeypatch.setattr(cute_kernels, kernel, run, raising=False)
    got = overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **options)
    assert torch.equal(torch.cat(outputs), torch.cat(got if isinstance(got, (tuple, list)) else [got]))
    ((given, given_options),) = asked
    assert given_options == options
    assert len(given) == len(args)
    assert all(x is y if y is None else torch.equal(_bytes(x), _bytes(y)) for x, y in zip(given, args, strict=True))
