"""The torch.compile backend: swaps attention for the skip-aware op and threads the states through as static inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import fx

from lite_attention.compile.layers import LayerStates, RuntimeSite, runtime_sites
from lite_attention.compile.multihead import take_apart
from lite_attention.compile.other_attention import sites_of_ops
from lite_attention.compile.provenance import value_of
from lite_attention.compile.runner import generations_unknown, nothing_swapped
from lite_attention.compile.settings import SkipOptions, SkipSettings, check_options_of_torch
from lite_attention.compile.sites import GraphSite, Names, find_sites, log_sites, sites_in_subgraphs
from lite_attention.compile.store import StateStore
from lite_attention.compile.swap import swap_site
from lite_attention.ops import Session, default_session
from lite_attention.ops.option_names import takes_options
from lite_attention.ops.site import Site
from lite_attention.ops.torch_internals import (
    FakeModes,
    backend_named,
    compile_with_inductor,
    copy_of_graph,
    example_of,
    is_held_by_module,
    mark_static_input,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LiteAttentionBackend", "liteattn_backend"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Compiled = Callable[..., Any]
_Size = Callable[[Sequence[Any]], int]


def _called_by_torch(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Say how a backend gets options where somebody calls one with them."""

    @functools.wraps(call)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if len(args) < 3 and "example_inputs" not in kwargs:
            got = ", ".join([type(value).__name__ for value in args[1:]] + [f"{name}=" for name in kwargs])
            raise TypeError(
                "liteattn_backend: expected a graph and its inputs, which torch.compile calls a backend with, got "
                f"{got or 'nothing'}; LiteAttentionBackend(threshold=...) is a backend with options"
            )
        return call(*args, **kwargs)

    return checked


