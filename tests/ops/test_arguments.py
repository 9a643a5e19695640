"""Arguments of users that are none: each gets a ValueError that names it, and nothing has been written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lite_attention import LiteAttention, attention, schedules, skip_attention
from lite_attention.ops import SkipState
from lite_attention.ops import control as c
from tests.support.op_cases import clustered_qkv

SIZES: dict[str, Any] = {"batch": 1, "heads": 2, "seq_q": 40, "seq_k": 48, "tile_m": 8, "tile_n": 8}
COUNTS = [*SIZES, "slots", "num_steps", "refresh"]
NO_COUNTS = [2.5, 2.0, True, "2", 0, -1, 2**31, math.nan, np.float32(2), [2], torch.tensor(2.0)]
Q, K, V = clustered_qkv(0, seq_q=40, seq_k=48)


def _state(**options: Any) -> SkipState:
    return SkipState(**{**SIZES, "threshold": -1.0, **options})


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_what_counts_is_an_integer(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*at least 1.*, got "):
        _state(**{name: value})


@pytest.mark.parametrize("integer", [np.int64, np.int32, torch.tensor])
def test_integers_of_other_libraries_will_do(integer: Callable[[int], Any]) -> None:
    state = _state(**{name: integer(8) for name in COUNTS})
    assert state.capacity == (8, 8, 8, 8)
    assert all(type(size) is int for size in (*state.capacity, state.tile_m, state.tile_n))
    assert state.control[c.NUM_STEPS] == 8
    state.set_step(integer(3), integer(7))
    assert state.step(7) == 3


@pytest.mark.parametrize("value", [1, 0, "yes", None], ids=repr)
@pytest.mark.parametrize("name", ["auto_step", "persistent", "allow_positive"])
def test_switches_are_bools(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected True or False, got "):
        _state(**{name: value})


THRESHOLDS: list[tuple[Any, str]] = [
    (torch.tensor(-3.0, device="meta"), "threshold: expected a tensor with values, got one on the meta device"),
    (-(10**400), "threshold: expected a number within the range of floats"),
    ([-1.0, -(10**400)], "threshold: expected a number within the range of floats"),
    (True, "threshold: expected a number or a tensor, got True"),
    (None, "threshold: expected a number or a tensor, got NoneType"),
    ("x", "threshold: expected a number or a tensor, got str"),
    (1j, "threshold: expected a number or a tensor, got complex"),
    ([[-1.0], [-1.0, -2.0]], "threshold: expected a number or a tensor, got list"),
    (torch.tensor(False), "dtype of threshold: expected a real one, got torch.bool"),
    (torch.tensor(-1j), "dtype of threshold: expected a real one, got torch.complex64"),
    (math.nan, "threshold: expected numbers, got NaN"),
]


@pytest.mark.parametrize(("threshold", "message"), THRESHOLDS, ids=repr)
def test_thresholds(threshold: Any, message: str) -> None:
    state, module = _state(), LiteAttention(threshold=-1.0)
    calls = [
        lambda: _state(threshold=threshold), lambda: state.set_threshold(threshold),
        lambda: module.set_threshold(threshold),
    ]  # fmt: skip
    if threshold is not None:  # which leaves it at the default there
        calls.append(lambda: LiteAttention(threshold=threshold))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert (state.threshold == -1.0).all()


@pytest.mark.parametrize("mask", ["x", [[True]], 1, torch.zeros(1, 1, 5, 6, dtype=torch.bool, device="meta")], ids=repr)
def test_initial_masks(mask: Any) -> None:
    with pytest.raises(ValueError, match="initial_mask: expected a tensor with values, got "):
        _state(initial_mask=mask)


STATE_CALLS: list[tuple[Callable[[SkipState], Any], str]] = [
    (lambda state: state.set_step(2**31), "step: expected 0 to 2147483647, got 2147483648"),
    (lambda state: state.set_step(1.5), "step: expected an integer, 0 to 2147483647, got 1.5"),
    (lambda state: state.set_step(True), "step: expected an integer, 0 to 2147483647, got True"),
    (lambda state: state.set_step(0, 0.5), "slot: expected an integer, 0 to 1, got 0.5"),
    (lambda state: setattr(state, "slot", 0.5), "slot: expected an integer, 0 to 1, got 0.5"),
    (lambda state: setattr(state, "slot", True), "slot: expected an integer, 0 to 1, got True"),
    (lambda state: state.set_num_steps(2.5), "num_steps: expected an integer, at least 1, got 2.5"),
    (lambda state: state.sparsity(5), "per: expected names out of .*, got \\[5\\]"),
    (lambda state: state.sparsity("row"), "per: expected names out of .*, got \\['row'\\]"),
]


@pytest.mark.parametrize(("call", "message"), STATE_CALLS)
def test_what_is_written_to_a_state(call: Callable[[SkipState], Any], message: str) -> None:
    state = _state()
    before = [buffer.clone() for buffer in state.buffers()]
    with pytest.raises(ValueError, match=message):
        call(state)
    assert all(torch.equal(a, b) for a, b in zip(before, state.buffers(), strict=True))


# Of a call with q, k, v and a state; the first ones are those of dense attention too.
DENSE_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"key_lengths": [3]}, r"key_lengths: expected an integer tensor \(1,\), got list"),
    ({"key_lengths": torch.tensor([3.0])}, "dtype of key_lengths: expected an integer one, got torch.float32"),
    ({"key_lengths": torch.tensor([True])}, "dtype of key_lengths: expected an integer one, got torch.bool"),
    ({"key_lengths": torch.tensor([-1])}, r"key_lengths: expected 0 to 48, got \[-1\]"),
    ({"key_lengths": torch.tensor([49])}, r"key_lengths: expected 0 to 48, got \[49\]"),
    ({"key_lengths": torch.tensor([3, 4])}, r"key_lengths: expected shape \(1,\), got \(2,\)"),
    ({"key_lengths": torch.tensor([3], device="meta")}, "device of key_lengths: expected that of q, cpu, got meta"),
    ({"scale": math.inf}, "scale: expected a number above 0, got inf"),
    ({"scale": math.nan}, "scale: expected a number above 0, got nan"),
    *(({name: torch.zeros(3)}, rf"{name}: expected \(batch, seq_len, heads, head_dim\), got 1 dim") for name in "qkv"),
    *(({name: x.numpy()}, f"{name}: expected a tensor, got ndarray") for name, x in zip("qkv", (Q, K, V), strict=True)),
    ({"key_mask": [True]}, "key_mask: expected a tensor, got list"),
]
RANGES = [[0.5, 10.5], [0.0, 10.0], [False, True], "ab", 5, [(0, 10), (20, 30)], torch.tensor([0.0, 1.0])]
SKIP_CALLS: list[tuple[dict[str, Any], str]] = [
    *(({name: ranges}, f"{name}: expected ") for name in ("must_do", "must_skip") for ranges in RANGES),
    ({"state": None}, "state: expected a SkipState, got NoneType"),
    ({"implementation": ["reference"]}, "implementation: expected None or 'reference'"),
]


@pytest.mark.parametrize(("options", "message"), [*DENSE_CALLS, *SKIP_CALLS], ids=repr)
def test_calls(options: dict[str, Any], message: str) -> None:
    state = _state()
    call = {"q": Q, "k": K, "v": V, "state": state}
    skip_attention(**call, must_do=[0, 10], must_skip=[0, 1])  # ranges that passed are remembered
    before = [buffer.clone() for buffer in state.buffers()]
    with pytest.raises(ValueError, match=message):
        skip_attention(**{**call, **options})
    assert all(torch.equal(a, b) for a, b in zip(before, state.buffers(), strict=True))
    if any(options is dense for dense, _ in DENSE_CALLS):
        with pytest.raises(ValueError, match=message):
            attention(**{"q": Q, "k": K, "v": V, **options})


def test_ranges_may_be_integers_of_any_kind() -> None:
    want = skip_attention(Q, K, V, _state(), must_skip=[8, 16])
    for ranges in (torch.tensor([8, 16]), np.array([8, 16]), (np.int32(8), 16)):
        assert torch.equal(skip_attention(Q, K, V, _state(), must_skip=ranges), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_calls_of_a_module(name: str, first: bool) -> None:
    module = LiteAttention() if first else LiteAttention().allocate(1, 40, 2, 8, kv_seq_len=48)
    for wrong in (None, [0.0], Q.numpy()):
        with pytest.raises(ValueError, match=f"{name[0]}: expected a tensor, got {type(wrong).__name__}"):
            module(**{"query": Q, "key": K, "value": V, name: wrong})


MODULES: list[tuple[Callable[[], Any], str]] = [
    (lambda: LiteAttention(enable_skipping="no"), "enable_skipping: expected True or False, got 'no'"),  # type: ignore
    (
        lambda: LiteAttention(implementation="triton"),
        "implementation: expected None or 'reference' or 'portable', got 'triton'",
    ),
    (lambda: LiteAttention(initial_mask="x"), "initial_mask: expected a bool tensor, got str"),  # type: ignore
    (lambda: LiteAttention().enable_skip_optimization("x"), "enable: expected True or False, got 'x'"),  # type: ignore
    (lambda: LiteAttention().allocate(1, 128, 2, 2.5), "head_dim: expected an integer"),  # type: ignore
    (lambda: LiteAttention().allocate(1, True, 2, 16), "seq_q: expected an integer"),
]


@pytest.mark.parametrize(("call", "message"), MODULES)
def test_options_of_a_module(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [v for v in NO_COUNTS if v is not True], ids=repr)
@pytest.mark.parametrize(
    "build",
    [
        lambda steps: schedules.linear(steps, -2.0, -1.0),
        lambda steps: schedules.three_segments(steps, -3.0, -2.0, -1.0),
        lambda steps: schedules.dense_first(schedules.linear(4, -2.0, -1.0), steps),
    ],
)
def test_steps_of_a_schedule(build: Callable[[Any], torch.Tensor], value: Any) -> None:
    if value == 0:
        value = 0.0  # no dense steps are fine
    with pytest.raises(ValueError, match="steps: expected "):
        build(value)


@pytest.mark.parametrize(
    "threshold", ["x", None, True, -(10**400), torch.tensor(-1.0, device="meta"), torch.tensor(True)], ids=repr
)
@pytest.mark.parametrize(
    "build",
    [
        schedules.constant,
        schedules.branches,
        lambda threshold: schedules.linear(3, threshold, -1.0),
        lambda threshold: schedules.three_segments(3, -3.0, threshold, -1.0),
        lambda threshold: schedules.dense_first(threshold, 1),
    ],
)
def test_thresholds_of_a_schedule(build: Callable[[Any], torch.Tensor], threshold: Any) -> None:
    with pytest.raises(ValueError, match=r"(threshold|schedules?|first|middle): expected "):
        build(threshold)


def test_the_users_tensor_stays_the_users() -> None:
    parameter = nn.Parameter(torch.tensor(-3.0))
    state, module = _state(threshold=parameter), LiteAttention(threshold=parameter)
    state.set_threshold(parameter)
    module(Q, K, V)
    assert module.state is not None
    for tensor in (*state.buffers(), *module.state.buffers()):
        assert not tensor.requires_grad
    assert not list(module.parameters())
    with torch.no_grad():
        parameter.fill_(-9.0)
    module.state = None
    module(Q, K, V)
    assert (module.state.threshold == -3.0).all()
