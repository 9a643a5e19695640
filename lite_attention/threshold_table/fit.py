"""Whether thresholds fit a model: what its attention sites look like, and in what a table differs."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lite_attention.enabled import session_of
from lite_attention.model_sites import ModelSite, methods_of, models_of, sites_of, stores_of
from lite_attention.ops.control import SEQ_Q, slot_word
from lite_attention.ops.residual_settings import ResidualSettings
from lite_attention.threshold_table.content import Content

if TYPE_CHECKING:
    from lite_attention.ops.site import Site

__all__ = [
    "at_steps", "branches_of", "check_fit", "check_method", "class_name", "dtype_name", "fitted", "model_name",
    "num_steps_of", "threshold_at",
]  # fmt: skip


@dataclass(frozen=True)
class _Facts:
    """What is known of one attention site; None = not before its first call. It holds neither model nor states."""

    name: str
    num_steps: int | None  # None: the model was not told
    slots: int | None = None
    heads: int | None = None
    tile_shape: tuple[int, int] | None = None
    dtype: torch.dtype | None = None
    rows: int | None = None  # steps that the threshold tables of its states have room for
    tokens: frozenset[int] = frozenset()  # queries, of all sizes it was called at


def _facts_of(model_or_pipe: Any) -> list[_Facts]:
    """Return the skip-aware sites that a model has shown so far."""
    return [
        _Facts(site.name, site.num_steps, site.slots, site.heads, site.tile_shape, site.dtype, site.rows, _tokens(site))
        for site in sites_of(model_or_pipe)
        if site.swapped
    ]


def _tokens(site: ModelSite) -> frozenset[int]:
    """Return how many queries a site was called with, those of all ranks."""
    if site.module is None:
        return frozenset(site.shard.all_queries(*state.capacity[2:]) for state in site.states)
    # A module's state may be larger than its calls.
    words = [state.control[slot_word(slot, SEQ_Q)] for state in site.states for slot in range(state.slots)]
    return frozenset(int(word) for word in words) - {0}


# ---- what is known of a model --------------------------------------------------------------------------------------


def num_steps_of(model_or_pipe: Any) -> int | None:
    """Return the number of denoising steps that a model was told, None if it was not."""
    told = [site.num_steps for site in sites_of(model_or_pipe)]
    told += [store.settings.num_steps for model in models_of(model_or_pipe).values() for store in stores_of(model)]
    return next((num_steps for num_steps in told if num_steps is not None), None)


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


def dtype_name(dtypes: set[torch.dtype]) -> str | None:
    """Return the names of dtypes, None of none."""
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or None


def model_name(model_or_pipe: Any) -> str:
    """Return the name that a model has on a hub, or else a hash of its parameters' names and shapes."""
    models = models_of(model_or_pipe).values()
    return ", ".join(_hub_name(_loaded_as(model)) or _parameters(model) for model in models)


