"""Wiring of models and diffusers pipelines: branches, steps and fresh starts without the user's help."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lite_attention.module import LiteAttention
from lite_attention.ops import Session, default_session

__all__ = ["branch", "default_session", "disable", "enable", "reset"]

_Target = TypeVar("_Target")


@dataclass
class _Wiring:
    """What `enable` did to one model."""

    session: Session
    undo: list[Callable[[], None]]


_wirings: weakref.WeakKeyDictionary[nn.Module, _Wiring] = weakref.WeakKeyDictionary()
_pipelines: weakref.WeakKeyDictionary[Any, Callable[[], None]] = weakref.WeakKeyDictionary()


def enable(
    model_or_pipe: _Target,
    *,
    compile: bool | str = True,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    inner: Any = "inductor",
    **settings: Any,
) -> _Target:
    """Make a model, or the transformers of a diffusers pipeline, skip attention that does not matter.

    Branches (cond, uncond) and denoising steps are read from diffusers' `cache_context`; a pipeline starts fresh at
    each generation by itself. A bare model that is called without step information needs `num_steps`, or `reset(model)`
    before each generation. Calling it again replaces the earlier settings.

    Args:
        model_or_pipe: an nn.Module, or a pipeline with `transformer` (and `transformer_2`, as Wan 2.2 has).
        compile: True compiles the whole model, "blocks" its repeated blocks, False runs it eagerly.
        mode: as for torch.compile.
        options: as for torch.compile.
        dynamic: as for torch.compile.
        inner: what compiles the changed graphs, see `LiteAttentionBackend`.
        settings: fields of `lite_attention.compile.SkipSettings`: threshold, num_steps, slots, refresh, select,
            min_tiles, tile_shape, initial_mask, max_steps, implementation.

    Returns:
        The argument, changed in place.

    Raises:
        ValueError: nothing in it can be enabled, or a setting is out of range.
    """
    from lite_attention.compile.settings import SkipSettings

    if compile not in (True, False, "blocks"):
        raise ValueError(f"compile: expected True, False or 'blocks', got {compile!r}")
    if hasattr(model_or_pipe, "_orig_mod"):
        raise ValueError("model_or_pipe: expected a model before torch.compile, got its result: enable() compiles it")
    models = _models_of(model_or_pipe)
    SkipSettings(**settings)  # wrong ones are told before anything is changed
    disable(model_or_pipe)
    for model in models:
        session = Session()
        undo = [_follow_cache_context(model, session)]
        if compile:
            undo.append(_compile(model, compile == "blocks", session, inner, settings, mode, options, dynamic))
        else:
            undo.append(_attach(model, session, settings))
        _wirings[model] = _Wiring(session, undo)
    if not isinstance(model_or_pipe, nn.Module):
        _pipelines[model_or_pipe] = _follow_progress(model_or_pipe, models)
    return model_or_pipe


def disable(model_or_pipe: _Target) -> _Target:
    """Undo `enable`; without it nothing happens. The skip states are dropped."""
    if not isinstance(model_or_pipe, nn.Module) and model_or_pipe in _pipelines:
        _pipelines.pop(model_or_pipe)()
    for model in _models_of(model_or_pipe):
        wiring = _wirings.pop(model, None)
        for undo in wiring.undo if wiring else []:
            undo()
    return model_or_pipe


@contextlib.contextmanager
def branch(name: str, step: int | None = None, *, model: nn.Module | None = None) -> Iterator[None]:
    """Run what is inside as one branch of the denoising step, with a memory of its own.

    Args:
        name: any name, such as "cond"; each new one takes the next slot.
        step: denoising step, if known; one that goes backwards begins a new generation.
        model: a model given to `enable`; None = everything that was not.

    Raises:
        ValueError: one branch more than there are slots.
    """
    with session_of(model).branch(name, step):
        yield


def reset(model_or_pipe: Any = None) -> None:
    """Begin a new generation: all skip states of a model (None = of all that was not given to `enable`) start fresh."""
    if model_or_pipe is None:
        default_session.reset()
        default_session.branches.clear()
        return
    from lite_attention.compile.store import records_of

    for model in _models_of(model_or_pipe):
        session = session_of(model)
        session.is_told = True
        if session is not default_session:
            session.reset()
        for store, record in records_of(model):
            store.reset([record])
        for module in model.modules():
            if isinstance(module, LiteAttention):
                module.reset_skip_state()


def session_of(model: nn.Module | None) -> Session:
    """Return the session that a model's states follow."""
    wiring = _wirings.get(model) if model is not None else None
    return default_session if wiring is None else wiring.session


def _models_of(model_or_pipe: Any) -> list[nn.Module]:
    if isinstance(model_or_pipe, nn.Module):
        return [getattr(model_or_pipe, "_orig_mod", model_or_pipe)]  # what torch.compile wraps
    components: dict[str, Any] = getattr(model_or_pipe, "components", {})
    models = [c for name, c in components.items() if name.startswith("transformer") and isinstance(c, nn.Module)]
    if not models:
        raise ValueError(
            "model_or_pipe: expected an nn.Module or a diffusers pipeline with a transformer, "
            f"got {type(model_or_pipe).__name__}"
        )
    return models


def _follow_cache_context(model: nn.Module, session: Session) -> Callable[[], None]:
    """Let `model.cache_context`, with which diffusers' pipelines announce a branch and step, move the session too."""
    inner = getattr(model, "cache_context", None)
    if inner is None:
        return lambda: None

    @contextlib.contextmanager
    def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
        with inner(name, **kwargs), session.branch(name, kwargs.get("step_index")):
            yield

    return _override(model, "cache_context", cache_context)


def _follow_progress(pipe: Any, models: list[nn.Module]) -> Callable[[], None]:
    """Start fresh whenever a pipeline opens the progress bar of its denoising loop."""
    inner = pipe.progress_bar
    for model in models:
        session_of(model).is_told = True

    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        for model in models:
            reset(model)
        return inner(*args, **kwargs)

    return _override(pipe, "progress_bar", progress_bar)


def _override(target: Any, name: str, value: Any) -> Callable[[], None]:
    """Put an attribute over one of the class, and return a function that takes it away again."""
    before = vars(target).get(name)
    object.__setattr__(target, name, value)

    def undo() -> None:
        if vars(target).get(name) is value:
            if before is None:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, before)

    return undo


def _compile(
    model: nn.Module,
    blocks: bool,
    session: Session,
    inner: Any,
    settings: dict[str, Any],
    mode: str | None,
    options: dict[str, Any] | None,
    dynamic: bool | None,
) -> Callable[[], None]:
    from lite_attention.compile.backend import LiteAttentionBackend

    backend = LiteAttentionBackend(inner=inner, session=session, **settings)
    before = {module: module._compiled_call_impl for module in model.modules()}
    if not blocks:
        model.compile(backend=backend, mode=mode, options=options, dynamic=dynamic)
    elif hasattr(model, "compile_repeated_blocks"):
        compile_blocks: Any = model.compile_repeated_blocks
        compile_blocks(backend=backend, mode=mode, options=options, dynamic=dynamic)
    else:
        raise ValueError(
            f"compile: expected True or False, got 'blocks': {type(model).__name__} names no repeated blocks"
        )

    def undo() -> None:
        for module, implementation in before.items():
            module._compiled_call_impl = implementation

    return undo


def _attach(model: nn.Module, session: Session, settings: dict[str, Any]) -> Callable[[], None]:
    from lite_attention.compile.eager import attach
    from lite_attention.compile.settings import SkipSettings
    from lite_attention.compile.store import StateStore

    return attach(model, StateStore(SkipSettings(**settings), session))
