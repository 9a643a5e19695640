"""What memories will take in a sampling run, so that ComfyUI leaves room when it decides how much of a model fits."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lite_attention.integrations.numbers import numbers_in
from lite_attention.ops.buffers import nbytes_of, readable
from lite_attention.ops.site import Site

from .options import NodeOptions

__all__ = ["conditionings_of", "expected_bytes", "reserved"]

_ON_HOST = ("residual", "residual_scale")  # what goes there with memory "host"

_log = logging.getLogger("lite_attention")


def conditionings_of(guider: Any) -> int:
    """Return how many conditionings a guider runs in a step, as far as it tells."""
    conds = getattr(guider, "conds", None) or {"positive": [None]}
    left_out = {"negative"} if getattr(guider, "cfg", None) == 1.0 else set()
    return max(1, sum(len(conds[name]) for name in conds if name not in left_out))


def expected_bytes(model: Any, noise_shape: Sequence[int], options: NodeOptions) -> tuple[int, int] | None:
    """Return the bytes, of the device and of the host, that one conditioning takes; None = the model is not known.

    Args:
        model: a `ModelPatcher`.
        noise_shape: of the latents, (batch, channels, ...).
        options: of the node.
    """
    net = model.model.diffusion_model
    width = _number_of(net, "dim", "hidden_size", "inner_dim")
    blocks = sum(len(m) for name, m in net.named_children() if isinstance(m, nn.ModuleList) and "blocks" in name)
    tokens = _tokens(net, noise_shape)
    if not (width and blocks and tokens):
        return None
    if tokens < options.min_tokens:
        return 0, 0
    heads = _number_of(net, "num_heads", "num_attention_heads") or max(1, width // 128)
    settings, shape = options.settings(20, 20), (noise_shape[0], tokens, heads, width // heads)
    dtype = getattr(model.model, "manual_cast_dtype", None) or model.model_dtype()
    site = Site("attention", "ComfyUI", 0, shape, shape, shape, dtype, model.load_device)
    if settings.unsupported_reason(site) is not None:
        return 0, 0
    nbytes = nbytes_of(settings.buffers(site))
    blocks -= sum(block < blocks for block in numbers_in("dense_blocks", options.dense_blocks))
    host = sum(nbytes.get(name, 0) for name in _ON_HOST) if settings.memory == "host" else 0
    return blocks * (sum(nbytes.values()) - host), blocks * host


def _number_of(net: nn.Module, *names: str) -> int | None:
    found = (getattr(net, name, None) for name in names)
    return next((number for number in found if type(number) is int and number > 0), None)


def _tokens(net: nn.Module, noise_shape: Sequence[int]) -> int | None:
    """Return the tokens that a model makes of latents; None where it does not say its patches."""
    patch = getattr(net, "patch_size", 1 if hasattr(net, "patchifier") else None)
    sides = noise_shape[2:]
    if isinstance(patch, int):
        patch = (patch, patch)
    if not isinstance(patch, (tuple, list)) or len(patch) > len(sides):
        return None
    patches = [1] * (len(sides) - len(patch)) + [*patch]
    return int(math.prod(-(-side // size) for side, size in zip(sides, patches, strict=True)))


@contextmanager
def reserved(model: Any, noise_shape: Sequence[int], options: NodeOptions, conditionings: int) -> Iterator[None]:
    """Let ComfyUI count what memories will take beside what the model needs, and say it.

    Args:
        model: a `ModelPatcher`.
        noise_shape: of the latents.
        options: of the node.
        conditionings: that have memories of their own.
    """
    each = expected_bytes(model, noise_shape, options)
    if each is None or not any(each):
        yield
        return
    device, host = (conditionings * nbytes for nbytes in each)
    if options.preset != "votes":  # which takes hardly any
        _say(device, host, conditionings, model.load_device)
    needed = model.model.memory_required
    model.model.memory_required = lambda *args, **kwargs: needed(*args, **kwargs) + device
    try:
        yield
    finally:
        del model.model.memory_required


def _say(device: int, host: int, conditionings: int, load_device: Any) -> None:
    from comfy.model_management import get_total_memory

    there = f" and {readable(host)} of the host" if host else ""
    _log.info(
        "LiteAttention: memories of %d conditioning(s) will take %s of the device%s", conditionings, readable(device),
        there,
    )  # fmt: skip
    total = get_total_memory(load_device)
    if device > total:
        _log.warning(
            "LiteAttention: that is more than the %s of the device: set memory to 'host', or preset to 'votes', or "
            "make fewer or smaller frames", readable(total),
        )  # fmt: skip
