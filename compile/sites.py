"""Deciding which attention of a graph is swapped, with a reason for each one that is not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lite_attention.compile.attention_calls import AttentionCall, find_attention_calls, is_our_attention, is_sdpa
from lite_attention.compile.outer_masks import outer_mask_of
from lite_attention.compile.provenance import Provenance, value_of
from lite_attention.compile.settings import SkipSettings
from lite_attention.ops.shard import WHOLE, Shard
from lite_attention.ops.site import Site
from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.torch_internals import (
    example_of,
    holds_for_all_sizes,
    holds_unless_unknown,
    input_path,
    is_wrapper,
    module_ids,
    module_text,
    running_module,
)

__all__ = ["GraphSite", "Names", "find_sites", "sites_in_subgraphs"]

_log = logging.getLogger("lite_attention")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class GraphSite:
    """A site and the nodes that it is made of."""

    site: Site
    call: AttentionCall
    owners: list[fx.Node]

    def remap(self, copies: dict[fx.Node, fx.Node]) -> GraphSite:
        """Return the same site where some nodes have others in their place: in a copy, or after an earlier swap."""
        call = self.call

        def copy(node: fx.Node) -> fx.Node:
            return copies.get(node, node)

        moved = replace(
            call, node=copy(call.node), q=copy(call.q), k=copy(call.k), v=copy(call.v),
            mask=None if call.mask is None else copy(call.mask),
            rows=None if call.rows is None else copy(call.rows), inner=[*map(copy, call.inner)],
        )  # fmt: skip
        return GraphSite(self.site, moved, [*map(copy, self.owners)])


class Names:
    """What the modules and parameters of a graph are called: in the model, or, if that is not known, from the frame."""

    def __init__(self, model: nn.Module | None = None) -> None:
        modules = {} if model is None else dict(model.named_modules())
        self._modules = {id(module): (path, type(module).__name__) for path, module in modules.items()}
        self._parameters = {} if model is None else {id(p): path for path, p in model.named_parameters()}

    def of_caller(self, node: fx.Node) -> tuple[str, str]:
        """Return the path and class name of the innermost module around a node."""
        running = running_module() if self._modules else None  # a frame that a graph break made is within no module
        for module in (*module_ids(node), id(running)):
            if module in self._modules:
                return self._modules[module]
        return module_text(node)

    def alike(self, node: fx.Node, path: str) -> list[str]:
        """Return what modules a node's code may also run for: all, if it is the model that was compiled, else many."""
        text, class_name = module_text(node)
        if text == path or not self._modules:
            return [path]
        if not text:  # in a frame that a graph break made
            class_name = next((name for where, name in self._modules.values() if where == path), "")
        end = f".{text}" if text else ""
        return [where for where, name in self._modules.values() if name == class_name and f".{where}".endswith(end)]

    def of_owner(self, node: fx.Node) -> str:
        """Return the path of a parameter."""
        return self._parameters.get(id(example_of(node))) or input_path(node)


def _tensor(node: fx.Node) -> torch.Tensor | None:
    value = value_of(node)
    return value if isinstance(value, torch.Tensor) else None


def _permuted_shape(node: fx.Node, permutation: tuple[int, ...]) -> tuple[Any, ...]:
    value = _tensor(node)
    shape = tuple(value.shape) if value is not None else ()
    return tuple(shape[i] for i in permutation) if len(shape) == 4 else shape


def _describe(call: AttentionCall, ordinal: int, names: Names) -> Site:
    path, class_name = names.of_caller(call.node)
    value = _tensor(call.node)  # not q: autocast and attention written by hand may cast on the way
    return Site(
        path, class_name, ordinal, _permuted_shape(call.q, call.q_permutation),
        _permuted_shape(call.k, call.k_permutation), _permuted_shape(call.v, call.v_permutation),
        torch.float32 if value is None else value.dtype, torch.device("cpu") if value is None else value.device,
    )  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    return holds_for_all_sizes(a == b)


