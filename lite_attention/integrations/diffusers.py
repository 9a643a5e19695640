"""LiteAttention as one of diffusers' attention backends, under the name "lite_attention".

```python
import lite_attention.integrations.diffusers as lite

lite.configure(threshold=-6.0)
pipe.transformer.set_attention_backend("lite_attention")  # until reset_attention_backend(), or another one is set

with diffusers.attention_backend("lite_attention"):  # or as long as this lasts
    pipe(prompt)
```

A backend of diffusers is a function that knows neither the layer nor the step. So the name only switches on what
`lite_attention.enable(model, compile=False)` does: it finds the sites, and follows branches, steps and generations. The
name is the model's own; diffusers makes others that of all models that name none. A model given to `enable` before
keeps its options, and stays enabled whatever is reset. `enable(pipe)` also knows the pipeline's loop and scheduler.

Attention that runs outside of a model's call, as a VAE's, is PyTorch's. Within the context, so is that of what
`torch.compile(model)` returned; `configure(compile=True)` compiles. `enable_parallelism` may come before or after.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from lite_attention import api
from lite_attention.compile.runner import timestep_of
from lite_attention.compile.settings import OtherOptions, SkipSettings, check_compiling
from lite_attention.enabled import Wiring, wirings
from lite_attention.exact_tokens import check_exact_tokens
from lite_attention.ops.option_names import takes_options
from lite_attention.parallel.diffusers_member import MEMBER, NAME

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from lite_attention.exact_tokens import ExactTokenOption
    from lite_attention.ops.site import SiteKeep, SiteThreshold
    from lite_attention.threshold_table import ThresholdTable

__all__ = ["MEMBER", "NAME", "Options", "configure"]


class Options(OtherOptions, total=False):
    """The arguments of `lite_attention.enable`."""

    compile: bool | Literal["blocks"]
    mode: str | None
    options: dict[str, Any] | None
    dynamic: bool | None
    inner: str | Callable[..., Any]
    token_order: str | Sequence[int] | None
    threshold: SiteThreshold | ThresholdTable | str | Path | None
    keep: SiteKeep | ThresholdTable | str | Path | None
    preset: Literal["quality", "balanced", "fast"] | None
    process_group: ProcessGroup | None
    exact_tokens: ExactTokenOption | None


_HOW = {
    "compile": False, "mode": None, "options": None, "dynamic": None, "inner": "inductor", "process_group": None,
}  # fmt: skip
_options: Options = {}
_set: weakref.WeakKeyDictionary[nn.Module, Wiring] = weakref.WeakKeyDictionary()  # by name, and what that did
_within: weakref.WeakKeyDictionary[nn.Module, Wiring] = weakref.WeakKeyDictionary()  # by the context, likewise
_is_inside: ContextVar[bool] = ContextVar("inside the call of a model", default=False)


@takes_options(*Options.__annotations__)
def configure(**options: Unpack[Options]) -> None:
    """Say how the backend runs the models that it is set on from now on; what is not given is as by default.

    Args:
        options: those of `lite_attention.enable`; `compile` is False unless given.

    Raises:
        ValueError: an option is out of range, or there is no such file.
        TypeError: there is no such option.
        OSError: the file of a table cannot be read.
    """
    global _options
    given: dict[str, Any] = {"threshold": None, "keep": None, "preset": None, "token_order": None, **options}
    how = {name: given.pop(name, default) for name, default in _HOW.items()}
    check_compiling(how["compile"], how["mode"], how["options"], how["inner"])
    check_exact_tokens(given.pop("exact_tokens", None), given["token_order"])
    threshold, keep, preset, order = (given.pop(name) for name in ("threshold", "keep", "preset", "token_order"))
    SkipSettings(**api.chosen_options(threshold, keep, preset, order, given))
    _options = options


# ---- which models are enabled ----------------------------------------------------------------------------------------


def _switch_on(model: nn.Module, by: weakref.WeakKeyDictionary[nn.Module, Wiring]) -> None:
    """Enable a model, unless `enable` was called on it by hand."""
    if model not in wirings or _is_ours(model):
        api.enable(model, **{"compile": False, **_options})  # type: ignore[arg-type]
        by[model] = wirings[model]


def _switch_off(model: nn.Module, by: weakref.WeakKeyDictionary[nn.Module, Wiring]) -> None:
    """Disable a model that was enabled so, unless it has been enabled by hand since."""
    if _is_ours(model) and by.pop(model, None) is not None:
        api.disable(model)


def _is_ours(model: nn.Module) -> bool:
    wiring = wirings.get(model)
    return wiring is not None and (_set.get(model) is wiring or _within.get(model) is wiring)


def _is_wanted(model: nn.Module) -> bool:
    """Return whether a model that is about to run is one for the context's backend, and not enabled yet."""
    if _registry._active_backend is not MEMBER or torch.compiler.is_compiling():
        return False
    return not _is_inside.get() and model not in wirings and _follows_context(model)


def _follows_context(model: nn.Module) -> bool:
    """Return whether a model denoises, and has sites that name no backend of their own."""
    if timestep_of(model) is None:
        return False
    processors: list[Any] = [module.processor for module in model.modules() if hasattr(module, "processor")]
    named = [processor._attention_backend for processor in processors if hasattr(processor, "_attention_backend")]
    return None in named or not named


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    """Mark the call of an enabled model: those that it calls itself are part of it."""
    token = _is_inside.set(True)
    try:
        yield
    finally:
        _is_inside.reset(token)


# ---- what diffusers calls: what is private of it is here and in `parallel.diffusers_member` --------------------------

_registry = dispatch._AttentionBackendRegistry


def _over(cls: type, name: str) -> Callable[[Callable[..., Any]], None]:
    """Put a function over a method; it is given the method as its first argument."""
    method = getattr(cls, name)

    def put(function: Callable[..., Any]) -> None:
        setattr(cls, name, functools.wraps(method)(lambda *args, **kwargs: function(method, *args, **kwargs)))

    return put


@_over(ModelMixin, "set_attention_backend")
def _set_backend(method: Callable[..., None], model: Any, backend: str) -> None:
    is_ours, active = str(backend).lower() == NAME, _registry._active_backend
    method(model, backend)
    if not is_ours:
        _switch_off(model, _set)
        return
    _registry.set_active_backend(active)  # other models may have sites that nobody enabled
    try:
        _switch_on(model, _set)
    except BaseException:
        model.reset_attention_backend()
        raise


@_over(ModelMixin, "reset_attention_backend")
def _reset_backend(method: Callable[..., None], model: nn.Module) -> None:
    method(model)
    _switch_off(model, _set)


@_over(ModelMixin, "__call__")
def _call(method: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if _is_wanted(model):
        _switch_on(model, _within)
    if _registry._active_backend is not MEMBER or torch.compiler.is_compiling() or model not in wirings:
        return method(model, *args, **kwargs)
    with _inside():
        return method(model, *args, **kwargs)


@_over(CacheMixin, "cache_context")
def _cache_context(method: Callable[..., Any], model: Any, name: str, **kwargs: Any) -> Any:
    if _is_wanted(model):  # the first branch is told before the first call
        _switch_on(model, _within)
        return model.cache_context(name, **kwargs)
    return method(model, name, **kwargs)


_set_active = _registry.set_active_backend


def _set_active_backend(backend: Any) -> None:
    _set_active(backend)
    for model in [] if backend is MEMBER else [*_within]:
        _switch_off(model, _within)


_registry.set_active_backend = _set_active_backend  # type: ignore[method-assign]
