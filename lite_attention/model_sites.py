"""The attention sites of a model or pipeline: one walk for all who ask for them.

A site is a call that the swap has seen, or a `LiteAttention` module. Their names are those that `report` prints: the
path of the module in its model, below the name of the transformer if it is a pipeline's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lite_attention.module import LiteAttention
from lite_attention.ops import SkipState
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.ops.residual_settings import ResidualSettings
from lite_attention.ops.shard import WHOLE, Shard
from lite_attention.ops.site import Site, SiteKeep, SiteThreshold
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import unwrapped

if TYPE_CHECKING:
    from lite_attention.compile.records import SiteRecord
    from lite_attention.compile.store import StateStore

__all__ = [
    "ModelSite",
    "methods_of",
    "models_of",
    "parts_of",
    "set_dense",
    "set_values",
    "sites_of",
    "stores_of",
]


@dataclass
class ModelSite:
    """One attention site of a model; exactly one of `record` and `module` is there."""

    name: str  # as `report` prints it
    model: nn.Module  # the one that holds it
    record: SiteRecord | None = None  # of a call that the swap has seen, with its store
    store: StateStore | None = None
    module: LiteAttention | None = None

    @property
    def site(self) -> Site:
        """What is known of the call; sizes are 0 for a `LiteAttention` before its first one."""
        if self.record is not None:
            return self.record.site
        assert self.module is not None
        return self.module.site(self.name)

    @property
    def reason(self) -> str | None:
        """Why it does not skip, None if it does."""
        return None if self.record is None else self.record.site.reason

    @property
    def note(self) -> str | None:
        """What a site did otherwise in the last forward of its model, as far as that is known."""
        if self.record is None or self.store is None:
            return None
        if self.swapped and self.record.ran_dense is not None:
            return f"dense in its last call: {self.record.ran_dense}"
        return None if self.record.ran_in == self.store.forwards else "it did not run in the last forward"

    @property
    def swapped(self) -> bool:
        """Whether it is skip-aware."""
        return self.reason is None

    @property
    def states(self) -> list[SiteState]:
        """The states there are, of all sizes and threads."""
        if self.record is not None:
            return [*self.record.states.values()]
        assert self.module is not None
        return self.module.states

    @property
    def last(self) -> SiteState | None:
        """The state of the latest call, None before the first; of several parts of the heads, the first."""
        return self.latest[0] if self.latest else None

    @property
    def latest(self) -> list[SiteState]:
        """The states of the latest call: none before the first, more than one where heads are computed in parts."""
        if self.module is not None:
            return self.module.states
        last = None if self.record is None else self.record.last
        return [] if last is None else [last]

    @property
    def shapes(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Shapes of q and k in the whole model, (B, S, H, D): of the latest call that skipped, or else of the first."""
        site = self.site
        states = self.record.states if self.record is not None else {}
        for (batch, seq_q, seq_k), _, _, _, shard in (key for key, state in states.items() if state is self.last):
            q, k = (batch, seq_q, *site.q_shape[2:]), (batch, seq_k, *site.k_shape[2:])
            site = shard.whole(replace(site, q_shape=q, k_shape=k))
        return site.q_shape, site.k_shape

    @property
    def num_steps(self) -> int | None:
        """Denoising steps of a generation, as the user gave them."""
        if self.store is not None:
            return self.store.settings.num_steps
        assert self.module is not None
        return self.module.num_steps

    @property
    def slots(self) -> int | None:
        """Branches that its states have room for; None = not known before the first call."""
        if self.store is not None:
            return self.store.settings.slots
        return None if self.last is None else self.last.slots

    @property
    def shard(self) -> Shard:
        """Which part of the model's attention is here."""
        if self.store is not None:
            return self.store.shard
        exchange = None if self.module is None else self.module.exchange
        return WHOLE if exchange is None else exchange.shard

    @property
    def heads(self) -> int | None:
        """Query heads, of the whole model; None = not known before the first call."""
        if self.record is not None:
            return self.shard.all_heads(int(self.record.site.q_shape[2]))
        return None if self.last is None else int(self.site.q_shape[2])

    @property
    def tile_shape(self) -> tuple[int, int] | None:
        """(tile_m, tile_n); None = not known before the first call."""
        if self.store is not None:
            return self.store.settings.tile_shape_for(self.site)
        return None if self.last is None else (self.last.tile_m, self.last.tile_n)

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the queries, as far as known."""
        return None if self.record is None else self.record.site.dtype

    @property
    def rows(self) -> int | None:
        """Steps that the threshold tables of its states have room for; None without one."""
        return min((state.threshold.shape[1] for state in self.states if isinstance(state, SkipState)), default=None)

    def reset(self) -> None:
        """Begin a new generation: forget all that was learned, and the states of all sizes but the last."""
        if self.store is not None and self.record is not None:
            self.store.reset([self.record])
        elif self.module is not None:
            self.module.reset_skip_state()

    def set_dense(self, dense: bool) -> None:
        """Turn skipping off or on: of the states there are, or of a `LiteAttention` for good."""
        if self.module is not None:
            self.module.enable_skip_optimization(not dense)
        for state in self.states:
            state.set_flag(FLAG_DENSE, dense)


def parts_of(model_or_pipe: Any) -> dict[str, nn.Module]:
    """Return the transformers of a pipeline by their names in it, or a model as "model_or_pipe".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(model_or_pipe, nn.Module):
        return {"model_or_pipe": model_or_pipe}
    components: dict[str, Any] = getattr(model_or_pipe, "components", {})
    parts = {name: c for name, c in components.items() if name.startswith("transformer") and isinstance(c, nn.Module)}
    if not parts:
        raise ValueError(
            "model_or_pipe: expected an nn.Module or a diffusers pipeline with a transformer, "
            f"got {type(model_or_pipe).__name__}"
        )
    return parts


