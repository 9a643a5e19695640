"""Another default dtype or device is for the tensors of a user: ours are what they are without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lite_attention import LiteAttention, attention, schedules, skip_attention
from lite_attention.ops import SkipState
from lite_attention.ops.cpu import skip_attention_reference
from lite_attention.ops.ranges import must_do_words, must_skip_mask
from tests.support.op_cases import clustered_qkv

Q, K, V = clustered_qkv(0, seq_q=70, seq_k=90, head_dim=16)
SIZES: dict[str, Any] = {"batch": 1, "heads": 2, "seq_q": 70, "seq_k": 90, "tile_m": 16, "tile_n": 16, "device": "cpu"}
HEADS = torch.tensor([-1.0, -2.0])
MASK = torch.eye(5, 6, dtype=torch.bool)[None, None]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "cuda": lambda: torch.device("cuda"),  # which is not here: to make a tensor there is an error
}


def _two_steps(call: Callable[..., Any], state: SkipState, **options: Any) -> list[Any]:
    results = [call(Q, K, V, **options) for _ in range(2)]
    return [*results, *state.buffers(), state.slot, state.step(), state.sparsity(), state.sparsity("head")]


def _state(**options: Any) -> SkipState:
    return SkipState(**{**SIZES, "threshold": -1.0, **options})


def _by_hand(**options: Any) -> list[Any]:
    state = _state(initial_mask=MASK, num_steps=3)
    return _two_steps(lambda *qkv, **others: skip_attention(*qkv, state, **others), state, **options)


def _module(**options: Any) -> list[Any]:
    module = LiteAttention(threshold=HEADS, num_steps=4, **options)
    results = [module(Q, K, V, return_softmax_lse=True) for _ in range(2)]
    module.set_threshold(-0.5)
    assert module.state is not None
    return [*results, *module.state.buffers(), module.sparsity()]


def _kernel() -> list[Any]:
    """Run the CPU kernel itself, which the dispatcher would keep from the default device."""
    state = _state(initial_mask=MASK)
    others = {"must_do": None, "key_mask": None, "scale": None, "tile_m": 16, "tile_n": 16}
    return [skip_attention_reference(Q, K, V, *state.buffers(), **others), *state.buffers()]  # type: ignore[arg-type]


def _saved() -> list[Any]:
    state = _state(threshold=HEADS)
    state.set_step(2)
    saved = state.state_dict()
    return [*saved.values(), *SkipState.from_state_dict(saved, device="cpu").buffers()]


CASES: dict[str, Callable[[], list[Any]]] = {
    "constant": lambda: [schedules.constant(-1.0), schedules.constant(HEADS)],
    "linear": lambda: [schedules.linear(5, -3.0, -1.0), schedules.linear(4, HEADS, -1.0)],
    "three_segments": lambda: [schedules.three_segments(7, -3.0, HEADS.double(), -1.0)],
    "dense_first": lambda: [schedules.dense_first(-1.0, 2), schedules.dense_first(schedules.linear(3, -2, -1), 1)],
    "branches": lambda: [schedules.branches(-1.0, schedules.linear(3, -2.0, -1.0))],
    "state": _by_hand,
    "kernel": _kernel,
    "words of ranges": lambda: [must_do_words([0, 17], 90, 16), must_skip_mask([20, 33], 90)],
    "ranges": lambda: _by_hand(must_do=[0, 17], must_skip=[20, 33]),
    "lengths": lambda: _by_hand(key_lengths=torch.tensor([61], device="cpu"), quantization="int8"),
    "fp8": lambda: _by_hand(quantization="int8_fp8"),
    "module": _module,
    "module, fp8": lambda: _module(use_int8=True, use_fp8=True),
    "dense": lambda: [attention(Q, K, V, key_lengths=torch.tensor([61], device="cpu"), return_lse=True)],
    "saving": _saved,
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("case", CASES)
def test_nothing_changes(case: str, default: str) -> None:
    want = CASES[case]()
    with DEFAULTS[default]():
        got = CASES[case]()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("default", DEFAULTS)
def test_schedules_are_float32_on_the_cpu(default: str) -> None:
    with DEFAULTS[default]():
        tables = [table for case in CASES if hasattr(schedules, case) for table in CASES[case]()]
    assert {(table.dtype, table.device.type) for table in tables} == {(torch.float32, "cpu")}


def test_a_state_is_where_the_default_device_is() -> None:
    """As for any module, where no device is given."""
    with torch.device("meta"):
        state = SkipState(**{**SIZES, "device": None}, initial_mask=MASK)
    assert {buffer.device.type for buffer in state.buffers()} == {"meta"}
