"""Whether thresholds fit a model: what its attention sites look like, and in what a file differs."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lite_attention.module import LiteAttention
from lite_attention.ops import SkipState
from lite_attention.registry.threshold_file import ThresholdTable
from lite_attention.wiring import parts_of, session_of

__all__ = [
    "ModelSite",
    "at_steps",
    "branches_of",
    "class_name",
    "differences_of",
    "mapped",
    "models_of",
    "num_steps_of",
    "sites_of",
]


@dataclass
class ModelSite:
    """What is known of one attention site; None = not before its first call."""

    name: str
    states: list[SkipState]  # of all sizes
    num_steps: int | None  # None: the model was not told
    slots: int | None = None
    heads: int | None = None
    tile_shape: tuple[int, int] | None = None
    dtype: str | None = None

    @property
    def rows(self) -> int | None:
        """Steps that the threshold tables of its states have room for."""
        return min((state.threshold.shape[1] for state in self.states), default=None)


def sites_of(model_or_pipe: Any) -> list[ModelSite]:
    """Return the skip-aware sites that a model has shown so far; their names are those of `report`."""
    from lite_attention.compile.store import records_of

    sites = []
    for part, model in models_of(model_or_pipe).items():
        prefix = "" if isinstance(model_or_pipe, nn.Module) else f"{part}."
        for store, record in records_of(model):
            if record.site.swapped:
                name, settings, site = prefix + record.name(model), store.settings, record.site
                sites.append(
                    ModelSite(
                        name, list(record.states.values()), settings.num_steps, settings.slots, int(site.q_shape[2]),
                        settings.tile_shape_for(site), str(site.dtype).removeprefix("torch."),
                    )
                )  # fmt: skip
        for name, module in model.named_modules():
            if isinstance(module, LiteAttention):
                found, state = ModelSite(prefix + name, [], module.num_steps), module.state
                if state is not None:
                    found.states, found.slots, found.heads = [state], state.slots, state.capacity[1]
                    found.tile_shape = (state.tile_m, state.tile_n)
                sites.append(found)
    return sites


def models_of(model_or_pipe: Any) -> dict[str, nn.Module]:
    """Return a model, or the transformers of a pipeline, by name, without what torch.compile puts around them."""
    return {part: getattr(model, "_orig_mod", model) for part, model in parts_of(model_or_pipe).items()}


def num_steps_of(model_or_pipe: Any) -> int | None:
    """Return the number of denoising steps that a model was told, None if it was not."""
    from lite_attention.compile.store import records_of

    for model in models_of(model_or_pipe).values():
        told = [store.settings.num_steps for store, _ in records_of(model)]
        told += [module.num_steps for module in model.modules() if isinstance(module, LiteAttention)]
        for num_steps in told:
            if num_steps is not None:
                return num_steps
    return None


def branches_of(model_or_pipe: Any) -> tuple[str, ...]:
    """Return the names of the branches met so far, in the order of their slots."""
    for model in models_of(model_or_pipe).values():
        slots = session_of(model).branches
        if slots:
            return tuple(sorted(slots, key=slots.__getitem__))
    return ()


def class_name(model_or_pipe: Any) -> str:
    """Return the name of the model's class, of a pipeline those of its transformers."""
    return ", ".join(type(model).__name__ for model in models_of(model_or_pipe).values())


# ---- does a file fit? ----------------------------------------------------------------------------------------------


def differences_of(table: ThresholdTable, model: Any, sites: list[ModelSite]) -> list[str]:
    """Return all in which a file and a model differ, a line for each kind with the sites it concerns."""
    lines = []
    if table.model_class is not None and table.model_class != class_name(model):
        lines.append(f"model class: the file is for {table.model_class}, the model is a {class_name(model)}")
    branches, of_file = branches_of(model), table.branches or ()
    by_slot = any(threshold.shape[0] > 1 for threshold in table.thresholds.values())
    if by_slot and any(a != b for a, b in zip(of_file, branches, strict=False)):
        lines.append(f"order of branches: {', '.join(of_file)} in the file, {', '.join(branches)} in the model")
    names = {site.name for site in sites}
    if names:
        for what, missing in (
            ("not in the file", [site.name for site in sites if site.name not in table.thresholds]),
            ("not in the model", [name for name in table.thresholds if name not in names]),
        ):
            if missing:
                lines.append(f"sites {what}: {', '.join(missing)}")
    found: dict[str, list[str]] = defaultdict(list)  # difference -> sites
    for site in sites:
        if site.name not in table.thresholds:
            continue
        slots, rows, heads = table.thresholds[site.name].shape
        for what, there, here in (
            ("tile shape", table.tile_shapes.get(site.name), site.tile_shape),
            ("steps", rows if rows > 1 else table.num_steps, site.num_steps),
            ("slots", None if slots == 1 else slots, site.slots),
            ("heads", None if heads == 1 else heads, site.heads),
        ):
            if there is not None and here is not None and there != here:
                found[f"{what}: {there} in the file, {here} in the model"].append(site.name)
        if site.num_steps is None and site.rows is not None and rows > site.rows:
            found[f"steps: {rows} in the file, room for {site.rows} in the model (num_steps)"].append(site.name)
    return lines + [f"{difference}: {', '.join(of)}" for difference, of in found.items()]


def mapped(threshold: torch.Tensor, site: ModelSite) -> torch.Tensor:
    """Return thresholds (slots, steps, heads) as near to a file's as a site can have them; -inf where it cannot."""
    if site.slots not in (None, threshold.shape[0]):
        threshold = threshold.amin(0, keepdim=True)
    if site.heads not in (None, threshold.shape[2]):
        same = bool((threshold == threshold[..., :1]).all())
        threshold = threshold[..., :1] if same else torch.full((1, 1, 1), -math.inf)
    if site.num_steps is not None:
        return at_steps(threshold, site.num_steps)
    return threshold if site.rows is None or site.rows >= threshold.shape[1] else threshold.amin(1, keepdim=True)


def at_steps(threshold: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Return thresholds for another number of steps, each step taking those of the nearest relative position."""
    if threshold.shape[1] in (1, num_steps):
        return threshold
    return threshold[:, torch.linspace(0, threshold.shape[1] - 1, num_steps).round().long()]
