"""`SkipState`: sizes, meaning, saving, loading, moving, copying."""

from __future__ import annotations

import copy
import io
import math
import re
import threading
from typing import Any

import pytest
import torch
from torch import nn

from lite_attention.ops import SkipState, functional, skip_attention
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.oracle import skip_attention_oracle
from tests.support.buffers import assert_buffers, buffers_of
from tests.support.op_cases import Qkv, clustered_qkv, live_sparsity

SIZES = {"batch": 2, "heads": 4, "seq_q": 50, "seq_k": 70, "tile_m": 8, "tile_n": 8}  # 7 x 9 tiles


def _state(**options: Any) -> SkipState:
    return SkipState(**{**SIZES, "threshold": -3.0, **options})


def _inputs(step: int = 0, batch: int = 2, seq_q: int = 50, seq_k: int = 70) -> Qkv:
    return clustered_qkv(4, batch=batch, seq_q=seq_q, seq_k=seq_k, heads=4, kv_heads=2, step=step)


def _used(**options: Any) -> SkipState:
    """Return a state with votes in both of its slots."""
    state = _state(**options)
    for slot in range(state.slots):
        state.slot = slot
        for step in range(2 + slot):
            skip_attention(*_inputs(step), state)
    return state


# ---- sizes ---------------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    state = SkipState(batch=3, heads=4, seq_q=129, seq_k=64 * 33, tile_m=64, tile_n=64, slots=5, num_steps=7)
    assert state.skip_mask.shape == (5, 3, 4, 3, 2)
    assert state.control.shape == (c.control_words(5),)
    assert state.slots == 5
    assert len(state.control) == c.control_words(5)
    assert state.threshold.shape == (5, 7, 4)
    assert state.initial_mask is None
    assert state.nbytes == 4 * (5 * 3 * 4 * 3 * 2 + c.control_words(5) + 5 * 7 * 4)
    assert state.kept_tiles().shape == (5, 3, 4, 3, 33)
    assert state.control[c.NUM_STEPS] == 7
    assert "3x33 tiles of 64x64" in repr(state)


def test_for_inputs_takes_the_sizes_of_the_inputs_and_of_the_table() -> None:
    q, k, _ = clustered_qkv(0, batch=2, seq_q=100, seq_k=70, heads=4, kv_heads=2)
    state = SkipState.for_inputs(q, k, slots=3, threshold=-2.0)
    assert state.capacity == (2, 4, 100, 70)
    assert (state.tile_m, state.tile_n, state.slots) == (64, 64, 3)
    assert (state.threshold == -2.0).all()
    assert SkipState.for_inputs(q, k, batch=5).capacity[0] == 5


