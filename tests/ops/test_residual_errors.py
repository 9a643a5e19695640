"""Every ValueError of `residual_attention` and of its functional form: what it says, and that nothing has changed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from lite_attention.ops import ResidualState, SkipState, residual_attention, skip_attention
from lite_attention.ops import control as c
from lite_attention.ops.check_calls import check_residual_call
from lite_attention.ops.schema import RESIDUAL_IMPLEMENTATIONS
from lite_attention.ops.signature import call_signature
from tests.support.op_cases import SK, SQ, WRONG_QKV, B, D, H

_SIZES = {"batch": B, "heads": H, "seq_q": SQ, "seq_k": SK, "value_dim": 5, "tile_m": 8, "tile_n": 8, "slots": 2}


def _state(**options: Any) -> ResidualState:
    return ResidualState(**{**_SIZES, "plan": [2, 1, 0], **options})


def _call(**options: Any) -> dict[str, Any]:
    """Return the arguments of a call that is in order."""
    state = _state(**options)
    return {
        "q": torch.randn(B, SQ, H, D), "k": torch.randn(B, SK, 2, D), "v": torch.randn(B, SK, 2, 5),
        **{name: state._buffers[name] for name in state.BUFFERS},
        "initial_mask": torch.zeros(1, H, 3, 1, dtype=torch.int32), "must_do": torch.zeros(1, dtype=torch.int32),
        "key_mask": torch.ones(B, SK, dtype=torch.bool), "scale": None, "tile_m": 8, "tile_n": 8,
    }  # fmt: skip


def _ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def _e4m3(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(torch.float8_e4m3fn)


_ROOM = "room for (slots, 2, 2, 4, 3, 1) for q (2, 20, 4, 8), 36 keys"
_RESIDUAL_ROOM = "residual: expected room for (2, 1 or 2, 2, 4, 20, 5), got "
_LSE = "row_lse: expected room for (2, 3, 2, 4, 20), got "
_SCALE = "residual_scale: expected room for (2, 2, 2, 4, 20), got "
WRONG = [
    ("scale", 0.0, "scale: expected a number above 0, got 0.0"),
    ("scale", math.nan, "scale: expected a number above 0, got nan"),
    ("tile_m", 0, "tile_m, tile_n: expected positive sizes, got (0, 8)"),
    ("skip_mask", _ints(2, B, H, 3, 1), "skip_mask: expected 6 dimensions, got 5"),
    ("skip_mask", _ints(2, 2, B, H, 3, 1).long(), "dtype of skip_mask: expected torch.int32, got torch.int64"),
    ("skip_mask", _ints(2, 2, B, H, 3, 1).to("meta"), "device of skip_mask: expected that of q, cpu, got meta"),
    ("skip_mask", _ints(2, 2, B, H, 3, 2)[..., ::2], "skip_mask: expected a contiguous tensor, got one that is not"),
    ("skip_mask", _ints(2, 1, B, H, 3, 1), f"skip_mask: expected {_ROOM}"),
    ("skip_mask", _ints(2, 2, 1, H, 3, 1), f"skip_mask: expected {_ROOM}"),
    ("skip_mask", _ints(2, 2, B, 8, 3, 1), f"skip_mask: expected {_ROOM}"),
    ("skip_mask", _ints(2, 2, B, H, 2, 1), f"skip_mask: expected {_ROOM}"),
    ("skip_mask", _ints(2, 2, B, H, 3, 0), f"skip_mask: expected {_ROOM}"),
    ("control", _ints(1, 24), "control: expected 1 dimensions, got 2"),
    ("control", _ints(24).float(), "dtype of control: expected torch.int32, got torch.float32"),
    ("control", _ints(48)[::2], "control: expected a contiguous tensor, got one that is not"),
    ("control", _ints(32), "control: expected 24 words for 2 slots, got 32 words"),
    ("plan", _ints(1, 3), "plan: expected 1 dimensions, got 2"),
    ("plan", _ints(3).long(), "dtype of plan: expected torch.int32, got torch.int64"),
    ("plan", _ints(3).to("meta"), "device of plan: expected that of q, cpu, got meta"),
    ("plan", _ints(0), "steps of plan: expected at least 1, got 0"),
    ("plan", _ints(6)[::2], "plan: expected a contiguous tensor, got one that is not"),
    ("keep", torch.zeros(1, 3), "keep: expected 1 dimensions, got 2"),
    ("keep", torch.zeros(3).double(), "dtype of keep: expected torch.float32, got torch.float64"),
    ("keep", torch.zeros(0), "steps of keep: expected at least 1, got 0"),
    ("times", torch.zeros(6), "times: expected 2 dimensions, got 1"),
    ("times", torch.zeros(2, 3).half(), "dtype of times: expected torch.float32, got torch.float16"),
    ("times", torch.zeros(2, 2), "times: expected (2, 3), got (2, 2)"),
    ("times", torch.zeros(1, 3), "times: expected (2, 3), got (1, 3)"),
    ("residual", torch.zeros(2, 2, B, H, SQ, 5).double(), "dtype of residual: expected one of torch.float8_e4m3fn, "),
    ("residual", _ints(2, 2, B, H, SQ, 5), "torch.float32, got torch.int32"),
    ("residual", _e4m3(2, 2, B, H, SQ * 5), "residual: expected 6 dimensions, got 5"),
    ("residual", _e4m3(2, 2, B, H, SQ, 5).to("meta"), "device of residual: expected that of q, cpu, got meta"),
    ("residual", _e4m3(2, 2, B, H, SQ, 10)[..., ::2], "residual: expected a contiguous tensor, got one that is not"),
    ("residual", _e4m3(1, 2, B, H, SQ, 5), _RESIDUAL_ROOM),
    ("residual", _e4m3(2, 3, B, H, SQ, 5), _RESIDUAL_ROOM),
    ("residual", _e4m3(2, 2, 1, H, SQ, 5), _RESIDUAL_ROOM),
    ("residual", _e4m3(2, 2, B, 2, SQ, 5), _RESIDUAL_ROOM),
    ("residual", _e4m3(2, 2, B, H, 19, 5), _RESIDUAL_ROOM),
    ("residual", _e4m3(2, 2, B, H, SQ, 8), _RESIDUAL_ROOM),
    ("residual", torch.zeros(2, 2, B, H, SQ, 5), "residual_scale: expected None beside residuals in torch.float32"),
    ("residual_scale", None, "residual_scale: expected a tensor beside residuals in torch.float8_e4m3fn, got None"),
    ("residual_scale", torch.zeros(2, 2, B, H), "residual_scale: expected 5 dimensions, got 4"),
    ("residual_scale", torch.zeros(2, 2, B, H, SQ).half(), "dtype of residual_scale: expected torch.float32"),
    ("residual_scale", torch.zeros(2, 1, B, H, SQ), _SCALE),
    ("residual_scale", torch.zeros(2, 2, 1, H, SQ), _SCALE),
    ("residual_scale", torch.zeros(2, 2, B, H, 19), _SCALE),
    ("row_lse", torch.zeros(2, 3, B, H), "row_lse: expected 5 dimensions, got 4"),
    ("row_lse", torch.zeros(2, 3, B, H, SQ).double(), "dtype of row_lse: expected torch.float32, got torch.float64"),
    (
        "row_lse",
        torch.zeros(2, 3, B, H, 2 * SQ)[..., ::2],
        "row_lse: expected a contiguous tensor, got one that is not",
    ),
    ("row_lse", torch.zeros(2, 2, B, H, SQ), _LSE),
    ("row_lse", torch.zeros(1, 3, B, H, SQ), _LSE),
    ("row_lse", torch.zeros(2, 3, B, 2, SQ), _LSE),
    ("row_lse", torch.zeros(2, 3, B, H, 19), _LSE),
    ("initial_mask", _ints(1, H, 3), "initial_mask: expected 4 dimensions, got 3"),
    ("initial_mask", _ints(1, H, 3, 1).bool(), "dtype of initial_mask: expected torch.int32, got torch.bool"),
    ("initial_mask", _ints(1, 2, 3, 1), "initial_mask: expected (1 or 2, 1 or 4, 3, 1)"),
    ("must_do", _ints(1).long(), "dtype of must_do: expected torch.int32, got torch.int64"),
    ("must_do", _ints(0), "must_do: expected 1 words for q (2, 20, 4, 8), 36 keys and tiles of 8 x 8, got 0"),
    ("key_mask", torch.zeros(B, SK), "dtype of key_mask: expected torch.bool, got torch.float32"),
    ("key_mask", torch.ones(3, SK, dtype=torch.bool), "key_mask: expected (1 or 2, 36), got (3, 36)"),
]


def _id(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("argument", "value", "message"), WRONG_QKV + WRONG, ids=_id)
def test_a_call_that_does_not_fit(argument: str, value: Any, message: str) -> None:
    call = {**_call(), argument: value}
    before = {name: x.clone() for name, x in call.items() if isinstance(x, torch.Tensor) and not x.is_meta}
    *tensors, scale, tile_m, tile_n = call.values()
    with pytest.raises(ValueError, match=re.escape(message)):
        check_residual_call(call_signature(tuple(tensors), scale, tile_m, tile_n))
    if not (isinstance(value, torch.Tensor) and value.is_meta):  # which would be dispatched to another device
        for op in RESIDUAL_IMPLEMENTATIONS.values():
            with pytest.raises(ValueError, match=re.escape(message)):
                op(*tensors, scale=scale, tile_m=tile_m, tile_n=tile_n)
    for name, x in before.items():
        assert torch.equal(call[name].float().nan_to_num(-1), x.float().nan_to_num(-1)), name


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (c.SLOT, 2, "control: expected a slot from 0 to 1, got 2"),
        (c.slot_word(0, c.STEP), -1, "control: expected a step of at least 0, got -1"),
        (c.SIGNATURE, 7, "control: expected a state, got memory that nobody wrote"),
    ],
)
def test_control_words_that_are_none(word: int, value: int, message: str) -> None:
    call = _call()
    call["control"][word] = value
    before = call["control"].clone()
    *tensors, scale, tile_m, tile_n = call.values()
    with pytest.raises(ValueError, match=message):
        torch.ops.lite_attention.residual_attention(*tensors, scale=scale, tile_m=tile_m, tile_n=tile_n)
    assert torch.equal(call["control"], before)
    assert not call["skip_mask"].any()


@pytest.mark.parametrize("implementation", RESIDUAL_IMPLEMENTATIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_quantization_that_is_none(implementation: str | None, device: str) -> None:
    """The fake refuses what the kernel does, so that a compiler tells it."""
    call = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in _call().items()}
    *tensors, scale, tile_m, tile_n = call.values()
    with pytest.raises(ValueError, match="quantization: expected 'none' or 'int8' or 'int8_fp8', got 'fp8'"):
        RESIDUAL_IMPLEMENTATIONS[implementation](
            *tensors, scale=scale, tile_m=tile_m, tile_n=tile_n, quantization="fp8"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "triton"}, "implementation: expected None or 'reference' or 'portable', got 'triton'"),
        ({"quantization": "fp8"}, "quantization: expected 'none' or 'int8' or 'int8_fp8', got 'fp8'"),
        ({"key_lengths": torch.tensor([3])}, "key_lengths: expected shape (2,), got (1,)"),
        ({"scale": -0.5}, "scale: expected a number above 0, got -0.5"),
        ({"must_do": [3]}, "must_do must hold pairs of start and end"),
        ({"must_skip": [5, 2]}, "must_skip expects 0 <= start <= end <= 36 keys"),
        ({"key_mask": torch.zeros(B, SK), "must_skip": [0, 1]}, "dtype of key_mask: expected torch.bool, got torch.f"),
        ({"q": torch.zeros(B, SQ, D)}, "q: expected (batch, seq_len, heads, head_dim), got 3 dimensions"),
        ({"state": None}, "state: expected a ResidualState, got NoneType"),
    ],
    ids=_id,
)
def test_the_functional_form(options: dict[str, Any], message: str) -> None:
    call, state = _call(), _state()
    given = {"q": call["q"], "k": call["k"], "v": call["v"], "state": state, **options}
    before = [buffer.float().nan_to_num(-1) for buffer in state.buffers()]
    with pytest.raises(ValueError, match=re.escape(message)):
        residual_attention(**given)
    after = [buffer.float().nan_to_num(-1) for buffer in state.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_states_of_the_other_method_are_refused() -> None:
    call = _call()
    qkv = [call[name] for name in "qkv"]
    votes = SkipState(batch=B, heads=H, seq_q=SQ, seq_k=SK, tile_m=8, tile_n=8)
    with pytest.raises(ValueError, match="state: expected a ResidualState, got SkipState"):
        residual_attention(*qkv, votes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state: expected a SkipState, got ResidualState"):
        skip_attention(*qkv, _state())  # type: ignore[arg-type]
