"""Which heads and queries of a model are here: asked of diffusers' or cache-dit's configuration, or of a group."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from lite_attention.ops.shard import Ranks, Shard
from lite_attention.parallel.group import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Ranks", "Shard", "context_parallel_of", "ranks_of", "shard_of"]


def ranks_of(process_group: ProcessGroup) -> Ranks:
    """Return the place of this process in a group.

    Raises:
        ValueError: no group, or one without this process.
    """
    group = Group.of(process_group)
    return Ranks(group.rank, group.ranks)


def shard_of(model: nn.Module, head_ranks: Ranks | None = None) -> Callable[[], Shard]:
    """Return a function that tells the part of a model's attention that is here, as the model is when it is asked.

    So parallelism may be enabled before or after `lite_attention.enable`. It does not keep the model alive.

    Args:
        model: with the configuration of diffusers' `enable_parallelism`, or of cache-dit, or with none.
        head_ranks: over which heads are exchanged where the model does not tell, as with ParaAttention.
    """
    if head_ranks is not None:
        told = Shard(head_ranks)
        return lambda: told
    of = weakref.ref(model)
    return lambda: _shard_by_config(of())


def context_parallel_of(model: Any, *names: str) -> Any:
    """Return the context parallel configuration of a model of diffusers, or under cache-dit; None if it has none.

    Args:
        model: any.
        names: attributes that may hold it; by default those of both.
    """
    for name in names or ("_cp_config", "_parallel_config"):
        config = getattr(model, name, None)
        config = getattr(config, "context_parallel_config", config)
        if hasattr(config, "ulysses_degree"):
            return config
    return None


def _shard_by_config(model: Any) -> Shard:
    config = context_parallel_of(model)
    if config is not None:
        heads = Ranks(config._ulysses_local_rank or 0, config.ulysses_degree or 1)
        queries = Ranks(config._ring_local_rank or 0, config.ring_degree or 1)
        return Shard(heads, queries, _uneven_heads(model, config))
    tensor_parallel = getattr(getattr(model, "_parallel_config", None), "tensor_parallel_config", None)
    mesh = getattr(tensor_parallel, "_mesh", None)
    return Shard() if mesh is None else Shard(Ranks(mesh.get_local_rank(), mesh.size()))


def _uneven_heads(model: Any, config: Any) -> int | None:
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return heads if getattr(config, "ulysses_anything", False) and isinstance(heads, int) else None
