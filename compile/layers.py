"""From a run of a graph to the states of the layer that it runs for, since one graph may serve many layers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from lite_attention.compile.provenance import value_of
from lite_attention.compile.records import SiteRecord
from lite_attention.compile.sites import GraphSite, choice_reason
from lite_attention.compile.store import Resolved, StateStore
from lite_attention.ops import DEFAULT_THRESHOLD
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.ops.site import Site
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import example_of, running_module

__all__ = ["LayerStates", "RuntimeSite", "runtime_sites"]

_Size = Callable[[Sequence[Any]], int]


@dataclass
class RuntimeSite:
    """How to find the owners of a site, and its sizes, from the arguments of its graph."""

    site: Site
    owner_inputs: tuple[int, ...]
    fixed_owners: tuple[object, ...]  # parameters that freezing made part of the graph
    ordinal: int  # among the sites of the same owners
    region: int | None  # the graph, for what stays dense inside it without an owner of its own
    sizes: list[_Size]  # batch, seq_q, seq_k

    def owners(self, args: Sequence[Any]) -> list[object]:
        """Return the parameters that tell the layer, or else the module that runs."""
        owners = [*(args[i] for i in self.owner_inputs), *self.fixed_owners]
        return owners or [module for module in (running_module(),) if module is not None]


def runtime_sites(
    gm: fx.GraphModule, found: list[GraphSite], nested: list[Site], is_parameter: Callable[[fx.Node], bool]
) -> list[RuntimeSite]:
    """Return all sites of a graph, with what tells them at run time.

    Args:
        gm: the graph as dynamo made it.
        found: its sites.
        nested: sites that no state can reach; they have a row in the report of the model whose parameters are there.
        is_parameter: tells the inputs and attributes that hold parameters.
    """
    inputs = {node: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    ordinals: Counter[tuple[fx.Node, ...]] = Counter()

    def make(site: Site, owners: Sequence[fx.Node], *rest: Any) -> RuntimeSite:
        fixed = tuple(example_of(node) for node in owners if node not in inputs)
        return RuntimeSite(site, tuple(inputs[node] for node in owners if node in inputs), fixed, *rest)

    runtime = []
    for graph_site in found:
        site, owners = graph_site.site, tuple(graph_site.owners)
        if not owners and not site.swapped:
            nested.append(site)
            continue
        shape = (*site.q_shape[:2], site.k_shape[1]) if site.swapped else ()
        readers = [_size_reader(size, inputs) for size in shape]
        sizes = [reader for reader in readers if reader is not None]
        if site.swapped and len(sizes) < 3:
            site.reason = "sizes are not known before the call"
        runtime.append(make(site, owners, ordinals[owners], None, sizes))
        ordinals[owners] += 1
    anyone = [node for node in gm.graph.nodes if is_parameter(node)][:1]
    return runtime + [make(site, anyone, i, id(gm), []) for i, site in enumerate(nested)]


def _size_reader(size: int | torch.SymInt, inputs: dict[fx.Node, int]) -> _Size | None:
    """Return a function that reads a size from the arguments of the graph; None if they do not tell it."""
    if isinstance(size, int):
        return lambda args: size
    expression = size.node.expr
    positions = {}
    for node, position in inputs.items():
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr in expression.free_symbols:
            positions[value.node.expr] = position
    if expression.free_symbols - positions.keys():
        return None

    @functools.lru_cache(maxsize=64)
    def evaluate(*values: int) -> int:
        return int(expression.xreplace(dict(zip(positions, map(sympy.Integer, values), strict=True))))

    return lambda args: evaluate(*(int(args[p]) for p in positions.values()))


class LayerStates:
    """The states that the runs of one graph need.

    A layer is told by the owners of its sites; if it runs several times in a forward, its calls by their order.

    Args:
        store: where the states are.
        sites: those of the graph.
    """

    def __init__(self, store: StateStore, sites: list[RuntimeSite]) -> None:
        self._store, self._sites = store, sites
        self._owner_inputs = sorted({i for site in sites for i in site.owner_inputs})
        self._asks_who_runs = any(not site.owner_inputs and not site.fixed_owners for site in sites)
        self._readers = [reader for site in sites for reader in site.sizes]
        self._calls: dict[tuple[int, ...], Counter[tuple[int, ...]]] = {}  # of a layer, by owners
        self._idle: dict[tuple[Any, ...], SiteState] = {}  # by shapes, where other layers skip

    def buffers(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """Return the buffers of the states for one run, in the order of the graph's inputs."""
        owners = [id(args[i]) for i in self._owner_inputs]
        if self._asks_who_runs:
            owners.append(id(running_module()))
        layer = tuple(owners)
        calls = self._calls.get(layer)
        if calls is None:
            counted = (site for site in self._sites if site.region is None)
            calls = self._calls[layer] = Counter(tuple(map(id, site.owners(args))) for site in counted)
        before = self._store.calls_before(calls)
        key = (self, *layer, *before, *[read(args) for read in self._readers])
        return self._store.resolved(key, lambda: self._resolve(args, dict(zip(calls, before, strict=True))))

    def _resolve(self, args: Sequence[Any], before: dict[tuple[int, ...], int]) -> Resolved:
        found, buffers = [], []
        for site in self._sites:
            owners = site.owners(args)
            key = (site.region, site.ordinal + before.get(tuple(map(id, owners)), 0))
            record = self._store.record(owners, key, site.site)
            state = None
            reason = site.site.reason
            if site.site.swapped:
                batch, seq_q, seq_k = (size(args) for size in site.sizes)
                reason = self._reason_here(record)
                if reason is None:
                    used = state = self._store.state(record, (batch, seq_q, seq_k), site.site.device)
                else:
                    used = self._idle_state(site.site, (batch, seq_q, seq_k))
                buffers += used.present_buffers()
            found.append((record, state, reason))
        return found, buffers

    def _reason_here(self, record: SiteRecord) -> str | None:
        """Return why this layer does not skip though the graph can: the user selects layers, and graphs serve many."""
        model = self._store.model
        if self._store.settings.select is None or model is None:
            return None
        site = replace(record.site, name=record.name(model), reason=None)
        reason = choice_reason(site, self._store.settings, may_guard=False, shard=self._store.shard)
        if reason is not None:
            record.site = replace(record.site, reason=reason)
        return reason

    def _idle_state(self, site: Site, sizes: tuple[int, int, int]) -> SiteState:
        """Return a state by which the op visits everything and remembers nothing."""
        key = (sizes, *site.q_shape[2:], site.v_shape[3], site.dtype, site.device)
        state = self._idle.get(key)
        if state is None:
            given = self._store.settings
            settings = replace(
                given,
                threshold=DEFAULT_THRESHOLD if callable(given.threshold) else given.threshold,
                initial_mask=None if given.initial_mask is None else lambda _: None,
            )
            state = self._idle[key] = settings.new_state(site, sizes)
            state.set_flag(FLAG_DENSE, True)
        return state
