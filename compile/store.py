"""The states of swapped sites, found at run time by who owns the site.

A graph does not own them: one compiled block serves many layers, and a recompile must not lose a state. The owner is
what tells layers apart: the parameters that feed the attention, or the module that calls it.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lite_attention.compile.settings import Site, SkipSettings, Threshold
from lite_attention.ops import Session, SkipState

__all__ = ["SiteRecord", "StateStore", "records_of"]

Sizes = tuple[int, int, int]  # batch, seq_q, seq_k
StateKey = tuple[Sizes, torch.device, tuple[int, int]]  # with tile_m and tile_n
NamedThreshold = Threshold | Callable[[str], Threshold]  # one for all sites, or by their paths in a model

_stores: weakref.WeakSet[StateStore] = weakref.WeakSet()


@dataclass
class SiteRecord:
    """One attention site of one layer, with a state for each size, device and tile shape it has been called at."""

    site: Site
    owners: tuple[weakref.ref[object], ...]
    states: dict[StateKey, SkipState] = field(default_factory=dict)
    last: SkipState | None = None

    def name(self, model: nn.Module) -> str:
        """Return the full path of the site's module in a model, as far as its owners tell."""
        paths: dict[int, list[str]] = defaultdict(list)
        for path, parameter in model.named_parameters(remove_duplicate=False):
            paths[id(parameter)].append(path.removeprefix("_orig_mod."))
        for path, module in model.named_modules(remove_duplicate=False):
            paths[id(module)].append(path.removeprefix("_orig_mod."))
        known = [(paths[id(owner())], i) for i, owner in enumerate(self.owners) if id(owner()) in paths]
        # A parameter that layers share does not name the layer: the others come first.
        for (path, *_), i in sorted(known, key=lambda item: len(item[0])):
            if isinstance(self.owners[i](), nn.Module):
                return path
            if i < len(self.site.owner_paths):
                return _renamed(self.site.name, self.site.owner_paths[i], path)
        return self.site.name


def _renamed(name: str, then: str, now: str) -> str:
    """Return what a module is called in the layer whose parameter is `now`, from its name in that of `then`."""
    old, new = then.split("."), now.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop(), new.pop()
    parts = name.split(".") if name else []
    return ".".join([*new, *parts[len(old) :]]) if parts[: len(old)] == old else name


# The sites of one run of a graph with their states, and the states' buffers in the order of the graph's inputs.
Resolved = tuple[list[tuple[SiteRecord, SkipState]], list[torch.Tensor]]


class StateStore:
    """The records of one backend, or of one model run eagerly.

    Args:
        settings: what the states are made with.
        session: what they follow.
        model: whose paths name the sites that `settings.threshold` and `settings.initial_mask` are asked about; None =
            sites are named as in the compiled graph, relative to what was compiled.
    """

    def __init__(self, settings: SkipSettings, session: Session, model: nn.Module | None = None) -> None:
        self.settings = settings
        self.session = session
        self._model = None if model is None else weakref.ref(model)  # it holds the store
        self._threshold: Threshold | None = None  # of states to come, in place of that of the settings
        self._thresholds: weakref.WeakKeyDictionary[nn.Module, NamedThreshold] = weakref.WeakKeyDictionary()
        self._records: dict[tuple[object, ...], SiteRecord] = {}
        self._resolved: dict[tuple[object, ...], Resolved] = {}  # so that a call costs one look-up, not one a site
        _stores.add(self)

    @property
    def records(self) -> list[SiteRecord]:
        """All sites met so far."""
        return list(self._records.values())

    @property
    def model(self) -> nn.Module | None:
        """The model whose paths name the sites."""
        return None if self._model is None else self._model()

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
            record = SiteRecord(site, tuple(weakref.ref(owner) for owner in owners))
            self._records[full_key] = record
            for owner in owners:
                weakref.finalize(owner, self._forget, full_key).atexit = False
        elif record.site.swapped <= site.swapped:
            record.site = site  # a graph that swaps it says more than one that did not
        return record

    def _forget(self, full_key: tuple[object, ...]) -> None:
        self._records.pop(full_key, None)
        self._resolved.clear()

    def resolved(self, key: tuple[object, ...], resolve: Callable[[], Resolved]) -> list[torch.Tensor]:
        """Return the state buffers for one run of a graph; `resolve` finds them at the first with this key."""
        found = self._resolved.get(key)
        if found is None:
            found = self._resolved[key] = resolve()
        for record, state in found[0]:
            record.last = state
        return found[1]

    def state(self, record: SiteRecord, sizes: Sizes, device: torch.device) -> SkipState:
        """Return the state of a site at a size, allocated on first use.

        Raises:
            RuntimeError: it would have to be allocated while a CUDA graph is being captured.
        """
        site = replace(record.site, device=device)
        key = (sizes, device, self.settings.tile_shape_for(site))
        state = record.states.get(key)
        if state is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"skip state of {record.site.name or 'a site'} at (batch, seq_q, seq_k) = {sizes} is not "
                    "allocated, and a CUDA graph is being captured: call the model once before capturing"
                )
            model = None if self._model is None else self._model()
            if model is not None:
                site.name = record.name(model)
            state = self.settings.new_state(site, sizes, self._threshold_of(record))
            self.session.follow(state)
            record.states[key] = state
        return state

    def reset(self, records: Iterable[SiteRecord] | None = None) -> None:
        """Begin a new generation: forget all votes, and the states of all sizes but the last."""
        self._resolved.clear()
        for record in self.records if records is None else records:
            record.states = {key: state for key, state in record.states.items() if state is record.last}
            for state in record.states.values():
                state.reset()

    def clear(self) -> None:
        """Let go of all sites and states; compiled code that nobody calls any more may still hold the store."""
        self._records.clear()
        self._resolved.clear()

    def set_threshold(self, threshold: Threshold) -> None:
        """Write the threshold of all states, in place, and remember it for those to come."""
        for record in self.records:
            for state in record.states.values():
                state.set_threshold(threshold)
        self._threshold = threshold
        self._thresholds.clear()

    def tables(self, model: nn.Module, threshold: NamedThreshold) -> list[tuple[SkipState, torch.Tensor]]:
        """Return the states of a model's sites with the table that each is to hold; nothing is written.

        Raises:
            ValueError: a threshold that does not fit; or, before there are states, that none of this store could hold.
        """
        if not callable(threshold):
            self.settings.check_schedule(threshold)
        return [
            (state, state.threshold_table(threshold(record.name(model)) if callable(threshold) else threshold))
            for record in self.records_in(model)
            for state in record.states.values()
        ]

    def remember(self, model: nn.Module, threshold: NamedThreshold) -> None:
        """Let a model's states to come begin with a threshold."""
        self._thresholds.pop(model, None)  # the latest is the last
        self._thresholds[model] = threshold

    def _threshold_of(self, record: SiteRecord) -> Threshold | None:
        for model, threshold in [*self._thresholds.items()][::-1]:
            if any(record is other for other in self.records_in(model)):
                return threshold(record.name(model)) if callable(threshold) else threshold
        return self._threshold

    def records_in(self, model: nn.Module) -> list[SiteRecord]:
        """Return the sites that belong to a model's parameters and modules."""
        owned = {id(p) for p in model.parameters()} | {id(m) for m in model.modules()}
        return [record for record in self.records if any(id(owner()) in owned for owner in record.owners)]


def records_of(model: nn.Module) -> Iterator[tuple[StateStore, SiteRecord]]:
    """Yield the sites that belong to a model's parameters and modules, with their stores."""
    for store in list(_stores):
        for record in store.records_in(model):
            yield store, record