@pytest.mark.parametrize("name", [*SIZES, "slots", "num_steps", "refresh"])
def test_sizes_below_1(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        _state(**{name: 0})


# ---- what a user reads and writes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", [-1, 2])
def test_slots_that_are_none(slot: int) -> None:
    state = _used()
    before = buffers_of(state)
    calls = (
        lambda: setattr(state, "slot", slot), lambda: state.step(slot), lambda: state.set_step(1, slot),
        lambda: state.start_fresh(slot), lambda: state.reset(slot),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=f"slot: expected 0 to 1, got {slot}"):
            call()
    assert_buffers(state, before)


def test_other_values_that_are_none() -> None:
    state = _used()
    before = buffers_of(state)
    with pytest.raises(ValueError, match="step: expected 0 to 2147483647, got -1"):
        state.set_step(-1)
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        state.set_num_steps(0)
    with pytest.raises(ValueError, match=r"per: expected names out of \('slot', 'batch', 'head'\), got \['heads'\]"):
        state.sparsity("heads")
    assert_buffers(state, before)


def test_each_slot_counts_its_steps_and_wraps() -> None:
    state = _state(num_steps=3)
    steps = []
    for slot in (0, 0, 1, 0, 0, 1):
        state.slot = slot
        skip_attention(*_inputs(), state)
        steps.append((state.step(0), state.step(1)))
    assert steps == [(1, 0), (2, 0), (2, 1), (0, 1), (1, 1), (1, 2)]
    state.set_num_steps(None)
    state.set_step(9)
    skip_attention(*_inputs(), state)
    assert (state.step(0), state.step()) == (9, 10)


def test_a_fresh_step_forgets_the_votes() -> None:
    """After the wrap, at a refresh, after `start_fresh` and with other sizes, the mask is that of a first call."""
    first = _state()
    skip_attention(*_inputs(2), first)
    wrapped, refreshed, told, resized = _state(num_steps=2), _state(refresh=2), _state(), _state()
    for step in range(3):
        skip_attention(*_inputs(step), wrapped)
        skip_attention(*_inputs(step), refreshed)
        if step == 2:
            told.start_fresh()
        skip_attention(*_inputs(step), told)
        skip_attention(*_inputs(step, batch=1 if step == 1 else 2), resized)
    for state in (wrapped, refreshed, told, resized):
        assert torch.equal(state.skip_mask[0], first.skip_mask[0])
    assert (wrapped.step(), refreshed.step(), told.step()) == (1, 3, 3)


def test_a_shorter_call_leaves_no_bits_beyond_its_tiles() -> None:
    state = _state()
    skip_attention(*_inputs(), state)
    assert unpack_bits(state.skip_mask[0], 9)[:, :, :3, 3:].any()
    skip_attention(*_inputs(0, 2, 20, 20), state)
    assert not unpack_bits(state.skip_mask[0], 32)[:, :, :3, 3:].any()


def test_reset() -> None:
    state = _used()
    skip_mask, control = state.skip_mask.clone(), state.control.clone()
    state.reset(0)
    assert not state.skip_mask[0].any()
    assert torch.equal(state.skip_mask[1], skip_mask[1])
    control[c.slot_word(0, 0) : c.slot_word(1, 0)] = 0
    assert torch.equal(state.control, control)  # the other slot, the header: as they were
    state.reset()
    assert not state.skip_mask.any()
    assert (state.step(0), state.step(1), state.slot) == (0, 0, 1)
    assert state.control[c.FLAGS] == c.FLAG_AUTO_STEP


@pytest.mark.parametrize(
    ("threshold", "options"),
    [
        (-4.0, {}),
        (torch.tensor(-4.0), {}),
        (torch.tensor([-1.0, -2.0, -3.0, -4.0]), {}),
        (torch.arange(-3.0, 0.0).view(3, 1), {"num_steps": 3}),
        (torch.arange(-2.0, 0.0).view(2, 1), {"num_steps": 5}),  # past its end the last step holds
        (torch.arange(-2.0, 0.0).view(2, 1, 1), {"num_steps": 5}),
        (-torch.rand(2, 3, 4), {"num_steps": 3}),
    ],
)
def test_thresholds_broadcast_to_slots_steps_heads(threshold: float | torch.Tensor, options: dict[str, Any]) -> None:
    state = _state(threshold=-9.0, **options)
    address = state.threshold.data_ptr()
    state.set_threshold(threshold)
    assert state.threshold.data_ptr() == address  # compiled code and CUDA graphs know it
    table = torch.as_tensor(threshold)
    table = table.view((1,) * (3 - table.dim()) + table.shape)
    for slot in range(2):
        for step in range(state.threshold.shape[1]):
            row = table[slot % len(table), min(step, table.shape[1] - 1)]
            assert torch.equal(state.threshold[slot, step], row.expand(4))
    assert torch.equal(_state(threshold=threshold, **options).threshold, state.threshold)


def test_a_table_of_steps_makes_room_for_itself() -> None:
    assert _state(threshold=torch.zeros(6, 1)).threshold.shape == (2, 6, 4)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (math.nan, "threshold: expected numbers, got NaN"),
        (0.5, "threshold: expected at most 0 .*got 0.5"),
        (torch.zeros(3), r"broadcasts to \(slots, steps, heads\) = \(2, 1, 4\), got \(3,\)"),
        (torch.zeros(3, 1, 4), r"broadcasts to \(slots, steps, heads\) = \(2, 1, 4\), got \(3, 1, 4\)"),
        (torch.zeros(3, 1), r"broadcasts.*a longer table needs a state made with num_steps"),
    ],
)
def test_thresholds_that_are_none(threshold: float | torch.Tensor, message: str) -> None:
    state = _used()
    before = buffers_of(state)
    with pytest.raises(ValueError, match=message):
        state.set_threshold(threshold)
    assert_buffers(state, before)


