"""`SiteModule`: a module with the state of one attention site: what it tells of it, and what moves and copies mean."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lite_attention.module_options import ModuleOptions
from lite_attention.ops import default_session
from lite_attention.ops.arguments import check_switch
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.ops.residual_settings import ResidualSettings
from lite_attention.ops.saved_parts import own_part, whole_sizes
from lite_attention.ops.site import Site
from lite_attention.ops.site_state import SiteState

if TYPE_CHECKING:
    from lite_attention.parallel.module_exchange import ModuleExchange

__all__ = ["SiteModule"]

_Module = TypeVar("_Module", bound="SiteModule")


class SiteModule(nn.Module):
    """Holds a state, and what it is made from. A copy, shallow or deep, has a state of its own."""

    state: SiteState | None  # of the first part of the heads, which mostly is all
    more_states: nn.ModuleList | None  # of the others, if there are any
    exchange: ModuleExchange | None  # with other ranks, where there is a process group
    skipping_enabled: bool
    _options: ModuleOptions

    def __init__(self) -> None:
        super().__init__()
        self.register_module("state", None)
        self.register_module("exchange", None)
        self.register_module("more_states", None)
        self._is_told = False  # somebody says where generations begin

    @property
    def states(self) -> list[SiteState]:
        """The states there are: none before the first call, then one for each part of the heads."""
        more: Any = self.more_states or ()
        return [] if self.state is None else [self.state, *more]

    def _adopt(self, states: list[SiteState]) -> None:
        for state in states:
            state.set_flag(FLAG_DENSE, not self.skipping_enabled)
            default_session.follow(state)  # which may refuse
        self.state, self.more_states = states[0], nn.ModuleList(states[1:]) if states[1:] else None

    def reset_skip_state(self) -> None:
        """Forget everything: the next call begins a new generation."""
        self._is_told = True
        for state in self.states:
            state.reset()

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """Turn skipping on or off, on the device; while off, everything is computed and the state stays as it is."""
        check_switch("enable", enable)
        self.skipping_enabled = enable
        for state in self.states:
            state.set_flag(FLAG_DENSE, not enable)

    def site(self, name: str) -> Site:
        """Return what is known of it as a site of that name; sizes are those of the state, 0 before there is one."""
        batch, heads, seq_q, seq_k = (0, 0, 0, 0) if self.state is None else self.state.capacity
        if self.exchange is not None:
            heads, seq_q = heads * self.exchange.group.ranks * self.exchange.parts, seq_k
        tiles = None if self.state is None else (self.state.tile_m, self.state.tile_n)
        device = torch.device("cpu") if self.state is None else self.state.control.device
        q_shape, k_shape = (batch, seq_q, heads, 0), (batch, seq_k, 0, 0)
        kind = type(self).__name__
        return Site(name, kind, 0, q_shape, k_shape, k_shape, torch.get_default_dtype(), device, tile_shape=tiles)

    @property
    def num_steps(self) -> int | None:
        """Denoising steps of a generation, as given."""
        return self._options.num_steps

    @property
    def residual(self) -> ResidualSettings | None:
        """The options of method "residual"; None = the other one."""
        return self._options.residual

    def sparsity(self, per: str | Collection[str] = ()) -> torch.Tensor:
        """Return the share of tiles that the next call skips, see `SiteState.sparsity`; 0 before the first call."""
        if not self.states:
            return torch.zeros(())
        parts = [state.sparsity(per) for state in self.states]  # of as many tiles each
        return torch.cat(parts, -1) if isinstance(per, Collection) and "head" in per else torch.stack(parts).mean(0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        names = [key for key in state_dict if key.startswith(prefix + "state.")]
        if names and self._options.of_state["persistent"]:
            # Taken out, so that the state is not loaded once more, over the flags and the slot that hold here.
            saved = {key.removeprefix(prefix + "state."): state_dict.pop(key) for key in names}
            device = None if self.state is None else self.state.control.device
            exchange = self.exchange
            place = None if exchange is None else exchange.prepare_for(*whole_sizes(saved), device)
            self._adopt([self._options.loaded_state(own_part(saved, place), device)])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self: _Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Module:
        """Move; what goes to the meta device, where nothing is kept, comes back without a state."""
        device = None if self.state is None else self.state.device_after(fn)
        if device is None or device.type == "meta":
            self.state = self.more_states = None
            self.exchange = None if self.exchange is None else self.exchange.anew()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __copy__(self: _Module) -> _Module:
        """Return a module with a state of its own, which has learned the same."""
        twin = self.__new__(type(self))
        modules = {name: copy.deepcopy(module) for name, module in self._modules.items()}  # all are memories
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
        modules = {**state["_modules"]}
        for name in ("exchange", "more_states"):  # it had no process groups either
            modules.setdefault(name, None)
        super().__setstate__({**state, "_modules": modules})  # type: ignore[no-untyped-call]
        for of_part in self.states:
            default_session.follow(of_part)
