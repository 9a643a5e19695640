"""What is put on models and pipelines while they are enabled, and taken off again.

Nothing here follows an object into its copies: a copy of an enabled model or pipeline is not enabled, and has the
methods of its class. An enabled one is not pickled.
"""

from __future__ import annotations

import contextlib
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lite_attention.ops import Session
from lite_attention.ops.torch_internals import override, override_of

__all__ = [
    "Undo",
    "follow_cache_context",
    "follow_parallelism",
    "follow_progress",
    "let_dynamo_see",
    "mark",
    "refuse_compile",
    "take_off_compiled",
]

# Undoes something on the model or pipeline it is given. It must not hold on to it, or neither would ever be freed.
Undo = Callable[[Any], None]

_MARK, _TAKEN_OFF = "_lite_attention", "_lite_attention_took_off"


def mark(model: nn.Module) -> Undo:
    """Note on a model that it is enabled: who copies it is told that the copy is not, who pickles it is refused."""
    object.__setattr__(model, _MARK, _Mark())
    return lambda model: model.__dict__.pop(_MARK, None)


class _Mark:
    def __deepcopy__(self, memo: object) -> None:
        warnings.warn(
            "lite_attention: the copy of an enabled model is not enabled; call lite_attention.enable() on it",
            stacklevel=3,
        )

    def __reduce__(self) -> Any:
        from lite_attention.compile.runner import NOT_PICKLED

        raise ValueError(NOT_PICKLED)


class _Override:
    """A function over a method of one object; a deep copy of the object has its own method there."""

    def __init__(self, target: Any, name: str, call: Callable[..., Any]) -> None:
        self._id, self._name, self._call = id(target), name, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo.get(self._id)
        return None if copy is None else types.MethodType(getattr(type(copy), self._name), copy)

    __reduce__ = _Mark.__reduce__


def _override(target: Any, name: str, call: Callable[..., Any]) -> Undo:
    """Put a function over a method of an object, and return what takes it away again."""
    before, ours = vars(target).get(name), _Override(target, name, call)
    object.__setattr__(target, name, ours)
    put = weakref.ref(ours)

    def undo(target: Any) -> None:
        if vars(target).get(name) is put():
            if before is None:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, before)

    return undo


def take_off_compiled(model: nn.Module) -> Undo:
    """Take away what `model.compile()` put in place: code compiled earlier would run around the swap."""
    for module in model.modules():
        run = override_of(module)
        if run is not None:
            object.__setattr__(module, _TAKEN_OFF, _TakenOff(run))
            override(module, None)

    def undo(model: nn.Module) -> None:
        for module in model.modules():
            if _MARK not in vars(module):  # otherwise it has been enabled by itself meanwhile
                override(module, getattr(module.__dict__.pop(_TAKEN_OFF, None), "run", None))

    return undo


class _TakenOff:
    """Code that `module.compile()` made; it holds the module, so the module has it, and no copy does."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __deepcopy__(self, memo: object) -> None:
        pass

    __reduce__ = _Mark.__reduce__


def refuse_compile(model: nn.Module) -> Undo:
    """Let `model.compile()` raise: it would take the swap away."""

    def compile(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "model: expected one that is not enabled to compile, got one given to lite_attention.enable(), which "
            "compiles it; use enable(compile=..., mode=..., options=...), or disable() first"
        )

    undos = [_override(model, name, compile) for name in ("compile", "compile_repeated_blocks") if hasattr(model, name)]

    def undo(model: nn.Module) -> None:
        for undo_one in undos:
            undo_one(model)

    return undo


def let_dynamo_see(model: nn.Module) -> Undo:
    """Let code that is compiled around a model call what runs in its place, as Python does.

    Dynamo goes straight to the `forward` of a module that has no hooks, so the swap would be gone, and nobody told.
    """
    handle = model.register_forward_pre_hook(_nothing)
    return lambda _: handle.remove()


def _nothing(*_: Any) -> None:
    pass


def follow_cache_context(model: nn.Module, session: Callable[[], Session]) -> Undo:
    """Let `model.cache_context`, with which diffusers' pipelines announce a branch and step, tell the session too."""
    inner = getattr(model, "cache_context", None)
    if inner is None:
        return lambda _: None

    @contextlib.contextmanager
    def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
        time = kwargs.get("timestep") if kwargs.get("sigma") is None else kwargs["sigma"]
        times = {} if time is None else {"cache_context": time}
        with inner(name, **kwargs), session().telling(name, kwargs.get("step_index"), times):
            yield

    return _override(model, "cache_context", cache_context)


def follow_parallelism(model: nn.Module) -> Undo:
    """Let attention that diffusers splits over processes be one that can skip, split before or after this."""
    detach = [_split_attention(model)]
    inner = getattr(model, "enable_parallelism", None)
    if inner is None:
        return lambda _: None

    def enable_parallelism(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        detach.append(_split_attention(model))

    take_off = _override(model, "enable_parallelism", enable_parallelism)

    def undo(model: nn.Module) -> None:
        take_off(model)
        for function in reversed(detach):
            function()

    return undo


def _split_attention(model: nn.Module) -> Callable[[], None]:
    """Let attention that is split over processes be the one of `diffusers_member`, and return what undoes it."""
    from lite_attention.parallel.shard import context_parallel_of

    split = context_parallel_of(model, "_parallel_config")
    if split is None or max(split.ring_degree, split.ulysses_degree) == 1:
        return lambda: None
    from lite_attention.parallel.diffusers_member import attach

    return attach(model)


def follow_progress(pipe: Any, begin: Callable[[int | None], None]) -> Undo:
    """Call `begin` with the number of steps whenever a pipeline opens the progress bar of its denoising loop."""
    inner = getattr(pipe, "progress_bar", None)
    if inner is None:  # a modular pipeline: its blocks have one each
        return lambda _: None

    def progress_bar(iterable: Any = None, total: int | None = None, **kwargs: Any) -> Any:
        begin(total if iterable is None or not hasattr(iterable, "__len__") else len(iterable))
        return inner(iterable, total, **kwargs) if iterable is not None else inner(total=total, **kwargs)

    return _override(pipe, "progress_bar", progress_bar)
