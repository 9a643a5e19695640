"""What SGLang calls: the backend "lite_attention", and the attention of one layer."""

from __future__ import annotations

import functools
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise
from numbers import Integral, Real
from pkgutil import resolve_name
from typing import Any

import torch
from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import AttentionBackend, AttentionImpl
from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context_or_none
from sglang.multimodal_gen.runtime.platforms import current_platform
from sglang.multimodal_gen.runtime.server_args import get_global_server_args

from lite_attention.integrations.serving import Layer, Moment, ServedAttention
from lite_attention.integrations.serving_options import ServingOptions
from lite_attention.integrations.sglang import backend_member
from lite_attention.integrations.wrap import wrap_once
from lite_attention.ops import attention
from lite_attention.ops.threads import PerThread
from lite_attention.ops.torch_internals import uncompiled

__all__ = ["LiteAttentionBackend", "LiteAttentionImpl"]

_MINIMAX_H3 = "sglang.multimodal_gen.runtime.models.dits.minimax_h3"
_unnamed = count()  # layers that SGLang gives no path


class LiteAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """The backend, as SGLang asks for it."""

    @staticmethod
    def get_enum() -> Any:
        """Return its member of the enumeration of backends."""
        return backend_member()

    @staticmethod
    def get_impl_cls() -> type[LiteAttentionImpl]:
        """Return what a layer makes one of."""
        return LiteAttentionImpl

    @classmethod
    def supports_ring_rotation(cls) -> bool:
        """Return that calls tell their log-sum-exp, so that parts can be merged."""
        return True


