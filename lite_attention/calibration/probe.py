"""Standing between a model and its skip-aware attention: every call is caught, while the model runs eagerly."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lite_attention.api import disable, enable, reset
from lite_attention.calibration.shared_calls import ALONE, Sharing, sharing_of
from lite_attention.compile.settings import CommonOptions
from lite_attention.enabled import run_by, session_of, store_of
from lite_attention.model_sites import methods_of, parts_of, sites_of
from lite_attention.module import LiteAttention
from lite_attention.ops.control import FLAG_DENSE, FLAGS, Call, read_control, write_control
from lite_attention.ops.cpu import skipped_tiles
from lite_attention.ops.methods import METHODS
from lite_attention.ops.option_names import takes_options
from lite_attention.ops.schema import ATTENTION, IMPLEMENTATIONS
from lite_attention.ops.tiles import ceil_div
from lite_attention.ops.torch_internals import override, override_of, plain_call, traced_call, uncompiled, unwrapped
from lite_attention.parallel.agreement import check_groups, shard_of_all

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from lite_attention.compile.store import StateStore

__all__ = ["AttentionProbe", "CaughtCall", "EnableOptions", "Output", "Place", "check_can_be_probed"]

Output = tuple[torch.Tensor, torch.Tensor]  # out, lse
Place = tuple[str, int, int]  # site, slot, step

_probed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that a probe is attached to


class EnableOptions(CommonOptions, total=False):
    """Arguments of `lite_attention.enable` that a model which is not enabled yet is measured with."""

    token_order: str | Sequence[int] | None


class CaughtCall(NamedTuple):
    """One call of `lite_attention::skip_attention`, before it runs."""

    site: str  # as `lite_attention.report` names it
    ordinal: int  # among the states of that name: a module that attends twice, or at two sizes
    control: Call  # slot, step, ...
    skipped: torch.Tensor  # bool [B, Hq, q_tiles, k_tiles], by the votes of earlier steps
    op: Any
    args: tuple[Any, ...]  # q, k, v, skip_mask, control, threshold, initial_mask, must_do, key_mask
    kwargs: dict[str, Any]  # scale, tile_m, tile_n, quantization
    sharing: Sharing = ALONE  # with other ranks

    @property
    def place(self) -> Place:
        """Site, slot and step."""
        return self.site, self.control.slot, self.control.step

    @property
    def tokens(self) -> int:
        """Queries, of all ranks."""
        return int(self.sharing.shard.all_queries(self.args[0].shape[1], self.args[1].shape[1]))

    @property
    def where(self) -> str:
        """Name of the site with slot and step, for messages."""
        return f"{self.site}, slot {self.control.slot}, step {self.control.step}"

    def run(self, threshold: torch.Tensor | None = None) -> Output:
        """Run the op as it was called, or with another threshold table."""
        args = self.args if threshold is None else (*self.args[:5], threshold, *self.args[6:])
        return self.op(*args, **self.kwargs)  # type: ignore[no-any-return]

    def run_dense(self) -> Output:
        """Run the op with nothing skipped, by the same kernel; the state stays as it is."""
        control = self.args[4].clone()
        control[FLAGS : FLAGS + 1].bitwise_or_(FLAG_DENSE)
        return self.op(*self.args[:4], control, *self.args[5:], **self.kwargs)  # type: ignore[no-any-return]

    def run_stateless(self) -> Output:
        """Compute dense attention with the dense op, which is faster where it computes the same."""
        q, k, v, *_, key_mask = self.args
        if self.op is not IMPLEMENTATIONS[None] or self.kwargs.get("quantization", "none") != "none":
            return self.run_dense()
        return ATTENTION(q, k, v, key_mask, scale=self.kwargs["scale"])  # type: ignore[no-any-return]

    def finish(self, words: torch.Tensor) -> None:
        """Do to the state what the op would have done, with this mask after it: int32 [B, Hq, q_tiles, k_words]."""
        q, k, _, skip_mask, control, *_ = self.args
        batch, heads, q_tiles, k_words = words.shape
        skip_mask[self.control.slot, :batch, :heads, :q_tiles, :k_words] = words
        write_control(control, self.control, (q.shape[0], q.shape[1], k.shape[1]))


def check_can_be_probed(model_or_pipe: Any) -> None:
    """Raise ValueError for the result of torch.compile, and for a model that is measured already."""
    for name, model in parts_of(model_or_pipe).items():
        if unwrapped(model) is not model:
            raise ValueError(
                f"{name}: expected a model before torch.compile, got its result: attention is measured eagerly; "
                "give the model itself, and use it meanwhile"
            )
        if model in _probed:
            raise ValueError(f"{name}: expected a model that nobody measures, got one with a calibration under way")


class AttentionProbe:
    """Catches the skip-aware attention of a model or pipeline until `detach`; the model runs eagerly meanwhile.

    A model that neither holds `LiteAttention` nor was given to `enable` is enabled here, so branches, steps and fresh
    starts are followed as ever; one that was enabled keeps its settings. Subclasses say what a call returns.

    Args:
        model_or_pipe: an nn.Module, or a diffusers pipeline.
        num_steps: denoising steps of a generation, for a model that is enabled here.
        settings: as for `enable`, for a model that is enabled here.

    Raises:
        TypeError: a setting that is none.
        ValueError: the result of torch.compile, a model that is measured already, settings for one that has its own, or
            one with another method. The model is as before then.
    """

    method: ClassVar[Literal["votes", "residual"]] = "votes"  # whose calls are caught

    @takes_options(*EnableOptions.__annotations__)
    def __init__(self, model_or_pipe: Any, num_steps: int | None = None, **settings: Unpack[EnableOptions]) -> None:
        self._target = model_or_pipe
        self._models = parts_of(model_or_pipe)
        self._sites: dict[
            int, tuple[torch.Tensor, str, int, Sharing]
        ] = {}  # by id of the skip mask, which is kept alive
        self._named: Counter[str] = Counter()  # states by name
        check_can_be_probed(model_or_pipe)
        has_its_own = any(store_of(model) or _holds_modules(model) for model in self._models.values())
        if settings and has_its_own:
            raise ValueError(
                "settings: expected none for a model that was given to enable() or holds LiteAttention, "
                f"got {sorted(settings)}"
            )
        if has_its_own:
            self._check_method()
        self.ops = frozenset(METHODS[self.method].implementations.values())
        with contextlib.ExitStack() as undo:
            if not has_its_own:
                settings["method"] = self.method
                enable(model_or_pipe, compile=False, num_steps=num_steps, **settings)
                undo.callback(disable, model_or_pipe)
            undo.callback(self.start_fresh)
            self.shard = shard_of_all(model_or_pipe)
            check_groups(self.shard)
            self._hold_heads(undo)
            for model in self._models.values():
                self._attach(model, undo)
            self._undo = undo.pop_all()  # nothing went wrong

    def _hold_heads(self, undo: contextlib.ExitStack) -> None:
        """Let heads stay on their ranks meanwhile."""
        for site in sites_of(self._target):
            exchange = None if site.module is None else site.module.exchange
            if exchange is not None:
                exchange.is_held = True
                undo.callback(setattr, exchange, "is_held", False)

    def _check_method(self) -> None:
        for residual in methods_of(self._target):
            method = "votes" if residual is None else "residual"
            if method != self.method:
                raise ValueError(f"method: expected a model with method={self.method!r}, got one with {method!r}")

    # ---- what subclasses say ---------------------------------------------------------------------------------------

    def attend(self, call: CaughtCall) -> Output:
        """Return the output of a call; as it is here, the call runs as if nobody looked."""
        return call.run()

    def after_forward(self) -> None:
        """Is called after each forward of a model, also one that raised."""

    # ---- attaching -------------------------------------------------------------------------------------------------

    def _attach(self, model: nn.Module, undo: contextlib.ExitStack) -> None:
        from lite_attention.compile.eager import attach
        from lite_attention.compile.store import StateStore

        _probed.add(model)
        undo.callback(_probed.discard, model)
        before = {module: override_of(module) for module in model.modules()}
        own = store_of(model)
        undo.callback(_restore_compiled, before, model, own)
        for module in before:  # code compiled earlier would run around the probe
            override(module, None)
        inner: Any = plain_call(model)
        if own is not None:
            never = replace(own.settings, threshold=-torch.inf) if self.method == "votes" else own.settings
            store = StateStore(never, session_of(model), model, own.prefix, lambda: own.shard)
            undo.callback(store.clear)
            run, detach = attach(model, store)
            undo.callback(detach)
            inner = run_by(model, store, run)
        override(model, uncompiled(_Watched(self, inner).run))

    def start_fresh(self) -> None:
        """Begin a new generation."""
        for model in self._models.values():
            if store_of(model):
                reset(model)
        for site in sites_of(self._target):
            site.reset()

    def detach(self) -> None:
        """Leave the model as it was; its skip states start fresh. Further calls do nothing."""
        self._undo.close()
        self._sites.clear()
        self._named.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    # ---- calls -----------------------------------------------------------------------------------------------------

    def _caught(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        q, k, _, skip_mask, control, _, initial_mask, *_ = args
        batch, q_tiles = q.shape[0], ceil_div(q.shape[1], kwargs["tile_m"])
        does = read_control(control, skip_mask.shape[0], (batch, q.shape[1], k.shape[1]))
        bits = skip_mask[does.slot, :batch, :, :q_tiles]
        skipped = skipped_tiles(does, bits, initial_mask, ceil_div(k.shape[1], kwargs["tile_n"]))
        site, ordinal, sharing = self._site_of(skip_mask, q.shape[2])
        call = CaughtCall(site, ordinal, does, skipped, op, args, kwargs, sharing)
        return call.run() if does.dense else self.attend(call)

    def _site_of(self, skip_mask: torch.Tensor, heads: int) -> tuple[str, int, Sharing]:
        found = self._sites.get(id(skip_mask))
        if found is None:
            sites = sites_of(self._target)
            site = next((site for site in sites if any(s.skip_mask is skip_mask for s in site.states)), None)
            if site is None:
                raise RuntimeError("attention was called with a skip state that belongs to no module of the model")
            sharing = sharing_of(site, heads)
            found = self._sites[id(skip_mask)] = (skip_mask, site.name, self._named[site.name], sharing)
            self._named[site.name] += 1
        return found[1:]


def _holds_modules(model: nn.Module) -> bool:
    return any(isinstance(module, LiteAttention) for module in model.modules())


def _restore_compiled(before: dict[nn.Module, Any], model: nn.Module, store: StateStore | None) -> None:
    """Put back what ran the modules of a model, unless it was enabled or disabled meanwhile."""
    if store_of(model) is store:
        for module, compiled in before.items():
            override(module, compiled)


class _Watched:
    """Runs a model with its calls of the op caught."""

    def __init__(self, probe: AttentionProbe, inner: Any) -> None:
        self.probe, self.inner = probe, inner

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with _Catch(self.probe):
                return self.inner(*args, **kwargs)
        finally:
            self.probe.after_forward()


class _Catch(TorchFunctionMode):
    def __init__(self, probe: AttentionProbe) -> None:
        super().__init__()
        self._probe = probe

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if torch.compiler.is_compiling():  # torch.compile of a part of the model
            return traced_call(func, args, kwargs or {})
        if func in self._probe.ops:
            return self._probe._caught(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
