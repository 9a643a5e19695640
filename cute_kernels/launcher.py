"""From tensors to a launch: checks, layouts that TMA accepts, and the choice of kernel."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from lite_attention.cute_kernels.cache import Kernel, get_kernel, has_compiler, library
from lite_attention.cute_kernels.config import (
    KEY_BITS_PAD,
    KEY_CHUNK,
    MAX_TILES,
    VALUE_BLOCK,
    KernelConfig,
    Masks,
    QuantizeConfig,
    Scales,
    State,
)
from lite_attention.ops.allocate import empty_output, empty_quantized, empty_quantized_value
from lite_attention.ops.bitmask import WORD_BITS, pack_bits
from lite_attention.ops.quantization import QUANTIZATIONS, Quantization, check_quantization
from lite_attention.ops.quantize import LARGEST_FP8, QUERY_ROWS, zero_excluded
from lite_attention.ops.targets import DTYPE_NAMES, TARGETS, target_of
from lite_attention.ops.tiles import allowed_in_tiles, ceil_div
from lite_attention.ops.units import LOG2_E
from lite_attention.ops.validate import (
    CallSignature,
    TensorSignature,
    call_signature,
    check_call,
    check_dense_call,
    check_keys,
    check_quantize_key,
    check_queries,
    check_values,
    split_signature,
    tensor_signatures,
)

__all__ = [
    "attention_forward",
    "key_mean",
    "quantize_key",
    "quantize_query",
    "quantize_value",
    "skip_attention_forward",
    "unsupported_reason",
]

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
    target = target_of(device)
    reason = target.unsupported_reason(head_dim, value_dim, dtype)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability not in target.capabilities:
        served = ", ".join(f"{major}.{minor} ({t.title})" for t in TARGETS.values() for major, minor in t.capabilities)
        return f"there are kernels for compute capability {served}, got {capability[0]}.{capability[1]}"
    if library() is None and not has_compiler():
        driver = "cu13" if (torch.version.cuda or "13").startswith("13") else "cu12"
        return f"the CuTe DSL is not installed: pip install 'lite-attention[{driver}]'"
    return None


def _check_supported(op: str, head_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    reason = unsupported_reason(head_dim, value_dim, dtype, device)
    if reason is not None:
        raise RuntimeError(f"lite_attention::{op}: {reason}")


def _reads(strides: tuple[int, ...]) -> bool:
    """Return whether kernels can read a tensor as it lies, 16 bytes at a time, if its address is one of 16 bytes."""
    *outer, inner = strides
    return inner == 1 and all(stride > 0 and stride % 8 == 0 for stride in outer)  # 8 elements of 2 bytes


def _readable(x: torch.Tensor, reads: bool) -> torch.Tensor:
    return x if reads and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _run(kernel: Kernel, device: torch.device, *arguments: object) -> None:
    if device.index == torch.cuda.current_device():
        kernel(*arguments)
    else:
        with torch.cuda.device(device):
            kernel(*arguments)


def _masks(key_mask: torch.Tensor | None, batch: int, tile_n: int) -> Masks:
    if key_mask is None:
        return Masks()
    key_mask = key_mask.expand(batch, -1)
    in_tiles = allowed_in_tiles(key_mask, tile_n)
    flags = torch.stack([in_tiles.any(-1), ~in_tiles.all(-1)], 1)
    return Masks(pack_bits(flags), pack_bits(torch.nn.functional.pad(key_mask, (0, KEY_BITS_PAD * WORD_BITS))))


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: as many CTAs run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Plan(NamedTuple):
    """What is the same for all calls of one signature."""

    kernel: Kernel
    readable: tuple[bool, ...]  # q, k, v: as they lie
    lse_shape: tuple[int, int, int]
    scale: float
    tile_n: int
    quantization: Quantization
    processors: int


def _plan(
    op: str,
    q: TensorSignature,
    k: TensorSignature,
    v: TensorSignature,
    scale: float | None,
    quantization: str = "none",
    **variant: bool,
) -> _Plan:
    batch, seq_q, heads, head_dim = q.shape
    _check_supported(op, head_dim, v.shape[3], q.dtype, q.device)
    target, kind = target_of(q.device), check_quantization(quantization)
    tile_m, tile_n = target.tile_shape(head_dim, quantization)
    config = KernelConfig(DTYPE_NAMES[q.dtype], head_dim, tile_m, tile_n, quantization=kind, target=target, **variant)
    if ceil_div(k.shape[1], tile_n) > MAX_TILES:
        raise ValueError(f"seq_len of k: expected at most {MAX_TILES * tile_n}, got {k.shape[1]}")
    if batch * heads * ceil_div(seq_q, tile_m) > _MAX_JOBS:
        raise ValueError(f"q: expected at most {_MAX_JOBS} tiles of {tile_m} rows in all, got {tuple(q.shape)}")
    return _Plan(
        get_kernel(config),
        tuple(_reads(x.stride) for x in (q, k, v)),
        (batch, heads, seq_q),
        head_dim**-0.5 if scale is None else scale,
        tile_n,
        kind,
        _processors(q.device),
    )


@functools.lru_cache(maxsize=4096)
def _skip_plan(call: CallSignature, quantization: str) -> _Plan:
    """Check a call and plan it; a call like one before costs a look-up."""
    check_call(call)
    (q, k, v, *_), (initial_mask, must_do, key_mask), scale, tile_m, tile_n = split_signature(call)
    expected = target_of(q.device).tile_shape(q.shape[3], quantization)
    if (tile_m, tile_n) != expected:
        raise ValueError(f"tile_m, tile_n: expected {expected} on {q.device}, got {(tile_m, tile_n)}")
    return _plan(
        "skip_attention", q, k, v, scale, quantization, skip=True, initial_mask=initial_mask is not None,
        must_do=must_do is not None, key_mask=key_mask is not None,
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
    state: State,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    masks = _masks(key_mask, q.shape[0], plan.tile_n)
    out = empty_output(q, v)
    lse = q.new_empty(plan.lse_shape, dtype=torch.float32)
    q, k, v = (_readable(x, reads) for x, reads in zip((q, k, v), plan.readable, strict=True))
    scales = Scales()
    if plan.quantization.scores is not None:
        mean = _key_mean(k, key_mask)
        q, q_scales, q_norms, lse_shift = _quantize_query(q, mean, plan.scale)
        k, k_scales, k_norms = _quantize_key(k, mean, key_mask, plan.tile_n)
        v_scales: torch.Tensor | None = None
        if plan.quantization.values is not None:
            v, v_scales = _quantize_value(v, key_mask)
            v = v.view(torch.uint8)
        elif plan.quantization.weighs_excluded:
            v = zero_excluded(v, key_mask)
        scales = Scales(q_scales, q_norms, k_scales, k_norms, lse_shift, v_scales)
    _run(
        plan.kernel, out.device, q, k, v, out, lse, state, masks, scales, plan.scale * LOG2_E, plan.processors,
    )  # fmt: skip
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
    quantization: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::skip_attention` on torch's current stream.

    Raises:
        ValueError: an argument does not fit; nothing has been changed then.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    state = State(skip_mask, control, threshold, initial_mask, must_do)
    plan = _skip_plan(call_signature((q, k, v, *state, key_mask), scale, tile_m, tile_n), quantization)
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
    return _launch(plan, q, k, v, State(), key_mask)


# ---- INT8 queries and keys, FP8 values -----------------------------------------------------------------------------


def key_mean(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Launch the kernel for `lite_attention::key_mean` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    check_keys(k, key_mask)
    _check_quantizable("key_mean", k)
    return _key_mean(_readable(k, _reads(k.stride())), key_mask)


def quantize_query(
    q: torch.Tensor, mean: torch.Tensor, *, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::quantize_query` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    check_queries(q, mean, scale)
    _check_quantizable("quantize_query", q)
    q, mean = (_readable(x, _reads(x.stride())) for x in (q, mean))
    return _quantize_query(q, mean, q.shape[3] ** -0.5 if scale is None else scale)


def quantize_key(
    k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, *, tile_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::quantize_key` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    check_quantize_key(k, mean, key_mask, tile_n)
    expected = _check_quantizable("quantize_key", k)
    if tile_n not in expected:
        raise ValueError(f"tile_n: expected {' or '.join(map(str, expected))} on {k.device}, got {tile_n}")
    k, mean = (_readable(x, _reads(x.stride())) for x in (k, mean))
    return _quantize_key(k, mean, key_mask, tile_n)


def quantize_value(v: torch.Tensor, key_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels for `lite_attention::quantize_value` on torch's current stream.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    check_values(v, key_mask)
    _check_quantizable("quantize_value", v)
    return _quantize_value(_readable(v, _reads(v.stride())), key_mask)


def _check_quantizable(op: str, x: torch.Tensor) -> list[int]:
    """Return the keys of a tile, by quantization, if there are kernels for queries, keys or values like these."""
    _check_supported(op, x.shape[3], x.shape[3], x.dtype, x.device)
    names = [name for name, quantization in QUANTIZATIONS.items() if quantization.scores is not None]
    tiles = [target_of(x.device).tile_shape(x.shape[3], name)[1] for name in names]
    return list(dict.fromkeys(tiles))


def _quantizer(op: str, x: torch.Tensor, rows: int, key_mask: torch.Tensor | None = None) -> Kernel:
    target = target_of(x.device)
    return get_kernel(QuantizeConfig(op, DTYPE_NAMES[x.dtype], x.shape[3], rows, key_mask is not None, target))


def _bytes(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if key_mask is None else key_mask.contiguous().view(torch.uint8)


def _key_mean(k: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    batch, seq, heads, head_dim = k.shape
    sums = k.new_empty((batch, heads, ceil_div(seq, KEY_CHUNK), head_dim), dtype=torch.float32)
    _run(_quantizer("key_sums", k, KEY_CHUNK, key_mask), k.device, k, _bytes(key_mask), sums)
    count = seq if key_mask is None else key_mask.sum(1).clamp_(min=1)[:, None, None]
    return sums.sum(2).div_(count)


def _quantize_query(
    q: torch.Tensor, mean: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, seq, heads, _ = q.shape
    values, scales, norms = empty_quantized(q, QUERY_ROWS)
    lse_shift = q.new_empty((batch, heads, seq), dtype=torch.float32)
    kernel = _quantizer("quantize_query", q, QUERY_ROWS)
    _run(kernel, q.device, q, mean, None, values, scales, norms, lse_shift, scale)
    return values, scales, norms, lse_shift


def _quantize_key(
    k: torch.Tensor, mean: torch.Tensor, key_mask: torch.Tensor | None, tile_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, scales, norms = empty_quantized(k, tile_n)
    kernel = _quantizer("quantize_key", k, tile_n, key_mask)
    _run(kernel, k.device, k, mean, _bytes(key_mask), values, scales, norms, None, 1.0)
    return values, scales, norms


def _quantize_value(v: torch.Tensor, key_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seq, heads, head_dim = v.shape
    parts = v.new_empty((batch, heads, ceil_div(seq, KEY_CHUNK), head_dim), dtype=torch.float32)
    _run(_quantizer("value_max", v, KEY_CHUNK, key_mask), v.device, v, _bytes(key_mask), parts)
    largest = parts.amax(2)
    values = empty_quantized_value(v)
    kernel = _quantizer("quantize_value", v, VALUE_BLOCK, key_mask)
    _run(kernel, v.device, v, largest, _bytes(key_mask), values.view(torch.uint8))  # DLPack of old has no FP8
    return values, largest / LARGEST_FP8
