"""What several processes have learned, joined to be saved; each takes its own when it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
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


def joined_state_dict(module: nn.Module, process_group: ProcessGroup) -> dict[str, Any]:
    """Return the `state_dict` of a module in which states are those of all processes, the same on all; a collective.

    It is what one process would save. `load_state_dict` takes it in one process, or in any number of them, where each
    takes its heads and queries. Heads are in the order of the model, whoever they were dealt to. A module that deals
    them keeps the thresholds that it was given by head; those of a state alone are not dealt with it.

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
    for prefix, state in _states_in(saved):
        parts = _of_all(state, shard, group)
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


def _of_all(state: Saved, shard: Shard, group: Group) -> list[Saved]:
    """Return the saved states of all ranks: what they look like by the store, their bytes by a collective."""
    device = state["control"].device
    layouts = [json.loads(text) for text in texts_of_all(shard, json.dumps(_layout(state)))]
    require(
        all(layout.keys() == state.keys() for layout in layouts), "process_group", f"states of {sorted(state)} on all",
        [sorted(layout) for layout in layouts],
    )  # fmt: skip
    own = torch.cat([x.to(device).contiguous().flatten().view(torch.uint8) for x in state.values()])
    lengths = [sum(of_name["nbytes"] for of_name in layout.values()) for layout in layouts]
    whole = gathered_rows([own], lengths, group.name)[0]
    return [_read(layout, of_rank) for layout, of_rank in zip(layouts, whole.split(lengths), strict=True)]


def _layout(state: Saved) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": [*x.shape], "dtype": str(x.dtype).removeprefix("torch."), "nbytes": x.nbytes}
        for name, x in state.items()
    }


def _read(layout: dict[str, dict[str, Any]], whole: torch.Tensor) -> Saved:
    """Return tensors from their bytes; `geometry` is read on the host, where all of them have it."""
    split = whole.split([of_name["nbytes"] for of_name in layout.values()])
    found = {
        name: x.clone().view(getattr(torch, of_name["dtype"])).view(of_name["shape"])
        for (name, of_name), x in zip(layout.items(), split, strict=True)
    }
    return {**found, "geometry": found["geometry"].cpu()}
