"""Options by name: one that there is not is told with the function that has none of it, and what was perhaps meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

__all__ = ["check_names", "takes_options"]

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_names(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Check the names of options.

    Raises:
        TypeError: one that is none of the known; says which are near, and all that there are.
    """
    known = [*known]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
            raise TypeError(f"{function}: there is no option {name!r}{meant} There are {', '.join(known)}")


def takes_options(*passed_on: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator of a function that users give options to: it checks their names.

    Args:
        passed_on: names of options that the function takes by `**`, and hands on.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        named = {name: p for name, p in inspect.signature(function).parameters.items() if p.kind in _NAMED}
        operands = {name for name, p in named.items() if p.kind is not p.KEYWORD_ONLY and p.default is p.empty}
        options = dict.fromkeys(name for name in (*named, *passed_on) if name not in operands)
        called = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            check_names(called, (name for name in kwargs if name not in operands), options)
            return function(*args, **kwargs)

        return checked

    return decorate
