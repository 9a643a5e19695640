"""Provenance of tensors in a forward that runs eagerly, from which self-attention is told: `Origins`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lite_attention.ops.torch_internals import storage_key, tree_leaves

__all__ = ["Origins"]

_UNKNOWN = 1  # the bit of origins that are not known


class Origins:
    """Which inputs each tensor depends on, as a bit set per storage: a write through a view reaches its base.

    Args:
        model: its parameters and buffers depend on none. Of any other tensor that comes from nowhere, as from compiled
            code, the origins are unknown.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sets: dict[int, int] = {}
        self._count = 1
        self._kept: dict[int, StorageWeakRef] = {}  # so no new tensor takes the place of a freed one
        for storage in self._storages([*model.parameters(), *model.buffers()]):
            self._sets[storage] = 0

    def _storages(self, values: object) -> Iterable[int]:
        for tensor in tree_leaves(values):
            key = storage_key(tensor) if isinstance(tensor, torch.Tensor) else None
            if key is not None:
                if key not in self._kept:
                    self._kept[key] = StorageWeakRef(tensor.untyped_storage())
                yield key

    def _of(self, values: object) -> int:
        found = 0
        for storage in self._storages(values):
            found |= self._sets.get(storage, _UNKNOWN)
        return found

    def are_same(self, query: torch.Tensor, key: torch.Tensor) -> bool | None:
        """Return whether two tensors come from the same inputs, None if that is not known."""
        of_q, of_k = self._of(query), self._of(key)
        only_q, only_k = of_q & ~of_k & ~_UNKNOWN, of_k & ~of_q & ~_UNKNOWN
        if only_q or only_k:  # what one side lacks may be among what is not known of it
            lacking = (0 if only_q else of_q) | (0 if only_k else of_k)
            return None if lacking & _UNKNOWN else False
        return True if of_q & ~_UNKNOWN else None

    def add_new(self, values: object) -> None:
        """Make each tensor an origin of its own."""
        for storage in self._storages(values):
            self._sets[storage] = 1 << self._count
            self._count += 1

    def track(self, arguments: object, result: object, writes_first: bool) -> None:
        """Note that the result, and the first argument if it is written to, depend on the arguments."""
        origins = self._of(arguments)
        for storage in self._storages(result):
            self._sets[storage] = self._sets.get(storage, 0) | origins
        if writes_first:
            first = next(iter(self._storages(arguments)), None)
            if first is not None:
                self._sets[first] = self._sets.get(first, 0) | origins
