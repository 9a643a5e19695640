"""What a user calls: `enable` and `disable`, `branch` and `reset`."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn

from lite_attention import diffusers_hooks as hooks
from lite_attention import token_order as order
from lite_attention.compile.settings import OtherOptions, SkipSettings, check_compiling
from lite_attention.diffusers_hooks import Undo
from lite_attention.enabled import Wiring, session_of, wirings
from lite_attention.enabling import How, enable_model
from lite_attention.exact_tokens import check_exact_tokens
from lite_attention.masks import Pattern
from lite_attention.model_sites import models_of, parts_of, sites_of
from lite_attention.ops import Session, default_session
from lite_attention.ops.arguments import check_time
from lite_attention.ops.clock import Clock
from lite_attention.ops.option_names import takes_options
from lite_attention.ops.session import BRANCH_TIME
from lite_attention.ops.threads import PerThread
from lite_attention.ops.torch_internals import unwrapped
from lite_attention.pipeline_scheduler import PipelineScheduler
from lite_attention.presets import with_preset
from lite_attention.threshold_table import ThresholdTable, check_method, loaded, of_sites

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from lite_attention.exact_tokens import ExactTokenOption
    from lite_attention.ops.shard import Shard
    from lite_attention.ops.site import SiteKeep, SiteThreshold

__all__ = ["branch", "default_session", "disable", "enable", "reset"]

_Target = TypeVar("_Target")

# Distilled to run once a step: room for a second pass would be for nothing, and with residuals it is much.
_ONE_PASS = {"MiniMaxH3Transformer3DModel"}

_pipelines: weakref.WeakKeyDictionary[Any, Undo] = weakref.WeakKeyDictionary()


@takes_options(*OtherOptions.__annotations__)
def enable(
    model_or_pipe: _Target,
    *,
    compile: bool | Literal["blocks"] = True,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    inner: str | Callable[..., Any] = "inductor",
    token_order: str | Sequence[int] | None = None,
    threshold: SiteThreshold | ThresholdTable | str | Path | None = None,
    keep: SiteKeep | ThresholdTable | str | Path | None = None,
    preset: Literal["quality", "balanced", "fast"] | None = None,
    process_group: ProcessGroup | None = None,
    exact_tokens: ExactTokenOption | None = "auto",
    **settings: Unpack[OtherOptions],
) -> _Target:
    """Make a model, or the transformers of a diffusers pipeline, skip attention that does not matter.

    Which branch (cond, uncond), step and generation a call belongs to is read from diffusers' `cache_context`, from the
    timestep that the model is given, and from the loop of the pipeline, see `lite_attention.ops.clock`. A model without
    any of these needs `num_steps`, or `reset(model)` before each generation. Each thread has memories of its own. What
    goes otherwise than meant is warned of, once for each cause. Call it after offloading, hooks and adapters; calling
    it again replaces the earlier settings. An enabled model is not pickled, and its copies are not enabled.

    Args:
        model_or_pipe: an nn.Module, or a pipeline with `transformer` (and `transformer_2`, as Wan 2.2 has).
        compile: True compiles the whole model, "blocks" the repeated blocks that it names, False runs it eagerly.
        mode: as for torch.compile.
        options: as for torch.compile.
        dynamic: as for torch.compile.
        inner: what compiles the changed graphs, see `LiteAttentionBackend`.
        token_order: "tile3d" reorders the tokens of Wan and LTX-Video within the model so that a tile is a block of the
            video, see `lite_attention.token_order`; (frames, rows, columns) gives the size of the block. An
            `initial_mask` out of `lite_attention.masks` follows; any other is one of the reordered sequence.
        threshold: of method "votes": log2 units, at most 0: a number, a tensor that broadcasts to
            (slots, steps, heads), a callable that returns one of these for a `Site`, whose name is that which `report`
            prints, or a `ThresholdTable` or the path of its file. None = -10.
        keep: of method "residual": the share of tiles that sparse steps compute, above 0 and at most 1: a number, a
            tensor (steps,), a callable that returns one of these for a `Site`, or a `ThresholdTable` of shares or the
            path of its file. None = 0.3.
        preset: method "residual" with the options of `lite_attention.presets`, which says what each computes; options
            given beside it go before its own.
        process_group: over which attention heads are exchanged, where the model does not tell: `enable_parallelism` of
            diffusers and cache-dit tell it, whether they come before or after. Thresholds, shares, masks and files are
            of the whole model; each process takes what is its own.
        exact_tokens: tokens that are never skipped, and whose own attention skips nothing, rounded outward to tiles.
            "auto" is all but the picture in models that `lite_attention.token_layout` names: text, audio and references
            of MiniMax-H3, audio of LTX-2, text of HunyuanVideo, CogVideoX and Mochi. Or slices of each site's sequence,
            such as [(0, 226), (-256, None)]; or a callable that is given a `Site` and returns one of these, or None.
            Slices go with no `token_order`.
        settings: see `lite_attention.compile.SkipSettings`: `method`, `num_steps` and so on. Here `slots` is 3
            unless given, and 2 with method "residual"; of MiniMax-H3, which runs once a step, it is 1.

    Returns:
        The argument, changed in place.

    Raises:
        ValueError: nothing in it can be enabled, a setting is out of range, there is no such file or group, a table was
            found with other settings, or a model's tokens cannot be reordered. While running: a table, or a pattern,
            does not fit the model or the video.
        TypeError: a setting that there is not.
        OSError: the file of a table cannot be read.
    """
    # What is wrong is told before anything is changed.
    check_compiling(compile, mode, options, inner)
    _check_models(model_or_pipe, compile, token_order)
    check_exact_tokens(exact_tokens, token_order)
    told_shard = _shard_by(process_group)
    if all(type(model).__name__ in _ONE_PASS for model in parts_of(model_or_pipe).values()):
        settings.setdefault("slots", 1)
    keep = loaded("keep", keep)
    known = SkipSettings(**chosen_options(threshold, keep, preset, token_order, settings))
    if isinstance(keep, ThresholdTable):
        check_method(keep, known.residual)
    how = How(
        known, compile, {"mode": mode, "options": options, "dynamic": dynamic}, inner, token_order, told_shard,
        exact_tokens,
    )  # fmt: skip
    is_open = all(given is None for given in (keep, settings.get("num_steps"), settings.get("full_every")))
    _disable_all(model_or_pipe)
    try:
        _enable_all(model_or_pipe, how, preset if is_open else None)
    except BaseException:
        disable(model_or_pipe)
        raise
    return model_or_pipe


def _check_models(model_or_pipe: Any, compile: object, token_order: str | Sequence[int] | None) -> None:
    """Raise ValueError where models cannot be enabled so."""
    for name, model in parts_of(model_or_pipe).items():
        if unwrapped(model) is not model:
            raise ValueError(f"{name}: expected a model before torch.compile, got its result: enable() compiles it")
        if compile == "blocks" and not getattr(model, "_repeated_blocks", None):
            raise ValueError(
                f"compile: expected True or False, got 'blocks': {type(model).__name__} names no repeated blocks"
            )
        if token_order is not None:
            order.check(token_order, model)


def _disable_all(model_or_pipe: Any) -> None:
    """Disable models, and those within them."""
    disable(model_or_pipe)
    for model in models_of(model_or_pipe).values():
        for within in [module for module in model.modules() if module in wirings]:
            disable(within)


def _enable_all(model_or_pipe: Any, how: How, open_preset: str | None) -> None:
    """Enable models, and follow the loop of a pipeline.

    Args:
        model_or_pipe: whose.
        how: likewise.
        open_preset: the preset, where the number of steps that a loop announces decides what it is.
    """
    known = how.settings
    clock = PerThread(lambda: Clock(known.num_steps, known.max_steps))
    scheduler = None if isinstance(model_or_pipe, nn.Module) else PipelineScheduler(model_or_pipe)
    for part, model in models_of(model_or_pipe).items():
        wiring = wirings[model] = Wiring(PerThread(lambda: Session(known.slots)), clock, scheduler, open_preset)
        enable_model(model, wiring, how, f"{part}." if part else "")
    if not isinstance(model_or_pipe, nn.Module):
        _pipelines[model_or_pipe] = hooks.follow_progress(model_or_pipe, _begin_loops(model_or_pipe))


def chosen_options(
    threshold: Any, keep: Any, preset: str | None, token_order: str | Sequence[int] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options of `SkipSettings` out of those of `enable`."""
    chosen, num_steps = dict(options), options.get("num_steps")
    if threshold is not None:
        chosen["threshold"] = of_sites("threshold", threshold, num_steps)
    if keep is not None:
        chosen["keep"] = of_sites("keep", keep, num_steps)
    if preset is not None:
        chosen = with_preset(preset, chosen)
    # As many as pipelines of diffusers make passes in a step: LTX-2 has three, most have one or two. Residuals take too
    # much memory for a branch that may not come.
    chosen.setdefault("slots", 2 if chosen.get("method") == "residual" else 3)
    mask = chosen.get("initial_mask")
    if token_order is not None and isinstance(mask, Pattern):
        chosen["initial_mask"] = replace(mask, token_order=token_order)
    return chosen


