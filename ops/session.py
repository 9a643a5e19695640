"""Which branch and step a model is in, told to the states of its attention sites."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from lite_attention.ops import control as c
from lite_attention.ops.arguments import check_step, check_time
from lite_attention.ops.place import Place, Told
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import add_to_each, zero_each

__all__ = ["BRANCH_TIME", "STEP_TIME", "Place", "Session", "Told", "default_session"]

# Who tells the flow's time: `branch(time=)`, or, where nobody does, the number of the step stands for it.
BRANCH_TIME, STEP_TIME = "branch", "step"

_TIMES = 3  # floats of a slot in the buffer `times`; the first is the time now


class Session:
    """Branch and step of a generation, written to the device memory of every state that follows the session.

    Compiled code and CUDA graphs read them there, so entering a branch recompiles nothing. One session serves one
    generation at a time.

    Args:
        slots: that every state will have; None = as the states that follow.
    """

    def __init__(self, slots: int | None = None) -> None:
        self._slots = slots
        self.clear()

    def clear(self) -> None:
        """Forget everything: names, steps, and who follows."""
        self.branches: dict[str, int] = {}  # name -> slot
        self.told: list[Told] = []  # branches entered, innermost last
        self.is_told = False  # somebody says where generations begin
        self._said = False  # that nobody does
        self._passes: dict[int, int] = {}  # passes of this generation that have no name -> slot
        self._ran: set[str] = set()  # names that ran in it
        self._states: weakref.WeakSet[SiteState] = weakref.WeakSet()
        self._controls: list[torch.Tensor | None] = []  # of the states, when these views were made:
        self._views: dict[tuple[str, int], list[torch.Tensor]] = {}  # by buffer and element
        self._slot = 0
        self._steps: dict[int, int] = {}  # slot -> step on the device, while the host writes it
        self._told_steps: dict[int, int] = {}  # slot -> the last step that the caller said
        self.steps = 0  # that the host has seen begin in this generation
        self.time_sources: dict[int, str] = {}  # slot -> who tells the flow's time in this generation
        self._times: dict[int, float] = {}  # slot -> the flow's time on the device, where it was ever written
        self._counting = True  # the op counts the steps; False: the host writes them
        self._driven = False  # by `enter` and `leave`, forward by forward
        self.generation = 0  # of the last forward that was placed
        self._thread: int | None = None  # inside a branch

    @property
    def states(self) -> list[SiteState]:
        """The states that follow, in no particular order."""
        return list(self._states)

    @property
    def slot_and_step(self) -> tuple[int, int | None]:
        """Where the next call is; the step is None while the op counts."""
        return self._slot, None if self._counting else self._steps.get(self._slot)

    def follow(self, state: SiteState) -> None:
        """Let a state follow from now on, and tell it where the session is.

        Raises:
            ValueError: the state has fewer slots than the session has branches.
        """
        if state in self._states:
            return
        self._check_slots(max([self._slot, *self.branches.values()]), [state])
        self._states.add(state)
        state.slot = self._slot
        if not self._counting:
            state.set_flag(c.FLAG_AUTO_STEP, False)
            for slot, step in self._steps.items():
                state.set_step(step, slot)
        times = state._buffers.get("times")
        if times is not None:
            for slot, time in self._times.items():
                times[slot : slot + 1, 0] = time

    # ---- branches by hand ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def branch(self, name: str, step: int | None = None, time: float | None = None) -> Iterator[int]:
        """Enter a branch; every call inside uses its slot.

        Args:
            name: any name; each new one takes the next free slot.
            step: denoising step. Given, it is written to the states, and holds for all calls inside; one that goes
                backwards begins a new generation. None: the op counts the calls.
            time: the flow's time, in any unit, for what forecasts. A generation that begins with it should tell it
                throughout: where it is missing, nothing is forecast.

        Raises:
            ValueError: one branch more than the states have slots, a step out of range, or a time that is no finite
                number.
            RuntimeError: another thread is inside a branch.
        """
        step = None if step is None else check_step(step)
        times = {} if time is None else {BRANCH_TIME: check_time(time)}
        slot = self._slot_of(name)
        self._check_slots(slot)
        if not self._states and self._thread not in (None, threading.get_ident()):
            yield slot  # nothing to write, so another thread is not in the way
            return
        with self._of_one_thread():
            self.branches[name] = slot
            self.is_told |= step is not None
            before, counting = self._slot, self._counting
            self._enter(slot)
            if step is not None:
                self._move(slot, step)
            elif not self._driven:
                self._told_steps.pop(slot, None)  # the op moves on from here
            self._count(step is None and not self._driven)
            try:
                with self.telling(name, step, times):
                    self._tell_by_hand(slot)
                    yield slot
            finally:
                self._enter(before)
                self._count(counting)
                self._tell_by_hand(slot)

    @contextlib.contextmanager
    def telling(self, name: str, step: int | None = None, times: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Name the branch, and perhaps step and time, of the forwards that a runner places inside; nothing is written.

        A time holds for all that is inside, unless another one is told there.
        """
        outer = self.told[-1].times if self.told else {}
        self.told.append(Told(name, step, {**outer, **(times or {})}))
        try:
            yield
        finally:
            self.told.pop()

    def _tell_by_hand(self, slot: int) -> None:
        told = self.told[-1].times.get(BRANCH_TIME) if self.told else None
        if not self._driven:
            self._tell_time(slot, {} if told is None else {BRANCH_TIME: told})

    @contextlib.contextmanager
    def _of_one_thread(self) -> Iterator[None]:
        outer, thread = self._thread, threading.get_ident()
        if outer not in (None, thread):
            raise RuntimeError(
                "branch: expected calls from one thread at a time, got one while another thread is inside a branch of "
                "the same session; give each model to enable(), which keeps the memories of threads apart"
            )
        self._thread = thread
        try:
            yield
        finally:
            self._thread = outer

    def say_unknown(self) -> None:
        """Warn, once, that nobody says where generations begin, unless somebody does."""
        if not self.is_told and not self._said:
            self._said = True
            warnings.warn(
                "lite_attention: nobody tells where a generation ends, so what one generation learned is used in the "
                "next: give LiteAttention num_steps=, or call lite_attention.reset() before each generation, or "
                "lite_attention.branch(name, step) around its steps",
                stacklevel=8,
            )

    def reset(self) -> None:
        """Begin a new generation: all states forget their votes and their step; branches keep their slots."""
        self.is_told = True
        self._count(not self._driven)
        self._restart()
        if self.told:  # a branch goes on with what it says
            self._tell_by_hand(self._slot)

    # ---- forwards that a model's runner places ---------------------------------------------------------------------

    def enter(self, place: Place) -> bool:
        """Write branch and step of a forward to the states; steps are the host's from now on.

        Returns:
            Whether the states have a slot for the branch; without one nothing is written.
        """
        if place.generation != self.generation:
            self.generation = place.generation
            self._restart()
        if not self._driven:
            self._driven = True
            self._steps.clear()
        self._count(False)
        slot = self._slot_of(place.branch)
        if slot >= self._room(self._states, slot + 1):
            return False
        if isinstance(place.branch, int):
            self._passes[place.branch] = slot
        else:
            self.branches[place.branch] = slot
            self._ran.add(place.branch)
        self._enter(slot)
        self.steps = max(self.steps, place.step + 1)
        if place.is_told:
            self._move(slot, place.step)
        elif self._steps.get(slot) != place.step:
            self._write_step(slot, place.step)
        self._tell_time(slot, place.times, binds=place.step > 0)
        return True

    def leave(self, place: Place) -> None:
        """Move a counted step on in all states, in those too that the forward left out."""
        if not place.is_told:
            slot = self._slot_of(place.branch)
            words = self._words(c.slot_word(slot, c.STEP))
            if words:
                add_to_each(words, 1)
            self._steps[slot] = place.step + 1

    def let_the_op_count(self) -> None:
        """Leave the steps to the op: a CUDA graph is captured, which the host will not see run."""
        self._driven = False
        self._count(True)
        for slot in range(self._room(self._states, 1)):
            self.time_sources[slot] = STEP_TIME
            self._write_time(slot, math.nan)

    # ---- the flow's time -------------------------------------------------------------------------------------------

    def _tell_time(self, slot: int, times: Mapping[str, float], binds: bool = True) -> None:
        """Write the flow's time of a slot. Who tells it first in a generation tells it for all of it.

        Times of two sources have two units: where that one is silent, infinity says that nothing is to be forecast.
        The first step does not bind: it leaves no residual, and schedulers tell nothing before it is over.
        """
        source = self.time_sources.get(slot, next(iter(times), STEP_TIME))
        if binds:
            self.time_sources[slot] = source
        time = math.nan if source == STEP_TIME else times.get(source, math.inf)
        if slot in self._times or not math.isnan(time):  # which is there from the start
            self._write_time(slot, time)

    def _write_time(self, slot: int, time: float) -> None:
        self._times[slot] = time
        _fill_each(self._words(slot * _TIMES, "times"), time)

    # ---- slots and words -------------------------------------------------------------------------------------------

    def _slot_of(self, branch: str | int) -> int:
        """Return the slot of a branch, or the first free one; passes may have those of names that have not run."""
        if isinstance(branch, int):
            taken = {*self._passes.values(), *(self.branches[name] for name in self._ran)}
            known = self._passes.get(branch)
        else:
            taken = {*self._passes.values(), *self.branches.values()}
            known = self.branches.get(branch)
            known = None if known in self._passes.values() else known
        return next(slot for slot in range(len(taken) + 1) if slot not in taken) if known is None else known

    def _room(self, states: Iterable[SiteState], otherwise: int) -> int:
        """Return the slots that all states have, or will have, if that is known."""
        return self._slots or min((state.slots for state in states), default=otherwise)

    def _check_slots(self, slot: int, states: Iterable[SiteState] | None = None) -> None:
        slots = self._room(self._states if states is None else states, slot + 1)
        if slot >= slots:
            raise ValueError(
                f"branch: expected at most {slots} names, one for each slot, got {[*self.branches]} and one more; "
                f"give slots={slot + 1} to enable(), the backend or LiteAttention"
            )

    def _restart(self) -> None:
        self._passes.clear()
        self._ran.clear()
        self._steps.clear()
        self._told_steps.clear()
        self.time_sources.clear()
        self.steps = 0
        states = [*self._states]
        if states:
            zero_each([state.skip_mask for state in states])
            zero_each([state.control[c.slot_word(0, 0) :] for state in states])
        for slot in self._times:
            self._write_time(slot, math.nan)

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
        last = self._told_steps.get(slot)
        if last is None or step < last:
            self._write(c.slot_word(slot, c.FRESH), 1)
            self.time_sources.pop(slot, None)
            self.steps = 0
        self.steps = max(self.steps, step + 1)
        if self._counting or self._steps.get(slot) != step:
            self._write_step(slot, step)
        self._told_steps[slot] = step

    def _write_step(self, slot: int, step: int) -> None:
        self._write(c.slot_word(slot, c.STEP), step)
        self._steps[slot] = step

    def _write(self, word: int, value: int) -> None:
        """Write one word of all control tensors: two launches, however many states there are."""
        _fill_each(self._words(word), value)

    def _words(self, word: int, name: str = "control") -> list[torch.Tensor]:
        """Return views of one word of a buffer of all states, kept from call to call: each takes 4 us to make."""
        controls = [state._buffers["control"] for state in self._states]
        if len(controls) != len(self._controls) or any(
            a is not b for a, b in zip(controls, self._controls, strict=True)
        ):
            self._controls, self._views = controls, {}  # who follows has changed, or has been moved
        if (name, word) not in self._views:
            buffers = [buffer.view(-1) for state in self._states if (buffer := state._buffers.get(name)) is not None]
            self._views[name, word] = [b[word : word + 1] for b in buffers if b.shape[0] > word]
        return self._views[name, word]


def _fill_each(words: list[torch.Tensor], value: float) -> None:
    if words:
        zero_each(words)
        add_to_each(words, value)


default_session = Session()
