"""Swapping attention without compiling: a mode that catches scaled_dot_product_attention while a model runs.

The module that calls attention owns the state, so parameters may be replaced or moved at every call, as offloading
does. Self-attention is told by provenance here too: during the first forward every tensor carries the set of inputs
that went into it, with the output of an attention as an input of its own.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lite_attention.compile.attention_calls import ATTENTION_OPS, SDPA
from lite_attention.compile.multihead import attend_in_parts, reason_against
from lite_attention.compile.other_attention import (
    attention_modules,
    on_other_backends,
    reason_of_op,
    site_of_op,
)
from lite_attention.compile.runner import NOT_PICKLED
from lite_attention.compile.settings import SkipSettings
from lite_attention.compile.sites import choice_reason, log_sites, unsupported_call
from lite_attention.compile.store import SiteRecord, StateStore
from lite_attention.ops import attention, skip_attention
from lite_attention.ops.site import Site
from lite_attention.ops.threads import PerThread
from lite_attention.ops.torch_internals import is_op, op_name, plain_call, storage_key, tree_leaves, without_modes

__all__ = ["attach"]

_log = logging.getLogger("lite_attention")


class _Origins:
    """Which inputs each tensor depends on, as a bit set per storage: a write through a view reaches its base."""

    def __init__(self) -> None:
        self._sets: dict[int, int] = {}
        self._count = 0

    @staticmethod
    def _storages(values: object) -> Iterable[int]:
        for tensor in tree_leaves(values):
            key = storage_key(tensor) if isinstance(tensor, torch.Tensor) else None
            if key is not None:
                yield key

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


@dataclass
class _Run:
    """What one thread is at in a forward of the model."""

    running: list[nn.Module] = field(default_factory=list)  # modules, innermost last; none outside of the model
    calls: Counter[nn.Module] = field(default_factory=Counter)  # of attention, by module
    ops: Counter[nn.Module] = field(default_factory=Counter)  # that hold attention, likewise
    apart: dict[nn.Module, Any] = field(default_factory=dict)  # modules that run without this mode
    origins: _Origins | None = None  # kept while sites are to be decided


class _EagerSwap(TorchFunctionMode):
    """Active while the model runs; knows which module is running."""

    def __init__(self, model: nn.Module, store: StateStore) -> None:
        super().__init__()
        self.store = store
        self.settings: SkipSettings = store.settings
        self._model = model
        self._attention = attention_modules(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._runs = PerThread(lambda: [_Run()])  # the innermost last: a model may run within itself
        self._records: dict[tuple[int, int], SiteRecord] = {}
        self._left_alone: dict[tuple[object, ...], str] = {}  # kinds of call that were, by site, and why
        self._complete = False  # all sites met in the last forward had been decided before

    # ---- running -------------------------------------------------------------------------------------------------

    @property
    def _run(self) -> _Run:
        return self._runs()[-1]

    def run_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its hooks, this mode active; no exception leaves it behind."""
        run = _Run([self._model], apart=dict.fromkeys(module for _, module, _ in on_other_backends(self._attention)))
        if not self._complete:
            run.origins = _Origins()
            run.origins.add_new((args, kwargs))
        self._complete = True
        self._runs().append(run)
        try:
            with self:
                return plain_call(self._model)(*args, **kwargs)
        finally:
            self._runs().pop()

    def enter_module(self, module: nn.Module, _: object) -> None:
        if self._run.running:
            self._run.running.append(module)
            if module in self._run.apart:  # FlexAttention compiles itself, and would compile this mode too
                self._run.apart[module] = without_modes()
                self._run.apart[module].__enter__()

    def leave_module(self, module: nn.Module, _: object, output: object) -> None:
        if self._run.running and self._run.running[-1] is module:
            self._run.running.pop()
            if module in self._run.apart:
                self._run.apart[module].__exit__(None, None, None)
                if self._run.origins is not None:
                    self._run.origins.add_new(output)

    # ---- calls ---------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_multihead = func is multi_head_attention_forward
        if is_multihead and reason_against(args, kwargs) is None:
            with self:
                return attend_in_parts(args, kwargs)
        is_sdpa = func in SDPA
        name = op_name(func) if is_op(func) else getattr(func, "__name__", "")
        reason = None if is_sdpa else reason_against(args, kwargs) if is_multihead else reason_of_op(name)
        if reason is not None:
            self._note_op(reason, args, kwargs)
        result = self._attend(*args, **kwargs) if is_sdpa else func(*args, **kwargs)
        origins = self._run.origins
        if origins is None:
            pass
        elif is_sdpa or func in ATTENTION_OPS:
            origins.add_new(result)
        else:
            name = getattr(func, "__name__", "")
            writes_first = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
            writes_first = writes_first or name.startswith("__i")
            origins.track((args, kwargs), result, writes_first)
        return result

    def _note_op(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note attention within an op, which runs as it is."""
        module = self._run.running[-1]
        ordinal = self._run.ops[module]
        self._run.ops[module] += 1
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        caller = self._names.get(id(module), ""), type(module).__name__
        site = site_of_op(caller, ordinal, tensors, reason)
        self.store.note(self.store.record([module], ("op", ordinal), site), None, reason)

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
        call = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        run = self._run
        module = run.running[-1]
        ordinal = run.calls[module]
        run.calls[module] += 1
        record = self._records.get((id(module), ordinal))
        if record is None or not record.site.swapped:
            record = self._look_again(record, module, ordinal, tensors, attn_mask, call)
        way, reason = self._way(tensors, attn_mask, call, record)
        if record is not None and way != "skip":
            self.store.note(record, None, reason)
        if record is None or way == "sdpa":
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        q, k, v = (t.to(_dtype_of(t)).transpose(1, 2) for t in tensors)
        key_mask = None if attn_mask is None else attn_mask[:, 0, 0]
        if way == "dense":
            out = attention(q, k, v, scale=scale, key_mask=key_mask)
        else:
            state = self.store.state(record, (q.shape[0], q.shape[1], k.shape[1]), q.device)
            self.store.note(record, state)
            out = skip_attention(
                q, k, v, state, scale=scale, key_mask=key_mask, quantization=self.settings.quantization,
                implementation=self.settings.implementation,
            )  # fmt: skip
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    def _look_again(
        self,
        record: SiteRecord | None,
        module: nn.Module,
        ordinal: int,
        tensors: tuple[torch.Tensor, ...],
        mask: torch.Tensor | None,
        call: dict[str, Any],
    ) -> SiteRecord | None:
        """Decide about a call of a kind not met before: a site left alone once may be swapped at another size."""
        kind = (id(module), ordinal, *self._kind(tensors, mask))
        if kind in self._left_alone:
            return record
        self._complete = False
        if self._run.origins is None:  # the next forward keeps them
            return record
        site = self._decide(module, ordinal, tensors, mask, call)
        record = self._records[(id(module), ordinal)] = self.store.record([module], (ordinal,), site)
        if site.reason is not None:
            self._left_alone[kind] = site.reason
        return record

    @staticmethod
    def _kind(tensors: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> tuple[object, ...]:
        """Return what the decision about a call depends on; a site left alone once may be swapped at another size."""
        of_tensors = [(t.shape, _dtype_of(t), t.device) for t in tensors]
        of_mask = None if mask is None else (mask.shape, mask.dtype)
        return (*of_tensors, of_mask, torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

    def _site(self, module: nn.Module, ordinal: int, tensors: tuple[torch.Tensor, ...]) -> Site:
        q, k, v = (tuple(t.transpose(1, 2).shape) if t.dim() == 4 else tuple(t.shape) for t in tensors)
        name, like = self._names.get(id(module), ""), tensors[0]
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
        origins = self._run.origins
        if site.reason is None and origins is not None:
            site.fits_dense_kernel = self.settings.fits_dense_kernel(site)
            of_q, of_k = origins.of(tensors[0]), origins.of(tensors[1])
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
    ) -> tuple[str, str | None]:
        """Return what runs a call, "skip", "dense" or "sdpa", and why it does not skip; it may be unlike the first."""
        if record is None:
            return "sdpa", None
        swapped = record.site.swapped
        if not swapped and self.settings.dense != "kernel":
            return "sdpa", record.site.reason
        now = self._site(self._run.running[-1], record.site.ordinal, tensors)
        reason = unsupported_call(now, tensors, mask, **call)
        if reason is not None:
            return "sdpa", reason
        reason = self.settings.unsupported_reason(now) if swapped else record.site.reason
        if swapped and reason is None:
            return "skip", None
        return "dense" if self.settings.fits_dense_kernel(now) else "sdpa", reason


def _dtype_of(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype that scaled_dot_product_attention would compute in: autocast, if on, casts what it is given."""
    kind = tensor.device.type
    casts = tensor.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else tensor.dtype


class _Hook:
    """Tells the mode that a module begins or ends. A copy of the module is not enabled, and tells nobody."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell

    def __call__(self, module: nn.Module, *seen: Any) -> None:
        self._tell(module, *seen)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _tell_nobody

    def __reduce__(self) -> Any:
        raise ValueError(NOT_PICKLED)


def _tell_nobody(*_: Any) -> None:
    pass


def attach(model: nn.Module, store: StateStore) -> tuple[Callable[..., Any], Callable[[], None]]:
    """Return what runs a model with its attention swapped, and a function that undoes what that needs.

    Args:
        model: any module; calls of its submodules from elsewhere are left alone.
        store: where the states go.
    """
    mode = _EagerSwap(model, store)
    handles = []
    for module in model.modules():
        if module is not model and any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(_Hook(mode.enter_module)))
            handles.append(module.register_forward_hook(_Hook(mode.leave_module), always_call=True))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return mode.run_model, detach