def test_allow_positive() -> None:
    state = _state(threshold=0.5, allow_positive=True)
    state.set_threshold(2.0)
    assert (state.threshold == 2.0).all()


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_initial_mask(batch: int, heads: int) -> None:
    mask = torch.rand(batch, heads, 7, 9) < 0.4
    state = _state(initial_mask=mask, threshold=-math.inf)
    assert state.initial_mask is not None
    assert torch.equal(unpack_bits(state.initial_mask, 9), mask)
    out, lse = skip_attention(*_inputs(), state, return_lse=True)
    assert torch.equal(state.kept_tiles()[0], ~mask.expand(2, 4, 7, 9))
    seen = ~mask.expand(2, 4, 7, 9).repeat_interleave(8, 2)[:, :, :50].repeat_interleave(8, 3)[..., :70]
    q, k, v = (x.transpose(1, 2) for x in _inputs())
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~seen, -math.inf)
    plain = scores.softmax(-1).nan_to_num(0) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out.transpose(1, 2), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 1, 7, 9),
        torch.zeros(7, 9, dtype=torch.bool),
        torch.zeros(3, 1, 7, 9, dtype=torch.bool),
        torch.zeros(1, 2, 7, 9, dtype=torch.bool),
        torch.zeros(1, 1, 7, 8, dtype=torch.bool),
    ],
)
def test_initial_masks_that_are_none(mask: torch.Tensor) -> None:
    expected = r"initial_mask: expected bool \(1 or 2, 1 or 4, 7, 9\) for tiles of 8 x 8, got "
    with pytest.raises(ValueError, match=expected + re.escape(f"{mask.dtype} {tuple(mask.shape)}")):
        _state(initial_mask=mask)


# ---- what it learned -----------------------------------------------------------------------------------------------


def test_kept_tiles_are_those_the_oracle_visits_next() -> None:
    state = _used()
    q, k, v = _inputs(3)
    names = ("skip_mask", "control", "threshold")
    want = skip_attention_oracle(q, k, v, *(getattr(state, name) for name in names), tile_m=8, tile_n=8)
    seen = state.kept_tiles()[1].repeat_interleave(8, 2)[:, :, :50].repeat_interleave(8, 3)[..., :70]
    keys = k.double().transpose(1, 2).repeat_interleave(2, 1)
    scores = q.double().transpose(1, 2) @ keys.mT * 8**-0.5
    torch.testing.assert_close(scores.masked_fill(~seen, -math.inf).logsumexp(-1), want.lse)


def test_sparsity_counts_kept_tiles() -> None:
    state = _used()
    kept = state.kept_tiles()
    skipped = (~kept).double()
    assert 0.2 < live_sparsity(state) < 0.9
    torch.testing.assert_close(state.sparsity(), torch.tensor(live_sparsity(state)))
    axes = {"slot": 0, "batch": 1, "head": 2}
    for per in ("slot", "batch", "head", ("slot", "head"), ["head", "batch"], {"slot", "batch", "head"}):
        names = [per] if isinstance(per, str) else per
        others = [dim for name, dim in axes.items() if name not in names]
        torch.testing.assert_close(state.sparsity(per), skipped.mean([*others, 3, 4]).float())


def test_sparsity_counts_what_the_last_calls_used() -> None:
    state = _state(slots=3)
    assert state.sparsity() == 0
    for slot, sizes in ((0, (2, 50, 70)), (2, (1, 33, 20))):
        state.slot = slot
        skip_attention(*_inputs(0, *sizes), state)
    per_slot = state.sparsity("slot")
    assert per_slot[1] == 0
    live = ~state.kept_tiles()[2, :1, :, :5, :3]
    torch.testing.assert_close(per_slot[2], live.float().mean())
    torch.testing.assert_close(state.sparsity(), torch.tensor(live_sparsity(state)))
    assert state.sparsity(("slot", "batch"))[2, 1] == 0