def unsupported_call(
    site: Site,
    tensors: Sequence[torch.Tensor | None],
    mask: torch.Tensor | None,
    *,
    dropout_p: object,
    is_causal: object,
    scale: object,
    enable_gqa: object,
) -> str | None:
    """Return what the op cannot compute about a call, None if it can.

    Args:
        site: shapes and dtype.
        tensors: q, k and v, real or fake.
        mask: the attention mask.
        dropout_p: as given to scaled_dot_product_attention, as are the others.
        is_causal: likewise.
        scale: likewise.
        enable_gqa: likewise.
    """
    if any(t is None or t.dim() != 4 for t in tensors):
        return "q, k and v are not all of rank 4"
    for t in (*tensors, mask):
        if t is not None and (is_wrapper(t) or t.layout != torch.strided):
            return f"a {type(t).__name__} with layout {t.layout}, which the op does not know"
    if any(_same(size, 0) for shape in (site.q_shape, site.k_shape) for size in shape):
        return "no queries or keys"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "needs gradients: run it under torch.no_grad()"
    if site.dtype not in _DTYPES:
        return f"dtype {site.dtype}"
    if is_causal is not False:
        return "causal"
    if dropout_p != 0:
        return "dropout"
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
        return f"scale is not a number above 0: {scale}"
    (batch, _, heads, head_dim), k_shape, v_shape = site.q_shape, site.k_shape, site.v_shape
    if not (_same(batch, k_shape[0]) and _same(batch, v_shape[0]) and _same(k_shape[2], v_shape[2])):
        return "batch or heads are broadcast"
    if not all(isinstance(size, int) for size in (heads, k_shape[2], head_dim, v_shape[3])):
        return "number of heads or head_dim is dynamic"
    if heads != k_shape[2] != 1 and enable_gqa is not True:
        return f"{heads} query heads and {k_shape[2]} key heads without enable_gqa"
    if heads % k_shape[2]:
        return f"{heads} query heads are no multiple of {k_shape[2]} key heads"
    if mask is not None and not is_key_mask(mask, site):
        kind = "bool mask that differs per query" if mask.dtype == torch.bool else f"{mask.dtype} mask"
        return f"{kind}, shape {tuple(mask.shape)}"
    return None


def is_key_mask(mask: torch.Tensor, site: Site) -> bool:
    """Return whether a mask only excludes keys: bool [B or 1, 1, 1, Sk]."""
    if mask.dtype != torch.bool or mask.dim() != 4:
        return False
    batch, heads, rows, keys = mask.shape
    fits = _same(heads, 1) and _same(rows, 1) and _same(keys, site.k_shape[1])
    return fits and (_same(batch, 1) or _same(batch, site.q_shape[0]))


def choice_reason(
    site: Site,
    settings: SkipSettings,
    *,
    may_guard: bool = True,
    layers: Sequence[str] = (),
    shard: Shard = WHOLE,
) -> str | None:
    """Return why a site that could be swapped should not be, None if it should.

    Args:
        site: as far as decided.
        settings: what the user wants.
        layers: names of all layers that it stands for; their reasons may differ, and None is that of one.
        may_guard: whether lengths that are symbols may be told apart by what they are now, as dynamo can.
        shard: which part of the model's attention it is.
    """
    site, chosen = shard.whole(site), None
    if settings.select is not None:
        answers = {settings.select(replace(site, name=name)) for name in layers or [site.name]}
        chosen = True if True in answers else None if None in answers else False
    if chosen is not None:
        return None if chosen else "not selected"
    if site.is_self_attention is False:
        return "cross-attention"
    same = holds_unless_unknown if may_guard else holds_for_all_sizes
    if site.is_self_attention is None and not same(site.q_shape[1] == site.k_shape[1]):
        return "no evidence of self-attention in the graph, and lengths differ"
    k_tiles = ceil_div(site.k_shape[1], settings.tile_shape_for(site)[1])
    if holds_for_all_sizes(k_tiles < settings.min_tiles):
        return f"only {k_tiles} k-tile(s), fewer than min_tiles={settings.min_tiles}"
    if holds_for_all_sizes(site.q_shape[1] != site.k_shape[1]):
        return "queries and keys of one origin but of different number, as where tokens are pooled"
    if site.is_self_attention is None:
        _log.warning(
            "%s: queries and keys come ready-made, so only their equal number says that this is self-attention; "
            "select= decides otherwise", site.name or site.class_name or "a site",
        )  # fmt: skip
    return None


