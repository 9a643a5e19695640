"""Swapping attention without compiling: a mode that catches scaled_dot_product_attention while a model runs.

The module that calls attention owns the state, so parameters may be replaced or moved at every call, as offloading
does. Self-attention is told by provenance here too: during the first forward every tensor carries the set of inputs
that went into it, with the output of an attention as an input of its own.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lite_attention.compile.attention_calls import ATTENTION_OPS
from lite_attention.compile.settings import Site, SkipSettings
from lite_attention.compile.sites import choice_reason, log_sites, unsupported_call
from lite_attention.compile.store import SiteRecord, StateStore
from lite_attention.compile.torch_internals import storage_key, uncompiled
from lite_attention.ops import attention, skip_attention

__all__ = ["attach"]

_log = logging.getLogger("lite_attention")


class _Origins:
    """Which inputs each tensor depends on, as a bit set per storage: a write through a view reaches its base."""

    def __init__(self) -> None:
        self._sets: dict[int, int] = {}
        self._count = 0

    @staticmethod
    def _storages(values: object) -> Iterable[int]:
        return (storage_key(t) for t in tree_leaves(values) if isinstance(t, torch.Tensor))

    def of(self, values: object) -> int:
        found = 0
        for storage in self._storages(values):
            found |= self._sets.get(storage, 0)
        return found

    def add_new(self, values: object) -> None:
        """Make each tensor an origin of its own."""
        for storage in self._storages(values):
            self._sets[storage] = 1 << self._count
            self._count += 1

    def track(self, arguments: object, result: object, writes_first: bool) -> None:
        """Note that the result, and the first argument if it is written to, depend on the arguments."""
        origins = self.of(arguments)
        read = set(self._storages(arguments))
        for storage in self._storages(result):
            # A new tensor may sit where a freed one was: what that depended on is history.
            self._sets[storage] = origins | (self._sets.get(storage, 0) if storage in read else 0)
        if writes_first:
            first = next(iter(self._storages(arguments)), None)
            if first is not None:
                self._sets[first] = self._sets.get(first, 0) | origins


class _EagerSwap(TorchFunctionMode):
    """Active while the model runs; knows which module is running."""

    def __init__(self, model: nn.Module, store: StateStore) -> None:
        super().__init__()
        self.store = store
        self.settings: SkipSettings = store.settings
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []  # innermost last; empty while the model does not run
        self._calls: Counter[nn.Module] = Counter()  # of attention, by module, in this forward
        self._records: dict[tuple[int, int], SiteRecord] = {}
        self._left_alone: set[tuple[object, ...]] = set()  # sites with the kinds of call that were
        self._origins: _Origins | None = None
        self._complete = False  # all sites met in the last forward had been decided before

    # ---- running -------------------------------------------------------------------------------------------------

    def run_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its hooks, this mode active; no exception leaves it behind."""
        outer = self._running, self._calls, self._origins
        try:
            self._running, self._calls, self._origins = [self._model], Counter(), None
            if not self._complete:
                self._origins = _Origins()
                self._origins.add_new((args, kwargs))
            self._complete = True
            with self:
                return self._model._call_impl(*args, **kwargs)
        finally:
            self._running, self._calls, self._origins = outer

    def enter_module(self, module: nn.Module, *_: Any) -> None:
        if self._running:
            self._running.append(module)

    def leave_module(self, module: nn.Module, *_: Any) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()

    # ---- calls ---------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_sdpa = func is scaled_dot_product_attention
        result = self._attend(*args, **kwargs) if is_sdpa else func(*args, **kwargs)
        if self._origins is None:
            pass
        elif is_sdpa or func in ATTENTION_OPS:
            self._origins.add_new(result)
        else:
            name = getattr(func, "__name__", "")
            writes_first = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
            writes_first = writes_first or name.startswith("__i")
            self._origins.track((args, kwargs), result, writes_first)
        return result

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        tensors = (query, key, value)
        call = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        module = self._running[-1]
        ordinal = self._calls[module]
        self._calls[module] += 1
        record = self._records.get((id(module), ordinal))
        kind = None
        if record is None or not record.site.swapped:
            kind = (id(module), ordinal, *self._kind(tensors, attn_mask))
        if kind is not None and kind not in self._left_alone:
            self._complete = False
            if self._origins is not None:
                site = self._decide(module, ordinal, tensors, attn_mask, call)
                record = self.store.record([module], (ordinal,), site)
                self._records[(id(module), ordinal)] = record
                if not site.swapped:
                    self._left_alone.add(kind)
        way = self._way(tensors, attn_mask, call, record)
        if record is None or way == "sdpa":
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        q, k, v = (t.to(_dtype_of(t)).transpose(1, 2) for t in tensors)
        key_mask = None if attn_mask is None else attn_mask[:, 0, 0]
        if way == "dense":
            out = attention(q, k, v, scale=scale, key_mask=key_mask)
        else:
            record.last = state = self.store.state(record, (q.shape[0], q.shape[1], k.shape[1]), q.device)
            out = skip_attention(
                q, k, v, state, scale=scale, key_mask=key_mask, quantization=self.settings.quantization,
                implementation=self.settings.implementation,
            )  # fmt: skip
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    @staticmethod
    def _kind(tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> tuple[object, ...]:
        """Return what the decision about a call depends on; a site left alone once may be swapped at another size."""
        of_tensors = [(t.shape, _dtype_of(t), t.device) for t in tensors]
        of_mask = None if mask is None else (mask.shape, mask.dtype)
        return (*of_tensors, of_mask, torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def _site(self, module: nn.Module, ordinal: int, tensors: tuple[torch.Tensor, ...]) -> Site:
        q, k, v = (tuple(t.transpose(1, 2).shape) if t.dim() == 4 else tuple(t.shape) for t in tensors)
        name, like = self._names[id(module)], tensors[0]
        return Site(name, type(module).__name__, ordinal, q, k, v, _dtype_of(like), like.device)

    def _decide(
        self,
        module: nn.Module,
        ordinal: int,
        tensors: tuple[torch.Tensor, ...],
        mask: torch.Tensor | None,
        call: dict[str, Any],
    ) -> Site:
        site = self._site(module, ordinal, tensors)
        site.reason = unsupported_call(site, tensors, mask, **call)
        if site.reason is None and self._origins is not None:
            site.fits_dense_kernel = self.settings.fits_dense_kernel(site)
            of_q, of_k = self._origins.of(tensors[0]), self._origins.of(tensors[1])
            site.is_self_attention = of_q == of_k if of_q or of_k else None
            site.reason = self.settings.unsupported_reason(site) or choice_reason(site, self.settings)
        log_sites([site], "eager")
        return site

    def _way(
        self,
        tensors: tuple[torch.Tensor, ...],
        mask: torch.Tensor | None,
        call: dict[str, Any],
        record: SiteRecord | None,
    ) -> str:
        """Return what runs a call: "skip", "dense" or "sdpa"; this one may be unlike the first that was decided."""
        if record is None or not (record.site.swapped or self.settings.dense == "kernel"):
            return "sdpa"
        now = self._site(self._running[-1], record.site.ordinal, tensors)
        if unsupported_call(now, tensors, mask, **call) is not None:
            return "sdpa"
        if record.site.swapped and self.settings.unsupported_reason(now) is None:
            return "skip"
        return "dense" if self.settings.fits_dense_kernel(now) else "sdpa"


def _dtype_of(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype that scaled_dot_product_attention would compute in: autocast, if on, casts what it is given."""
    kind = tensor.device.type
    casts = tensor.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else tensor.dtype


def attach(model: nn.Module, store: StateStore) -> Callable[[], None]:
    """Swap the attention of a model whenever it runs, and return a function that undoes it.

    Args:
        model: any module; calls of its submodules from elsewhere are left alone.
        store: where the states go.
    """
    mode = _EagerSwap(model, store)
    handles = []
    for module in model.modules():
        if module is not model and any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(mode.enter_module))
            handles.append(module.register_forward_hook(mode.leave_module, always_call=True))
    # Not hooks of the model, which a KeyboardInterrupt goes past. A torch.compile around it has to leave it as it is.
    model._compiled_call_impl = uncompiled(mode.run_model)

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach
