"""torch.export: a program in, a program with mutable skip state out."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from lite_attention.compile.other_attention import sites_of_ops
from lite_attention.compile.provenance import value_of
from lite_attention.compile.settings import SkipOptions, SkipSettings
from lite_attention.compile.sites import GraphSite, find_sites, log_sites, sites_in_subgraphs
from lite_attention.compile.swap import swap_site
from lite_attention.ops.methods import METHOD_OF_OP
from lite_attention.ops.option_names import takes_options
from lite_attention.ops.site import Site
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import AUTO_FUNCTIONALIZED, fake_mode_of, upper_bound

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SkipAwareProgram", "make_skip_aware", "skip_states"]

_STATE_MODULE = "lite_attention"  # a site's buffers are called <module>.lite_attention.skip_mask and so on


class SkipAwareProgram(ExportedProgram):
    """An ExportedProgram whose modules have skip states of their own: running one leaves the program clean to save."""

    sites: list[Site]

    def module(self, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """Return a module that runs the program, with skip states of its own that begin fresh."""
        module: fx.GraphModule = super().module(*args, **kwargs)
        for path, owner in [*module.named_modules()]:
            if path.rpartition(".")[2].rstrip("_") == _STATE_MODULE:
                for name, buffer in [*owner.named_buffers(recurse=False)]:
                    setattr(owner, name, buffer.clone())
        return module

    def run_decompositions(self, *args: Any, **kwargs: Any) -> SkipAwareProgram:
        """Decompose; the mutation of the states shows as BUFFER_MUTATION in the signature."""
        program: Any = super().run_decompositions(*args, **kwargs)
        program.__class__ = SkipAwareProgram
        program.sites = self.sites
        return program  # type: ignore[no-any-return]


@takes_options(*SkipOptions.__annotations__)
def make_skip_aware(exported_program: ExportedProgram, **settings: Unpack[SkipOptions]) -> SkipAwareProgram:
    """Swap the self-attention of an exported program, and add the skip states as buffers.

    The states are buffers `<module>.lite_attention.skip_mask`, `.control` and so on, not persistent, so the
    `state_dict` keeps the model's keys. `lite_attention.branch` cannot reach a program that was loaded elsewhere: write
    the slot and step into `control` (see `lite_attention.ops.control`), or use `skip_states(module)`.

    A saved program needs `import lite_attention` where it is loaded, which registers the op; without it PyTorch reports
    an error in deserializing, or a missing schema. What `torch.export.load` returns is PyTorch's own ExportedProgram:
    its module writes into it, so reset `skip_states(module)` before saving it once more.

    Args:
        exported_program: as `torch.export.export` returns it, before `run_decompositions`; it is left as it is.
        settings: fields of `SkipSettings`: threshold, slots, num_steps, select, and so on.

    Returns:
        A program with the same inputs and outputs. Its `sites` says what was swapped, and why not.

    Raises:
        TypeError: a setting that is none.
        ValueError: it is no exported program; it has been decomposed, so that its attention is gone; a size is
            unbounded, so that no state can be large enough; or there is an initial mask for a length that varies.
    """
    options = SkipSettings(**settings)
    if not isinstance(exported_program, ExportedProgram):
        raise ValueError(
            "exported_program: expected what torch.export.export returns, got "
            f"{type(exported_program).__name__}; a model that is not exported is for lite_attention.enable"
        )
    if exported_program.dialect != "TRAINING":
        raise ValueError(
            "exported_program: expected the training IR that torch.export.export returns, got dialect "
            f"{exported_program.dialect}; call make_skip_aware before run_decompositions"
        )
    program = _copy(exported_program)
    specs = program.graph_signature.input_specs
    weights = {spec.arg.name for spec in specs if spec.kind is not InputKind.USER_INPUT}
    found = find_sites(program.graph, options, lambda node: node.op == "placeholder" and node.name in weights)
    program.sites = [item.site for item in found] + sites_in_subgraphs(program.graph_module)
    program.sites += sites_of_ops(program.graph)
    log_sites(program.sites, "torch.export")
    if not any(site.swapped for site in program.sites):
        reasons = "; ".join(sorted({str(site.reason) for site in program.sites})) or "there is none in the program"
        warnings.warn(f"make_skip_aware: no attention was swapped ({reasons})", stacklevel=3)
    swapped: dict[fx.Node, fx.Node] = {}
    for original in found:
        item = original.remap(swapped)  # its inputs may be the output of another site
        if item.site.swapped or item.site.dense_kernel:
            nodes = _add_buffers(program, item, options) if item.site.swapped else None
            out = swapped[item.call.node] = swap_site(program.graph, item, nodes, options, "val")
            program.graph_signature.replace_all_uses(item.call.node.name, out.name)
    program.graph_module.recompile()
    program.validate()  # type: ignore[no-untyped-call]
    return program


def _copy(program: ExportedProgram) -> SkipAwareProgram:
    """Copy the graph and its signature; the weights are shared."""
    graph = copy.deepcopy(program.graph)
    for node, copied in zip(program.graph.nodes, graph.nodes, strict=True):
        copied.name = node.name  # a copy renames what is called like a builtin, such as "input"
    return SkipAwareProgram(
        root=fx.GraphModule(program.graph_module, graph),
        graph=graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )


def _upper_bound(size: int | torch.SymInt, what: str) -> int:
    upper = upper_bound(size)
    if upper is None:
        raise ValueError(
            f"exported_program: expected a bound for {what} = {size}, got none; "
            "export with torch.export.Dim(name, max=...), so that the skip state has room for the largest call"
        )
    return upper


def _add_buffers(program: SkipAwareProgram, found: GraphSite, settings: SkipSettings) -> list[fx.Node | None]:
    """Add the buffers of one site's state, with room for the largest sizes, ahead of the user's inputs."""
    site, graph, specs = found.site, program.graph, program.graph_signature.input_specs
    batch, seq_q, seq_k = (
        _upper_bound(size, f"{name} of {site.name}")
        for name, size in zip(("batch", "seq_q", "seq_k"), (*site.q_shape[:2], site.k_shape[1]), strict=True)
    )
    lengths = site.q_shape[1], site.k_shape[1]
    if settings.initial_mask is not None and not all(isinstance(length, int) for length in lengths):
        raise ValueError(
            f"initial_mask: expected none, got one for {site.name}, whose length varies in the exported program: "
            "a mask belongs to one length. Export a program for each"
        )
    state = settings.new_state(site, (batch, seq_q, seq_k))
    fake_mode = fake_mode_of([value_of(found.call.q)])
    assert fake_mode is not None
    path = [part for part in site.name.split(".") if part.isidentifier() or part.isdecimal()]
    owner = ".".join([*path, _STATE_MODULE])
    while f"{owner}.control" in program.constants:  # a module may call attention twice
        owner += "_"
    position = sum(spec.kind is not InputKind.USER_INPUT for spec in specs)
    nodes: list[fx.Node | None] = []
    for name in state.BUFFERS:
        buffer = getattr(state, name)
        if buffer is None:
            nodes.append(None)
            continue
        with graph.inserting_before([*graph.nodes][position]):
            node = graph.placeholder(f"b_{name}_{site.ordinal}")
        node.meta = {"val": fake_mode.from_tensor(buffer, static_shapes=True)}
        fqn = f"{owner}.{name}"
        specs.insert(position, InputSpec(InputKind.BUFFER, TensorArgument(node.name), fqn, persistent=False))
        program.constants[fqn] = buffer
        nodes.append(node)
        position += 1
    return nodes


def skip_states(module: nn.Module) -> dict[str, SiteState]:
    """Return the skip states of a running skip-aware program, by the path of the module that holds their buffers.

    The states share the program's buffers: what is written to them (slot, step, threshold, time, reset) is what the
    program sees at its next call. Each is a `SkipState` or a `ResidualState`, as the program's method is.

    Args:
        module: `program.module()` of a program from `make_skip_aware`, also one that was saved and loaded.

    Raises:
        ValueError: it is no module.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: expected program.module(), got {type(module).__name__}")
    graph = getattr(module, "graph", None)
    states: dict[str, SiteState] = {}
    for node in graph.nodes if isinstance(graph, fx.Graph) else []:
        op, mask = _state_of(node)
        if op is not None:
            path, _, _ = str(mask.target).rpartition(".")
            owner = module.get_submodule(path)
            tile_m, tile_n = int(node.kwargs["tile_m"]), int(node.kwargs["tile_n"])
            states[path] = METHOD_OF_OP[op].state.over(dict(owner.named_buffers(recurse=False)), tile_m, tile_n)
    return states


def _state_of(node: fx.Node) -> tuple[Any, Any]:
    """Return which op of ours a node calls, decomposed or not, and its skip mask; None of any other node."""
    if node.op == "call_function" and node.target in METHOD_OF_OP:
        return node.target, node.args[3]
    if node.target is AUTO_FUNCTIONALIZED and node.args[0] in METHOD_OF_OP:
        bases: Any = node.kwargs["_all_bases"]
        return node.args[0], bases[node.kwargs["_skip_mask_base_index"]]
    return None, None
