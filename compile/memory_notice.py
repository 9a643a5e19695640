"""Saying how much memory residuals will take, before it is taken."""

from __future__ import annotations

import logging

from torch import nn

from lite_attention.ops.buffers import readable

__all__ = ["MemoryNotice"]

_log = logging.getLogger("lite_attention")


class MemoryNotice:
    """Logs each state of a store, and, before the first of a kind, what all of that kind will take."""

    def __init__(self) -> None:
        self.nbytes = 0  # of all states so far; some may be gone
        self._kinds: set[tuple[str, int]] = set()

    def announce(self, name: str, nbytes: int, where: str, model: nn.Module | None) -> None:
        """Say that the state of a site is about to be allocated.

        Args:
            name: path of the site in the model.
            nbytes: of its state.
            where: "device" or "host".
            model: whose modules with the same path, but for numbers, will have states too; None = not known.
        """
        kind = _without_numbers(name)
        if (kind, nbytes) not in self._kinds:
            self._kinds.add((kind, nbytes))
            paths = [] if model is None else [path for path, _ in model.named_modules()]
            sites = sum(_without_numbers(path) == kind for path in paths) or 1
            _log.warning(
                "residuals: %s for %d site(s) like %s, %s each, on the %s, for each thread; forecast=False, fewer "
                "slots and memory='host' take less of the device", readable(nbytes * sites), sites, kind or "this one",
                readable(nbytes), where,
            )  # fmt: skip
        self.nbytes += nbytes
        _log.info("residual of %s: %s, %s in all so far", name or "a site", readable(nbytes), readable(self.nbytes))


def _without_numbers(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))