def _shard_by(process_group: ProcessGroup | None) -> Shard | None:
    from lite_attention.parallel.shard import shard_by

    return None if process_group is None else shard_by(process_group)


def _begin_loops(pipe: Any) -> Callable[[int | None], None]:
    """Return a function that lets the transformers of a pipeline begin a loop; it keeps nothing alive."""
    of, models, warned = weakref.ref(pipe), weakref.WeakSet(models_of(pipe).values()), set[str]()

    def begin(total: int | None) -> None:
        for wiring in [wirings[model] for model in models if model in wirings]:
            wiring.begin_loop(total)
        parts = {} if of() is None else models_of(of())
        for part, model in parts.items():
            if model not in models and model not in wirings and part not in warned:
                warned.add(part)
                warnings.warn(
                    f"lite_attention: {part} came into the pipeline after enable(), so its attention is dense; call "
                    "enable() on the pipeline once more",
                    stacklevel=4,
                )

    return begin


def disable(model_or_pipe: _Target) -> _Target:
    """Undo `enable`, and drop the skip states; a model or pipeline that is not enabled is left as it is.

    Args:
        model_or_pipe: what was given to `enable`.

    Returns:
        The argument, changed in place.

    Raises:
        ValueError: it is neither a model nor a pipeline with a transformer.
    """
    if not isinstance(model_or_pipe, nn.Module) and model_or_pipe in _pipelines:
        _pipelines.pop(model_or_pipe)(model_or_pipe)
    for model in models_of(model_or_pipe).values():
        wiring = wirings.pop(model, None)
        for undo in reversed(wiring.undo if wiring else []):
            undo(model)
        if wiring and wiring.store:
            wiring.store.clear()
    return model_or_pipe


