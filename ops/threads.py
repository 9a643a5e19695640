"""`PerThread`: what each thread has of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["PerThread"]

_T = TypeVar("_T")


class PerThread(Generic[_T]):
    """A value for each thread that asks, made at its first call and dropped when the thread ends."""

    def __init__(self, make: Callable[[], _T]) -> None:
        self._make = make
        self._local = threading.local()

    def __call__(self) -> _T:
        """Return the value of this thread."""
        try:
            return self._local.value  # type: ignore[no-any-return]
        except AttributeError:
            self._local.value = self._make()
            return self._local.value  # type: ignore[no-any-return]

    def set(self, value: _T) -> None:
        """Give this thread another value."""
        self._local.value = value
