"""What ranks compare before a call of a new size is exchanged, so that what one of them refuses, all refuse.

By collectives of a few numbers, which wait for the device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from lite_attention.parallel.exchange import Tokens, tokens_of
from lite_attention.parallel.group import Group

__all__ = ["agreed_tokens", "done_by_all"]

_Result = TypeVar("_Result")


def agreed_tokens(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Group, key_group: Group, seq_len: int | None,
    parts: int, others: Mapping[str, object], device: torch.device,
) -> Tokens:  # fmt: skip
    """Return what `tokens_of` does, where the call is the same on all ranks.

    Args:
        q: of the tokens here, as are the others.
        k: keys.
        v: values.
        group: the ranks that exchange heads.
        key_group: the ranks whose keys are gathered.
        seq_len: tokens of all ranks; None = as many on each as here.
        parts: the heads of a rank are computed in so many.
        others: what else must be the same, by name.
        device: where ranks compare.

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
    named = {} if tokens is None else {**_of_call(q, k, v, tokens), "parts": parts, **others}
    for each in _shared(group, key_group):
        own = [_number(value) for value in named.values()] or [0] * (_OF_CALL + 1 + len(others))
        rows = each.numbers([0] * len(own) if refusal else own, device)
        refusal = refusal or _disagreement(named, rows)
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


def _disagreement(named: Mapping[str, object], rows: list[list[int]]) -> ValueError | None:
    """Return what is wrong with the numbers of all ranks; zeros are of one that refuses."""
    refused = [rank for rank, row in enumerate(rows) if not any(row)]
    if refused:
        return ValueError(f"q, k, v: expected calls that all ranks accept, got one that rank {refused[0]} refuses")
    for (name, own), *values in zip(named.items(), *rows, strict=True):
        if len(set(values)) > 1:
            got = values if isinstance(own, int) else f"{own} here, which is not what all have"
            expected = "the same on all ranks" + (", or seq_len= of all of them" if name == "seq_len" else "")
            return ValueError(f"{name}: expected {expected}, got {got}")
    return None


_OF_CALL = 7


def _of_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens) -> dict[str, object]:
    """Return what of a call must be the same on all ranks, by what it is called."""
    batch, _, heads, head_dim = q.shape
    return {
        "seq_len": tokens.whole, "batch of q": batch, "heads of q": heads, "heads of k": k.shape[2],
        "head_dim of q": head_dim, "head_dim of v": v.shape[3], "dtype of q": q.dtype,
    }  # fmt: skip


def _number(value: object) -> int:
    return value if isinstance(value, int) else zlib.crc32(repr(value).encode())
