"""vLLM-Omni 0.30.0, as far as a plug-in of its diffusion models sees it."""

from __future__ import annotations

import enum
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import hosts

__all__ = ["CLASSES", "FOLDER", "config", "install"]

FOLDER = "LITE_ATTENTION_VLLM_OMNI"
_DIFFUSION = "vllm_omni.diffusion"
_BACKENDS = f"{_DIFFUSION}.attention.backends"
_ADAPTER = "lite_attention.integrations.vllm_omni_backend"
_BARE = [f"{_BACKENDS}.utils", f"{_DIFFUSION}.distributed"]

config = SimpleNamespace(parallel_config=SimpleNamespace(ring_degree=1))


def install(patch: pytest.MonkeyPatch, kind: str) -> None:
    """Make vLLM-Omni importable until the test ends."""
    root = hosts.folder(FOLDER) if kind == "wheel" else None
    modules = [*_stubs(), *([] if root else _recorded())]
    hosts.install(patch, "vllm_omni", root, modules, _ADAPTER, _BARE)


class _Platform:
    """One with kernels for CUDA; in tests they get tensors of the CPU."""

    device_name = "cuda"

    def is_cuda(self) -> bool:
        return True

    def is_rocm(self) -> bool:
        return False

    def get_diffusion_attn_backend_cls(
        self, selected_backend: str | None, head_size: int, allow_trtllm_default: bool = True
    ) -> str:
        assert selected_backend is None
        return f"{_BACKENDS}.sdpa.SDPABackend"


def _stubs() -> list[hosts.Module]:
    def resolve(path: str) -> Any:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    vllm = hosts.stub("vllm", ir=None)
    others = [
        hosts.stub("vllm.ir"),
        hosts.stub("vllm.logger", init_logger=hosts.logger),
        hosts.stub("vllm.config", VllmConfig=object),
        hosts.stub("vllm.utils"),
        hosts.stub("vllm.utils.import_utils", resolve_obj_by_qualname=resolve),
        hosts.stub("vllm.sequence", IntermediateTensors=type("IntermediateTensors", (), {})),
        hosts.stub(f"{_DIFFUSION}.data", OmniDiffusionConfig=object),
        hosts.stub(f"{_DIFFUSION}.config", get_current_diffusion_config_or_none=lambda: config),
        hosts.stub(
            f"{_DIFFUSION}.distributed.parallel_state", get_cfg_group=None,
            get_classifier_free_guidance_rank=lambda: 0, get_classifier_free_guidance_world_size=lambda: 1,
            is_cfg_group_initialized=lambda: False,
        ),
        hosts.stub("vllm_omni.platforms", current_omni_platform=_Platform()),
    ]  # fmt: skip
    return [vllm, *others]


# ---- recorded ------------------------------------------------------------------------------------------------------


class AttentionBackend(ABC):
    accept_output_buffer = False
    supported_platforms: tuple[str, ...] | None = None
    supports_piecewise_spans: bool = False

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        return False

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        sizes = cls.get_supported_head_sizes()
        return not sizes or head_size in sizes

    @classmethod
    def validate_available(cls) -> None:
        return None

    @staticmethod
    @abstractmethod
    def get_supported_head_sizes() -> list[int]: ...


class AttentionImpl(ABC):
    @abstractmethod
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **extra_impl_args: Any,
    ) -> None: ...

    def forward(self, query: Any, key: Any, value: Any, attn_metadata: Any = None) -> Any:
        return self.forward_cuda(query, key, value, attn_metadata)

    def forward_cuda(self, query: Any, key: Any, value: Any, attn_metadata: Any = None) -> Any:
        raise NotImplementedError


class SDPAImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        backend_kwargs: dict[str, Any] | None = None,
        **extra_impl_args: Any,
    ) -> None:
        self.causal, self.scale = causal, softmax_scale

    def forward_cuda(self, query: Any, key: Any, value: Any, attn_metadata: Any = None) -> Any:
        mask = None if attn_metadata is None else attn_metadata.attn_mask
        mask = mask[:, None, None].bool() if mask is not None and mask.dim() == 2 else mask
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=self.scale)
        return out.transpose(1, 2)  # fmt: skip


class SDPABackend(AttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        return SDPAImpl

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []


@dataclass
class VideoTokenSpan:
    start: int
    latent_grid: tuple[int, int, int]
    role: str

    @property
    def length(self) -> int:
        return math.prod(self.latent_grid)


@dataclass
class VideoTokenLayout:
    prefix_len: int | None = None
    latent_grid: tuple[int, int, int] | None = None
    used_len: int | None = None
    video_spans: tuple[VideoTokenSpan, ...] = ()


@dataclass
class AttentionMetadata:
    attn_mask: torch.Tensor | None = None
    full_attn_spans: list[list[tuple[int, int]]] | None = None
    video_layout: VideoTokenLayout | None = None


@dataclass
class ForwardContext:
    in_diffusion_kv_memory_profile: bool = False
    denoise_step_idx: int | None = None
    denoise_timestep: float | None = None
    total_denoise_steps: int | None = None


class CFGParallelMixin:
    def predict_noise(self, *args: Any, **kwargs: Any) -> Any: ...

    def predict_noise_maybe_with_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float,
        positive_kwargs: dict[str, Any],
        negative_kwargs: dict[str, Any] | None,
        cfg_normalize: bool = True,
        output_slice: int | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        results = [self.predict_noise(**positive_kwargs)]
        if do_true_cfg and negative_kwargs is not None:
            results.append(self.predict_noise(**negative_kwargs))
        return results[0] if len(results) == 1 else torch.lerp(results[1], results[0], true_cfg_scale)

    def predict_noise_with_multi_branch_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: float | dict[str, float],
        branches_kwargs: list[dict[str, Any]],
        cfg_normalize: bool = False,
        output_slice: int | None = None,
    ) -> Any:
        results = [self.predict_noise(**branch) for branch in branches_kwargs]
        return self.combine_multi_branch_cfg_noise(results, true_cfg_scale, cfg_normalize)

    def combine_multi_branch_cfg_noise(self, predictions: Any, true_cfg_scale: Any, cfg_normalize: bool = False) -> Any:
        return predictions[0]


