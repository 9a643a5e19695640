"""`SiteRecord`: one attention site of one layer, what it is called, and its states; `Forward`: what a thread is at."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lite_attention.ops.shard import Shard
from lite_attention.ops.site import Site
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import WRAPPED

__all__ = ["Forward", "SiteRecord", "Sizes", "StateKey", "paths_of"]

Sizes = tuple[int, int, int]  # batch, seq_q, seq_k
# With tile_m and tile_n, the id of the session, and which part of the model's attention it is of.
StateKey = tuple[Sizes, torch.device, tuple[int, int], int, Shard]


@dataclass
class Forward:
    """What a thread is at."""

    number: int = 0  # of the forward of the model; 0 where none is known
    calls: Counter[tuple[int, ...]] = field(default_factory=Counter)  # of attention, by the ids of the owners
    skipped: bool = False  # a site that may skip ran
    ran: set[int] = field(default_factory=set)  # records of sites that skipped, by id
    is_explained: bool = False  # that a site which skips did not is said


@dataclass
class SiteRecord:
    """One attention site of one layer, with a state for each size, device, tile shape and thread it was called at."""

    site: Site
    owners: tuple[weakref.ref[object], ...]
    states: dict[StateKey, SiteState] = field(default_factory=dict)
    last: SiteState | None = None  # of the latest call that skipped
    recent: dict[int, SiteState] = field(default_factory=dict)  # the same for each session, by id
    ran_in: int = 0  # the latest forward that ran it
    exact_tokens: tuple[tuple[int, int], ...] = ()  # (start, end) that are never skipped
    ran_dense: str | None = None  # why the latest call did not skip

    def name(self, model: nn.Module) -> str:
        """Return the full path of the site's module in a model, as far as its owners tell."""
        return self.name_among(paths_of(model))

    def name_among(self, paths: Mapping[int, list[str]]) -> str:
        """Return the same from the `paths_of` the model, for those who ask for many sites."""
        known = [(paths[id(owner())], i) for i, owner in enumerate(self.owners) if id(owner()) in paths]
        # A parameter that layers share does not name the layer: the others come first.
        for (path, *_), i in sorted(known, key=lambda item: len(item[0])):
            if isinstance(self.owners[i](), nn.Module):
                return path
            if i < len(self.site.owner_paths):
                return _renamed(self.site.name, self.site.owner_paths[i], path)
        return self.site.name


def paths_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the paths of a model's parameters and modules, by id."""
    paths: dict[int, list[str]] = defaultdict(list)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths[id(parameter)].append(path.removeprefix(f"{WRAPPED}."))
    for path, module in model.named_modules(remove_duplicate=False):
        paths[id(module)].append(path.removeprefix(f"{WRAPPED}."))
    return paths


def _renamed(name: str, then: str, now: str) -> str:
    """Return what a module is called in the layer whose parameter is `now`, from its name in that of `then`."""
    old, new = then.split("."), now.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop(), new.pop()
    parts = name.split(".") if name else []
    return ".".join([*new, *parts[len(old) :]]) if parts[: len(old)] == old else name
