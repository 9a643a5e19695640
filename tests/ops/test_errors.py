"""Every ValueError of the op and of the functional form: what it says, and that nothing has changed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from lite_attention.ops import SkipState, skip_attention
from lite_attention.ops import control as c
from lite_attention.ops.check_calls import check_call
from lite_attention.ops.schema import IMPLEMENTATIONS
from lite_attention.ops.signature import call_signature
from lite_attention.ops.validate import check_inputs, check_threshold
from tests.support.op_cases import SK, SQ, WRONG_QKV, B, D, H


def _call() -> dict[str, Any]:
    """Return the arguments of a call that is in order."""
    state = SkipState(batch=B, heads=H, seq_q=SQ, seq_k=SK, tile_m=8, tile_n=8, slots=2)
    return {
        "q": torch.randn(B, SQ, H, D), "k": torch.randn(B, SK, 2, D), "v": torch.randn(B, SK, 2, 5),
        "skip_mask": state.skip_mask, "control": state.control, "threshold": state.threshold,
        "initial_mask": torch.zeros(1, H, 3, 1, dtype=torch.int32), "must_do": torch.zeros(1, dtype=torch.int32),
        "key_mask": torch.ones(B, SK, dtype=torch.bool), "scale": None, "tile_m": 8, "tile_n": 8,
    }  # fmt: skip


def _ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


STATE = [
    ("scale", 0.0, "scale: expected a number above 0, got 0.0"),
    ("scale", -1.0, "scale: expected a number above 0, got -1.0"),
    ("scale", math.nan, "scale: expected a number above 0, got nan"),
    ("tile_m", 0, "tile_m, tile_n: expected positive sizes, got (0, 8)"),
    ("tile_n", -8, "tile_m, tile_n: expected positive sizes, got (8, -8)"),
    ("skip_mask", _ints(2, B, H, 3), "skip_mask: expected 5 dimensions, got 4"),
    ("skip_mask", _ints(2, B, H, 3, 1).long(), "dtype of skip_mask: expected torch.int32, got torch.int64"),
    ("skip_mask", _ints(2, B, H, 3, 1).to("meta"), "device of skip_mask: expected that of q, cpu, got meta"),
    ("skip_mask", _ints(2, B, H, 3, 2)[..., ::2], "skip_mask: expected a contiguous tensor, got one that is not"),
    (
        "skip_mask",
        _ints(2, 1, H, 3, 1),
        "skip_mask: expected room for (slots, 2, 4, 3, 1) for q (2, 20, 4, 8), 36 keys",
    ),
    ("skip_mask", _ints(2, B, 8, 3, 1), "skip_mask: expected room for (slots, 2, 4, 3, 1)"),
    ("skip_mask", _ints(2, B, H, 2, 1), "skip_mask: expected room for (slots, 2, 4, 3, 1)"),
    ("skip_mask", _ints(2, B, H, 3, 0), "got (2, 2, 4, 3, 0)"),
    ("control", _ints(1, 24), "control: expected 1 dimensions, got 2"),
    ("control", _ints(24).float(), "dtype of control: expected torch.int32, got torch.float32"),
    ("control", _ints(24).to("meta"), "device of control: expected that of q, cpu, got meta"),
    ("control", _ints(48)[::2], "control: expected a contiguous tensor, got one that is not"),
    ("control", _ints(32), "control: expected 24 words for 2 slots, got 32 words"),
    ("threshold", torch.zeros(H), "threshold: expected 3 dimensions, got 1"),
    ("threshold", torch.zeros(1, 1, H).double(), "dtype of threshold: expected torch.float32, got torch.float64"),
    ("threshold", torch.zeros(1, 1, H, device="meta"), "device of threshold: expected that of q, cpu, got meta"),
    ("threshold", torch.zeros(3, 1, H), "slots of threshold: expected 1 or 2, got 3"),
    ("threshold", torch.zeros(1, 0, H), "steps of threshold: expected at least 1, got 0"),
    ("threshold", torch.zeros(1, 1, 2), "heads of threshold: expected 1 or 4, got 2"),
    ("initial_mask", _ints(1, H, 3), "initial_mask: expected 4 dimensions, got 3"),
    ("initial_mask", _ints(1, H, 3, 1).bool(), "dtype of initial_mask: expected torch.int32, got torch.bool"),
    ("initial_mask", _ints(1, H, 3, 1).to("meta"), "device of initial_mask: expected that of q, cpu, got meta"),
    ("initial_mask", _ints(1, 2, 3, 1), "initial_mask: expected (1 or 2, 1 or 4, 3, 1)"),
    ("initial_mask", _ints(1, H, 2, 1), "initial_mask: expected (1 or 2, 1 or 4, 3, 1)"),
    ("initial_mask", _ints(1, H, 3, 0), "initial_mask: expected (1 or 2, 1 or 4, 3, 1)"),
    ("must_do", _ints(1, 1), "must_do: expected 1 dimensions, got 2"),
    ("must_do", _ints(1).long(), "dtype of must_do: expected torch.int32, got torch.int64"),
    ("must_do", _ints(1).to("meta"), "device of must_do: expected that of q, cpu, got meta"),
    ("must_do", _ints(0), "must_do: expected 1 words for q (2, 20, 4, 8), 36 keys and tiles of 8 x 8, got 0"),
    ("key_mask", torch.ones(SK, dtype=torch.bool), "key_mask: expected 2 dimensions, got 1"),
    ("key_mask", torch.zeros(B, SK), "dtype of key_mask: expected torch.bool, got torch.float32"),
    ("key_mask", torch.ones(B, SK, dtype=torch.bool, device="meta"), "device of key_mask: expected that of q, cpu"),
    ("key_mask", torch.ones(B, 35, dtype=torch.bool), "key_mask: expected (1 or 2, 36), got (2, 35)"),
    ("key_mask", torch.ones(3, SK, dtype=torch.bool), "key_mask: expected (1 or 2, 36), got (3, 36)"),
]


def _id(value: object) -> str:
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("argument", "value", "message"), WRONG_QKV + STATE, ids=_id)
def test_a_call_that_does_not_fit(argument: str, value: Any, message: str) -> None:
    call = {**_call(), argument: value}
    state = [call[name].clone() for name in ("skip_mask", "control", "threshold")]
    *tensors, scale, tile_m, tile_n = call.values()
    with pytest.raises(ValueError, match=re.escape(message)):
        check_call(call_signature(tuple(tensors), scale, tile_m, tile_n))
    if argument in ("q", "k", "v"):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_inputs(call["q"], call["k"], call["v"])
    if not (isinstance(value, torch.Tensor) and value.is_meta):  # which would be dispatched to another device
        scale, tiles = call.pop("scale"), (call.pop("tile_m"), call.pop("tile_n"))
        for op in IMPLEMENTATIONS.values():
            with pytest.raises(ValueError, match=re.escape(message)):
                op(*call.values(), scale=scale, tile_m=tiles[0], tile_n=tiles[1])
        after = [call[name] for name in ("skip_mask", "control", "threshold")]
        assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))


def test_integers_are_no_queries() -> None:
    x = torch.ones(B, SQ, H, D, dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"dtype of q: expected float16, bfloat16, float32 or float64, got torch.int32"
    ):
        check_inputs(x, x, x)


@pytest.mark.parametrize("size", ["batch", "seq_len", "heads", "head_dim"])
def test_nothing_to_attend_to(size: str) -> None:
    shape = [B, SK, H, D]
    shape[["batch", "seq_len", "heads", "head_dim"].index(size)] = 0
    q, k = torch.zeros(shape), torch.zeros(shape)
    if size == "seq_len":
        q = torch.zeros(B, SQ, H, D)
    owner = "k" if size in ("seq_len", "heads") else "q"
    with pytest.raises(ValueError, match=f"{size} of {owner}: expected at least 1, got 0"):
        check_inputs(q, k, k)


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_that_is_none(slot: int) -> None:
    call = _call()
    call["control"][c.SLOT] = slot
    _assert_control_is_refused(call, f"control: expected a slot from 0 to 1, got {slot}")


def test_a_step_before_the_first() -> None:
    call = _call()
    call["control"][c.slot_word(0, c.STEP)] = -1
    _assert_control_is_refused(call, "control: expected a step of at least 0, got -1")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_quantization_that_is_none(implementation: str | None, device: str) -> None:
    """The fake refuses what the kernel does, so that a compiler tells it."""
    call = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in _call().items()}
    options = {name: call.pop(name) for name in ("scale", "tile_m", "tile_n")}
    with pytest.raises(ValueError, match="quantization: expected 'none' or 'int8' or 'int8_fp8', got 'fp8'"):
        IMPLEMENTATIONS[implementation](*call.values(), **options, quantization="fp8")


def _assert_control_is_refused(call: dict[str, Any], message: str) -> None:
    before = call["control"].clone()
    scale, tile_m, tile_n = (call.pop(name) for name in ("scale", "tile_m", "tile_n"))
    with pytest.raises(ValueError, match=message):
        torch.ops.lite_attention.skip_attention(*call.values(), scale=scale, tile_m=tile_m, tile_n=tile_n)
    assert torch.equal(call["control"], before)
    assert not call["skip_mask"].any()


def test_thresholds() -> None:
    for fine in (0.0, -math.inf, -3, torch.tensor([-1.0, -2.0]), torch.zeros(0)):
        check_threshold(fine, allow_positive=False)
    check_threshold(2.0, allow_positive=True)
    for allow_positive in (False, True):
        with pytest.raises(ValueError, match="threshold: expected numbers, got NaN"):
            check_threshold(torch.tensor([-1.0, math.nan]), allow_positive=allow_positive)
    with pytest.raises(ValueError, match=r"threshold: expected at most 0 .*allow_positive=True insists.*got 0\.5"):
        check_threshold(torch.tensor([-1.0, 0.5]), allow_positive=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "triton"}, "implementation: expected None or 'reference' or 'portable', got 'triton'"),
        ({"quantization": "fp8"}, "quantization: expected 'none' or 'int8' or 'int8_fp8', got 'fp8'"),
        ({"key_lengths": torch.tensor([3])}, "key_lengths: expected shape (2,), got (1,)"),
        ({"key_lengths": torch.tensor(3)}, "key_lengths: expected shape (2,), got ()"),
        ({"scale": -0.5}, "scale: expected a number above 0, got -0.5"),
        ({"key_mask": torch.zeros(B, SK)}, "dtype of key_mask: expected torch.bool, got torch.float32"),
        # Joined with another way to exclude keys, the mask must be no less right.
        (
            {"key_mask": torch.zeros(B, SK), "must_skip": [0, 1]},
            "dtype of key_mask: expected torch.bool, got torch.float32",
        ),
        (
            {"key_mask": torch.ones(B, 1, dtype=torch.bool), "must_skip": [0, 1]},
            "key_mask: expected (1 or 2, 36), got (2, 1)",
        ),
        (
            {"key_mask": torch.ones(B, 35, dtype=torch.bool), "key_lengths": torch.tensor([3, 4])},
            "key_mask: expected (1 or 2, 36), got (2, 35)",
        ),
    ],
    ids=_id,
)
def test_the_functional_form(options: dict[str, Any], message: str) -> None:
    call = _call()
    state = SkipState(batch=B, heads=H, seq_q=SQ, seq_k=SK, tile_m=8, tile_n=8)
    before = [buffer.clone() for buffer in state.buffers()]
    with pytest.raises(ValueError, match=re.escape(message)):
        skip_attention(call["q"], call["k"], call["v"], state, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, state.buffers(), strict=True))