def models_of(model_or_pipe: Any) -> dict[str, nn.Module]:
    """Return a model as "", or the transformers of a pipeline by name; without what torch.compile puts around them."""
    whole = isinstance(model_or_pipe, nn.Module)
    return {"" if whole else name: unwrapped(part) for name, part in parts_of(model_or_pipe).items()}


def stores_of(model: nn.Module) -> list[StateStore]:
    """Return the stores that hold, or will hold, states of a model's sites."""
    from lite_attention.compile.store import stores_with

    return stores_with(model)


def sites_of(model_or_pipe: Any) -> list[ModelSite]:
    """Return the attention sites that a model or pipeline has shown so far, swapped or not.

    Raises:
        ValueError: it is neither.
    """
    return [
        site
        for part, model in models_of(model_or_pipe).items()
        for site in _sites_in(model, prefix=f"{part}." if part else "")
    ]


def _sites_in(model: nn.Module, prefix: str) -> Iterator[ModelSite]:
    from lite_attention.compile.records import paths_of

    paths = paths_of(model)
    for store in stores_of(model):
        for record in store.records_in(model):
            yield ModelSite(prefix + record.name_among(paths), model, record, store)
    for name, module in model.named_modules():
        if isinstance(module, LiteAttention):
            yield ModelSite(prefix + name, model, module=module)


def set_dense(model_or_pipe: Any, dense: bool) -> None:
    """Turn skipping off or on, in the states there are and in those that are yet to come.

    Raises:
        ValueError: no attention of ours in it.
    """
    stores, _ = _stores_and_modules(model_or_pipe)
    for store, *_ in stores:
        store.is_dense = dense
    for site in sites_of(model_or_pipe):
        site.set_dense(dense)


def methods_of(model_or_pipe: Any) -> list[ResidualSettings | None]:
    """Return the options of the residual wherever a model was told a method; None where that is "votes"."""
    found = [store.settings.residual for model in models_of(model_or_pipe).values() for store in stores_of(model)]
    return found + [site.module.residual for site in sites_of(model_or_pipe) if site.module is not None]


def _stores_and_modules(
    model_or_pipe: Any,
) -> tuple[list[tuple[StateStore, nn.Module, str]], list[tuple[ModelSite, LiteAttention]]]:
    """Return the stores of a model, each with it and the prefix of its sites, and its sites that are modules.

    Raises:
        ValueError: there is neither.
    """
    models = models_of(model_or_pipe)
    stores = [
        (store, model, f"{part}." if part else "") for part, model in models.items() for store in stores_of(model)
    ]
    modules = [(site, site.module) for site in sites_of(model_or_pipe) if site.module is not None]
    if not stores and not modules:
        raise ValueError(
            f"model_or_pipe: expected one given to enable(), compiled with our backend and run once, or with "
            f"LiteAttention modules, got {type(model_or_pipe).__name__} with none of these"
        )
    return stores, modules


def set_values(model_or_pipe: Any, name: Literal["threshold", "keep"], value: SiteThreshold | SiteKeep) -> None:
    """Set the thresholds, or the shares to keep, of all sites, and of states that are yet to come.

    Args:
        model_or_pipe: whose sites.
        name: what is to be set.
        value: a number, a tensor as the states take it, or a callable that returns one of these for a `Site`.

    Raises:
        ValueError: no attention of ours in it, some with a method that has none of these, or a value that does not fit.
            Nothing is changed then.
    """
    from lite_attention.compile.values import write_table

    stores, modules = _stores_and_modules(model_or_pipe)
    tables = [table for store, model, prefix in stores for table in store.tables(model, name, value, prefix)]
    values = [(m, value(site.site) if callable(value) else value) for site, m in modules]
    for module, of_module in values:
        module.check_value(name, of_module)
    for state, table in tables:
        write_table(state, table)
    for store, model, prefix in stores:
        store.remember(model, value, prefix)
    for module, of_module in values:
        module.set_value(name, of_module)
