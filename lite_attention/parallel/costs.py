"""What heads cost, to be kept from one run for the next: so that its first generation is balanced, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from lite_attention.model_sites import sites_of
from lite_attention.module import LiteAttention
from lite_attention.ops.arguments import require
from lite_attention.parallel.module_exchange import ModuleExchange

__all__ = ["deal_heads", "head_costs"]


def head_costs(model: nn.Module) -> dict[str, list[float]]:
    """Return the share of tiles that each head computes now, by the name of its site; a collective of all ranks.

    The heads are those of all ranks, as the model has them, so what is returned is the same on all. It may be written
    to a file, as JSON. Sites without a process group, or that have not run yet, are left out.

    Raises:
        ValueError: no model.
    """
    found = {}
    for name, module, exchange in _modules(model):
        if module.states:
            found[name] = exchange.costs_of_all(1 - module.sparsity("head"))
    return found


def deal_heads(model: nn.Module, costs: Mapping[str, Sequence[float]]) -> None:
    """Deal the heads of a model by what they cost, where its next generation begins; the same on all ranks.

    Args:
        model: with `LiteAttention` modules that have a process group and `balance`.
        costs: as `head_costs` returns them, or other numbers by site and head. Other sites stay as they are.

    Raises:
        ValueError: a site that the model does not have, that is not balanced, or that has another number of heads;
            nothing is changed then.
    """
    exchanges = {name: exchange for name, _, exchange in _modules(model)}
    for name, of_site in costs.items():
        known = ", ".join(exchanges) or "none"
        require(name in exchanges, "costs", f"names of sites with a process group, {known}", repr(name))
        exchanges[name].check_costs(name, of_site)
    for name, of_site in costs.items():
        exchanges[name].set_costs(of_site)


def _modules(model: nn.Module) -> Iterator[tuple[str, LiteAttention, ModuleExchange]]:
    for site in sites_of(model):
        if site.module is not None and site.module.exchange is not None:
            yield site.name, site.module, site.module.exchange