# ---- saving, loading, moving, copying ------------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [False, True])
def test_state_dict_round_trip(with_mask: bool) -> None:
    options = {"initial_mask": torch.rand(2, 1, 7, 9) < 0.3} if with_mask else {}
    state = _used(num_steps=5, refresh=4, threshold=-torch.rand(2, 5, 4) - 2, **options)
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)  # weights_only

    into = _state(num_steps=5, **options)
    addresses = [buffer.data_ptr() for buffer in into.buffers()]
    into.load_state_dict(saved)
    assert [buffer.data_ptr() for buffer in into.buffers()] == addresses
    anew = SkipState.from_state_dict(saved)
    assert anew.capacity == state.capacity
    assert (anew.tile_m, anew.tile_n) == (8, 8)
    for loaded in (into, anew):
        assert_buffers(loaded, buffers_of(state))
        assert torch.equal(skip_attention(*_inputs(5), loaded), skip_attention(*_inputs(5), copy.deepcopy(state)))


def test_from_state_dict_keeps_positive_thresholds() -> None:
    state = _state(threshold=1.5, allow_positive=True)
    assert_buffers(SkipState.from_state_dict(state.state_dict()), buffers_of(state))


def test_a_state_over_buffers_shares_them() -> None:
    state = _used(initial_mask=torch.rand(1, 1, 7, 9) < 0.3)
    over = SkipState.over(dict(state.named_buffers()), 8, 8)
    assert torch.equal(over.kept_tiles()[..., :9], state.kept_tiles())
    assert over.sparsity() == state.sparsity()
    over.set_threshold(0.5)
    skip_attention(*_inputs(4), over)
    assert [a.data_ptr() for a in over.buffers()] == [b.data_ptr() for b in state.buffers()]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"slots": 3}, r"skip_mask: expected torch.int32 \(2, 2, 4, 7, 1\), got torch.int32 \(3, 2, 4, 7, 1\)"),
        ({"num_steps": 3}, r"threshold: expected torch.float32 \(2, 1, 4\), got torch.float32 \(2, 3, 4\)"),
        ({"seq_q": 49}, r"geometry .*: expected \[2, 4, 50, 70, 8, 8\], got \[2, 4, 49, 70, 8, 8\]"),
        ({"initial_mask": torch.zeros(1, 1, 7, 9, dtype=torch.bool)}, "state_dict: expected .* got .*initial_mask"),
    ],
    ids=str,
)
def test_state_dicts_that_do_not_fit(other: dict[str, Any], message: str) -> None:
    state = _used()
    before = buffers_of(state)
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(_state(**other).state_dict())
    assert_buffers(state, before)


@pytest.mark.parametrize("name", ["skip_mask", "control", "threshold", "geometry"])
@pytest.mark.parametrize("wrong", [None, 3, "x", torch.zeros(1, device="meta"), torch.zeros(7)], ids=str)
def test_state_dicts_of_what_is_no_state(name: str, wrong: Any) -> None:
    state = _used()
    before, saved = buffers_of(state), {**_state().state_dict(), name: wrong}
    with pytest.raises(ValueError, match=f"{name}.*: expected "):
        state.load_state_dict(saved)
    with pytest.raises(ValueError, match=f"{name}.*: expected "):
        SkipState.from_state_dict(saved)
    assert_buffers(state, before)


def test_state_dicts_with_a_tensor_missing_or_of_another_dtype() -> None:
    state = _used()
    before, saved = buffers_of(state), _state().state_dict()
    with pytest.raises(ValueError, match=r"skip_mask: expected torch.int32 .* got torch.int64"):
        state.load_state_dict({**saved, "skip_mask": saved["skip_mask"].long()})
    del saved["control"]
    with pytest.raises(ValueError, match=r"state_dict: expected \['control', .*got \['geometry'"):
        state.load_state_dict(saved)
    assert_buffers(state, before)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_model_saves_the_state_only_if_persistent(persistent: bool) -> None:
    class Model(nn.Module):
        def __init__(self, state: SkipState) -> None:
            super().__init__()
            self.linear, self.site = nn.Linear(2, 2), state

    state = _used(persistent=persistent)
    model, other = Model(state), Model(_state(persistent=persistent))
    saved = model.state_dict()
    names = {"linear.weight", "linear.bias"}
    if persistent:
        names |= {f"site.{name}" for name in ("skip_mask", "control", "threshold", "geometry")}
    assert set(saved) == names
    fresh = buffers_of(other.site)
    other.load_state_dict(saved)  # strict
    assert_buffers(other.site, buffers_of(state) if persistent else fresh)


