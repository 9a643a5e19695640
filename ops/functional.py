"""The functional forms of skip-aware attention and of dense attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lite_attention.ops.arguments import check_choice
from lite_attention.ops.ranges import must_do_words, must_skip_mask, range_ends
from lite_attention.ops.residual_state import ResidualState
from lite_attention.ops.schema import ATTENTION, IMPLEMENTATIONS, RESIDUAL_IMPLEMENTATIONS
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.state import SkipState
from lite_attention.ops.validate import check_inputs, check_key_lengths, check_key_mask, is_bshd, is_traced

__all__ = ["attention", "residual_attention", "skip_attention"]

# Ranges seldom change between calls, and on CUDA each new tensor costs a copy from the host.
_must_do_words = functools.lru_cache(maxsize=256)(must_do_words)
_must_skip_mask = functools.lru_cache(maxsize=256)(must_skip_mask)


def _cached(function: Any, name: str, ranges: Sequence[int], *args: Any) -> Any:
    if is_traced():  # then the result must not be kept
        return function.__wrapped__(ranges, *args)
    # Told apart here: as keys of a cache, 0.0 and False are 0.
    ends = range_ends(name, ranges)
    with torch.inference_mode(False):
        return function(ends, *args)


def _joined_key_mask(
    q: torch.Tensor,
    seq_k: int,
    key_mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    must_skip: Sequence[int] | None,
) -> torch.Tensor | None:
    """Return one key mask, bool (batch or 1, seq_k), for all that excludes keys; None if nothing does."""
    masks = []
    if key_mask is not None:
        check_key_mask(key_mask, q, seq_k)  # before it is joined with others, which would hide its shape and dtype
        masks.append(key_mask)
    if key_lengths is not None:
        check_key_lengths(key_lengths, q, seq_k)
        masks.append(torch.arange(seq_k, device=q.device) < key_lengths.unsqueeze(-1))
    if must_skip is not None:
        masks.append(_cached(_must_skip_mask, "must_skip", must_skip, seq_k, q.device))
    return functools.reduce(torch.logical_and, masks) if masks else None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    key_lengths: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> Any:
    """Dense attention, exact, without a state: for sites that never skip.

    Args:
        q: (batch, seq_q, heads, head_dim), floating; any strides, the last one 1 (others are copied).
        k: (batch, seq_k, kv_heads, head_dim); heads is a multiple of kv_heads.
        v: (batch, seq_k, kv_heads, value_dim).
        scale: factor of the scores, above 0; None = head_dim ** -0.5.
        return_lse: also return the log-sum-exp of the scores.
        key_lengths: int (batch,), 0 to seq_k: keys from this index on take no part. Values are checked on the CPU.
        key_mask: bool (batch or 1, seq_k), True = the key takes part.

    Returns:
        out (batch, seq_q, heads, value_dim); with `return_lse` also lse float32 (batch, heads, seq_q), natural log.
        A row without any key gives 0 and -inf.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: a gradient is required, or no kernel runs this dtype and head_dim on the device.
        NotImplementedError: no kernel for this device.
    """
    if not (is_bshd(q) and is_bshd(k) and is_bshd(v)):
        check_inputs(q, k, v)  # which tells what is wrong
    allowed = _joined_key_mask(q, k.shape[1], key_mask, key_lengths, None)
    out, lse = ATTENTION(q, k, v, allowed, scale=scale)
    return (out, lse) if return_lse else out


def _state_tensors(state: SiteState) -> list[torch.Tensor | None]:
    if torch.compiler.is_compiling():
        return [getattr(state, name) for name in state.BUFFERS]
    return [state._buffers[name] for name in state.BUFFERS]  # an attribute of a Module costs 2 us each


def skip_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: SkipState,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    must_do: Sequence[int] | None = None,
    must_skip: Sequence[int] | None = None,
    key_lengths: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    quantization: str = "none",
    implementation: str | None = None,
) -> Any:
    """Attention that leaves out the tiles which its state says do not matter, and updates the state.

    The method is QK-Skip of LiteAttention (arXiv 2511.11062): a tile whose scores all lie far below the running
    maximum of their rows is skipped from the next call on. At each call the output is exact attention over the keys
    of the tiles that are visited.

    Args:
        q: (batch, seq_q, heads, head_dim), floating; any strides, the last one 1 (others are copied).
        k: (batch, seq_k, kv_heads, head_dim); heads is a multiple of kv_heads.
        v: (batch, seq_k, kv_heads, value_dim).
        state: the memory of this site, updated in place.
        scale: factor of the scores, above 0; None = head_dim ** -0.5.
        return_lse: also return the log-sum-exp of the scores.
        must_do: token ranges [start, end, start, end, ...] on the key axis, rounded outward to tiles that are always
            visited.
        must_skip: token ranges that take no part, exact to the token; wins over must_do.
        key_lengths: int (batch,), 0 to seq_k: keys from this index on take no part. Values are checked on the CPU.
        key_mask: bool (batch or 1, seq_k), True = the key takes part.
        quantization: "none", "int8": scores, and so votes, from INT8 queries and keys, or "int8_fp8": weights and
            values in FP8 besides, see `lite_attention.ops.quantize`. On a GPU the head dims that its table in
            `lite_attention.ops.targets` has; on the CPU, for comparison, all.
        implementation: None = the one for the device; "reference" = the CPU kernel on any device; "portable" = the
            kernel for all GPUs from Ampere on, whose tiles the state must have, also where there is another.

    Returns:
        out (batch, seq_q, heads, value_dim); with `return_lse` also lse float32 (batch, heads, seq_q), natural log.
        A row without any key gives 0 and -inf.

    Raises:
        ValueError: an argument, or the state, does not fit; nothing has been changed then.
        RuntimeError: a gradient is required.
        NotImplementedError: no kernel for this device.
    """
    if not isinstance(state, SkipState):
        raise ValueError(f"state: expected a SkipState, got {type(state).__name__}")
    return _attend(
        IMPLEMENTATIONS, q, k, v, state, scale=scale, return_lse=return_lse, must_do=must_do, must_skip=must_skip,
        key_lengths=key_lengths, key_mask=key_mask, quantization=quantization, implementation=implementation,
    )  # fmt: skip


def residual_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: ResidualState,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    must_do: Sequence[int] | None = None,
    must_skip: Sequence[int] | None = None,
    key_lengths: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    quantization: str = "none",
    implementation: str | None = None,
) -> Any:
    """Attention that computes few tiles in sparse steps, and adds what the others gave in full ones.

    The plan of the state says which steps are full. These choose the tiles with the largest share of softmax, and keep
    the difference that the others make. A sparse step computes the chosen tiles alone and adds that difference,
    extended to its time. See `docs/contract.md`.

    Args:
        q: (batch, seq_q, heads, head_dim), floating; any strides, the last one 1 (others are copied).
        k: (batch, seq_k, kv_heads, head_dim); heads is a multiple of kv_heads.
        v: (batch, seq_k, kv_heads, value_dim).
        state: the memory of this site, updated in place.
        scale: as for `skip_attention`, as are the others.
        return_lse: also return the log-sum-exp of the scores, in a sparse step that which its output stands for.
        must_do: token ranges on the key axis whose tiles are always computed.
        must_skip: token ranges that take no part.
        key_lengths: keys from this index on take no part.
        key_mask: True = the key takes part.
        quantization: what scores are computed from.
        implementation: as for `skip_attention`.

    Returns:
        out (batch, seq_q, heads, value_dim); with `return_lse` also lse float32 (batch, heads, seq_q), natural log.
        A row without any key gives 0 and -inf.

    Raises:
        ValueError: an argument, or the state, does not fit; nothing has been changed then.
        RuntimeError: a gradient is required.
        NotImplementedError: no kernel for this device.
    """
    if not isinstance(state, ResidualState):
        raise ValueError(f"state: expected a ResidualState, got {type(state).__name__}")
    return _attend(
        RESIDUAL_IMPLEMENTATIONS, q, k, v, state, scale=scale, return_lse=return_lse, must_do=must_do,
        must_skip=must_skip, key_lengths=key_lengths, key_mask=key_mask, quantization=quantization,
        implementation=implementation,
    )  # fmt: skip


def _attend(
    implementations: Mapping[str | None, Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: SiteState,
    *,
    scale: float | None,
    return_lse: bool,
    must_do: Sequence[int] | None,
    must_skip: Sequence[int] | None,
    key_lengths: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    quantization: str,
    implementation: str | None,
) -> Any:
    """Call an op with a state; the arguments are those of the functional forms."""
    check_choice("implementation", implementation, implementations)
    if not (is_bshd(q) and is_bshd(k) and is_bshd(v)):
        check_inputs(q, k, v)  # which tells what is wrong
    seq_k = k.shape[1]
    words = None if must_do is None else _cached(_must_do_words, "must_do", must_do, seq_k, state.tile_n, q.device)
    allowed = _joined_key_mask(q, seq_k, key_mask, key_lengths, must_skip)
    compiling = torch.compiler.is_compiling()
    outer = None if compiling else state.claim()
    try:
        out, lse = implementations[implementation](
            q, k, v, *_state_tensors(state), words, allowed, scale=scale, tile_m=state.tile_m, tile_n=state.tile_n,
            quantization=quantization,
        )  # fmt: skip
    finally:
        if not compiling:
            state.release(outer)
    return (out, lse) if return_lse else out
