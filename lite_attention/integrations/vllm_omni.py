"""LiteAttention as an attention backend of vLLM-Omni's diffusion models, under the name "LITE_ATTENTION".

```
export LITE_ATTENTION_CONFIG='{"preset": "balanced", "dense_layers": "0,1"}'  # or the path of a file
vllm serve ... --omni --diffusion-attention-config.per_role.self.backend LITE_ATTENTION
```

vLLM-Omni finds `register` by its entry point, wherever both packages are installed. What it lets a backend be
configured with is closed, so the options are in the environment, which its workers inherit. They are those of
`lite_attention.integrations.serving_options.ServingOptions.of`.

The step is what the pipeline publishes; where it publishes none, it ends where a branch runs a second time. Branches
are told apart by the arguments of `predict_noise`. A generation begins with each forward context; where steps are
published, with each that does not go on from the last step. Exact tokens are by themselves what stands beside the
video, where the model tells (MiniMax-H3).

Cross-attention, causal attention, attention that is causal outside of some spans (HunyuanImage 3, HiDream-O1), and
masks that differ per query stay with the backend that vLLM-Omni takes by itself. Ring attention goes past all backends,
and is refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lite_attention.integrations.enum_member import add_member
from lite_attention.integrations.wrap import wrap_once
from lite_attention.ops.threads import PerThread

__all__ = ["BACKEND", "Passes", "passes", "register"]

BACKEND = "LITE_ATTENTION"

_CLASS = "lite_attention.integrations.vllm_omni_backend.LiteAttentionBackend"
_ROUNDS = ("predict_noise_maybe_with_cfg", "predict_noise_with_multi_branch_cfg")


@dataclass
class Passes:
    """The passes of a model that a thread makes in one denoising step."""

    number: int = 0  # of calls of `predict_noise` so far, in all steps
    branch: str | None = None  # of the one that runs
    branches: list[Mapping[str, Any]] = field(default_factory=list)  # the arguments of each, within a step


passes: PerThread[Passes] = PerThread(Passes)


def register() -> None:
    """Add the backend to vLLM-Omni: a plug-in of the group `vllm_omni.general_plugins`. Once more changes nothing.

    It runs wherever both packages are installed, wanted or not. So a version without its places gets a warning only.
    """
    try:
        from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum
        from vllm_omni.diffusion.distributed.cfg_parallel import CFGParallelMixin
    except ImportError as error:
        warnings.warn(f"lite_attention: this vLLM-Omni does not get the backend {BACKEND}: {error}", stacklevel=2)
        return
    add_member(DiffusionAttentionBackendEnum, BACKEND, _CLASS)
    for name in _ROUNDS:
        if name in vars(CFGParallelMixin):
            wrap_once(CFGParallelMixin, name, _round)


def _round(method: Callable[..., Any], pipeline: Any, *args: Any, **kwargs: Any) -> Any:
    """Run all passes of a step, each of which `_pass` finds by its arguments."""
    defining = next(cls for cls in type(pipeline).__mro__ if "predict_noise" in vars(cls))
    wrap_once(defining, "predict_noise", _pass)
    given = inspect.signature(method).bind(pipeline, *args, **kwargs).arguments
    branches = given.get("branches_kwargs", (given.get("positive_kwargs"), given.get("negative_kwargs")))
    with _branches(branches):
        return method(pipeline, *args, **kwargs)


@contextmanager
def _branches(branches: Sequence[Mapping[str, Any] | None]) -> Iterator[None]:
    here = passes()
    outer, here.branches = here.branches, [branch for branch in branches if branch is not None]
    try:
        yield
    finally:
        here.branches = outer


def _pass(method: Callable[..., Any], pipeline: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one pass under the name of its branch."""
    here = passes()
    if here.branch is not None:  # an overridden method, called by the one that overrides it
        return method(pipeline, *args, **kwargs)
    here.number += 1
    here.branch = _branch_of(kwargs, here.branches)
    try:
        return method(pipeline, *args, **kwargs)
    finally:
        here.branch = None


def _branch_of(kwargs: Mapping[str, Any], branches: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of the branch whose arguments these are; the first one is the positive. None: they are none's."""
    for number, branch in enumerate(branches):
        if all(name in kwargs and kwargs[name] is value for name, value in branch.items()):
            return f"branch {number}"
    return None
