"""diffusers' ring as one attention: the keys of all ranks are gathered, and what is called can skip.

diffusers gathers them too, and then attends to one rank's keys after the other, which needs an LSE of each part. Here
the queries of a rank attend to all keys at once, by scaled_dot_product_attention, where the swap finds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.torch_internals import all_gather, arrived
from lite_attention.parallel.group import gathered_rows

__all__ = ["attend", "own_heads_of_mask"]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    config: Any,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return attention of the queries here to the keys of all ranks, (batch, tokens here, heads, value_dim).

    Args:
        query: (batch, tokens here, heads, head_dim), as are the others.
        key: of the tokens here.
        value: likewise.
        mask: of keys, those here or all: (batch, keys), or (batch or 1, heads or 1, 1, keys) of all heads.
        config: diffusers' `ContextParallelConfig`, with a ring.
        dropout_p: as for `scaled_dot_product_attention`, as are the others.
        is_causal: likewise; only False.
        scale: likewise.
        enable_gqa: likewise.

    Raises:
        ValueError: causal, or a mask that differs per query.
    """
    if is_causal:
        raise ValueError("is_causal: expected False with enable_parallelism(), got True")
    mask = None if mask is None else _of_all_keys(mask, key.shape[1], config)
    by_heads = config._ulysses_mesh.get_group() if config.ulysses_degree > 1 else None
    if by_heads is not None:
        query, key, value = (_exchanged(x, by_heads, 2, 1) for x in (query, key, value))
    key, value = _of_all_ranks([key, value], config)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)
    out = out.transpose(1, 2)
    return out if by_heads is None else _exchanged(out, by_heads, 1, 2)


def own_heads_of_mask(mask: torch.Tensor, heads: int, config: Any) -> torch.Tensor:
    """Return the part of a mask (batch, heads or 1, ...) that is of the heads of this rank; others as they are.

    Args:
        mask: of any shape.
        heads: of the whole model.
        config: diffusers' `ContextParallelConfig`.
    """
    if mask.dim() != 4 or mask.shape[1] == 1 or mask.shape[1] != heads:
        return mask
    each = ceil_div(heads, config.ulysses_degree)
    start = each * config._ulysses_local_rank
    return mask[:, start : start + each].contiguous()


def _exchanged(x: torch.Tensor, group: Any, scattered: int, gathered: int) -> torch.Tensor:
    from diffusers.models.attention_dispatch import SeqAllToAllDim

    exchanged: torch.Tensor = SeqAllToAllDim.apply(group, x, scattered, gathered)
    return exchanged


def _of_all_ranks(tensors: list[torch.Tensor], config: Any) -> list[torch.Tensor]:
    """Return (batch, tokens of the ring, ...), views of what arrives, of (batch, tokens here, ...)."""
    group, here = config._ring_mesh.get_group(), tensors[0].shape[1]
    lengths = _lengths(here, group) if config.ring_anything else [here] * config.ring_degree
    gathered = gathered_rows([x.transpose(0, 1) for x in tensors], lengths, group.group_name)
    return [x.transpose(0, 1) for x in gathered]


def _lengths(here: int, group: Any) -> list[int]:
    from diffusers.models._modeling_parallel import gather_size_by_comm

    lengths: list[int] = gather_size_by_comm(here, group)
    return lengths


def _of_all_keys(mask: torch.Tensor, keys: int, config: Any) -> torch.Tensor:
    """Return a mask [B or 1, heads here or 1, 1, keys of all ranks]; it may have them already."""
    if mask.dim() == 2:
        mask = mask[:, None, None]
    if mask.dim() != 4 or mask.shape[2] != 1:
        raise ValueError(
            "attn_mask: expected one of keys alone, (batch, keys) or (batch, heads, 1, keys), with a ring of "
            f"processes, got {tuple(mask.shape)}"
        )
    if config.ulysses_degree > 1:
        mask = own_heads_of_mask(mask, mask.shape[1], config)
    if mask.shape[3] != keys:
        return mask
    of_keys = mask.permute(3, 0, 1, 2)
    bits = of_keys.to(torch.uint8) if mask.dtype == torch.bool else of_keys  # which all collectives know
    if config.ulysses_degree > 1:
        group = config._ulysses_mesh.get_group()
        bits = arrived(all_gather(bits.contiguous(), config.ulysses_degree, group.group_name))
    (whole,) = _of_all_ranks([bits.transpose(0, 1)], config)
    return whole.transpose(0, 1).permute(1, 2, 3, 0).to(mask.dtype)
