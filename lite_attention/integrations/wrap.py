"""`wrap_once`: a function around a method of a host."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["wrap_once"]


def wrap_once(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Put a function around a method, once: it is called with the method and the arguments."""
    method = vars(owner)[name]
    if getattr(method, "_lite_attention", False):
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    wrapped._lite_attention = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
