"""Which heads and queries of a model are here: asked of diffusers' or cache-dit's configuration, or of a group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lite_attention.ops.shard import WHOLE, Ranks, Shard
from lite_attention.parallel.group import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Ranks", "Shard", "check_of_sequence", "context_parallel_of", "shard_by", "shard_of"]


def shard_by(process_group: ProcessGroup) -> Shard:
    """Return the part of this process where heads are exchanged over a group.

    Raises:
        ValueError: no group, or one without this process.
    """
    group = Group.of(process_group)
    return Shard(Ranks(group.rank, group.ranks), groups=(group.name, ""))


def shard_of(model: nn.Module, told: Shard | None = None) -> Callable[[], Shard]:
    """Return a function that tells the part of a model's attention that is here, as the model is when it is asked.

    So parallelism may be enabled before or after `lite_attention.enable`. It does not keep the model alive.

    Args:
        model: with the configuration of diffusers' `enable_parallelism`, or of cache-dit, or with none.
        told: where the model does not tell, as with ParaAttention.
    """
    if told is not None:
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
        config = _attribute(model, name)
        config = getattr(config, "context_parallel_config", config)
        if config is not None and hasattr(config, "ulysses_degree"):
            return config
    return None


def _attribute(model: Any, name: str) -> Any:
    """Return an attribute, None without one; what nn.Module does about a missing one takes longer than all else."""
    return getattr(model, "__dict__", {}).get(name, getattr(type(model), name, None))


def check_of_sequence(model: nn.Module, arguments: Sequence[str]) -> Callable[..., None]:
    """Return a check before each forward that diffusers has split the sequence so that attention can be computed.

    Where ranks split text and picture apart, joint attention has text, picture, text, picture. The check raises
    ValueError then, if there are arguments that name tokens; and where rotary embeddings of LTX-2 are not split as the
    tokens are, which diffusers leaves out. It does not keep the model alive.
    """
    of = weakref.ref(model)

    def check(*_: object) -> None:
        model = of()
        if context_parallel_of(model) is None:
            return
        for name in _unsplit_rotary(model):
            raise ValueError(
                f"cp_plan: expected one that splits what {name} of {type(model).__name__} returns, got one that does "
                "not, as that of diffusers: give enable_parallelism() the plan that the page on several GPUs has"
            )
        if arguments and _splits_joint_attention(model):
            raise ValueError(
                f"{arguments[0]}: expected none for {type(model).__name__} with enable_parallelism(), whose joint "
                "attention then has text and picture of each process in turn: it would name other tokens"
            )

    return check


def _unsplit_rotary(model: Any) -> list[str]:
    """Return the rotary embeddings of the video in LTX-2, one of its own and one for audio, that are not split."""
    modules = {name: model._modules.get(name) for name in ("rope", "cross_attn_rope")}
    if None in modules.values() or context_parallel_of(model, "_parallel_config") is None:
        return []
    dims = 4 if getattr(model.config, "rope_type", "") == "split" else 3  # with a dim for heads
    return [name for name, module in modules.items() if dims not in _split_dims(module)]


def _split_dims(module: Any) -> set[int]:
    """Return of how many dims outputs of a module are split over processes, by hooks of diffusers."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    plans = [hook.metadata for hook in hooks.values() if isinstance(getattr(hook, "metadata", None), dict)]
    return {split.expected_dims for plan in plans for split in plan.values()}


def _splits_joint_attention(model: Any) -> bool:
    plans = [plan for plan in (getattr(model, "_cp_plan", None) or {}).values() if isinstance(plan, dict)]
    is_apart = any({"hidden_states", "encoder_hidden_states"} <= set(plan) for plan in plans)
    return is_apart and any(getattr(module, "add_k_proj", None) is not None for module in model.modules())


def _shard_by_config(model: Any) -> Shard:
    config = context_parallel_of(model)
    if config is not None:
        heads = Ranks(config._ulysses_local_rank or 0, config.ulysses_degree or 1)
        queries = Ranks(config._ring_local_rank or 0, config.ring_degree or 1)
        groups = _group_of(config, "_ulysses_mesh"), _group_of(config, "_ring_mesh")
        return Shard(heads, queries, _uneven_heads(model, config), groups)
    tensor_parallel = getattr(_attribute(model, "_parallel_config"), "tensor_parallel_config", None)
    mesh = getattr(tensor_parallel, "_mesh", None)
    if mesh is None:
        return WHOLE
    return Shard(Ranks(mesh.get_local_rank(), mesh.size()), groups=(mesh.get_group().group_name, ""))


def _group_of(config: Any, name: str) -> str:
    mesh = getattr(config, name, None)
    return "" if mesh is None else str(mesh.get_group().group_name)


def _uneven_heads(model: Any, config: Any) -> int | None:
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return heads if getattr(config, "ulysses_anything", False) and isinstance(heads, int) else None
