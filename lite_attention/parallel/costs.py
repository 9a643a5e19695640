"""What heads cost, to be kept from one run for the next: so that its first generation is balanced, too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lite_attention.model_sites import sites_of
from lite_attention.module import LiteAttention
from lite_attention.ops.arguments import require
from lite_attention.parallel.module_exchange import ModuleExchange

__all__ = ["deal_heads", "head_costs"]


def head_costs(model: nn.Module) -> dict[str, list[float]]:
    """Return the share of tiles that each head computes now, by the name of its site; a collective of all ranks.

    The heads are those of all ranks, as the model has them, so what is returned is the same on all. It may be written
    to a file, as JSON. Sites that have not run yet, or whose heads are not dealt, are left out.

    Raises:
        ValueError: no model.
    """
    found = {}
    for name, module, exchange in _modules(model):
        if module.states and exchange.balance:
            found[name] = exchange.costs_of_all(1 - module.sparsity("head"))
    return found


def deal_heads(model: nn.Module, costs: Mapping[str, Sequence[float]]) -> None:
    """Deal the heads of a model by what they cost, where its next generation begins; the same on all ranks.

    Args:
        model: with `LiteAttention` modules that have a process group and `balance`.
        costs: as `head_costs` returns them, or other finite numbers by site and head. Other sites stay as they are.

    Raises:
        ValueError: no numbers, a site that the model does not have, that is not balanced, or that has another number
            of heads; nothing is changed then.
    """
    exchanges = {name: exchange for name, _, exchange in _modules(model)}
    require(isinstance(costs, Mapping), "costs", "numbers by head, by the name of a site", repr(costs))
    checked = {}
    for name, of_site in costs.items():
        known = ", ".join(exchanges) or "none"
        require(name in exchanges, "costs", f"names of sites with a process group, {known}", repr(name))
        checked[name] = _finite(f"costs of {name}", of_site)
        exchanges[name].check_costs(name, checked[name])
    for name, numbers in checked.items():
        exchanges[name].set_costs(numbers)


def _finite(name: str, costs: Any) -> list[float]:
    """Return costs as floats; raise ValueError where one is no finite number."""
    try:
        numbers = [math.nan if isinstance(cost, (bool, str)) else float(cost) for cost in costs]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        numbers = [math.nan]
    require(all(map(math.isfinite, numbers)), name, "finite numbers", costs)
    return numbers


def _modules(model: nn.Module) -> Iterator[tuple[str, LiteAttention, ModuleExchange]]:
    for site in sites_of(model):
        if site.module is not None and site.module.exchange is not None:
            yield site.name, site.module, site.module.exchange
