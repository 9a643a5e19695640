"""What `enable` keeps of each model, for all who follow an enabled one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lite_attention.diffusers_hooks import Undo
from lite_attention.exact_tokens import kept_exact
from lite_attention.ops import Session, default_session
from lite_attention.ops.clock import Clock
from lite_attention.ops.threads import PerThread
from lite_attention.pipeline_scheduler import PipelineScheduler
from lite_attention.presets import preset_of

if TYPE_CHECKING:
    from lite_attention.compile.runner import Check, Runner
    from lite_attention.compile.store import StateStore
    from lite_attention.exact_tokens import ExactTokenOption

__all__ = ["Wiring", "run_by", "session_of", "store_of", "wirings"]


@dataclass
class Wiring:
    """What `enable` did to one model."""

    session: PerThread[Session]
    clock: PerThread[Clock]
    scheduler: PipelineScheduler | None = None  # of its pipeline
    preset: str | None = None  # where the number of steps is still to decide what it is
    undo: list[Undo] = field(default_factory=list)
    store: StateStore | None = None
    exact_tokens: ExactTokenOption | None = None

    def runner(self, model: nn.Module, store: StateStore, run: Callable[..., Any], checks: Sequence[Check]) -> Runner:
        """Return what runs the model with this session and clock."""
        from lite_attention.compile.runner import Runner

        return Runner(model, store, run, self.clock, checks, self.scheduler)

    def begin_loop(self, total: int | None) -> None:
        """Note that the pipeline begins its loop, of so many steps as far as known."""
        self.clock().begin_loop(total)
        if self.preset is not None and self.store is not None and total:
            self.store.plan(*preset_of(self.preset, total))


wirings: weakref.WeakKeyDictionary[nn.Module, Wiring] = weakref.WeakKeyDictionary()


def session_of(model: nn.Module | None) -> Session:
    """Return the session that a model's states follow in this thread."""
    wiring = wirings.get(model) if model is not None else None
    return default_session if wiring is None else wiring.session()


def store_of(model: nn.Module) -> StateStore | None:
    """Return the states of a model given to `enable`, None for any other."""
    wiring = wirings.get(model)
    return None if wiring is None else wiring.store


def run_by(model: nn.Module, store: StateStore, run: Callable[..., Any]) -> Runner:
    """Return what runs an enabled model another way, with other states, but with its branches and steps."""
    wiring = wirings[model]
    run, looks = kept_exact(model, store, wiring.exact_tokens, run)
    return wiring.runner(model, store, run, looks)
