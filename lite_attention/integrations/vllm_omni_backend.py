"""What vLLM-Omni calls: the backend "LITE_ATTENTION", and the attention of one layer."""

from __future__ import annotations

import functools
import math
import os
import weakref
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

import torch
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available
from vllm_omni.platforms import current_omni_platform

from lite_attention.integrations.serving import Layer, Moment, ServedAttention
from lite_attention.integrations.serving_options import ServingOptions, mapping_of
from lite_attention.integrations.vllm_omni import BACKEND, passes
from lite_attention.ops.threads import PerThread
from lite_attention.ops.torch_internals import uncompiled

__all__ = ["CONFIG", "LiteAttentionBackend", "LiteAttentionImpl"]

CONFIG = "LITE_ATTENTION_CONFIG"  # the environment variable


class LiteAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """The backend, as vLLM-Omni asks for it."""

    supported_platforms = ("cuda",)
    supports_piecewise_spans = True  # in as far as the dense backend does

    @staticmethod
    def get_name() -> str:
        """Return its name."""
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type[LiteAttentionImpl]:
        """Return what a layer makes one of."""
        return LiteAttentionImpl

    @staticmethod
    def get_metadata_cls() -> Any:
        """Raise: there is no metadata of its own."""
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> Any:
        """Raise: there is no metadata of its own."""
        raise NotImplementedError

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Return no list: what has no kernel is dense."""
        return []

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """Return that masks of keys are taken, and others left to PyTorch."""
        return True

    @classmethod
    def validate_available(cls) -> None:
        """Raise ValueError, or OSError, where the configuration is wrong."""
        _served()


class LiteAttentionImpl(AttentionImpl):  # type: ignore[misc]
    """The attention of one layer.

    Args:
        num_heads: query heads.
        head_size: width of a head.
        softmax_scale: factor of the scores.
        causal: a causal layer stays dense.
        num_kv_heads: key heads.
        prefix: path of the layer in its model.
        role: "self", "joint", or another, which stays dense.
        options: passed to the dense backend.

    Raises:
        ValueError: ring attention, or a configuration that is wrong.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        role: str = "self",
        **options: Any,
    ) -> None:
        _refuse_ring()
        self._may_skip = not causal and "cross" not in role
        self._served = _served()
        self._layer = Layer(prefix or role, softmax_scale)
        layer: dict[str, Any] = {
            "num_heads": num_heads, "head_size": head_size, "softmax_scale": softmax_scale, "causal": causal,
            "num_kv_heads": num_kv_heads, "prefix": prefix, "role": role, **options,
        }  # fmt: skip
        dense = _dense_backend(head_size)
        self._has_spans = dense.supports_piecewise_spans
        self._dense, self._masked = dense.get_impl_cls()(**layer), SDPABackend.get_impl_cls()(**layer)

    @uncompiled
    def forward_cuda(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: Any = None
    ) -> torch.Tensor:
        """Attend: (batch, tokens, heads, head_dim).

        Raises:
            ValueError: attention that is causal outside of spans, without a mask, where the dense backend has none.
        """
        mask, spans = (getattr(attn_metadata, name, None) for name in ("attn_mask", "full_attn_spans"))
        if spans is not None and mask is None and not self._has_spans:
            raise ValueError(
                f"full_attn_spans: expected none, or a 4D attn_mask beside them, as the backend beneath {BACKEND} has "
                f"no such attention, got {spans}"
            )
        key_mask = None if mask is None else _key_mask(mask, key)
        may_skip = self._may_skip and spans is None and (mask is None) == (key_mask is None)
        if may_skip and self._served.follow(self._layer):
            picture = _picture(getattr(attn_metadata, "video_layout", None))
            out = self._served.attend(self._layer, query, key, value, key_mask=key_mask, picture=picture)
            if out is not None:
                return out  # type: ignore[no-any-return]
        dense = self._dense if mask is None else self._masked
        return dense.forward(query, key, value, attn_metadata)  # type: ignore[no-any-return]


def _key_mask(mask: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """Return a mask as one of keys, (batch or 1, seq_k), None where it is none; floats of four dimensions are added."""
    if mask.dim() == 4 and mask.dtype == torch.bool and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    is_of_keys = mask.dim() == 2 and mask.shape[0] in (1, key.shape[0]) and mask.shape[1] == key.shape[1]
    return mask.bool() if is_of_keys else None


def _picture(layout: Any) -> tuple[int, int] | None:
    """Return where the video that is made stands, (start, end), as a model tells it; None = it does not."""
    if layout is None:
        return None
    targets = [(span.start, span.length) for span in layout.video_spans if span.role == "target"]
    if layout.prefix_len is not None and layout.latent_grid is not None:
        targets.append((layout.prefix_len, math.prod(layout.latent_grid)))
    return (targets[-1][0], sum(targets[-1])) if targets else None


def _dense_backend(head_size: int) -> Any:
    """Return the backend that vLLM-Omni takes by itself."""
    path = current_omni_platform.get_diffusion_attn_backend_cls(selected_backend=None, head_size=head_size)
    return resolve_name(path)


def _refuse_ring() -> None:
    """Raise where ring attention would go past the backend without a word."""
    parallel = getattr(get_current_diffusion_config_or_none(), "parallel_config", None)
    degree = getattr(parallel, "ring_degree", 1)
    if degree > 1:
        raise ValueError(f"ring_degree: expected 1 with {BACKEND}, got {degree}; use Ulysses sequence parallelism")


@dataclass
class _Seen:
    """What a thread saw last."""

    context: weakref.ref[Any] | None = None
    step: int | None = None
    number: int = 0  # of `predict_noise`
    layers: set[int] = field(default_factory=set)  # that ran in this forward, by id


class _Served(ServedAttention):
    """Follows the forwards of a worker."""

    def __init__(self, options: ServingOptions) -> None:
        super().__init__(options)
        self._seen = PerThread(_Seen)

    def follow(self, layer: Layer) -> bool:
        """Note which forward this thread is in, at each call of a layer, and return whether it is one of a request.

        A forward begins with a pass of `predict_noise`. Where there is none, it begins where a layer runs again.
        """
        if not is_forward_context_available() or get_forward_context().in_diffusion_kv_memory_profile:
            return False
        context, seen, here = get_forward_context(), self._seen(), passes()
        is_new = seen.context is None or seen.context() is not context
        again = here.branch is None and id(layer) in seen.layers
        if is_new or again or here.number != seen.number:
            step = context.denoise_step_idx
            goes_on = step is not None and seen.step is not None and step > seen.step
            self.begin_forward(
                Moment(here.branch, step, context.denoise_timestep, is_new and not goes_on, context.total_denoise_steps)
            )
            seen.context, seen.step, seen.number, seen.layers = weakref.ref(context), step, here.number, set()
        seen.layers.add(id(layer))
        return True


def _served() -> _Served:
    """Return what serves all layers with the configuration of this process."""
    return _served_with(os.environ.get(CONFIG, ""))


@functools.cache
def _served_with(config: str) -> _Served:
    return _Served(ServingOptions.of(mapping_of(config) if config.strip() else None))