@contextlib.contextmanager
def branch(name: str, step: int | None = None, *, time: float | None = None, model: Any = None) -> Iterator[None]:
    """Run what is inside as one branch of the denoising step, with a memory of its own.

    Args:
        name: any name, such as "cond"; each new one takes the next slot.
        step: denoising step from 0 on, if known; it holds for all calls inside, and one that goes backwards begins a
            new generation.
        time: the flow's time, such as the noise level sigma, in any unit; what residuals are forecast by. It holds for
            all calls inside. A generation that begins with it should tell it throughout: a step without it forecasts
            nothing.
        model: a model or pipeline; None = all that runs inside in this thread, enabled or not.

    Raises:
        ValueError: one branch more than there are slots, a step out of range, a time that is no finite number, or
            `model` is neither a model nor a pipeline.
        RuntimeError: another thread is inside a branch of what is not enabled.
    """
    with contextlib.ExitStack() as stack:
        if model is None:
            times = {} if time is None else {BRANCH_TIME: check_time(time)}
            stack.enter_context(default_session.branch(name, step, time))
            for found in wirings.keyrefs():  # a list, whatever other threads enable meanwhile
                part = found()
                wiring = None if part is None else wirings.get(part)
                if wiring is not None:
                    stack.enter_context(wiring.session().telling(name, step, times))
        for part in [] if model is None else models_of(model).values():
            stack.enter_context(session_of(part).branch(name, step, time))
        yield


def reset(model_or_pipe: Any = None) -> None:
    """Begin a new generation: all skip states start fresh.

    Args:
        model_or_pipe: whose states, and those of this thread where it was given to `enable`; None = of all that was
            not.
    """
    if model_or_pipe is None:
        default_session.reset()
        default_session.branches.clear()
        return
    for model in models_of(model_or_pipe).values():
        wiring = wirings.get(model)
        if wiring is not None:
            wiring.clock().begin()
            wiring.session().reset()
        else:
            default_session.is_told = True
    for site in sites_of(model_or_pipe):
        site.reset()