class LiteAttentionImpl(AttentionImpl):  # type: ignore[misc]
    """The attention of one layer.

    Args:
        num_heads: query heads.
        head_size: width of a head.
        softmax_scale: factor of the scores.
        causal: a causal layer stays dense.
        num_kv_heads: key heads.
        prefix: path of the layer in its model.
        is_cross_attention: such a layer stays dense.
        options: passed to the dense backend.

    Raises:
        ValueError: an option in --attention-backend-config that there is not, or one out of range.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        is_cross_attention: bool = False,
        **options: Any,
    ) -> None:
        self._may_skip = not (causal or is_cross_attention)
        self._served = _served()
        _watch_minimax_h3()
        self._layer = Layer(prefix.removesuffix(".impl") or f"attention[{next(_unnamed)}]", softmax_scale)
        self._dense = _dense_backend(head_size).get_impl_cls()(
            num_heads=num_heads, head_size=head_size, softmax_scale=softmax_scale, causal=causal,
            num_kv_heads=num_kv_heads, prefix=prefix, is_cross_attention=is_cross_attention, **options,
        )  # fmt: skip

    @uncompiled
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: Any = None,
        *,
        return_softmax_lse: bool = False,
    ) -> Any:
        """Attend: (batch, tokens, heads, head_dim); the log-sum-exp is (batch, heads, tokens), natural log."""
        result = self._skipping(query, key, value, return_softmax_lse)
        if result is not None:
            return result
        if return_softmax_lse:
            return attention(query, key, value, scale=self._layer.scale, return_lse=True)
        return self._dense.forward(query, key, value, None)

    @uncompiled
    def forward_varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        cu_seqlens_host: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Attend within each of the sequences that are packed one behind the other: (tokens, heads, head_dim)."""
        if not (self._may_skip and self._served.follow()):
            return self._dense.forward_varlen(  # type: ignore[no-any-return]
                query, key, value, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cu_seqlens_host=cu_seqlens_host
            )
        bounds = cu_seqlens.tolist() if cu_seqlens_host is None else cu_seqlens_host
        out = query.new_zeros(*query.shape[:2], value.shape[2])
        picture = _video_of_minimax_h3()
        for start, end in pairwise(bounds):
            if start < end:
                part = [x[None, start:end] for x in (query, key, value)]
                is_there = picture is not None and start == 0 and picture[1] <= end
                one = self._served.attend(self._layer, *part, picture=picture if is_there else None)
                out[start:end] = (self._dense.forward(*part, None) if one is None else one)[0]
        return out

    @uncompiled
    def forward_ring_kv_chunk(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend with one part of the keys: (tokens, heads, head_dim), and a log-sum-exp (heads, tokens)."""
        out, lse = self.forward(query[None], key[None], value[None], return_softmax_lse=True)
        return out[0], lse[0]

    def _skipping(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, return_lse: bool) -> Any:
        if not (self._may_skip and self._served.follow()):
            return None
        return self._served.attend(self._layer, query, key, value, return_lse=return_lse)


# ---- where the video of MiniMax-H3 stands ----------------------------------------------------------------------------


@dataclass
class _Video:
    """Where the video stands in the packed sequence of the model."""

    rows: torch.Tensor | None = None  # the positions that the forward is to predict; None outside of one
    read: tuple[torch.Tensor, tuple[int, int] | None] | None = None  # positions, and (start, end) if they are a range


_video: PerThread[_Video] = PerThread(_Video)


def _watch_minimax_h3() -> None:
    """Note which rows each forward of the model is to predict: its layers are not told, nor is the context."""
    model = getattr(sys.modules.get(_MINIMAX_H3), "MiniMaxH3DiTModel", None)
    if model is not None:
        wrap_once(model, "forward", _noting_the_video)


def _noting_the_video(forward: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return forward(model, *args, **kwargs)
    told, here = kwargs.get("img_pos_for_infer_output_info"), _video()
    outer, here.rows = here.rows, told.get("position_ids") if isinstance(told, dict) else None
    try:
        return forward(model, *args, **kwargs)
    finally:
        here.rows = outer


def _video_of_minimax_h3() -> tuple[int, int] | None:
    """Return where the video stands, (start, end), in a forward of the model; None elsewhere."""
    here = _video()
    if here.rows is None or not here.rows.numel():
        return None
    if here.read is None or here.read[0] is not here.rows:  # reading waits for the device: once for each generation
        first, last = map(int, here.rows.flatten()[[0, -1]].tolist())
        here.read = here.rows, (first, last + 1) if last + 1 - first == here.rows.numel() else None
    return here.read[1]


def _dense_backend(head_size: int) -> Any:
    """Return the backend that SGLang takes by itself."""
    from sglang.multimodal_gen.runtime.utils.precision import get_compute_dtype

    return resolve_name(current_platform.get_attn_backend_cls_str(None, head_size, get_compute_dtype()))


@dataclass
class _Seen:
    """What a thread saw last: SGLang makes a context for each forward, and has a request for each generation."""

    context: weakref.ref[Any] | None = None
    denoises: bool = False  # in that context
    request: weakref.ref[Any] | None = None
    alone: int | None = None  # the step that contexts without a request have counted to, from 0 on
    counts: bool = False  # the request's forwards are numbered from 0; otherwise what they tell is a timestep
    timesteps: tuple[object, list[float]] | None = None  # of the request, as it has them, and as numbers


class _Served(ServedAttention):
    """Follows the forwards of a server."""

    def __init__(self, options: ServingOptions) -> None:
        super().__init__(options)
        self._seen = PerThread(_Seen)

    def follow(self) -> bool:
        """Note which forward this thread is in, and return whether it is a denoising one of a request."""
        context, seen = get_forward_context_or_none(), self._seen()
        if context is None:
            return False
        if seen.context is None or seen.context() is not context:
            seen.context, seen.denoises = weakref.ref(context), self._begin(seen, context)
        return seen.denoises

    def _begin(self, seen: _Seen, context: Any) -> bool:
        """Begin a forward, and return whether it is a denoising one of a request."""
        request, told = context.forward_batch, _told(context.current_timestep)
        if request is None or told is None:
            return request is None and told is not None and self._begin_without_request(seen, told)
        begins = seen.request is None or seen.request() is not request
        if begins:
            seen.request, seen.timesteps = weakref.ref(request), None
            seen.counts = told == 0 and isinstance(told, int)
        self.begin_forward(_moment(seen, request, told, begins))
        return True

    def _begin_without_request(self, seen: _Seen, told: float) -> bool:
        """Begin a forward of a loop that counts its steps but has no request, from its second step on.

        At a first step it cannot be told from an encoder, which runs without a request too, always at the same step.
        """
        before = seen.alone
        goes_on = isinstance(told, int) and before is not None and told - before in (0, 1)
        seen.alone = int(told) if goes_on or told == 0 else None
        if goes_on and told > 0:
            self.begin_forward(Moment(step=int(told), begins=before == 0))
            return True
        if told > 1:
            self.store.say(
                "this pipeline of SGLang denoises without a request in the forward context, and without steps from 0 "
                "on, so generations cannot be told apart, and its attention is dense"
            )
        return False


def _told(step: Any) -> float | None:
    """Return what a forward context says of its step: a number, or a timestep; None = it is no denoising step."""
    if isinstance(step, torch.Tensor):
        step = float(step.flatten()[0]) if step.numel() else None
    if isinstance(step, bool) or not isinstance(step, Real) or not float(step) >= 0:  # nor is NaN
        return None
    return int(step) if isinstance(step, Integral) else float(step)


def _moment(seen: _Seen, request: Any, told: float, begins: bool) -> Moment:
    branch = "uncond" if getattr(request, "is_cfg_negative", False) else "cond"
    num_steps = getattr(request, "num_inference_steps", None)
    if not (seen.counts and isinstance(told, int)):
        return Moment(branch=branch, timestep=float(told), begins=begins, num_steps=num_steps)
    return Moment(branch=branch, step=told, begins=begins, num_steps=num_steps, time=_time(seen, request, told))


def _time(seen: _Seen, request: Any, step: int) -> float | None:
    """Return the timestep of a step of a request; they are read from the device once."""
    timesteps = getattr(request, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.dim() != 1:
        return None
    if seen.timesteps is None or seen.timesteps[0] is not timesteps:
        seen.timesteps = timesteps, timesteps.tolist()
    return seen.timesteps[1][step] if step < len(seen.timesteps[1]) else None


def _served() -> _Served:
    """Return what serves all layers with the configuration of this server."""
    config = getattr(get_global_server_args(), "attention_backend_config", None) or {}
    return _served_with(json.dumps(config, sort_keys=True))


@functools.cache
def _served_with(config: str) -> _Served:
    return _Served(ServingOptions.of(json.loads(config)))
