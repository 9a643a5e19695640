"""Wiring of models and diffusers pipelines: branches, steps and fresh starts without the user's help."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from lite_attention import token_order as order
from lite_attention.masks import Pattern
from lite_attention.module import LiteAttention
from lite_attention.ops import Session, default_session

if TYPE_CHECKING:
    from lite_attention.compile.store import NamedThreshold, StateStore

__all__ = ["branch", "default_session", "disable", "enable", "reset", "set_threshold"]

_Target = TypeVar("_Target")


# Undoes something on the model or pipeline it is given. It must not hold on to it, or neither would ever be freed.
_Undo = Callable[[Any], None]


@dataclass
class _Wiring:
    """What `enable` did to one model."""

    session: Session
    undo: list[_Undo]
    store: StateStore | None = None


_wirings: weakref.WeakKeyDictionary[nn.Module, _Wiring] = weakref.WeakKeyDictionary()
_pipelines: weakref.WeakKeyDictionary[Any, _Undo] = weakref.WeakKeyDictionary()


def enable(
    model_or_pipe: _Target,
    *,
    compile: bool | str = True,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    inner: Any = "inductor",
    token_order: str | Sequence[int] | None = None,
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
        token_order: "tile3d" reorders the tokens of Wan and LTX-Video within the model so that a tile is a block of the
            video, see `lite_attention.token_order`; (frames, rows, columns) gives the size of the block. An
            `initial_mask` out of `lite_attention.masks` follows; any other is one of the reordered sequence.
        settings: fields of `lite_attention.compile.SkipSettings`: threshold, num_steps, slots, refresh, select,
            min_tiles, tile_shape, initial_mask, max_steps, use_int8, use_fp8, implementation, dense.

    Returns:
        The argument, changed in place.

    Raises:
        ValueError: nothing in it can be enabled, a setting is out of range, or a model's tokens cannot be reordered.
    """
    from lite_attention.compile.settings import SkipSettings

    if compile not in (True, False, "blocks"):
        raise ValueError(f"compile: expected True, False or 'blocks', got {compile!r}")
    for name, model in parts_of(model_or_pipe).items():
        if hasattr(model, "_orig_mod"):
            raise ValueError(f"{name}: expected a model before torch.compile, got its result: enable() compiles it")
        if compile == "blocks" and not getattr(model, "_repeated_blocks", None):
            raise ValueError(
                f"compile: expected True or False, got 'blocks': {type(model).__name__} names no repeated blocks"
            )
        if token_order is not None:
            order.check(token_order, model)
    if token_order is not None and isinstance(settings.get("initial_mask"), Pattern):
        settings["initial_mask"] = replace(settings["initial_mask"], token_order=token_order)
    known = SkipSettings(**settings)  # wrong ones are told before anything is changed
    disable(model_or_pipe)
    models = _models_of(model_or_pipe)
    try:
        for model in models:
            session = Session()
            undo = [_take_off_compiled(model), _follow_cache_context(model, session)]
            wiring = _wirings[model] = _Wiring(session, undo)
            if token_order is not None:
                undo.append(_calling(order.attach(model, token_order, known.tile_shape, known.quantization)))
            if compile:
                wiring.store = _compile(model, compile == "blocks", session, inner, settings, mode, options, dynamic)
            else:
                wiring.store = _attach(model, session, settings, undo)
        if not isinstance(model_or_pipe, nn.Module):
            _pipelines[model_or_pipe] = _follow_progress(model_or_pipe, models)
    except BaseException:
        disable(model_or_pipe)
        raise
    return model_or_pipe


def disable(model_or_pipe: _Target) -> _Target:
    """Undo `enable`; without it nothing happens. The skip states are dropped."""
    if not isinstance(model_or_pipe, nn.Module) and model_or_pipe in _pipelines:
        _pipelines.pop(model_or_pipe)(model_or_pipe)
    for model in _models_of(model_or_pipe):
        wiring = _wirings.pop(model, None)
        for undo in wiring.undo if wiring else []:
            undo(model)
        if wiring and wiring.store:
            wiring.store.clear()
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


