"""LiteAttention as an attention backend of SGLang's diffusion models, under the name "lite_attention".

```
sglang generate --model-path ... --attention-backend lite_attention \\
    --attention-backend-config '{"preset": "balanced", "dense_layers": "0,1", "exact_tokens": [[0, 226]]}'
```

SGLang finds `register` by its entry point, wherever both packages are installed. The options are those of
`lite_attention.integrations.serving_options.ServingOptions.of`. Step, branch and request come from SGLang's forward
context: a step is a number from 0 on there, or, as Helios has it, a timestep. The flow's time is the request's timestep
of the step. Cross-attention, causal attention, and all that runs outside of a request's denoising stay with the backend
that SGLang takes by itself.

Exact tokens are by themselves what stands beside the video of MiniMax-H3; elsewhere the configuration names them.

Some pipelines of SGLang 0.5.23 put no request into the context. Of these LTX-2, the refiner of SANA-WM and the painting
of Hunyuan3D count their steps, which tells generations: the first step is dense, and learns nothing. Cosmos 3 tells a
timestep; it and its simulation are dense, and a warning says so once.
"""

from __future__ import annotations

import sys
from typing import Any

from lite_attention.integrations.enum_member import add_member

__all__ = ["BACKEND", "backend_member", "register"]

BACKEND = "lite_attention"

_CLASS = "lite_attention.integrations.sglang_backend.LiteAttentionBackend"
_SERVER_ARGS = "sglang.multimodal_gen.runtime.server_args.server_args"


def register() -> None:
    """Add the backend to SGLang: a plug-in of the group `sglang.multimodal_gen.plugins`.

    It registers hooks, and resolves nothing that SGLang has not imported by then.
    """
    from sglang.multimodal_gen.runtime.platforms import current_platform
    from sglang.multimodal_gen.runtime.platforms.plugins import HookType, plugin_hook

    backend_member()
    platform = next(cls for cls in type(current_platform).__mro__ if "get_attn_backend_cls_str" in vars(cls))
    resolve = f"{platform.__module__}.{platform.__qualname__}.get_attn_backend_cls_str"
    plugin_hook(resolve, type=HookType.AROUND)(_resolve)
    plugin_hook(f"{_SERVER_ARGS}.ServerArgs._adjust_attention_backend", type=HookType.BEFORE)(_admit_ring)


def backend_member() -> Any:
    """Return our member of SGLang's `AttentionBackendEnum`, a sparse one, added at the first call."""
    from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum as Backends

    if BACKEND.upper() not in Backends.__members__:
        of_host = Backends.is_sparse.fget
        add_member(Backends, BACKEND.upper(), max(member.value for member in Backends) + 1)
        Backends.is_sparse = property(lambda self: self.name == BACKEND.upper() or of_host(self))
    return Backends[BACKEND.upper()]


def _resolve(resolve: Any, platform: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the path of a backend's class, around a platform's `get_attn_backend_cls_str`."""
    if selected_backend is backend_member():
        return _CLASS
    return resolve(platform, selected_backend, *args, **kwargs)


def _admit_ring(*_: Any) -> None:
    """Let ring attention have the backend: SGLang keeps a list of the names that tell the log-sum-exp."""
    module: Any = sys.modules[_SERVER_ARGS]
    if BACKEND not in module.RING_CAPABLE_ATTENTION_BACKENDS:
        module.RING_CAPABLE_ATTENTION_BACKENDS = (*module.RING_CAPABLE_ATTENTION_BACKENDS, BACKEND)
