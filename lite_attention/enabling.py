"""How one model is enabled: what is put on it, in which order, and what undoes it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lite_attention import diffusers_hooks as hooks
from lite_attention import token_order as order
from lite_attention.compile.settings import SkipSettings
from lite_attention.enabled import Wiring
from lite_attention.exact_tokens import kept_exact
from lite_attention.masks import Pattern, grid_of_call
from lite_attention.ops.torch_internals import call_of, override, uncompiled

if TYPE_CHECKING:
    from lite_attention.compile.runner import Check
    from lite_attention.compile.store import StateStore
    from lite_attention.exact_tokens import ExactTokenOption
    from lite_attention.ops.shard import Shard

__all__ = ["How", "enable_model"]

# Of models that were freed while they were enabled: the classes of their modules, and the backend. Dynamo forgets them
# at the next `enable`, since it may be compiling when garbage is collected.
_freed: list[tuple[set[type[nn.Module]], object]] = []


@dataclass(frozen=True)
class How:
    """What `enable` was asked to do with each model."""

    settings: SkipSettings
    compile: bool | str
    compile_arguments: dict[str, Any]
    inner: str | Callable[..., Any]
    token_order: str | Sequence[int] | None
    told_shard: Shard | None
    exact_tokens: ExactTokenOption | None


def enable_model(model: nn.Module, wiring: Wiring, how: How, prefix: str) -> None:
    """Enable one model; whatever is done is noted in `wiring.undo`, so that an exception can be undone."""
    checks: list[Check] = []
    wiring.undo.append(hooks.take_off_compiled(model))
    wiring.undo.append(hooks.mark(model))
    wiring.undo.append(hooks.follow_cache_context(model, wiring.session))
    wiring.undo.append(hooks.follow_parallelism(model))
    if how.token_order is not None:
        reordered = order.TokenOrder(model, how.token_order, how.settings.tile_shape, how.settings.quantization)
        wiring.undo.append(lambda _: reordered.detach())
        checks.append(reordered.check)
    if isinstance(how.settings.initial_mask, Pattern):
        checks.append(_check_of_grid(model, how.settings.initial_mask))
    checks.append(_check_of_sequence(model, how))
    run, wiring.store = (_compiled if how.compile else _eager)(model, wiring, how, prefix)
    wiring.exact_tokens = how.exact_tokens
    run, looks = kept_exact(model, wiring.store, how.exact_tokens, run)
    checks += looks
    wiring.undo.append(hooks.let_dynamo_see(model))
    override(model, uncompiled(wiring.runner(model, wiring.store, run, checks)))
    wiring.undo.append(hooks.refuse_compile(model))


def _check_of_sequence(model: nn.Module, how: How) -> Check:
    from lite_attention.parallel.shard import check_of_sequence

    named = {"initial_mask": how.settings.initial_mask, "exact_tokens": how.exact_tokens}
    return check_of_sequence(model, [name for name, given in named.items() if given not in (None, "auto")])


def _check_of_grid(model: nn.Module, pattern: Pattern) -> Check:
    """Return a check that each forward is of the video that a pattern is for; it does not keep the model alive."""
    of = weakref.ref(model)

    def check(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        grid = grid_of_call(of(), args, kwargs)
        if grid is not None:
            pattern.check_grid(grid)

    return check


def _store(model: nn.Module, wiring: Wiring, how: How, prefix: str) -> StateStore:
    from lite_attention.compile.store import StateStore
    from lite_attention.parallel.shard import shard_of

    return StateStore(how.settings, wiring.session, model, prefix, shard_of(model, how.told_shard))


def _compiled(model: nn.Module, wiring: Wiring, how: How, prefix: str) -> tuple[Callable[..., Any], StateStore]:
    from lite_attention.compile.backend import LiteAttentionBackend
    from lite_attention.ops.torch_internals import forget_compiled

    store = _store(model, wiring, how, prefix)
    backend = LiteAttentionBackend.of(store, how.inner)
    while _freed:
        forget_compiled(*_freed.pop())
    freed = weakref.finalize(model, lambda *left: _freed.append(left), {*map(type, model.modules())}, backend)
    freed.atexit = False

    def forget(model: nn.Module) -> None:
        freed.detach()
        forget_compiled({*map(type, model.modules())}, backend)

    wiring.undo.append(forget)
    compile_model: Any = model.compile_repeated_blocks if how.compile == "blocks" else model.compile
    compile_model(backend=backend, **how.compile_arguments)
    return call_of(model), store


def _eager(model: nn.Module, wiring: Wiring, how: How, prefix: str) -> tuple[Callable[..., Any], StateStore]:
    from lite_attention.compile.eager import attach

    store = _store(model, wiring, how, prefix)
    run, detach = attach(model, store)
    wiring.undo.append(lambda _: detach())
    return run, store
