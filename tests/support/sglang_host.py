"""SGLang 0.5.23, as far as a plug-in of its diffusion models sees it."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import hosts

__all__ = ["CLASSES", "FOLDER", "Request", "install", "server_args"]

FOLDER = "LITE_ATTENTION_SGLANG"
_RUNTIME = "sglang.multimodal_gen.runtime"
_ADAPTER = "lite_attention.integrations.sglang_backend"
_BARE = ["sglang.srt.plugins", f"{_RUNTIME}.layers.attention.backends", f"{_RUNTIME}.managers"]

server_args = SimpleNamespace(attention_backend_config={})


@dataclass
class Request:
    """What a forward of a model belongs to."""

    is_cfg_negative: bool = False
    num_inference_steps: int | None = None


def install(patch: pytest.MonkeyPatch, kind: str, config: dict[str, Any] | None = None) -> None:
    """Make SGLang importable until the test ends, with a configuration of its attention."""
    patch.setattr(server_args, "attention_backend_config", config or {})
    root = hosts.folder(FOLDER) if kind == "wheel" else None
    hosts.install(patch, "sglang", root, _stubs() if root else [*_stubs(), *_recorded()], _ADAPTER, _BARE)


def _stubs() -> list[hosts.Module]:
    class ServerArgs:
        def _adjust_attention_backend(self) -> None: ...

    ServerArgs.__module__ = f"{_RUNTIME}.server_args.server_args"
    return [
        hosts.stub("sglang.kernels.kernel_api_logging", wrap_method_with_debug_kernel_once=lambda obj, *_, **__: obj),
        hosts.stub("sglang.multimodal_gen.envs", SGLANG_DIFFUSION_PLATFORM_OVERRIDE="cpu"),
        hosts.stub("sglang.multimodal_gen.third_party.pynvml"),
        hosts.stub(f"{_RUNTIME}.utils.logging_utils", init_logger=hosts.logger),
        hosts.stub(f"{_RUNTIME}.utils.precision", get_compute_dtype=lambda: torch.float32),
        hosts.stub("sglang.srt.environ", envs=SimpleNamespace(SGLANG_PLUGINS=SimpleNamespace(get=lambda: None))),
        hosts.stub(f"{_RUNTIME}.server_args", get_global_server_args=lambda: server_args, ServerArgs=ServerArgs),
        hosts.stub(
            ServerArgs.__module__, ServerArgs=ServerArgs, RING_CAPABLE_ATTENTION_BACKENDS=("fa", "sage_attn")
        ),
    ]  # fmt: skip


# ---- recorded ------------------------------------------------------------------------------------------------------


class AttentionBackend:
    accept_output_buffer = False

    @classmethod
    def supports_ring_rotation(cls) -> bool:
        return False


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
        **extra_impl_args: Any,
    ) -> None: ...

    @abstractmethod
    def forward(self, query: Any, key: Any, value: Any, attn_metadata: Any) -> Any: ...

    def forward_varlen(
        self, query: Any, key: Any, value: Any, *, cu_seqlens: Any, max_seqlen: int, cu_seqlens_host: Any = None
    ) -> Any:
        raise NotImplementedError

    def forward_ring_kv_chunk(self, query: Any, key: Any, value: Any) -> Any:
        raise NotImplementedError


class SDPAImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        causal: bool,
        softmax_scale: float,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args: Any,
    ) -> None:
        self.causal, self.scale = causal, softmax_scale

    def forward(self, query: Any, key: Any, value: Any, attn_metadata: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
        return out.transpose(1, 2)

    def forward_varlen(
        self, query: Any, key: Any, value: Any, *, cu_seqlens: Any, max_seqlen: int, cu_seqlens_host: Any = None
    ) -> Any:
        sizes = cu_seqlens.diff().tolist()
        parts = zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
        return torch.cat([self.forward(*(x[None] for x in part), None)[0] for part in parts])


class SDPABackend(AttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        return SDPAImpl


class CpuPlatform:
    @classmethod
    def get_attn_backend_cls_str(cls, selected_backend: Any, head_size: int, dtype: torch.dtype) -> str:
        return f"{_RUNTIME}.layers.attention.backends.sdpa.SDPABackend"


@dataclass
class ForwardContext:
    current_timestep: int
    attn_metadata: Any
    forward_batch: Any = None
    others: dict[str, Any] = field(default_factory=dict)


# Where each is in the wheel.
_LAYERS = "layers/attention/backends"
CLASSES: dict[str, tuple[str, Any]] = {
    "AttentionImpl.__init__": (f"{_LAYERS}/attention_backend.py", AttentionImpl.__init__),
    "AttentionImpl.forward": (f"{_LAYERS}/attention_backend.py", AttentionImpl.forward),
    "AttentionImpl.forward_varlen": (f"{_LAYERS}/attention_backend.py", AttentionImpl.forward_varlen),
    "AttentionImpl.forward_ring_kv_chunk": (f"{_LAYERS}/attention_backend.py", AttentionImpl.forward_ring_kv_chunk),
    "AttentionBackend.supports_ring_rotation": (
        f"{_LAYERS}/attention_backend.py", AttentionBackend.supports_ring_rotation
    ),
    "ServerArgs._adjust_attention_backend": ("server_args/server_args.py", lambda self: None),
    "SDPAImpl.__init__": (f"{_LAYERS}/sdpa.py", SDPAImpl.__init__),
    "CpuPlatform.get_attn_backend_cls_str": ("platforms/cpu.py", CpuPlatform.get_attn_backend_cls_str),
}  # fmt: skip


def _recorded() -> list[hosts.Module]:
    class AttentionBackendEnum(enum.Enum):
        FA = enum.auto()
        TORCH_SDPA = enum.auto()
        SOL_ATTN = enum.auto()

        @property
        def is_sparse(self) -> bool:
            return self is AttentionBackendEnum.SOL_ATTN

    class HookType(enum.Enum):
        BEFORE = "before"
        AROUND = "around"

    class HookRegistry:
        hooks: dict[str, tuple[HookType, Any]] = {}  # noqa: RUF012

        @classmethod
        def apply_hooks(cls) -> None:
            for target, (kind, hook) in cls.hooks.items():
                _apply(target, hook, is_around=kind is HookType.AROUND)

    def plugin_hook(target: str, type: HookType) -> Any:
        return lambda hook: HookRegistry.hooks.setdefault(target, (type, hook))

    held = SimpleNamespace(context=None)

    @contextmanager
    def set_forward_context(current_timestep: int, attn_metadata: Any, forward_batch: Any = None) -> Iterator[None]:
        outer, held.context = held.context, ForwardContext(current_timestep, attn_metadata, forward_batch)
        try:
            yield
        finally:
            held.context = outer

    platform = type("CpuPlatform", (CpuPlatform,), {**{k: v for k, v in vars(CpuPlatform).items() if k[:2] != "__"}})
    platform.__module__, backends = f"{_RUNTIME}.platforms", f"{_RUNTIME}.{_LAYERS.replace('/', '.')}"
    return [
        hosts.stub(
            f"{_RUNTIME}.platforms", AttentionBackendEnum=AttentionBackendEnum, CpuPlatform=platform,
            current_platform=platform(),
        ),
        hosts.stub(
            f"{_RUNTIME}.platforms.plugins", HookType=HookType, HookRegistry=HookRegistry, plugin_hook=plugin_hook
        ),
        hosts.stub(
            f"{_RUNTIME}.managers.forward_context", set_forward_context=set_forward_context,
            get_forward_context_or_none=lambda: held.context,
        ),
        hosts.stub(f"{backends}.attention_backend", AttentionBackend=AttentionBackend, AttentionImpl=AttentionImpl),
        hosts.stub(f"{backends}.sdpa", SDPABackend=SDPABackend, SDPAImpl=SDPAImpl),
    ]  # fmt: skip


def _apply(target: str, hook: Any, *, is_around: bool) -> None:
    from pkgutil import resolve_name

    path, _, name = target.rpartition(".")
    owner = resolve_name(path)
    method = vars(owner)[name]
    function = getattr(method, "__func__", method)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_around:
            return hook(function, *args, **kwargs)
        hook(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, name, classmethod(wrapped) if isinstance(method, classmethod) else wrapped)
