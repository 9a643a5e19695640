"""The states of swapped sites, found at run time by who owns the site.

A graph does not own them: one compiled block serves many layers, and a recompile must not lose a state. The owner is
what tells layers apart: the parameters that feed the attention, or the module that calls it.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from lite_attention.compile.memory_notice import MemoryNotice
from lite_attention.compile.records import Forward, SiteRecord, Sizes, StateKey, paths_of
from lite_attention.compile.settings import SkipSettings
from lite_attention.compile.values import SiteValue, table_of
from lite_attention.ops import ResidualState, Session
from lite_attention.ops.buffers import nbytes_of
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.ops.residual_settings import check_keep, require_residual, require_votes
from lite_attention.ops.shard import Shard
from lite_attention.ops.site import Site
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.threads import PerThread

__all__ = ["StateStore", "stores_with"]

_stores: weakref.WeakSet[StateStore] = weakref.WeakSet()


# The sites of one run of a graph, each with its state or why it does not skip; and the states' buffers in the order of
# the graph's inputs.
Resolved = tuple[list[tuple[SiteRecord, SiteState | None, str | None]], list[torch.Tensor]]


class StateStore:
    """The records of one backend, or of one model run eagerly.

    Args:
        settings: what the states are made with.
        session: what they follow: one for all, or a function that returns that of the calling thread.
        model: whose paths name the sites that `settings.threshold` and `settings.initial_mask` are asked about; None =
            sites are named as in the compiled graph, relative to what was compiled.
        prefix: of these names, such as "transformer." in a pipeline.
        shard: tells which part of the model's attention is here; asked whenever a state may be born.
    """

    def __init__(
        self,
        settings: SkipSettings,
        session: Session | Callable[[], Session],
        model: nn.Module | None = None,
        prefix: str = "",
        shard: Callable[[], Shard] = Shard,
    ) -> None:
        self.settings = settings
        self.prefix = prefix
        self._shard = shard
        self.forwards = 0  # of the model so far, where it is enabled and tells
        self.is_dense = False  # states to come begin with skipping off
        self.on_birth: Callable[[SiteRecord, StateKey, SiteState, Site], None] | None = None
        self._session = session
        self._planned: PerThread[SkipSettings] = PerThread(lambda: settings)  # generations may differ in their steps
        self._model = None if model is None else weakref.ref(model)  # it holds the store
        self._forward: PerThread[Forward] = PerThread(Forward)
        # Thresholds, or shares to keep, that were set for a model, with the prefix of its sites' names.
        self._values: weakref.WeakKeyDictionary[nn.Module, tuple[SiteValue, str]] = weakref.WeakKeyDictionary()
        self._records: dict[tuple[object, ...], SiteRecord] = {}
        self._resolved: dict[int, dict[tuple[object, ...], Resolved]] = {}  # by session: a call costs one look-up
        self._met: set[int] = set()  # sessions whose end is awaited
        self._said: set[str] = set()
        self._notice = MemoryNotice()
        _stores.add(self)

    @property
    def session(self) -> Session:
        """What the states of this thread follow."""
        return self._session if isinstance(self._session, Session) else self._session()

    @property
    def shard(self) -> Shard:
        """Which part of the model's attention is here now."""
        return self._shard()

    @property
    def records(self) -> list[SiteRecord]:
        """All sites met so far."""
        return list(self._records.values())

    @property
    def model(self) -> nn.Module | None:
        """The model whose paths name the sites."""
        return None if self._model is None else self._model()

    # ---- forwards --------------------------------------------------------------------------------------------------

    def begin_forward(self) -> None:
        """Note that the model begins to run."""
        self.forwards += 1
        self._forward.set(Forward(self.forwards))

    @property
    def forward(self) -> Forward:
        """What this thread is at, or was at last."""
        return self._forward()

    def calls_before(self, calls: Counter[tuple[int, ...]]) -> tuple[int, ...]:
        """Return how many calls these owners have made in this forward, and count more.

        Args:
            calls: that are about to be made, by owners.

        Returns:
            A number for each key of `calls`; 0 where no forward is known.
        """
        forward = self._forward()
        before = tuple(forward.calls[owners] for owners in calls)
        if forward.number:
            forward.calls.update(calls)
        return before

    def note(self, record: SiteRecord, state: SiteState | None, reason: str | None = None) -> None:
        """Note that a site has run, with its state, or dense for a reason.

        Says, once for each reason, that one which skips did not; the report has them all.

        Args:
            record: the site.
            state: what it skipped by; None = it ran dense.
            reason: why it did.
        """
        forward = self._forward()
        record.ran_in = max(record.ran_in, forward.number)  # another thread may have overtaken this one
        forward.skipped |= state is not None
        forward.is_explained |= state is None and record.last is not None
        if state is not None:
            forward.ran.add(id(record))
            session = self.session
            record.last = record.recent[id(session)] = state
            slot, step = session.slot_and_step
            if isinstance(state, ResidualState) and step is not None:
                state.note_step(slot, step)
            record.ran_dense = None
        elif reason != record.ran_dense:
            record.ran_dense = reason
            if record.last is not None:
                name = self._named(record) or record.site.class_name
                said = f"ran dense: {reason}; see lite_attention.report(model)"
                self.say(f"{name}, which skips, {said}", cause=said)

    def say(self, message: str, cause: str | None = None) -> None:
        """Warn, once for each message, or for each cause."""
        cause = cause or message
        if cause not in self._said:
            self._said.add(cause)
            warnings.warn(f"lite_attention: {message}", stacklevel=4)

    # ---- records and states ----------------------------------------------------------------------------------------

    def record(self, owners: Sequence[object], key: tuple[object, ...], site: Site) -> SiteRecord:
        """Return the record of a site, made on first use and dropped when its first owner dies.

        Args:
            owners: parameters, or a module.
            key: tells sites of the same owners apart.
            site: what was seen of it when compiled.
        """
        full_key = (*map(id, owners), *key)
        record = self._records.get(full_key)
        if record is None:
            made = SiteRecord(site, tuple(weakref.ref(owner) for owner in owners))
            record = self._records.setdefault(full_key, made)
            for owner in owners:
                weakref.finalize(owner, _later(self._forget), full_key).atexit = False
        elif record.site.swapped <= site.swapped:
            record.site = site  # a graph that swaps it says more than one that did not
        return record

    def _forget(self, full_key: tuple[object, ...]) -> None:
        self._records.pop(full_key, None)
        self._resolved.clear()

    def resolved(self, key: tuple[object, ...], resolve: Callable[[], Resolved]) -> list[torch.Tensor]:
        """Return the state buffers for one run of a graph; `resolve` finds them at the first with this key."""
        of_session = self._resolved.setdefault(id(self.session), {})
        found = of_session.get(key)
        if found is None:
            found = of_session[key] = resolve()
        for record, state, reason in found[0]:
            self.note(record, state, reason)
        return found[1]

    def state(self, record: SiteRecord, sizes: Sizes, device: torch.device) -> SiteState:
        """Return the state of a site at a size for this thread, allocated on first use.

        Raises:
            RuntimeError: it would have to be allocated while a CUDA graph is being captured.
        """
        session, shard = self.session, self.shard
        site = replace(record.site, device=device)
        key = (sizes, device, self.settings.tile_shape_for(site), id(session), shard)
        state = record.states.get(key)
        if state is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"skip state of {record.site.name or 'a site'} at (batch, seq_q, seq_k) = {sizes} is not "
                    "allocated, and a CUDA graph is being captured: call the model once before capturing"
                )
            value, site.name = self._remembered(record)
            self._announce(record, site, sizes)
            state = self._planned().new_state(site, sizes, value, shard)
            state.set_flag(FLAG_DENSE, self.is_dense)
            session.follow(state)
            record.states[key] = state
            if self.on_birth is not None:
                self.on_birth(record, key, state, shard.whole(self.settings.sized(site, sizes, key[2])))
            if id(session) not in self._met:
                self._met.add(id(session))
                weakref.finalize(session, _later(self._forget_session), id(session)).atexit = False
        return state

    def _announce(self, record: SiteRecord, site: Site, sizes: Sizes) -> None:
        """Say how much memory is about to be taken, if it is much."""
        residual, model = self.settings.residual, self.model
        if residual is not None:
            sized = self.settings.sized(site, sizes, self.settings.tile_shape_for(site))
            name = site.name if model is None else record.name(model)
            nbytes = sum(nbytes_of(self.settings.buffers(sized)).values())
            self._notice.announce(name, nbytes, residual.memory, model)

    def _forget_session(self, session: int) -> None:
        """Let go of the states of a thread that has ended."""
        self._met.discard(session)
        self._resolved.pop(session, None)
        for record in self.records:
            record.recent.pop(session, None)
            for key in [key for key in [*record.states] if key[3] == session]:
                record.states.pop(key, None)

    def _named(self, record: SiteRecord) -> str:
        model = self.model
        return record.site.name if model is None else self.prefix + record.name(model)

    def reset(self, records: Iterable[SiteRecord] | None = None) -> None:
        """Begin a new generation in this thread: forget all votes, and the states of all sizes but the last."""
        self.forget_other_sizes(records)
        for record in self.records if records is None else records:
            state = record.recent.get(id(self.session))
            if state is not None:
                state.reset()

    def forget_other_sizes(self, records: Iterable[SiteRecord] | None = None) -> None:
        """Let go of the states of this thread that the latest calls did not use."""
        session = id(self.session)
        self._resolved.pop(session, None)
        for record in self.records if records is None else records:
            for key, state in [*record.states.items()]:
                if key[3] == session and state is not record.recent.get(session):
                    record.states.pop(key, None)

    def clear(self) -> None:
        """Let go of all sites and states; compiled code that nobody calls any more may still hold the store."""
        self._records.clear()
        self._resolved.clear()
        self._values.clear()
        _stores.discard(self)

    # ---- keep -----------------------------------------------------------------------------------------------------

    def plan(self, keep: float, full_every: int) -> None:
        """Let residuals of this thread keep so much, and every so many steps be full, in states to come too.

        Shares that were set for a model stay.
        """
        now = self._planned()
        if self._values or (keep, full_every) == (now.keep, now.full_every):
            return
        planned = replace(now, keep=keep, full_every=full_every)
        self._planned.set(planned)
        residual = planned.residual
        assert residual is not None
        for state in self._states_here():
            assert isinstance(state, ResidualState)
            residual.write_plan(state)
            state.set_keep(residual.keep)

    def _states_here(self) -> list[SiteState]:
        session = id(self.session)
        return [state for record in self.records for key, state in [*record.states.items()] if key[3] == session]

    # ---- thresholds and shares to keep -----------------------------------------------------------------------------

    def tables(
        self, model: nn.Module, name: Literal["threshold", "keep"], value: SiteValue, prefix: str = ""
    ) -> list[tuple[SiteState, torch.Tensor]]:
        """Return the states of a model's sites with the table that each is to hold; nothing is written.

        Args:
            model: whose sites are meant.
            name: what is to be set.
            value: for all, or by `Site`.
            prefix: of the sites' names.

        Raises:
            ValueError: a value that does not fit; or, before there are states, that none of this store could hold; or
                the method has none of that name.
        """
        self._check_value(name, value)
        found, paths = [], paths_of(model)
        for record in self.records_in(model):
            site = replace(record.site, name=prefix + record.name_among(paths))
            for (sizes, device, tiles, _, shard), state in [*record.states.items()]:  # threads add to them
                sized = shard.whole(self.settings.sized(replace(site, device=device), sizes, tiles))
                of_site = value(sized) if callable(value) else value
                if name == "threshold":  # shares to keep are of all heads together
                    of_site = shard.own_heads(name, of_site, state.capacity[1])
                found.append((state, table_of(state, of_site)))
        return found

    def _check_value(self, name: str, value: SiteValue) -> None:
        if name == "keep":
            require_residual(self.settings.residual)
            if not callable(value):
                check_keep(value)
        else:
            require_votes(self.settings.residual)
            if not callable(value):
                self.settings.check_schedule(value)

    def remember(self, model: nn.Module, value: SiteValue, prefix: str = "") -> None:
        """Let a model's states to come begin with a value; the arguments are those of `tables`."""
        self._values.pop(model, None)  # the latest is the last
        self._values[model] = value, prefix

    def _remembered(self, record: SiteRecord) -> tuple[SiteValue | None, str]:
        """Return the value that a site's states to come begin with, None for the settings', and the site's name."""
        for model, (value, prefix) in [*self._values.items()][::-1]:
            if any(record is other for other in self.records_in(model)):
                return value, prefix + record.name(model)
        return None, self._named(record)

    def records_in(self, model: nn.Module) -> list[SiteRecord]:
        """Return the sites that belong to a model's parameters and modules."""
        owned = {id(p) for p in model.parameters()} | {id(m) for m in model.modules()}
        return [record for record in self.records if any(id(owner()) in owned for owner in record.owners)]


def _later(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a method for `weakref.finalize`, which would keep its object alive otherwise."""
    alive = weakref.WeakMethod(method)

    def call(argument: Any) -> None:
        bound = alive()
        if bound is not None:
            bound(argument)

    return call


def stores_with(model: nn.Module) -> list[StateStore]:
    """Return the stores that hold sites of a model's parameters and modules, or that were made for it."""
    return [store for store in list(_stores) if store.model is model or store.records_in(model)]
