"""What ranks that share a model tell each other on the host: that all went well, or what went wrong on one.

By the store of the process group, which needs no device, and no rank that listens while another speaks. So a rank that
fails tells why even where the others wait for it in an exchange, until that gives up. A rank that has said the next has
heard what was said before: so when all have, each takes its own off the store.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from lite_attention.model_sites import models_of, sites_of, stores_of
from lite_attention.ops.arguments import require
from lite_attention.ops.shard import WHOLE, Ranks, Shard
from lite_attention.ops.torch_internals import default_store
from lite_attention.parallel.shard import shard_of

__all__ = ["check_groups", "first_writes", "shard_of_all", "texts_of_all", "told_of_errors"]

_count: Counter[tuple[str, int]] = Counter()  # of what was agreed upon, by group and rank
_there: defaultdict[tuple[str, int], set[int]] = defaultdict(set)  # numbers of what this rank has in the store


def shard_of_all(model_or_pipe: Any) -> Shard:
    """Return the part of a model or pipeline that is here; its transformers are shared by the same ranks, if at all."""
    shards: list[Shard] = []
    for model in models_of(model_or_pipe).values():
        shards += [store.shard for store in stores_of(model)] or [shard_of(model)()]
    shards += [site.shard for site in sites_of(model_or_pipe)]
    return next((shard for shard in shards if shard != WHOLE), WHOLE)


def check_groups(shard: Shard) -> None:
    """Raise ValueError where ranks share a model, and it is not known by which group they reach each other."""
    for (_, ranks), name in _places(shard):
        require(ranks == 1 or bool(name), "model_or_pipe", "ranks of a process group that it knows", "ranks of none")


def _places(shard: Shard) -> list[tuple[Ranks, str]]:
    return list(zip((shard.head_ranks, shard.query_ranks), shard.groups, strict=True))


def _shared(shard: Shard) -> list[tuple[Ranks, str]]:
    return [(place, name) for place, name in _places(shard) if place.ranks > 1 and name]


def texts_of_all(shard: Shard, text: str) -> list[str]:
    """Return what each rank that shares the model says, that of the first rank first; a collective on the host.

    Raises:
        RuntimeError: a rank does not say anything within the timeout of the process group.
    """
    texts = [text]
    for place, name in _shared(shard):
        number = _next(place, name)
        _say(place, name, number, "\0".join(texts))
        texts = [of_rank for rank in range(place.ranks) for of_rank in _heard(name, number, rank).split("\0")]
        _take_off(place, name, number)
    return texts


@contextlib.contextmanager
def told_of_errors(shard: Shard) -> Iterator[None]:
    """Let all ranks do something together: where one fails, all do, and are told what happened there.

    Raises:
        RuntimeError: another rank failed, or has not finished within the timeout of the process group.
    """
    shared = _shared(shard)
    numbers = [_next(place, name) for place, name in shared]
    try:
        yield
    except Exception as error:
        told = _first_error(shared, numbers, wait=False)
        _say_all(shared, numbers, told or f"{_named(shard)}: {type(error).__name__}: {error}")
        if told is None:
            raise
        raise RuntimeError(told) from error
    told = None
    for at, number in zip(shared, numbers, strict=True):
        _say(*at, number, told or "")
        told = told or _first_error([at], [number], wait=True)
        if told is None:  # all were heard
            _take_off(*at, number)
    if told is not None:
        _say_all(shared, numbers, told)
        raise RuntimeError(told)


def first_writes(shard: Shard, write: Callable[[], object]) -> None:
    """Let the first of the ranks write, and the others wait until it has; all fail where it does."""
    with told_of_errors(shard):
        if shard.place.rank == 0:
            write()


def _named(shard: Shard) -> str:
    rank, ranks = shard.place
    return f"rank {rank} of {ranks}"


def _next(place: Ranks, name: str) -> int:
    _count[name, place.rank] += 1
    return _count[name, place.rank]


def _key(name: str, number: int, rank: int) -> str:
    return f"lite_attention/{name}/{number}/{rank}"


def _say(place: Ranks, name: str, number: int, text: str) -> None:
    default_store().set(_key(name, number, place.rank), text)
    _there[name, place.rank].add(number)


def _take_off(place: Ranks, name: str, number: int) -> None:
    """Remove what this rank said before a number that all have said."""
    there = _there[name, place.rank]
    for before in [earlier for earlier in there if earlier < number]:
        default_store().delete_key(_key(name, before, place.rank))
        there.remove(before)


def _say_all(shared: list[tuple[Ranks, str]], numbers: list[int], text: str) -> None:
    for at, number in zip(shared, numbers, strict=True):
        _say(*at, number, text)


def _heard(name: str, number: int, rank: int) -> str:
    store = default_store()
    try:
        store.wait([_key(name, number, rank)])
    except RuntimeError as error:
        raise RuntimeError(
            f"lite_attention: expected all ranks to get here within the timeout of the process group, {store.timeout}; "
            f"rank {rank} of group {name} did not"
        ) from error
    text: bytes = store.get(_key(name, number, rank))
    return text.decode()


def _first_error(shared: list[tuple[Ranks, str]], numbers: list[int], wait: bool) -> str | None:
    for (place, name), number in zip(shared, numbers, strict=True):
        for rank in range(place.ranks):
            is_said = rank != place.rank and (wait or default_store().check([_key(name, number, rank)]))
            said = _heard(name, number, rank) if is_said else ""
            if said:
                return said
    return None