def _with_factors(call: AttentionCall) -> AttentionCall:
    """Return a call with the mask of its keys, and of its queries, where its mask is made of two such."""
    outer = None if call.mask is None else outer_mask_of(call.mask, call.node)
    return call if outer is None else replace(call, mask=outer.keys, rows=outer.rows)


def find_sites(
    graph: fx.Graph,
    settings: SkipSettings,
    is_weight: Callable[[fx.Node], bool],
    is_parameter: Callable[[fx.Node], bool] | None = None,
    names: Names | None = None,
    shard: Shard = WHOLE,
) -> list[GraphSite]:
    """Return all attention of a graph, decided.

    Args:
        graph: a graph of dynamo, or of `torch.export` in training IR, before any change.
        settings: what the user wants.
        is_weight: tells placeholders and attributes that hold parameters or buffers.
        is_parameter: tells those that hold parameters, where a state is found by its owners: a site without any is
            left alone, if no module is running either. None: every site has a key of its own.
        names: of the model's modules, where it is known.
        shard: which part of the model's attention is here.
    """
    calls, names = [_with_factors(call) for call in find_attention_calls(graph)], names or Names()
    outputs = {call.node for call in calls}
    provenance = Provenance(
        graph,
        lambda node: node in outputs or is_sdpa(node) or is_our_attention(node),
        is_weight,
        is_parameter or is_weight,
    )
    found = []
    for ordinal, call in enumerate(calls):
        site = _describe(call, ordinal, names)
        owners = provenance.owners((call.q, call.k, call.v), call.node)
        owners.sort(key=lambda node: node.op == "get_attr")  # inputs first
        site.owner_paths = tuple(map(names.of_owner, owners)) if is_parameter else ()
        tensors = [_tensor(node) for node in (call.q, call.k, call.v)]
        mask = None if call.mask is None else _tensor(call.mask)
        out = _tensor(call.node)
        with torch.set_grad_enabled(out is not None and out.requires_grad):  # the mode that the call itself runs in
            reason = unsupported_call(
                site,
                tensors,
                mask,
                dropout_p=call.dropout_p,
                is_causal=call.is_causal,
                scale=call.scale,
                enable_gqa=call.enable_gqa,
            )
        if reason is None:
            site.fits_dense_kernel = settings.fits_dense_kernel(site)
            site.is_self_attention = provenance.is_self_attention(call.q, call.k, call.node)
            layers = names.alike(call.node, site.name)
            reason = settings.unsupported_reason(site) or choice_reason(
                site, settings, may_guard=is_parameter is not None, layers=layers, shard=shard
            )
        if reason is None and is_parameter is not None and not owners and running_module() is None:
            reason = "owner unknown: no parameter in this graph, and no module runs it"
        site.reason = reason
        found.append(GraphSite(site, call, owners))
    return found


def sites_in_subgraphs(module: fx.GraphModule, names: Names | None = None) -> list[Site]:
    """Return the attention inside higher-order ops, where a state cannot be reached."""
    users = {node.target: user for node in module.graph.nodes if node.op == "get_attr" for user in node.users}
    found: list[Site] = []
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            for call in find_attention_calls(child.graph):
                site = _describe(call, len(found), names or Names())
                site.reason = "inside a nested region" + (f" ({users[name].target})" if name in users else "")
                found.append(site)
            found.extend(sites_in_subgraphs(child, names))
    return found


def log_sites(sites: list[Site], what: str) -> None:
    """Log one line per site: swapped, or the reason."""
    for site in sites:
        instead = "dense kernel" if site.dense_kernel else "left alone"
        _log.info(
            "%s: %s (%s) q %s k %s: %s", what, site.name or "<root>", site.class_name, tuple(site.q_shape),
            tuple(site.k_shape), "swapped" if site.swapped else f"{instead}: {site.reason}",
        )  # fmt: skip
