"""What several processes have learned, joined to be saved; each takes its own when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lite_attention.ops.arguments import require
from lite_attention.ops.saved_parts import Saved, joined
from lite_attention.ops.shard import Shard
from lite_attention.parallel.agreement import texts_of_all, told_of_errors
from lite_attention.parallel.group import Group, gathered_rows
from lite_attention.parallel.shard import shard_by

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["joined_state_dict"]

_Layout = dict[str, dict[str, Any]]  # shape, dtype and bytes, by the name of a tensor


def joined_state_dict(module: nn.Module, process_group: ProcessGroup) -> dict[str, Any]:
    """Return the `state_dict` of a module in which states are those of all processes, the same on all; a collective.

    It is what one process would save. `load_state_dict` takes it in one process, or in any number of them, where each
    takes its heads and queries. Heads are in the order of the model, whoever they were dealt to. A module that deals
    them keeps the thresholds that it was given by head; a state with others is refused there.

        saved = lite_attention.parallel.joined_state_dict(model, dist.group.WORLD)
        if dist.get_rank() == 0:
            torch.save(saved, "model.pt")

    Args:
        module: a model with `LiteAttention` modules that have `persistent_state`, or a state, such as
            `report(model).rows[0].state`.
        process_group: the processes that have the model once together.

    Raises:
        ValueError: no group; or processes that do not have each head and query once, that have made other calls, or
            whose queries are no whole tiles.
        RuntimeError: another process failed, or has said nothing within the timeout of the group.
    """
    shard, group = shard_by(process_group), Group.of(process_group)
    with told_of_errors(shard):
        saved: dict[str, Any] = {**module.state_dict()}
    states = dict(_states_in(saved))
    layouts = _layouts_of_all(states, shard)
    for prefix, state in states.items():
        parts = _of_all(state, [of_rank[prefix] for of_rank in layouts], group)
        with told_of_errors(shard):
            whole = joined(parts)
        for name in state:
            del saved[prefix + name]
        saved.update({prefix + name: x for name, x in whole.items()})
    return saved


def _states_in(saved: dict[str, Any]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield the states of parts in a state_dict, with the prefixes of their names."""
    prefixes = [key[: -len("part")] for key in saved if key.rpartition(".")[2] == "part"]
    for prefix in prefixes:
        if prefix + "geometry" not in saved:
            continue  # a model's own
        names = [key[len(prefix) :] for key in saved if key.startswith(prefix) and "." not in key[len(prefix) :]]
        yield prefix, {name: saved[prefix + name] for name in names}


def _layouts_of_all(states: Mapping[str, Saved], shard: Shard) -> list[dict[str, _Layout]]:
    """Return what the states of each rank look like, by their prefixes.

    Raises:
        ValueError: ranks have states of other sites, or with other tensors.
    """
    own = {prefix: _layout(state) for prefix, state in states.items()}
    layouts: list[dict[str, _Layout]] = [json.loads(text) for text in texts_of_all(shard, json.dumps(own))]
    named = [[prefix + name for prefix, layout in of_rank.items() for name in layout] for of_rank in layouts]
    for names in named:
        differ = sorted({*names} ^ {*named[0]})
        require(names == named[0], "module", "the same states on all ranks", f"{differ} on some")
    return layouts


def _of_all(state: Saved, layouts: Sequence[_Layout], group: Group) -> list[Saved]:
    """Return the saved states of all ranks: their bytes travel by a collective."""
    device = state["control"].device
    own = torch.cat([x.to(device).contiguous().flatten().view(torch.uint8) for x in state.values()])
    lengths = [sum(of_name["nbytes"] for of_name in layout.values()) for layout in layouts]
    whole = gathered_rows([own], lengths, group.name)[0]
    return [_read(layout, of_rank) for layout, of_rank in zip(layouts, whole.split(lengths), strict=True)]


def _layout(state: Saved) -> _Layout:
    return {
        name: {"shape": [*x.shape], "dtype": str(x.dtype).removeprefix("torch."), "nbytes": x.nbytes}
        for name, x in state.items()
    }


def _read(layout: _Layout, whole: torch.Tensor) -> Saved:
    """Return tensors from their bytes; `geometry` is read on the host, where all of them have it."""
    split = whole.split([of_name["nbytes"] for of_name in layout.values()])
    found = {
        name: x.clone().view(getattr(torch, of_name["dtype"])).view(of_name["shape"])
        for (name, of_name), x in zip(layout.items(), split, strict=True)
    }
    return {**found, "geometry": found["geometry"].cpu()}