def set_threshold(model_or_pipe: Any, threshold: NamedThreshold) -> None:
    """Set the thresholds of all attention sites, in place on the device: neither a recompile nor a new CUDA graph.

    States that are yet to come, such as those of another video length, begin with it too, until `enable` is called
    again. Where any of it does not fit, nothing is changed.

    Args:
        model_or_pipe: a model or pipeline given to `enable`, one compiled with our backend that has run once, or one
            that holds `LiteAttention`.
        threshold: log2 units, at most 0: a number, a tensor that broadcasts to (slots, steps, heads), see
            `lite_attention.schedules`, or a callable that returns one of these for the name of a site, as `report`
            prints it.

    Raises:
        ValueError: no attention of ours in it; or a threshold above 0, NaN, or of a shape that does not fit a state: a
            schedule may be as long as `num_steps`, or, where that is unknown, `max_steps`.
    """
    from lite_attention.compile.store import records_of

    tables: list[tuple[Any, torch.Tensor]] = []
    stores: list[tuple[StateStore, nn.Module, NamedThreshold]] = []
    modules: list[tuple[LiteAttention, float | torch.Tensor]] = []
    for part, target in parts_of(model_or_pipe).items():
        model = getattr(target, "_orig_mod", target)
        prefix = "" if isinstance(model_or_pipe, nn.Module) else f"{part}."
        of_part = _below(prefix, threshold)
        found = {store for store, _ in records_of(model)}
        enabled = store_of(model)
        found |= {enabled} if enabled else set()
        for store in found:
            tables += store.tables(model, of_part)
            stores.append((store, model, of_part))
        for name, module in model.named_modules():
            if isinstance(module, LiteAttention):
                value = of_part(name) if callable(of_part) else of_part
                module.check_threshold(value)
                modules.append((module, value))
    if not stores and not modules:
        raise ValueError(
            f"model_or_pipe: expected one given to enable(), compiled with our backend and run once, or with "
            f"LiteAttention modules, got {type(model_or_pipe).__name__} with none of these"
        )
    for state, table in tables:
        state.set_threshold(table)
    for store, model, of_part in stores:
        store.remember(model, of_part)
    for module, value in modules:
        module.set_threshold(value)


def _below(prefix: str, threshold: NamedThreshold) -> NamedThreshold:
    """Return a threshold by the names of a part, from one by names in the whole."""
    if not callable(threshold):
        return threshold
    return lambda name: threshold(prefix + name)


def session_of(model: nn.Module | None) -> Session:
    """Return the session that a model's states follow."""
    wiring = _wirings.get(model) if model is not None else None
    return default_session if wiring is None else wiring.session


def store_of(model: nn.Module) -> StateStore | None:
    """Return the states of a model given to `enable`, None for any other."""
    wiring = _wirings.get(model)
    return None if wiring is None else wiring.store


def parts_of(model_or_pipe: Any) -> dict[str, nn.Module]:
    """Return the transformers of a pipeline by their names in it, or a model as "model_or_pipe".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(model_or_pipe, nn.Module):
        return {"model_or_pipe": model_or_pipe}
    components: dict[str, Any] = getattr(model_or_pipe, "components", {})
    parts = {name: c for name, c in components.items() if name.startswith("transformer") and isinstance(c, nn.Module)}
    if not parts:
        raise ValueError(
            "model_or_pipe: expected an nn.Module or a diffusers pipeline with a transformer, "
            f"got {type(model_or_pipe).__name__}"
        )
    return parts


def _models_of(model_or_pipe: Any) -> list[nn.Module]:
    return [getattr(part, "_orig_mod", part) for part in parts_of(model_or_pipe).values()]  # what torch.compile wraps


def _take_off_compiled(model: nn.Module) -> _Undo:
    """Take away what `model.compile()` put in place: code compiled earlier would run around the swap."""
    before = weakref.WeakKeyDictionary({m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl})
    for module in before:
        module._compiled_call_impl = None

    def undo(model: nn.Module) -> None:
        for module in model.modules():
            module._compiled_call_impl = before.get(module)

    return undo


def _follow_cache_context(model: nn.Module, session: Session) -> _Undo:
    """Let `model.cache_context`, with which diffusers' pipelines announce a branch and step, move the session too."""
    inner = getattr(model, "cache_context", None)
    if inner is None:
        return lambda _: None

    @contextlib.contextmanager
    def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
        with inner(name, **kwargs), session.branch(name, kwargs.get("step_index")):
            yield

    return _override(model, "cache_context", cache_context)


def _follow_progress(pipe: Any, models: list[nn.Module]) -> _Undo:
    """Start fresh whenever a pipeline opens the progress bar of its denoising loop."""
    inner = getattr(pipe, "progress_bar", None)
    if inner is None:  # a modular pipeline: its blocks have one each
        return lambda _: None
    for model in models:
        session_of(model).is_told = True

    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        for model in models:
            reset(model)
        return inner(*args, **kwargs)

    return _override(pipe, "progress_bar", progress_bar)


def _calling(detach: Callable[[], None]) -> _Undo:
    return lambda _: detach()


def _override(target: Any, name: str, value: Any) -> _Undo:
    """Put an attribute over one of the class, and return a function that takes it away again."""
    before = vars(target).get(name)
    object.__setattr__(target, name, value)
    ours = weakref.ref(value)

    def undo(target: Any) -> None:
        if vars(target).get(name) is ours():
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
) -> StateStore:
    from lite_attention.compile.backend import LiteAttentionBackend

    backend = LiteAttentionBackend(inner=inner, session=session, model=model, **settings)
    compile_model: Any = model.compile_repeated_blocks if blocks else model.compile
    compile_model(backend=backend, mode=mode, options=options, dynamic=dynamic)
    return backend.store


def _attach(model: nn.Module, session: Session, settings: dict[str, Any], undo: list[_Undo]) -> StateStore:
    from lite_attention.compile.eager import attach
    from lite_attention.compile.settings import SkipSettings
    from lite_attention.compile.store import StateStore

    store = StateStore(SkipSettings(**settings), session, model)
    detach = attach(model, store)
    undo.append(_calling(detach))
    return store