# Where each is in the wheel.
_ABSTRACT, _SDPA = "attention/backends/abstract.py", "attention/backends/sdpa.py"
_CFG, _CONTEXT = "distributed/cfg_parallel.py", "forward_context.py"


def _set_forward_context(
    vllm_config: Any = None,
    omni_diffusion_config: Any = None,
    attn_metadata: Any = None,
    paged_kv_runtime: Any = None,
    paged_kv_cached_prefix_len: int = 0,
    in_diffusion_kv_memory_profile: bool = False,
    split_text_embed_in_sp: bool = False,
    denoise_step_idx: int | None = None,
) -> ForwardContext:
    return ForwardContext(in_diffusion_kv_memory_profile, denoise_step_idx)


CLASSES: dict[str, tuple[str, Any]] = {
    "AttentionImpl.__init__": (_ABSTRACT, AttentionImpl.__init__),
    "AttentionImpl.forward": (_ABSTRACT, AttentionImpl.forward),
    "AttentionImpl.forward_cuda": (_ABSTRACT, AttentionImpl.forward_cuda),
    "AttentionBackend.supports_attention_mask": (_ABSTRACT, AttentionBackend.supports_attention_mask),
    "AttentionBackend.supports_head_size": (_ABSTRACT, AttentionBackend.supports_head_size),
    "AttentionBackend.validate_available": (_ABSTRACT, AttentionBackend.validate_available),
    "AttentionBackend.get_supported_head_sizes": (_ABSTRACT, AttentionBackend.get_supported_head_sizes),
    "SDPAImpl.__init__": (_SDPA, SDPAImpl.__init__),
    "CFGParallelMixin.predict_noise": (_CFG, CFGParallelMixin.predict_noise),
    "CFGParallelMixin.predict_noise_maybe_with_cfg": (_CFG, CFGParallelMixin.predict_noise_maybe_with_cfg),
    "CFGParallelMixin.predict_noise_with_multi_branch_cfg": (
        _CFG, CFGParallelMixin.predict_noise_with_multi_branch_cfg
    ),
    "set_forward_context": (_CONTEXT, _set_forward_context),
    "get_forward_context": (_CONTEXT, lambda: None),
    "is_forward_context_available": (_CONTEXT, lambda: None),
    "set_forward_context_denoise_step_idx": (_CONTEXT, lambda step_idx: None),
    "set_forward_context_denoise_timestep": (_CONTEXT, lambda timestep: None),
    "set_forward_context_denoise_total_steps": (_CONTEXT, lambda total_steps: None),
}  # fmt: skip


def _recorded() -> list[hosts.Module]:
    class DiffusionAttentionBackendEnum(enum.Enum):
        TORCH_SDPA = f"{_BACKENDS}.sdpa.SDPABackend"

        def get_path(self) -> str:
            return str(self.value)

        def get_class(self) -> Any:
            module, _, name = self.get_path().rpartition(".")
            return getattr(importlib.import_module(module), name)

    held = SimpleNamespace(context=None)

    @contextmanager
    def set_forward_context(**options: Any) -> Iterator[None]:
        outer, held.context = held.context, _set_forward_context(**options)
        try:
            yield
        finally:
            held.context = outer

    def setter(name: str) -> Any:
        return lambda value: setattr(held.context, name, value)

    mixin = type("CFGParallelMixin", (CFGParallelMixin,), dict(vars(CFGParallelMixin)))
    return [
        hosts.stub(
            f"{_DIFFUSION}.forward_context", set_forward_context=set_forward_context,
            get_forward_context=lambda: held.context, is_forward_context_available=lambda: held.context is not None,
            set_forward_context_denoise_step_idx=setter("denoise_step_idx"),
            set_forward_context_denoise_timestep=setter("denoise_timestep"),
            set_forward_context_denoise_total_steps=setter("total_denoise_steps"),
        ),
        hosts.stub(
            f"{_BACKENDS}.abstract", AttentionBackend=AttentionBackend, AttentionImpl=AttentionImpl,
            AttentionMetadata=AttentionMetadata, VideoTokenLayout=VideoTokenLayout, VideoTokenSpan=VideoTokenSpan,
        ),
        hosts.stub(f"{_BACKENDS}.sdpa", SDPABackend=SDPABackend),
        hosts.stub(f"{_BACKENDS}.registry", DiffusionAttentionBackendEnum=DiffusionAttentionBackendEnum),
        hosts.stub(f"{_DIFFUSION}.distributed.cfg_parallel", CFGParallelMixin=mixin),
    ]  # fmt: skip
