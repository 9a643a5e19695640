"""`Runner`: runs the forwards of an enabled model, and looks at what they did.

It stands between `model(...)` and the model, compiled or not. Before a forward it tells the states which branch, step
and generation that is; behind it, it says, once for each cause, what went otherwise than the user meant.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from lite_attention.compile.other_attention import attention_modules, note_other_backends
from lite_attention.compile.store import StateStore
from lite_attention.ops import Session
from lite_attention.ops.clock import Clock
from lite_attention.ops.control import FLAG_DENSE, FLAGS
from lite_attention.ops.session import BRANCH_TIME
from lite_attention.ops.site import Site
from lite_attention.ops.torch_internals import fake_mode_of, is_fake, plain_call

__all__ = ["NOT_PICKLED", "Runner", "generations_unknown", "nothing_swapped", "timestep_of"]

NOT_PICKLED = "model: expected one that is not enabled to pickle, copy to another process or torch.save; call " + (
    "lite_attention.disable(model) first, and enable() what is loaded"
)

# What models call the timestep, and the most dimensions that it has: samples, or samples and tokens.
_TIMESTEPS = {"timestep": 2, "timesteps": 2, "t": 1, "time": 1, "sigma": 1, "sigmas": 1}

# Which of several timesteps each row of a joint sequence has, as MiniMax-H3 is told; its video comes last.
_ROWS = "timestep_indices"

_NOT_EXPORTED = (
    "model: expected one that is not enabled to export; call lite_attention.disable(model) first, and give the program "
    "to lite_attention.make_skip_aware()"
)

_SWAP_DID_NOT_RUN = (
    "a forward ran without skipping, though earlier ones skipped: the swapped code did not run. torch.compile leaves a "
    "model uncompiled beyond torch._dynamo.config.recompile_limit; hooks, offloading or adapters that came after "
    "enable() may break its graphs: call enable() after them, or with compile=False"
)

_INTEGERS = (torch.int32, torch.int64)

# Called with the arguments of a forward; raises what speaks against running it.
Check = Callable[[Sequence[Any], Mapping[str, Any]], None]


class Scheduler(Protocol):
    """What moves a pipeline from step to step; None where it does not say."""

    @property
    def step(self) -> int | None:
        """The call of the model that is to come."""

    @property
    def time(self) -> float | None:
        """The flow's time of that call."""


class Runner:
    """Runs a model as `enable` has it.

    Args:
        model: the model; what is called is `run`.
        store: the states of its sites.
        run: the model with its attention swapped.
        clock: returns the clock of the calling thread.
        checks: called before each forward.
        scheduler: that of the pipeline, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        store: StateStore,
        run: Callable[..., Any],
        clock: Callable[[], Clock],
        checks: Sequence[Check] = (),
        scheduler: Scheduler | None = None,
    ) -> None:
        self.store, self.clock = store, clock
        self._model, self._run, self._checks = model, run, checks
        self._scheduler = scheduler
        self._attention = attention_modules(model)
        self._timestep = timestep_of(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one forward.

        Raises:
            ValueError: the model is being exported.
        """
        for check in self._checks:
            check(args, kwargs)
        if fake_mode_of([*args, *kwargs.values()]) is not None:  # shapes alone are asked for
            if torch.compiler.is_exporting():
                raise ValueError(_NOT_EXPORTED)
            return plain_call(self._model)(*args, **kwargs)
        self.store.begin_forward()
        with self._placed(args, kwargs):
            result = self._run(*args, **kwargs)
        self._look_back()
        return result

    @contextmanager
    def _placed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Tell the states where the forward is; one that fails leaves no step half done."""
        session, clock = self.store.session, self.clock()
        name, step, told = session.told[-1] if session.told else (None, None, {})
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            session.let_the_op_count()  # a replay runs nothing of this but the branch that is captured
            with session.branch(name, step) if name is not None else nullcontext():
                yield
            return
        timestep = self._timestep_of(args, kwargs) if step is None else None
        place = clock.place(name, step, timestep, self._scheduler.step if self._scheduler and clock.in_loop else None)
        place = place._replace(times=self._times(told, clock, timestep))
        if place.generation != session.generation:
            self.store.forget_other_sizes()
        try:
            if session.enter(place):
                yield
                session.leave(place)
            else:
                slots = self.store.settings.slots
                self.store.say(
                    f"a step has more than {slots} passes: the others are dense. Give enable() slots={slots + 1}, or "
                    "as many as there are, or lite_attention.branch(name) around each pass"
                )
                with _dense(session):
                    yield
        except BaseException:
            clock.begin(is_told=False)
            raise

    def _times(self, told: Mapping[str, Any], clock: Clock, timestep: float | None) -> dict[str, float]:
        """Return the flow's time by who tells it, the surest first; only a forecast asks."""
        if not self.store.settings.forecasts:
            return {}
        of_scheduler = self._scheduler.time if self._scheduler and clock.in_loop else None
        times = {
            BRANCH_TIME: told.get(BRANCH_TIME), "cache_context": _number(told.get("cache_context")),
            "scheduler": of_scheduler, "timestep": timestep,
        }  # fmt: skip
        return {source: time for source, time in times.items() if time is not None and math.isfinite(time)}

    def _timestep_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
        """Return the timestep that the model is given, the middle of several; reading it waits for the device."""
        if self._timestep is None:
            return None
        name, position = self._timestep
        value = kwargs.get(name, args[position] if position < len(args) else None)
        return _number(_of_last_row(value, kwargs.get(_ROWS)), _TIMESTEPS[name])

    def _look_back(self) -> None:
        """Say, once for each cause, what a forward did that the user may not expect."""
        note_other_backends(self._attention, self.store)
        sites = [record.site for record in self.store.records]
        if not any(site.swapped for site in sites):
            self.store.say(nothing_swapped(sites))
            return
        # A cache of diffusers may leave all blocks out; that is as it should be.
        forward = self.store.forward
        if not (forward.skipped or forward.is_explained) and not getattr(self._model, "is_cache_enabled", False):
            self.store.say(_SWAP_DID_NOT_RUN)
        clock, settings = self.clock(), self.store.settings
        if clock.is_endless:
            self.store.say(generations_unknown(settings.max_steps))
        elif clock.is_blind and clock.has_loop:
            self.store.say(
                "the pipeline tells neither branch nor timestep, so every call of the model counts as a step of one "
                "branch; if it calls it twice a step, use lite_attention.branch(name) around each"
            )


