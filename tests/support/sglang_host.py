"""SGLang 0.5.23, as far as a plug-in of its diffusion models sees it."""

from __future__ import annotations

import ast
import enum
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import hosts

__all__ = [
    "CLASSES",
    "FOLDER",
    "MINIMAX_H3",
    "WITHOUT_REQUEST",
    "Request",
    "install",
    "server_args",
    "stages_without_request",
]

FOLDER = "LITE_ATTENTION_SGLANG"
_RUNTIME = "sglang.multimodal_gen.runtime"
_ADAPTER = "lite_attention.integrations.sglang_backend"
MINIMAX_H3 = f"{_RUNTIME}.models.dits.minimax_h3"
_BARE = ["sglang.srt.plugins", f"{_RUNTIME}.layers.attention.backends", f"{_RUNTIME}.managers"]

server_args = SimpleNamespace(attention_backend_config={})


@dataclass
class Request:
    """What a forward of a model belongs to."""

    is_cfg_negative: bool = False
    num_inference_steps: int | None = None
    timesteps: torch.Tensor | None = None


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
    "MiniMaxH3DiTModel.forward": ("models/dits/minimax_h3.py", lambda self, **kwargs: None),
    "SDPAImpl.__init__": (f"{_LAYERS}/sdpa.py", SDPAImpl.__init__),
    "CpuPlatform.get_attn_backend_cls_str": ("platforms/cpu.py", CpuPlatform.get_attn_backend_cls_str),
}  # fmt: skip


# Stages that denoise without a request in the forward context, by the names that the adapter has for them. MiniMax-H3's
# loop does so only where nobody gives it a `model_forward`; its pipelines do.
WITHOUT_REQUEST = {
    "ltx_2/denoising.py": "LTX-2",
    "cosmos3.py": "Cosmos 3",
    "cosmos3_simulation/dreams.py": "its simulation",
    "cosmos3_simulation/sim_auto.py": "its simulation",
    "sana_wm/refiner.py": "refiner of SANA-WM",
    "hunyuan3d/paint.py": "painting of Hunyuan3D",
    "minimax_h3/denoise_loop.py": "",
}


def stages_without_request(root: Path) -> set[str]:
    """Return the stages of a wheel that tell a step that varies, but no request."""
    stages = root.joinpath(*_RUNTIME.split("."), "pipelines_core/stages")
    found = set()
    for path in stages.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "set_forward_context":
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                if "forward_batch" not in given and not isinstance(
                    given.get("current_timestep"), (ast.Constant, NoneType)
                ):
                    found.add(str(path.relative_to(stages)).removeprefix("model_specific_stages/"))
    return found


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
