"""`Session`: branches take slots, steps reach the device, generations begin anew."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from lite_attention.ops import Session, SkipState, skip_attention
from lite_attention.ops import control as c
from lite_attention.ops.session import Place
from tests.support.op_cases import Qkv, clustered_qkv


def _state(slots: int = 2) -> SkipState:
    return SkipState(batch=1, heads=2, seq_q=40, seq_k=40, tile_m=8, tile_n=8, slots=slots, threshold=-3.0)


def _inputs(step: int = 0) -> Qkv:
    return clustered_qkv(2, seq_q=40, step=step)


def _following(session: Session, *slots: int) -> list[SkipState]:
    states = [_state(n) for n in slots]
    for state in states:
        session.follow(state)
    return states


def test_branches_take_slots_in_turn() -> None:
    session = Session()
    states = _following(session, 3, 2)
    for name, slot in (("cond", 0), ("uncond", 1), ("cond", 0)):
        with session.branch(name) as entered:
            assert entered == slot
            assert [state.slot for state in states] == [slot, slot]
        assert [state.slot for state in states] == [0, 0]
    assert session.branches == {"cond": 0, "uncond": 1}
    assert set(session.states) == set(states)


def test_branches_nest_and_survive_errors() -> None:
    session = Session()
    (state,) = _following(session, 2)
    with session.branch("a"), session.branch("b"):
        with session.branch("a"):
            assert state.slot == 0
        assert state.slot == 1
        with pytest.raises(ZeroDivisionError), session.branch("a"):
            raise ZeroDivisionError
        assert state.slot == 1
    assert state.slot == 0


def test_one_branch_too_many() -> None:
    session = Session()
    states = _following(session, 2, 3)
    with session.branch("a"), session.branch("b"):
        pass
    before = [state.control.clone() for state in states]
    message = r"expected at most 2 names.* got \['a', 'b'\] and one more.*slots=3"
    with pytest.raises(ValueError, match=message), session.branch("c", step=3):
        pass
    assert list(session.branches) == ["a", "b"]
    assert all(torch.equal(state.control, old) for state, old in zip(states, before, strict=True))


def test_a_state_with_too_few_slots_does_not_follow() -> None:
    session = Session()
    with session.branch("a"), session.branch("b"):
        pass
    with pytest.raises(ValueError, match="branch: expected at most 1 names"):
        session.follow(_state(1))
    assert session.states == []


def test_each_branch_has_votes_of_its_own() -> None:
    session = Session()
    (state,) = _following(session, 2)
    alone = _state(1)
    for step in range(3):
        with session.branch("cond", step):
            out = skip_attention(*_inputs(step), state)
        assert torch.equal(out, skip_attention(*_inputs(step), alone))
        with session.branch("uncond", step):
            skip_attention(*(x.flip(1) for x in _inputs(step + 9)), state)
    assert torch.equal(state.skip_mask[0], alone.skip_mask[0])
    assert not torch.equal(state.skip_mask[1], alone.skip_mask[0])


def test_steps_that_are_told_are_not_counted() -> None:
    session = Session()
    (state,) = _following(session, 2)
    for step in (0, 1, 1, 4):
        with session.branch("cond", step):
            assert state.step() == step
            skip_attention(*_inputs(), state)
            skip_attention(*_inputs(), state)
            assert state.step() == step
            assert not state.control[c.FLAGS] & c.FLAG_AUTO_STEP
        assert state.control[c.FLAGS] & c.FLAG_AUTO_STEP  # outside, and for who comes later, calls count again
    late = _state()
    session.follow(late)
    assert late.control[c.FLAGS] & c.FLAG_AUTO_STEP


def test_without_a_step_the_op_counts() -> None:
    session = Session()
    (state,) = _following(session, 2)
    for name in ("cond", "uncond", "cond"):
        with session.branch(name):
            skip_attention(*_inputs(), state)
    assert (state.step(0), state.step(1)) == (2, 1)


def test_a_branch_without_a_step_is_counted_beside_one_that_is_told() -> None:
    session = Session()
    (state,) = _following(session, 2)
    for step in range(3):
        with session.branch("told", step):
            skip_attention(*_inputs(step), state)
        with session.branch("counted"):
            skip_attention(*_inputs(step), state)
    assert (state.step(0), state.step(1)) == (2, 3)
    assert torch.equal(state.skip_mask[0], state.skip_mask[1])


def test_a_step_backwards_begins_anew() -> None:
    session = Session()
    (state,) = _following(session, 2)
    for step in (1, 2, 3):
        for name in ("cond", "uncond"):
            with session.branch(name, step):
                skip_attention(*_inputs(step), state)
    uncond = state.skip_mask[1].clone()
    with session.branch("cond", 1):
        skip_attention(*_inputs(7), state)
    first = _state()
    skip_attention(*_inputs(7), first)
    assert torch.equal(state.skip_mask[0], first.skip_mask[0])
    assert torch.equal(state.skip_mask[1], uncond)


def test_who_follows_late_is_told_slot_and_step() -> None:
    session = Session()
    with session.branch("cond", 4):
        pass
    with session.branch("uncond", 5):
        (late,) = _following(session, 3)
        assert late.slot == 1
        session.follow(late)  # a second time changes nothing
        assert (late.step(0), late.step(1), late.step(2)) == (4, 5, 0)
        skip_attention(*_inputs(), late)
        assert late.step() == 5
    assert late.slot == 0


def test_who_follows_from_another_slot_is_told_the_first() -> None:
    session, state = Session(), _state()
    state.slot = 1
    session.follow(state)
    assert state.slot == 0


def test_reset_forgets_votes_and_steps_but_not_the_names() -> None:
    session = Session()
    states = _following(session, 2, 2)
    for step in (1, 2):
        for name in ("cond", "uncond"):
            with session.branch(name, step):
                for state in states:
                    skip_attention(*_inputs(step), state)
    session.reset()
    assert session.branches == {"cond": 0, "uncond": 1}
    for state in states:
        assert not state.skip_mask.any()
        assert (state.step(0), state.step(1)) == (0, 0)
    first = _state()
    skip_attention(*_inputs(8), first)
    with session.branch("uncond", 3):
        for state in states:
            assert state.step() == 3
            skip_attention(*_inputs(8), state)
            assert torch.equal(state.skip_mask[1], first.skip_mask[0])


def test_a_step_before_the_first_is_refused() -> None:
    session = Session()
    (state,) = _following(session, 2)
    before = state.control.clone()
    with pytest.raises(ValueError, match="step: expected 0 to 2147483647, got -1"), session.branch("cond", step=-1):
        pass
    assert torch.equal(state.control, before)
    with session.branch("cond", step=0):
        skip_attention(*_inputs(), state)


def test_the_session_keeps_no_state_alive() -> None:
    session = Session()
    states = _following(session, 2, 2)
    del states[0]
    gc.collect()
    assert session.states == states


def test_reset_returns_to_counting() -> None:
    session, state = Session(), SkipState(batch=1, heads=1, seq_q=8, seq_k=8, tile_m=4, tile_n=4)
    session.follow(state)
    with session.branch("cond", step=3):
        assert not state.control[c.FLAGS] & c.FLAG_AUTO_STEP
    session.reset()
    assert state.control[c.FLAGS] & c.FLAG_AUTO_STEP
    assert state.step() == 0


def test_a_told_step_is_written_again_after_counted_calls() -> None:
    session, state = Session(), SkipState(batch=1, heads=1, seq_q=8, seq_k=8, tile_m=4, tile_n=4)
    session.follow(state)
    with session.branch("cond", step=3):
        pass
    with session.branch("cond"):
        state.set_step(4)  # as the op does
    with session.branch("cond", step=3):
        assert state.step() == 3


# ---- forwards that a runner places ---------------------------------------------------------------------------------


def _forward(session: Session, states: list[SkipState], place: Place, left_out: int | None = None) -> None:
    """Run the op on all states but one, as a step cache does, at a place."""
    assert session.enter(place)
    for i, state in enumerate(states):
        if i != left_out:
            skip_attention(*_inputs(place.step), state)
    session.leave(place)


def test_a_counted_step_moves_in_all_states_those_left_out_too() -> None:
    session = Session()
    states = _following(session, 2, 2)
    for step in range(4):
        for branch in ("cond", "uncond"):
            _forward(session, states, Place(branch, step, 1, False), left_out=step % 2)
    for state in states:
        assert (state.step(0), state.step(1)) == (4, 4)


def test_a_told_step_stays() -> None:
    session = Session()
    states = _following(session, 2)
    for step in (3, 4):
        _forward(session, states, Place("cond", step, 1, True))
    assert states[0].step(0) == 4


def test_another_generation_starts_all_slots_fresh() -> None:
    session = Session()
    (state,) = _following(session, 2)
    for step in range(3):
        for branch in (0, 1):
            _forward(session, [state], Place(branch, step, 1, False))
    assert state.skip_mask[0].any()
    assert state.skip_mask[1].any()
    first = _state(1)
    skip_attention(*_inputs(0), first)
    _forward(session, [state], Place(0, 0, 2, False))
    assert torch.equal(state.skip_mask[0], first.skip_mask[0])
    assert not state.skip_mask[1].any()
    assert (state.step(0), state.step(1)) == (1, 0)


def test_passes_and_names_never_share_a_slot() -> None:
    session = Session()
    (state,) = _following(session, 3)
    slots = []
    for branch in (0, "cond", 1):
        _forward(session, [state], Place(branch, 0, 1, False))
        slots.append(state.slot)
    assert slots == [0, 1, 2]
    assert session.branches == {"cond": 1}


def test_passes_take_slots_of_names_that_this_generation_lacks() -> None:
    session = Session(slots=2)
    (state,) = _following(session, 2)
    for name in ("cond", "uncond"):
        _forward(session, [state], Place(name, 0, 1, False))
    for number in (0, 1):
        _forward(session, [state], Place(number, 0, 2, False))
        assert state.slot == number
    for slot, name in ((1, "uncond"), (0, "cond")):
        _forward(session, [state], Place(name, 0, 3, False))
        assert state.slot == slot


def test_a_pass_beyond_the_slots_is_refused_and_changes_nothing() -> None:
    session = Session()
    (state,) = _following(session, 2)
    for branch in (0, 1):
        _forward(session, [state], Place(branch, 0, 1, False))
    before = state.control.clone()
    for branch in (2, "third"):
        assert not session.enter(Place(branch, 0, 1, False))
        assert torch.equal(state.control, before)
    assert session.branches == {}


def test_slots_that_states_will_have_count_before_they_are_born() -> None:
    session = Session(slots=1)
    assert session.enter(Place(0, 0, 1, False))
    assert not session.enter(Place(1, 0, 1, False))


def test_the_op_counts_where_the_host_will_not_see_it_run() -> None:
    session = Session()
    (state,) = _following(session, 2)
    _forward(session, [state], Place("cond", 0, 1, False))
    session.let_the_op_count()  # a CUDA graph is captured, and replayed twice
    for _ in range(2):
        skip_attention(*_inputs(), state)
    assert state.step(0) == 3
    _forward(session, [state], Place("cond", 1, 1, False))
    assert state.step(0) == 2


# ---- threads -------------------------------------------------------------------------------------------------------


def test_another_thread_is_refused_while_a_branch_is_open() -> None:
    session = Session()
    (state,) = _following(session, 2)
    errors: list[BaseException] = []

    def other() -> None:
        try:
            with session.branch("uncond"):
                pass
        except RuntimeError as error:
            errors.append(error)

    def run() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with session.branch("cond"):
        before = state.control.clone()
        run()
        assert torch.equal(state.control, before)
    assert "one thread at a time" in str(errors[0])
    run()
    assert len(errors) == 1
    assert session.branches == {"cond": 0, "uncond": 1}