def timestep_of(model: nn.Module) -> tuple[str, int] | None:
    """Return the name and position of the argument that tells a model the timestep; None if it has none."""
    names = [*inspect.signature(type(model).forward).parameters][1:]
    return next(((name, names.index(name)) for name in _TIMESTEPS if name in names), None)


def _of_last_row(timesteps: Any, rows: Any) -> Any:
    """Return the timestep of the last row of a sequence, or the timesteps as they are where rows have none."""
    if not (isinstance(rows, torch.Tensor) and rows.numel() and isinstance(timesteps, torch.Tensor)):
        return timesteps
    return timesteps if is_fake(timesteps) or timesteps.dim() != 1 else timesteps[rows.flatten()[-1:]]


def _number(value: object, dims: int = 1) -> float | None:
    """Return a number as it is, or the middle of a tensor of at most so many dimensions; None of anything else.

    Parts of a sequence may have timesteps of their own, some of which stay: those of a first frame at the lower end,
    those of reference audio at the upper. The middle of both ends moves as long as one of them does.
    """
    if isinstance(value, torch.Tensor):
        numbers = value.is_floating_point() or value.dtype in _INTEGERS
        is_one = numbers and value.dim() <= dims
        if not is_one or not value.numel() or is_fake(value):
            return None
        low, high = value.aminmax()
        return (float(low) + float(high)) / 2 if value.numel() > 1 else float(value)
    return float(value) if isinstance(value, (int, float)) else None


def nothing_swapped(sites: Sequence[Site]) -> str:
    """Return what to say where no site of a model is skip-aware."""
    reasons = sorted({str(site.reason) for site in sites}) or [
        "no scaled_dot_product_attention was seen: is the model's attention another's, or does torch.compile leave it "
        'alone, as where hooks of offloading break its graphs in loops? Then compile="blocks" or compile=False helps'
    ]
    return f"no attention was swapped ({'; '.join(reasons)}); see lite_attention.report(model)"


def generations_unknown(max_steps: int) -> str:
    """Return what to say where nobody tells generations apart."""
    return (
        f"nobody tells where a generation ends, so skipping starts fresh only every {max_steps} calls. Use "
        "lite_attention.enable(pipeline), or num_steps=, or lite_attention.reset(model) before each generation, and "
        "lite_attention.branch(name) around cond and uncond passes"
    )


@contextmanager
def _dense(session: Session) -> Iterator[None]:
    """Let the states of a session compute everything and stay as they are."""
    there = session.states
    words = [state.control[FLAGS : FLAGS + 1] for state in there]
    before = [word.clone() for word in words]
    for word in words:
        word.bitwise_or_(FLAG_DENSE)
    try:
        yield
    finally:
        for word, old in zip(words, before, strict=True):
            word.copy_(old)
        for state in {*session.states}.difference(there):  # born in the slot of another pass
            state.skip_mask.zero_()
            state.start_fresh()
