"""From tensors to a launch: checks, layouts that TMA accepts, and the choice of kernel."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lite_attention.cute_kernels.cache import Kernel, get_kernel, has_compiler, library
from lite_attention.cute_kernels.config import KEY_BITS_PAD, MAX_TILES, KernelConfig
from lite_attention.ops.bitmask import WORD_BITS, pack_bits
from lite_attention.ops.reference import LOG2_E, empty_output
from lite_attention.ops.tiles import HOPPER_HEAD_DIMS, ceil_div, tile_shape
from lite_attention.ops.validate import (
    CallSignature,
    TensorSignature,
    call_signature,
    check_call,
    check_dense_call,
    split_signature,
    tensor_signatures,
)

__all__ = ["attention_forward", "skip_attention_forward", "unsupported_reason"]

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_NO_STATE = (None,) * 5
_MAX_JOBS = 2**31 - 2**16  # numbered in 32 bits, with room to count past the end


@functools.cache
def unsupported_reason(head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why no kernel runs such a call, or None if one does.

    Args:
        head_dim: of queries and keys.
        value_dim: of values.
        dtype: of all three.
        device: a CUDA device; its capability is read.
    """
    if dtype not in _DTYPES:
        return f"the Hopper kernel computes in bfloat16 and float16, got {dtype}"
    if value_dim != head_dim or head_dim not in HOPPER_HEAD_DIMS:
        return f"the Hopper kernel has head dims {HOPPER_HEAD_DIMS}, values alike, got {head_dim} and {value_dim}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the kernel needs compute capability 9.0 (H100, H200), got {major}.{minor}"
    if library() is None and not has_compiler():
        driver = "cu13" if (torch.version.cuda or "13").startswith("13") else "cu12"
        return f"the CuTe DSL is not installed: pip install 'lite-attention[{driver}]'"
    return None


def _tma_reads(x: TensorSignature) -> bool:
    """Return whether TMA can read it as it lies, if its address is one of 16 bytes."""
    *outer, inner = x.stride
    return inner == 1 and all(stride > 0 and stride % 8 == 0 for stride in outer)  # 8 elements of 2 bytes


def _key_tables(key_mask: torch.Tensor, batch: int, tile_n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bits a tile int32 [B, 2, words] (some key allowed; some key excluded), and bits a key, padded."""
    seq_k = key_mask.shape[1]
    key_mask = key_mask.expand(batch, seq_k)
    tiles = ceil_div(seq_k, tile_n)
    in_tiles = torch.nn.functional.pad(key_mask, (0, tiles * tile_n - seq_k)).view(batch, tiles, tile_n)
    flags = torch.stack([in_tiles.any(-1), ~in_tiles.all(-1)], 1)
    return pack_bits(flags), pack_bits(torch.nn.functional.pad(key_mask, (0, KEY_BITS_PAD * WORD_BITS)))


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: as many CTAs run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Plan(NamedTuple):
    """What is the same for all calls of one signature."""

    kernel: Kernel
    readable: tuple[bool, ...]  # q, k, v: as they lie
    lse_shape: tuple[int, int, int]
    factor: float  # of the scores, into log2 units
    tile_n: int
    processors: int


def _plan(
    op: str, q: TensorSignature, k: TensorSignature, v: TensorSignature, scale: float | None, **variant: bool
) -> _Plan:
    batch, seq_q, heads, head_dim = q.shape
    reason = unsupported_reason(head_dim, v.shape[3], q.dtype, q.device)
    if reason is not None:
        raise RuntimeError(f"lite_attention::{op}: {reason}")
    tile_m, tile_n = tile_shape(head_dim, q.dtype, q.device)
    if ceil_div(k.shape[1], tile_n) > MAX_TILES:
        raise ValueError(f"seq_len of k: expected at most {MAX_TILES * tile_n}, got {k.shape[1]}")
    if batch * heads * ceil_div(seq_q, tile_m) > _MAX_JOBS:
        raise ValueError(f"q: expected at most {_MAX_JOBS} tiles of {tile_m} rows in all, got {tuple(q.shape)}")
    return _Plan(
        get_kernel(KernelConfig(_DTYPES[q.dtype], head_dim, tile_m, tile_n, **variant)),
        tuple(_tma_reads(x) for x in (q, k, v)),
        (batch, heads, seq_q),
        (head_dim**-0.5 if scale is None else scale) * LOG2_E,
        tile_n,
        _processors(q.device),
    )


@functools.lru_cache(maxsize=4096)
def _skip_plan(call: CallSignature) -> _Plan:
    """Check a call and plan it; a call like one before costs a look-up."""
    check_call(call)
    (q, k, v, *_), (initial_mask, must_do, key_mask), scale, tile_m, tile_n = split_signature(call)
    expected = tile_shape(q.shape[3], q.dtype, q.device)
    if (tile_m, tile_n) != expected:
        raise ValueError(f"tile_m, tile_n: expected {expected} on {q.device}, got {(tile_m, tile_n)}")
    return _plan(
        "skip_attention", q, k, v, scale, skip=True, initial_mask=initial_mask is not None, must_do=must_do is not None,
        key_mask=key_mask is not None,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _dense_plan(call: CallSignature) -> _Plan:
    *tensors, scale = call
    q, k, v = (TensorSignature(*t) for t in tensors[:3])
    key_mask = None if tensors[3] is None else TensorSignature(*tensors[3])
    check_dense_call(q, k, v, key_mask, scale)
    return _plan("attention", q, k, v, scale, skip=False, key_mask=key_mask is not None)


def _launch(
    plan: _Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: tuple[torch.Tensor | None, ...],
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    flags, key_bits = (None, None) if key_mask is None else _key_tables(key_mask, q.shape[0], plan.tile_n)
    out = empty_output(q, v)
    lse = q.new_empty(plan.lse_shape, dtype=torch.float32)
    readable = (
        x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
        for x, fits in zip((q, k, v), plan.readable, strict=True)
    )
    arguments = (*readable, out, lse, *state, flags, key_bits, plan.factor, plan.processors)
    if q.device.index == torch.cuda.current_device():
        plan.kernel(*arguments)
    else:
        with torch.cuda.device(q.device):
            plan.kernel(*arguments)
    return out, lse


def skip_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    skip_mask: torch.Tensor,
    control: torch.Tensor,
    threshold: torch.Tensor,
    initial_mask: torch.Tensor | None,
    must_do: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    *,
    scale: float | None,
    tile_m: int,
    tile_n: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::skip_attention` on torch's current stream.

    Raises:
        ValueError: an argument does not fit; nothing has been changed then.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    state = (skip_mask, control, threshold, initial_mask, must_do)
    plan = _skip_plan(call_signature((q, k, v, *state, key_mask), scale, tile_m, tile_n))
    return _launch(plan, q, k, v, state, key_mask)


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, *, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::attention` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    plan = _dense_plan((*tensor_signatures((q, k, v, key_mask)), scale))
    return _launch(plan, q, k, v, _NO_STATE, key_mask)