def _loaded_as(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or ""


def _hub_name(name_or_path: str) -> str | None:
    """Return the name on a hub, also out of the path of the hub's cache; a path elsewhere tells nothing."""
    cached = re.search(r"models--(.+?)--(.+?)[/\\]snapshots", name_or_path)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    is_name = re.fullmatch(r"[\w.-]*\w/[\w.-]+", name_or_path) and not Path(name_or_path).exists()
    return name_or_path if is_name else None


def _parameters(model: nn.Module) -> str:
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return f"parameters {hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}"


# ---- does a table fit? ---------------------------------------------------------------------------------------------


def fitted(table: Content, model_or_pipe: Any, *, strict: bool = True) -> Callable[[Site], torch.Tensor]:
    """Return what each site of a model is to have; see `ThresholdTable.apply`. It does not hold on to the model."""
    known = {facts.name: facts for facts in _facts_of(model_or_pipe)}
    differences = _differences(table, model_or_pipe, list(known.values()))
    if differences and strict:
        raise ValueError(_does_not_fit(table, differences))
    if differences:
        warnings.warn(f"lite_attention: {_does_not_fit(table, differences)}", stacklevel=4)
    num_steps = num_steps_of(model_or_pipe)

    def threshold_of(site: Site) -> torch.Tensor:
        facts = known.get(site.name)
        if facts is None:
            return threshold_at(table, site, num_steps, strict)
        return table.for_state(_of_site(table, facts, strict))

    return threshold_of


def check_fit(table: Content, model_or_pipe: Any) -> None:
    """Raise ValueError with all in which a table and the sites that a model has shown differ."""
    differences = _differences(table, model_or_pipe, _facts_of(model_or_pipe))
    if differences:
        raise ValueError(_does_not_fit(table, differences))


def check_method(table: Content, residual: ResidualSettings | None) -> None:
    """Raise ValueError unless a table was found with the options of a method, None = votes."""
    differences = [*_differences_of_methods(table, [residual])]
    if differences:
        raise ValueError(_does_not_fit(table, _lines(differences)))


def threshold_at(table: Content, site: Site, num_steps: int | None, strict: bool) -> torch.Tensor:
    """Return the thresholds of a site whose state is born; see `ThresholdTable.threshold_of`."""
    _, tokens, heads, _ = site.q_shape
    if strict and table.tokens is not None and tokens > table.tokens:
        raise ValueError(f"{table.label}: expected at most {table.tokens} tokens at {site.name}, got {tokens}")
    born = _Facts(site.name, num_steps, heads=heads, tile_shape=site.tile_shape, dtype=site.dtype)
    return table.for_state(_of_site(table, born, strict))


def _of_site(table: Content, site: _Facts, strict: bool) -> torch.Tensor:
    threshold = table.thresholds.get(site.name)
    if not strict:
        return (
            torch.full((1, 1, 1), table.dense, dtype=torch.float32, device="cpu")
            if threshold is None
            else _mapped(threshold, site)
        )
    if threshold is None:
        raise ValueError(f"{table.label}: expected thresholds for {site.name}, a site of the model, got none")
    for what, there, here in _differences_at(table, site):
        raise ValueError(f"{table.label}: {what}: {there} in the file, {here} in the model: {site.name}")
    return threshold


def _does_not_fit(table: Content, differences: list[str]) -> str:
    return "\n  ".join([f"{table.label} does not fit the model:", *differences])


def _differences(table: Content, model: Any, sites: list[_Facts]) -> list[str]:
    """Return all in which a table and a model differ, a line for each kind with the sites it concerns."""
    lines = _lines(_differences_of_whole(table, model, sites))
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
        for what, there, here in _differences_at(table, site):
            found[f"{what}: {there} in the file, {here} in the model"].append(site.name)
    return lines + [f"{difference}: {', '.join(of)}" for difference, of in found.items()]


def _lines(differences: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{what}: {there} in the file, {here} in the model" for what, there, here in differences]


def _differences_of_whole(table: Content, model: Any, sites: list[_Facts]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs, and how it is in a table and in a model."""
    yield from _differences_of_methods(table, methods_of(model))
    if table.model_class not in (None, class_name(model)):
        yield "model class", table.model_class, class_name(model)
    if table.model is not None and not _is_named(model, table.model):
        yield "model", table.model, model_name(model)
    tokens = {size for site in sites for size in site.tokens}
    if table.tokens is not None and tokens and table.tokens not in tokens:
        yield "tokens", table.tokens, ", ".join(map(str, sorted(tokens)))
    branches, of_table = branches_of(model), table.branches or ()
    by_slot = any(threshold.shape[0] > 1 for threshold in table.thresholds.values())
    if by_slot and any(a != b for a, b in zip(of_table, branches, strict=False)):
        yield "order of branches", ", ".join(of_table), ", ".join(branches)


def _differences_of_methods(
    table: Content, methods: Sequence[ResidualSettings | None]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield in what a table was found with other options than those of some methods, None of them for votes."""
    for residual in methods:
        method = "votes" if residual is None else "residual"
        if method != (table.method or "votes"):
            yield "method", table.method or "votes", method
        elif residual is not None:
            for name in ("full_every", "first_full", "decide_every"):
                there, here = getattr(table, name), getattr(residual, name)
                if there not in (None, here):
                    yield name, there, here


def _is_named(model_or_pipe: Any, name: str) -> bool:
    """Return whether a model may have the name that a table has of it."""
    models, names = models_of(model_or_pipe).values(), name.split(", ")
    if len(names) != len(models):
        return False
    for model, of_table in zip(models, names, strict=True):
        by_shapes = of_table.startswith("parameters ")
        here = _parameters(model) if by_shapes else _hub_name(_loaded_as(model))
        there = of_table if by_shapes else _hub_name(of_table)
        if None not in (here, there) and here != there:
            return False
    return True


def _differences_at(table: Content, site: _Facts) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs at a site, and how it is in a table and in a model."""
    if site.name not in table.thresholds:
        return
    slots, rows, heads = table.thresholds[site.name].shape
    dtypes = table.dtype.split(", ") if table.dtype else []
    dtype = None if site.dtype is None else dtype_name({site.dtype})
    for what, there, here in (
        ("dtype", None if dtype in dtypes else table.dtype, dtype),
        ("tile shape", table.tile_shapes.get(site.name), site.tile_shape),
        ("steps", rows if rows > 1 else table.num_steps, site.num_steps),
        ("slots", None if slots <= (site.slots or slots) else slots, site.slots),  # past its end the last one holds
        ("heads", None if heads == 1 else heads, site.heads),
    ):
        if there is not None and here is not None and there != here:
            yield what, there, here
    if site.num_steps is None and site.rows is not None and rows > site.rows:
        yield "steps", rows, f"room for {site.rows} (num_steps)"


def _mapped(threshold: torch.Tensor, site: _Facts) -> torch.Tensor:
    """Return thresholds (slots, steps, heads) as near to a table's as a site can have them; -inf where it cannot."""
    if threshold.shape[0] > (site.slots or threshold.shape[0]):
        threshold = threshold.amin(0, keepdim=True)
    if site.heads not in (None, threshold.shape[2]):
        same = bool((threshold == threshold[..., :1]).all())
        threshold = threshold[..., :1] if same else torch.full((1, 1, 1), -math.inf, dtype=torch.float32, device="cpu")
    if site.num_steps is not None:
        return at_steps(threshold, site.num_steps)
    return threshold if site.rows is None or site.rows >= threshold.shape[1] else threshold.amin(1, keepdim=True)


def at_steps(threshold: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Return thresholds for another number of steps, each step taking those of the nearest relative position."""
    if threshold.shape[1] in (1, num_steps):
        return threshold
    return threshold[:, torch.linspace(0, threshold.shape[1] - 1, num_steps, device="cpu").round().long()]
