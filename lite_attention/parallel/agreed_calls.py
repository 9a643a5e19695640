"""What ranks compare before a call of a new size is exchanged, so that what one of them refuses, all refuse.

By collectives of a few numbers, which wait for the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lite_attention.parallel.exchange import Tokens, tokens_of
from lite_attention.parallel.group import Group

__all__ = ["agreed_tokens", "done_by_all"]

_Result = TypeVar("_Result")

_NUMBERS = 8  # of a call that are compared


def agreed_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, key_group: Group, seq_len: int | None,
    parts: int,
) -> Tokens:  # fmt: skip
    """Return what `tokens_of` does, where the call is the same on all ranks.

    Raises:
        ValueError: it is not, or does not fit, here or on another rank.
    """
    tokens: Tokens | None = None
    refusal: ValueError | None = None
    try:
        for name, of_call in (("process_group", group), ("key_group", key_group)):
            of_call.is_there(name)
        tokens = tokens_of(q, k, v, group, key_group, seq_len, parts)
    except ValueError as error:
        refusal = error
    named = {} if tokens is None else _numbers(q, k, v, tokens)
    for each in _shared(group, key_group):
        rows = each.numbers([0] * _NUMBERS if refusal else [*named.values()], q.device)
        refusal = refusal or _disagreement([*named], rows)
    if refusal is not None or tokens is None:
        raise refusal or AssertionError
    return tokens


def done_by_all(make: Callable[[], _Result], groups: Sequence[Group], device: torch.device) -> _Result:
    """Return what a rank makes, if all can.

    Raises:
        RuntimeError: another rank failed; what fails here is raised as it is.
    """
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:
        failure = error
    for each in _shared(*groups):
        failed = [rank for rank, (is_failed,) in enumerate(each.numbers([failure is not None], device)) if is_failed]
        if failed and failure is None:
            failure = RuntimeError(
                f"process_group: expected room for what is learned on all ranks, got none on rank {failed[0]}, which "
                "says why; none of them goes on"
            )
    if failure is not None:
        raise failure
    return made


def _shared(*groups: Group) -> list[Group]:
    return [group for group in groups if group.ranks > 1]


def _disagreement(names: list[str], rows: list[list[int]]) -> ValueError | None:
    """Return what is wrong with the numbers of all ranks; zeros are of one that refuses."""
    refused = [rank for rank, row in enumerate(rows) if not any(row)]
    if refused:
        return ValueError(f"q, k, v: expected calls that all ranks accept, got one that rank {refused[0]} refuses")
    for name, *values in zip(names, *rows, strict=True):
        if len(set(values)) > 1:
            return ValueError(f"{name}: expected the same on all ranks, or seq_len= of all of them, got {values}")
    return None


def _numbers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens) -> dict[str, int]:
    """Return what must be the same on all ranks, by what it is called."""
    batch, _, heads, head_dim = q.shape
    return {
        "seq_len": tokens.whole, "batch of q": batch, "heads of q": heads, "heads of k": k.shape[2],
        "head_dim of q": head_dim, "head_dim of v": v.shape[3], "dtype of q": zlib.crc32(str(q.dtype).encode()),
        "dim": q.dim(),
    }  # fmt: skip
