"""Ulysses: heads are exchanged for tokens, so that a rank attends over all tokens for some of the heads.

What it learns is that of one process, bit for bit, for its heads: no rank has to agree with another. Where there are
more ranks than heads allow, such groups of ranks gather keys, see `key_gather`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lite_attention.ops.arguments import require
from lite_attention.ops.methods import METHODS
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.torch_internals import is_fake
from lite_attention.parallel.balance import expanded
from lite_attention.parallel.exchange import (
    Tokens,
    begin_gather,
    begin_scatter,
    end_gather,
    end_scatter,
    gather_lse,
    tokens_of,
)
from lite_attention.parallel.group import ALONE, Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Attend", "exchanged_attention", "ulysses_attention"]

Attend = Callable[..., Any]  # q, k, v of some heads and return_lse= -> out, or out and lse


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: SiteState | Sequence[SiteState],
    group: ProcessGroup | Group | None = None,
    *,
    key_group: ProcessGroup | Group | None = None,
    seq_len: int | None = None,
    order: torch.Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Attend with the tokens of this rank to those of all; a collective.

    Rank r has the r-th part of the tokens, as `torch.tensor_split` cuts them, and between the exchanges the r-th part
    of the heads. With `key_group` alone nothing is exchanged, and keys are gathered. With both, ranks with neighboring
    tokens exchange heads, and those with the same heads gather keys: rank r of `group` in place p of `key_group` has
    part p * ranks of group + r.

    Args:
        q: (batch, tokens here, heads, head_dim); as the others, any strides, the last one 1.
        k: (batch, tokens here, kv_heads, head_dim); kv_heads is a multiple of the ranks of `group`.
        v: (batch, tokens here, kv_heads, value_dim).
        state: of (batch, tokens of all in `group`, tokens of all, heads of this rank): a `SkipState` or a
            `ResidualState`. Several: the heads of a rank are computed in as many parts, and the exchange of one part
            runs beside attention of another.
        group: the ranks that exchange heads for tokens.
        key_group: the ranks that gather keys.
        seq_len: tokens of all ranks; None = as many on each as here.
        order: int64 (heads,) on the device: heads of rank 0, of rank 1, ...; those that share keys stay side by side.
            None = as they come. It may change only where the states start fresh.
        return_lse: also return the log-sum-exp of the scores.
        options: of `skip_attention`, of all tokens: masks, ranges and lengths are of the whole sequence.

    Returns:
        out (batch, tokens here, heads, value_dim); with `return_lse` also lse float32 (batch, heads, tokens here).

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: a gradient is required, or a rank did not answer within the timeout of its group.
    """
    states = [state] if isinstance(state, SiteState) else [*state] if isinstance(state, Sequence) else []
    methods = [m for m in METHODS.values() if states and all(isinstance(s, m.state) for s in states)]
    require(len(methods) == 1, "state", "a SkipState, a ResidualState or some of one kind", _kinds(state))
    require(
        len(states) == 1 or group is not None, "state", "one where no heads are exchanged", f"{len(states)} of them"
    )
    heads, keys = (
        ALONE if given is None else Group.of(given, name)
        for name, given in (("group", group), ("key_group", key_group))
    )
    tokens = tokens_of(q, k, v, heads, keys, seq_len, len(states))
    if order is not None and not torch.compiler.is_compiling():
        _check_order(order, q, q.shape[2] // k.shape[2])
    if tokens.keys is not None:
        for each in states:
            tokens.keys.place(each)
    attends = [partial(methods[0].attend, state=s, **options) for s in states]
    failures: dict[int, Exception] = {}
    result = exchanged_attention(attends, q, k, v, tokens, order, return_lse, failures)
    for error in failures.values():
        raise error
    return result


def _kinds(state: object) -> str:
    if not isinstance(state, Sequence) or isinstance(state, str):
        return type(state).__name__
    return ", ".join(type(each).__name__ for each in state) or "none"


def _check_order(order: torch.Tensor, q: torch.Tensor, shared: int) -> None:
    """Check that an order is one of all heads, of which so many share keys; values where that waits for nothing.

    Raises:
        ValueError: it is not.
    """
    heads = q.shape[2]
    expected = f"int64 ({heads},) on {q.device}"
    require(isinstance(order, torch.Tensor), "order", expected, type(order).__name__)
    found = (order.dtype, tuple(order.shape), order.device)
    require(found == (torch.int64, (heads,), q.device), "order", expected, "{} {} on {}".format(*found))
    if order.device.type == "cpu" and not is_fake(order):
        each = torch.equal(order.sort().values, torch.arange(heads))
        side_by_side = each and torch.equal(expanded(order[::shared] // shared, shared), order)
        named = "each head once" if shared == 1 else f"each head once, those side by side that share keys, {shared}"
        require(side_by_side, "order", named, order.tolist())


def exchanged_attention(
    attends: Sequence[Attend],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: Tokens,
    order: torch.Tensor | None,
    return_lse: bool,
    failures: dict[int, Exception],
) -> Any:
    """Exchange, attend, exchange; each of `attends` gets its part of the heads of this rank.

    What one of them raises is put into the failures, to be raised after the exchange, which the other ranks are in:
    they get NaN of these heads.
    """
    if tokens.group.ranks == 1 and len(attends) == 1:
        return attends[0](*_with_all_keys((q, k, v), tokens), return_lse=return_lse)
    shapes = [shape[2:] for shape in tokens.shapes((q, k, v), len(attends))]
    coming = [begin_scatter(q, k, v, tokens, order, len(attends), part) for part in range(len(attends))]
    going, lse = [], []
    for part, (attend, begun) in enumerate(zip(attends, coming, strict=True)):
        out, of_part = _attended(attend, _with_all_keys(end_scatter(begun, shapes), tokens), part, failures)
        going.append(begin_gather(out, tokens))
        lse.append(of_part)
    whole = end_gather(going, tokens, order)
    return (whole, gather_lse(lse, tokens, order)) if return_lse else whole


def _attended(
    attend: Attend, qkv: Sequence[torch.Tensor], part: int, failures: dict[int, Exception]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse of a part; NaN where it fails, which is put into the failures."""
    if torch.compiler.is_compiling():
        return attend(*qkv, return_lse=True)  # type: ignore[no-any-return]
    try:
        return attend(*qkv, return_lse=True)  # type: ignore[no-any-return]
    except Exception as error:
        failures[part] = error
        q, _, v = qkv
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), torch.nan, dtype=torch.float32)
        return q.new_full((*q.shape[:3], v.shape[3]), torch.nan), lse


def _with_all_keys(qkv: Sequence[torch.Tensor], tokens: Tokens) -> Sequence[torch.Tensor]:
    return qkv if tokens.keys is None else (qkv[0], *tokens.keys.gathered(*qkv[1:]))
