"""`SiteModule`: what moves, copies and saved files mean for a module with the state of one attention site."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lite_attention.module_options import ModuleOptions
from lite_attention.ops import default_session
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.ops.site_state import SiteState

if TYPE_CHECKING:
    from lite_attention.parallel.module_exchange import ModuleExchange

__all__ = ["SiteModule"]

_Module = TypeVar("_Module", bound="SiteModule")


class SiteModule(nn.Module):
    """Holds a state, and what it is made from. A copy, shallow or deep, has a state of its own."""

    state: SiteState | None
    exchange: ModuleExchange | None  # with other ranks, where there is a process group
    skipping_enabled: bool
    _options: ModuleOptions

    def __init__(self) -> None:
        super().__init__()
        self.register_module("state", None)
        self.register_module("exchange", None)

    def _adopt(self, state: SiteState) -> None:
        state.set_flag(FLAG_DENSE, not self.skipping_enabled)
        default_session.follow(state)  # which may refuse
        self.state = state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        names = [key for key in state_dict if key.startswith(prefix + "state.")]
        if names and self._options.of_state["persistent"]:
            # Taken out, so that the state is not loaded once more, over the flags and the slot that hold here.
            saved = {key.removeprefix(prefix + "state."): state_dict.pop(key) for key in names}
            device = None if self.state is None else self.state.control.device
            self._adopt(self._options.loaded_state(saved, device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self: _Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Module:
        """Move; what goes to the meta device, where nothing is kept, comes back without a state."""
        device = None if self.state is None else self.state.device_after(fn)
        if device is None or device.type == "meta":
            self.state = None
            self.exchange = None if self.exchange is None else self.exchange.anew()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __copy__(self: _Module) -> _Module:
        """Return a module with a state of its own, which has learned the same."""
        twin = self.__new__(type(self))
        modules = {**self._modules, **{name: copy.copy(self._modules[name]) for name in ("state", "exchange")}}
        twin.__setstate__({**self.__dict__, "_modules": modules, "_options": self._options.copy()})
        return twin

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "LiteAttention: nn.DataParallel makes replicas anew for each call, so what they learn is lost: run one "
            "process for each GPU"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Let the state of a copy follow the branches as the original's does."""
        if isinstance(state["_options"], dict):  # pickled by version 0.1, which had votes alone
            state = {**state, "_options": ModuleOptions("votes", None, state["_options"])}
        state["_modules"].setdefault("exchange", None)  # nor process groups
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.state is not None:
            default_session.follow(self.state)
