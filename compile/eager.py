"""Swapping attention without compiling: a mode that catches scaled_dot_product_attention while a model runs.

The module that calls attention owns the state, so parameters may be replaced or moved at every call, as offloading
does. Self-attention is told by provenance here too: during the first forward every tensor carries the set of inputs
that went into it, with the output of an attention as an input of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lite_attention.compile.attention_calls import ATTENTION_OPS, SDPA
from lite_attention.compile.multihead import attend_in_parts, reason_against
from lite_attention.compile.origins import Origins
from lite_attention.compile.other_attention import reason_of_op, site_of_op
from lite_attention.compile.outer_masks import OuterMasks
from lite_attention.compile.records import SiteRecord
from lite_attention.compile.runner import NOT_PICKLED
from lite_attention.compile.settings import SkipSettings
from lite_attention.compile.sites import choice_reason, log_sites, unsupported_call
from lite_attention.compile.store import StateStore
from lite_attention.ops import attention
from lite_attention.ops.methods import METHODS
from lite_attention.ops.site import Site
from lite_attention.ops.threads import PerThread
from lite_attention.ops.torch_internals import is_op, op_name, plain_call, traced_call, tree_leaves

__all__ = ["attach"]

# Attention that torch.compile may fuse, in a part of the model that it compiled on its own, and why it does not skip.
_COMPILED = {
    "flex_attention": str(reason_of_op("flex_attention")),
    "scaled_dot_product_attention": "torch.compile has compiled it apart from the model",
}


class _Traced:
    """Where compiled code says what attention it ran: dynamo makes the write, which it traces, part of that code."""

    name = ""


_traced = _Traced()


@dataclass
class _Run:
    """What one thread is at in a forward of the model."""

    running: list[nn.Module] = field(default_factory=list)  # modules, innermost last; none outside of the model
    calls: Counter[nn.Module] = field(default_factory=Counter)  # of attention, by module
    ops: Counter[nn.Module] = field(default_factory=Counter)  # that hold attention, likewise
    seen: set[str] = field(default_factory=set)  # kinds of attention that ran since a module began or ended
    origins: Origins | None = None  # kept while sites are to be decided
    masks: OuterMasks = field(default_factory=OuterMasks)


class _EagerSwap(TorchFunctionMode):
    """Active while the model runs; knows which module is running."""

    def __init__(self, model: nn.Module, store: StateStore) -> None:
        super().__init__()
        self.store = store
        self.settings: SkipSettings = store.settings
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._runs = PerThread(lambda: [_Run()])  # the innermost last: a model may run within itself
        self._records: dict[tuple[int, int], SiteRecord] = {}
        self._left_alone: set[tuple[object, ...]] = set()  # kinds of call that were, by site
        self._complete = False  # all calls that forwards meet have been decided
        self._missed = 0  # calls met that could not be, as their forward kept no origins

    # ---- running -------------------------------------------------------------------------------------------------

    @property
    def _run(self) -> _Run:
        return self._runs()[-1]

    def run_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with its hooks, this mode active; no exception leaves it behind."""
        run = _Run([self._model])
        if not self._complete:
            run.origins = Origins(self._model)
            run.origins.add_new((args, kwargs))
        missed = self._missed
        self._runs().append(run)
        try:
            with self:
                result = plain_call(self._model)(*args, **kwargs)
            self._note_compiled()
        finally:
            self._runs().pop()
        if run.origins is not None and missed == self._missed:
            self._complete = True
        return result

    def enter_module(self, module: nn.Module, _: object) -> None:
        if self._run.running:
            self._note_compiled()
            self._run.running.append(module)
            self._run.seen.clear()

    def leave_module(self, module: nn.Module, *_: object) -> None:
        if self._run.running and self._run.running[-1] is module:
            self._note_compiled()
            self._run.running.pop()
            self._run.seen.clear()

    # ---- calls ---------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # torch.compile of a part of the model, which runs as it is
            name = getattr(func, "__name__", "")
            if name in _COMPILED:
                _traced.name = name
            return traced_call(func, args, kwargs)
        if _traced.name:
            self._note_compiled()
        is_multihead = func is multi_head_attention_forward
        if is_multihead and reason_against(args, kwargs) is None:
            with self:
                return attend_in_parts(args, kwargs)
        is_sdpa = func in SDPA
        name = op_name(func) if is_op(func) else getattr(func, "__name__", "")
        reason = None if is_sdpa else reason_against(args, kwargs) if is_multihead else reason_of_op(name)
        if is_sdpa or reason is not None:
            self._run.seen.add("flex_attention" if name == "flex_attention" else "scaled_dot_product_attention")
        if reason is not None:
            self._note_op(reason, args, kwargs)
        result = self._attend(*args, **kwargs) if is_sdpa else func(*args, **kwargs)
        origins = self._run.origins
        if is_sdpa or reason is not None or func in ATTENTION_OPS:
            if origins is not None:
                origins.add_new(result)
            return result
        name = getattr(func, "__name__", "")
        if origins is not None:
            origins.track((args, kwargs), result, _writes_first(name))
        self._follow_mask(name, args, kwargs, result)
        return result

    def _follow_mask(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> None:
        of = args[0] if args else None
        if isinstance(of, torch.Tensor) and of.dtype == torch.bool and (_writes_first(name) or "out" in kwargs):
            self._run.masks.forget()
        elif isinstance(result, torch.Tensor) and result.dtype == torch.bool:
            self._run.masks.follow(name, args, kwargs, result)

    def _note_compiled(self) -> None:
        """Note attention that compiled code has run, unless its ops were seen: inductor may fuse them."""
        name, _traced.name = _traced.name, ""
        if name and name not in self._run.seen:
            self._note_op(_COMPILED[name], (), {})

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
        whole, outer = attn_mask, None if attn_mask is None else run.masks.of(attn_mask)
        if outer is not None and outer.keys is not None:
            attn_mask = outer.keys
        record = self._records.get((id(module), ordinal))
        if record is None or not record.site.swapped:
            record = self._look_again(record, module, ordinal, tensors, attn_mask, call)
        way, reason = self._way(tensors, attn_mask, call, record)
        if record is not None and way != "skip":
            self.store.note(record, None, reason)
        if record is None or way == "sdpa":
            return scaled_dot_product_attention(
                query, key, value, whole, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        q, k, v = (t.to(_dtype_of(t)).transpose(1, 2) for t in tensors)
        key_mask = None if attn_mask is None else attn_mask[:, 0, 0]
        if way == "dense":
            out = attention(q, k, v, scale=scale, key_mask=key_mask)
        else:
            state = self.store.state(record, (q.shape[0], q.shape[1], k.shape[1]), q.device)
            self.store.note(record, state)
            out = METHODS[self.settings.method].attend(
                q, k, v, state, scale=scale, key_mask=key_mask, quantization=self.settings.quantization,
                implementation=self.settings.implementation,
            )  # fmt: skip
        if attn_mask is not whole and outer is not None and outer.rows is not None:
            out = out.masked_fill(~outer.rows.flatten(1)[:, :, None, None], 0.0)
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
        if self._run.origins is None:  # the next forward keeps them
            self._complete = False
            self._missed += 1
            return record
        site = self._decide(module, ordinal, tensors, mask, call)
        record = self._records[(id(module), ordinal)] = self.store.record([module], (ordinal,), site)
        if site.reason is not None:
            self._left_alone.add(kind)
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
            site.is_self_attention = origins.are_same(*tensors[:2])
            site.reason = self.settings.unsupported_reason(site) or choice_reason(
                site, self.settings, shard=self.store.shard
            )
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
        if now.dtype != record.site.dtype or now.q_shape[2] != record.site.q_shape[2]:  # cast, or shared by processes
            record.site = replace(
                record.site, dtype=now.dtype, q_shape=now.q_shape, k_shape=now.k_shape, v_shape=now.v_shape
            )
        reason = unsupported_call(now, tensors, mask, **call)
        if reason is not None:
            return "sdpa", reason
        reason = self.settings.unsupported_reason(now) if swapped else record.site.reason
        if swapped and reason is None:
            return "skip", None
        return "dense" if self.settings.fits_dense_kernel(now) else "sdpa", reason


def _writes_first(name: str) -> bool:
    """Return whether a function of this name writes into its first argument."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or name.startswith("__i")


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
        if not torch.compiler.is_compiling():  # what torch.compile makes of a part of the model has no hooks
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