class LiteAttentionBackend:
    """A torch.compile backend: `torch.compile(model, backend=LiteAttentionBackend(threshold=-6.0))`.

    Attention that it can prove to be self-attention is swapped for `lite_attention::skip_attention`; all else compiles
    as usual. `mode=` and `options=` of torch.compile work. One backend may serve several models: states belong to the
    layers, whatever graph runs them. The op counts the calls of each branch as steps. Give `num_steps`, or call
    `lite_attention.reset(model)` before each generation; `lite_attention.enable` tells more by itself.

    Args:
        inner: what compiles the changed graph: "inductor", another dynamo backend's name, or a callable
            (graph module, example inputs) -> callable.
        session: branch and step that the states follow; by default that of `lite_attention.branch`.
        model: whose module paths name the sites that a callable threshold or initial mask is asked about; by default
            they are named relative to what is compiled.
        options: see `SkipSettings`.

    Raises:
        ValueError: an option out of range.
    """

    @takes_options(*SkipOptions.__annotations__)
    def __init__(
        self,
        *,
        inner: str | _Compiled = "inductor",
        session: Session | None = None,
        model: torch.nn.Module | None = None,
        **options: Unpack[SkipOptions],
    ) -> None:
        settings = SkipSettings(**options)
        self._init(inner, StateStore(settings, default_session if session is None else session, model))

    @classmethod
    def of(cls, store: StateStore, inner: str | _Compiled = "inductor") -> LiteAttentionBackend:
        """Return a backend whose states go into an existing store."""
        backend = cls.__new__(cls)
        backend._init(inner, store)
        return backend

    def _init(self, inner: str | _Compiled, store: StateStore) -> None:
        self.store, self.settings = store, store.settings
        self.sites: list[Site] = []  # of all graphs compiled so far
        self._inner = inner
        self._warned = False

    @_called_by_torch
    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> _Compiled:
        """Compile a graph of dynamo; called by torch.compile."""
        gm = take_apart(gm)
        names = Names(self.store.model)
        found = find_sites(gm.graph, self.settings, _is_weight, _is_parameter, names, self.store.shard)
        nested = sites_in_subgraphs(gm, names) + sites_of_ops(gm.graph, names)
        runtime = runtime_sites(gm, found, nested, _is_parameter)
        sites = [site.site for site in runtime]
        self.sites += sites
        log_sites(sites, "torch.compile")

        extra: list[torch.Tensor] = []
        found = [site for site in found if site.site.swapped or site.site.dense_kernel]
        if found:
            gm, copies = copy_of_graph(gm)
            modes = FakeModes.of([value_of(node) for node in gm.graph.nodes], example_inputs)
            for original in found:
                site, nodes = original.remap(copies), None
                if site.site.swapped:
                    nodes, fakes = _add_state_inputs(gm.graph, site, self.settings, modes)
                    extra += fakes
                # What attends to this output next finds it here.
                copies[original.call.node] = swap_site(gm.graph, site, nodes, self.settings, "example_value")
            gm.recompile()
        compiled = self._compile(gm, [*example_inputs, *extra], mode, options)
        return self._wrap(compiled, runtime, _first_parameter(gm))

    def _compile(
        self, gm: fx.GraphModule, inputs: list[Any], mode: str | None, options: dict[str, Any] | None
    ) -> _Compiled:
        check_options_of_torch(options)
        if self._inner != "inductor":
            if mode not in (None, "default") or options:
                raise ValueError(f"mode, options: expected none with inner={self._inner!r}, got {mode!r}, {options!r}")
            inner = backend_named(self._inner) if isinstance(self._inner, str) else self._inner
            result: _Compiled = inner(gm, inputs)
            return result
        return compile_with_inductor(gm, inputs, mode, options)

    def _wrap(self, compiled: _Compiled, sites: list[RuntimeSite], first_parameter: int | None) -> _Compiled:
        """Return a callable that finds the states of the layer that is being run, and hands them to the graph."""
        states = LayerStates(self.store, sites)
        layers_run: set[int] = set()

        def run(*args: Any) -> Any:
            extra = states.buffers(args)
            if not self._warned and not self.store.forwards:  # a runner knows when the whole model has run
                layer = 0 if first_parameter is None else id(args[first_parameter])
                self._warn_once(whole_model_ran=layer in layers_run)
                layers_run.add(layer)
            return compiled(*args, *extra)

        return run

    def _warn_once(self, whole_model_ran: bool) -> None:
        if any(record.site.swapped for record in self.store.records):
            if self.settings.num_steps is None and not self.store.session.is_told:
                self.store.say(generations_unknown(self.settings.max_steps))
        elif whole_model_ran:  # a graph runs again: no other graph, whose attention might be swapped, is to come
            self.store.say(nothing_swapped(self.sites))
        else:
            return
        self._warned = True


def _first_parameter(gm: fx.GraphModule) -> int | None:
    """Return which argument of the graph is its first parameter: what tells the layers that it runs apart."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return next((i for i, node in enumerate(inputs) if _is_parameter(node)), None)


def _is_parameter(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(example_of(node), torch.nn.Parameter)
    return node.op == "placeholder" and isinstance(value_of(node), torch.nn.Parameter)


def _is_weight(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(example_of(node), torch.Tensor)
    return _is_parameter(node) or (node.op == "placeholder" and is_held_by_module(node))


def _add_state_inputs(
    graph: fx.Graph, found: GraphSite, settings: SkipSettings, modes: FakeModes
) -> tuple[list[fx.Node | None], list[torch.Tensor]]:
    """Add the state of a site as inputs with a static address, after all others."""
    site = found.site
    nodes: list[fx.Node | None] = []
    fakes = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for name, spec in settings.buffers(site).items():
        if spec is None:
            nodes.append(None)
            continue
        with graph.inserting_after(last):
            last = graph.placeholder(f"{name}_{site.ordinal}")
        shape, dtype = spec
        with modes.traced:
            traced = torch.empty(shape, dtype=dtype, device=site.device)
        with modes.compiled:
            fakes.append(torch.empty(shape, dtype=dtype, device=site.device))
        mark_static_input(last, traced)
        nodes.append(last)
    return nodes, fakes


liteattn_backend = LiteAttentionBackend()
