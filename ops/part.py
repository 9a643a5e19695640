"""`Part`: which heads and queries of a site a state is of, where several processes share the site."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

__all__ = ["FIRST_HEAD", "Part", "said_of"]

FIRST_HEAD = 3  # of the words of a part, where its heads begin


class Part(NamedTuple):
    """Some heads and some queries, of those of the whole model."""

    heads: tuple[int, ...]  # in the order of the state
    all_heads: int
    query_start: int  # the first of the queries
    queries: int
    all_queries: int

    @classmethod
    def of_words(cls, words: torch.Tensor, queries: int) -> Part:
        """Return what `words` gave, of a state of so many queries. Waits for the device."""
        all_heads, query_start, all_queries, *heads = words.tolist()
        return cls(tuple(heads), all_heads, query_start, queries, all_queries)

    def words(self) -> torch.Tensor:
        """Return it as the buffer of a state, without the queries, int64."""
        return torch.tensor([self.all_heads, self.query_start, self.all_queries, *self.heads], device="cpu")

    @property
    def rows(self) -> range:
        """The queries."""
        return range(self.query_start, self.query_start + self.queries)

    @property
    def has_all_queries(self) -> bool:
        """Whether heads alone are shared."""
        return self.queries == self.all_queries

    def __str__(self) -> str:
        return said_of([self]) or "all heads and queries"


def said_of(parts: Iterable[Part]) -> str:
    """Return which heads and queries some parts of one site have together, as text; "" if all of them."""
    parts = list(parts)
    heads = [range(head, head + 1) for part in parts for head in part.heads]
    said = [
        _said("head", "heads", heads, max((part.all_heads for part in parts), default=0)),
        _said("query", "queries", [part.rows for part in parts], max((part.all_queries for part in parts), default=0)),
    ]
    return ", ".join(filter(None, said))


def _said(one: str, many: str, runs: Iterable[range], whole: int) -> str:
    joined = _joined(runs)
    here = sum(map(len, joined))
    return f"{one if here == 1 else many} {', '.join(map(_named, joined))} of {whole}" if here < whole else ""


def _joined(runs: Iterable[range]) -> list[range]:
    """Return runs of numbers in order, without overlaps, as few as can be."""
    found: list[range] = []
    for run in sorted(runs, key=lambda run: run.start):
        if found and run.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, run.stop))
        else:
            found.append(run)
    return found


def _named(run: range) -> str:
    return str(run.start) if len(run) == 1 else f"{run.start} to {run.stop - 1}"