@pytest.mark.parametrize(
    "move",
    [
        nn.Module.half,
        nn.Module.double,
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to(memory_format=torch.channels_last_3d),
        lambda module: module.to("cpu"),
        nn.Module.float,
    ],
)
def test_casts_of_a_model_leave_the_state_as_it_is(move: Any) -> None:
    model = nn.Sequential(nn.Conv3d(2, 2, 1), _used(initial_mask=torch.rand(2, 4, 7, 9) < 0.3))
    before = buffers_of(model[1])
    move(model)
    assert_buffers(model[1], before)
    skip_attention(*_inputs(3), model[1])


def test_moving_to_a_device_moves_all() -> None:
    state = _used(initial_mask=torch.rand(1, 1, 7, 9) < 0.3).to("meta")
    assert {buffer.device.type for buffer in state.buffers()} == {"meta"}
    assert state.skip_mask.dtype == torch.int32


def test_a_copy_goes_its_own_way() -> None:
    state = _used()
    twin, before = copy.deepcopy(state), buffers_of(state)
    skip_attention(*_inputs(4), twin)
    twin.set_threshold(-1.0)
    assert_buffers(state, before)
    assert not torch.equal(twin.skip_mask, state.skip_mask)
    assert (twin.tile_m, twin.capacity, twin.slots) == (state.tile_m, state.capacity, state.slots)


def test_a_state_born_in_inference_mode_lives_outside_of_it() -> None:
    with torch.inference_mode():
        state = _used(initial_mask=torch.zeros(1, 1, 7, 9, dtype=torch.bool))
    outside = _used(initial_mask=torch.zeros(1, 1, 7, 9, dtype=torch.bool))
    other = _used(initial_mask=torch.ones(1, 1, 7, 9, dtype=torch.bool), threshold=-2.0)
    before = buffers_of(outside)
    for action in (
        lambda state: skip_attention(*_inputs(3), state),
        lambda state: state.set_threshold(-1.0),
        lambda state: setattr(state, "slot", 0),
        lambda state: state.reset(),
        lambda state: state.load_state_dict(other.state_dict()),
        torch.inference_mode()(lambda state: skip_attention(*_inputs(3), state)),
        torch.inference_mode()(lambda state: state.reset()),
    ):
        results = [action(x) for x in (state, outside)]
        if isinstance(results[0], torch.Tensor):
            assert torch.equal(*results)
        assert_buffers(state, buffers_of(outside))
        assert any(not torch.equal(buffer, before[name]) for name, buffer in state.named_buffers())
        before = buffers_of(outside)


# ---- threads -------------------------------------------------------------------------------------------------------


def test_a_state_is_called_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call comes while the first is at it, and is refused before it computes anything."""
    q, k, v = clustered_qkv(1, seq_q=40)
    state, alone = (SkipState.for_inputs(q, k, threshold=-3.0) for _ in range(2))
    want = skip_attention(q, k, v, alone)
    errors: list[RuntimeError] = []

    def other() -> None:
        try:
            skip_attention(q, k, v, state)
        except RuntimeError as error:
            errors.append(error)

    op = functional.IMPLEMENTATIONS[None]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not errors:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return op(*args, **kwargs)

    monkeypatch.setitem(functional.IMPLEMENTATIONS, None, interrupted)
    assert torch.equal(skip_attention(q, k, v, state), want)
    assert "one thread at a time" in str(errors[0])
    assert torch.equal(state.control, alone.control)
    thread = threading.Thread(target=other)  # afterwards another thread may go on
    thread.start()
    thread.join()
    assert len(errors) == 1
    assert state.step() == 2


@pytest.mark.parametrize(("step", "auto_step", "then"), [(0, True, 1), (2, True, 3), (3, True, 0), (2, False, 2)])
def test_a_call_that_is_passed_over_leaves_the_next_one_to_start_fresh(step: int, auto_step: bool, then: int) -> None:
    """Else the first step of a generation, left out, would hand the last one's mask on."""
    state = SkipState(batch=1, heads=1, seq_q=8, seq_k=8, tile_m=4, tile_n=4, num_steps=4, auto_step=auto_step)
    state.slot = 1
    state.set_step(step)
    state.pass_over()
    assert (state.step(0), state.step(1)) == (step, then)
    assert [int(state.control[c.slot_word(slot, c.FRESH)]) for slot in (0, 1)] == [0, 1]
