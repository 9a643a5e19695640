"""Which branch and step a model is in, told to the states of its attention sites."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch

from lite_attention.ops import control as c
from lite_attention.ops.state import SkipState

__all__ = ["Session", "default_session"]


class Session:
    """Branch and step of a generation, written to the device memory of every state that follows the session.

    Compiled code and CUDA graphs read them there, so entering a branch recompiles nothing. One session serves one
    generation at a time.
    """

    def __init__(self) -> None:
        self.branches: dict[str, int] = {}  # name -> slot
        self._states: weakref.WeakSet[SkipState] = weakref.WeakSet()
        self._slot = 0
        self._steps: dict[int, int] = {}  # slot -> step, where the caller says it
        self._counting = True  # the op counts the steps; False: the caller says them
        self.is_told = False  # somebody says where generations begin

    @property
    def states(self) -> list[SkipState]:
        """The states that follow, in no particular order."""
        return list(self._states)

    def follow(self, state: SkipState) -> None:
        """Let a state follow from now on, and tell it where the session is.

        Raises:
            ValueError: the state has fewer slots than the session has branches.
        """
        if state in self._states:
            return
        self._check_slots(max(self.branches.values(), default=0), [state])
        self._states.add(state)
        state.slot = self._slot
        for slot, step in self._steps.items():
            state.set_step(step, slot)
        if not self._counting:
            state.set_flag(c.FLAG_AUTO_STEP, False)

    @contextlib.contextmanager
    def branch(self, name: str, step: int | None = None) -> Iterator[int]:
        """Enter a branch; every call inside uses its slot.

        Args:
            name: any name; each new one takes the next slot.
            step: denoising step. Given, it is written to the states, and one that goes backwards begins a new
                generation. None: the op counts the calls.

        Raises:
            ValueError: one branch more than the states have slots.
        """
        if step is not None and step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        slot = self.branches.get(name, len(self.branches))
        self._check_slots(slot, self._states)
        self.branches[name] = slot
        self.is_told |= step is not None
        before = self._slot
        self._enter(slot)
        self._count(step is None)
        if step is not None:
            self._move(slot, step)
        else:
            self._steps.pop(slot, None)  # the op moves on from here
        try:
            yield slot
        finally:
            self._enter(before)

    def reset(self) -> None:
        """Begin a new generation: all states forget their votes and their step; branches keep their slots."""
        self.is_told = True
        self._steps.clear()
        self._count(True)
        for state in self._states:
            state.reset()

    def _check_slots(self, slot: int, states: object) -> None:
        slots = min((state.slots for state in states), default=slot + 1)  # type: ignore[attr-defined]
        if slot >= slots:
            raise ValueError(
                f"branch: expected at most {slots} names, one for each slot, got {[*self.branches]} and one more; "
                f"give the states slots={slot + 1}, or reset() to forget the names"
            )

    def _enter(self, slot: int) -> None:
        if slot != self._slot:
            self._slot = slot
            self._write(c.SLOT, slot)

    def _count(self, counting: bool) -> None:
        if counting != self._counting:
            self._counting = counting
            for state in self._states:
                state.set_flag(c.FLAG_AUTO_STEP, counting and state.auto_step)

    def _move(self, slot: int, step: int) -> None:
        last = self._steps.get(slot)
        if last is None or step < last:
            self._write(c.slot_word(slot, c.FRESH), 1)
        if step != last:
            self._write(c.slot_word(slot, c.STEP), step)
        self._steps[slot] = step

    def _write(self, word: int, value: int) -> None:
        """Write one word of all control tensors: two launches, however many states there are."""
        words = [state.control[word : word + 1] for state in self._states]
        if words:
            torch._foreach_zero_(words)
            torch._foreach_add_(words, value)


default_session = Session()
