"""From tensors to a launch: checks, layouts that TMA accepts, and the choice of kernel."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from lite_attention.cute_kernels.cache import Kernel, get_kernel
from lite_attention.cute_kernels.config import (
    KEY_BITS_PAD,
    RESIDUAL_DTYPES,
    ChoiceConfig,
    KernelConfig,
    Masks,
    Residual,
    Scales,
    State,
)
from lite_attention.cute_kernels.launch import check_supported, parts, processors, readable, reads, run, say_once
from lite_attention.cute_kernels.quantize_launcher import mean_of, quantized_key, quantized_query, quantized_value
from lite_attention.cute_kernels.streams import turn_of
from lite_attention.ops.allocate import empty_output
from lite_attention.ops.bitmask import WORD_BITS, pack_bits
from lite_attention.ops.check_calls import RESIDUAL_ARGUMENTS, check_call, check_residual_call, given
from lite_attention.ops.choice import BINS
from lite_attention.ops.processors import left_processors
from lite_attention.ops.quantization import Quantization, check_quantization
from lite_attention.ops.quantize import zero_excluded
from lite_attention.ops.signature import (
    CallSignature,
    TensorSignature,
    call_signature,
    named_signatures,
    split_signature,
    tensor_signatures,
)
from lite_attention.ops.targets import DTYPE_NAMES, Target, target_of
from lite_attention.ops.tiles import allowed_in_tiles, ceil_div
from lite_attention.ops.units import LOG2_E
from lite_attention.ops.validate import check_dense_call

__all__ = ["attention_forward", "residual_attention_forward", "skip_attention_forward"]

_MAX_JOBS = 2**31 - 2**16  # numbered in 32 bits, with room to count past the end
_MAX_TILES = 2**31 - 1  # whose masses are told apart by 32 bits


def _masks(key_mask: torch.Tensor | None, batch: int, tile_n: int) -> Masks:
    if key_mask is None:
        return Masks()
    key_mask = key_mask.expand(batch, -1)
    in_tiles = allowed_in_tiles(key_mask, tile_n)
    flags = torch.stack([in_tiles.any(-1), ~in_tiles.all(-1)], 1)
    return Masks(pack_bits(flags), pack_bits(torch.nn.functional.pad(key_mask, (0, KEY_BITS_PAD * WORD_BITS))))


class _Plan(NamedTuple):
    """What is the same for all calls of one signature."""

    kernel: Kernel
    readable: tuple[bool, ...]  # q, k, v: as they lie
    lse_shape: tuple[int, int, int]
    scale: float
    tile_m: int
    tile_n: int
    quantization: Quantization
    processors: int
    target: Target
    choice: tuple[Kernel, Kernel] | None = None  # which find the tiles that stay, where there is a residual


def _plan(
    op: str,
    q: TensorSignature,
    k: TensorSignature,
    v: TensorSignature,
    scale: float | None,
    quantization: str = "none",
    implementation: str | None = None,
    **variant: Any,
) -> _Plan:
    batch, seq_q, heads, head_dim = q.shape
    check_supported(op, head_dim, v.shape[3], q.dtype, q.device, implementation, quantization=quantization, **variant)
    target, kind = target_of(q.device, implementation), check_quantization(quantization)
    say_once(target)
    tile_m, tile_n = target.tile_shape(head_dim, quantization)
    config = KernelConfig(DTYPE_NAMES[q.dtype], head_dim, tile_m, tile_n, quantization=kind, target=target, **variant)
    most = config.budget.max_tiles
    if ceil_div(k.shape[1], tile_n) > most:
        raise ValueError(f"seq_len of k: expected at most {most * tile_n}, got {k.shape[1]}")
    if batch * heads * ceil_div(seq_q, tile_m) > _MAX_JOBS:
        raise ValueError(f"q: expected at most {_MAX_JOBS} tiles of {tile_m} rows in all, got {tuple(q.shape)}")
    return _Plan(
        get_kernel(config),
        tuple(reads(x.stride) for x in (q, k, v)),
        (batch, heads, seq_q),
        head_dim**-0.5 if scale is None else scale,
        tile_m,
        tile_n,
        kind,
        processors(q.device),
        target,
        _choice(config) if config.residual else None,
    )


def _choice(config: KernelConfig) -> tuple[Kernel, Kernel]:
    counts = ChoiceConfig("count_masses", config.must_do, config.target)
    return get_kernel(counts), get_kernel(ChoiceConfig("choose_tiles", target=config.target))


def _check_tiles(
    q: TensorSignature, tile_m: int, tile_n: int, quantization: str, implementation: str | None = None
) -> None:
    expected = target_of(q.device, implementation).tile_shape(q.shape[3], quantization)
    if (tile_m, tile_n) != expected:
        raise ValueError(f"tile_m, tile_n: expected {expected} on {q.device}, got {(tile_m, tile_n)}")


@functools.lru_cache(maxsize=4096)
def _skip_plan(call: CallSignature, quantization: str, implementation: str | None = None) -> _Plan:
    """Check a call and plan it; a call like one before costs a look-up."""
    check_call(call)
    (q, k, v, *_), (initial_mask, must_do, key_mask), scale, tile_m, tile_n = split_signature(call)
    _check_tiles(q, tile_m, tile_n, quantization, implementation)
    return _plan(
        "skip_attention", q, k, v, scale, quantization, implementation, skip=True,
        initial_mask=initial_mask is not None, must_do=must_do is not None, key_mask=key_mask is not None,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _residual_plan(call: CallSignature, quantization: str, implementation: str | None = None) -> _Plan:
    check_residual_call(call)
    t, scale, tile_m, tile_n = named_signatures(call, RESIDUAL_ARGUMENTS)
    q, k, v, residual = (given(t, name) for name in ("q", "k", "v", "residual"))
    _check_tiles(q, tile_m, tile_n, quantization, implementation)
    stored = [name for name, dtype in RESIDUAL_DTYPES.items() if dtype == residual.dtype]
    if not stored:
        raise ValueError(
            f"dtype of residual: expected {' or '.join(map(repr, RESIDUAL_DTYPES))} on {q.device}, got {residual.dtype}"
        )
    tiles = q.shape[0] * q.shape[2] * ceil_div(q.shape[1], tile_m) * ceil_div(k.shape[1], tile_n)
    if tiles > _MAX_TILES:
        raise ValueError(f"q, k: expected at most {_MAX_TILES} tiles of {tile_m} by {tile_n} in all, got {tiles}")
    has: dict[str, Any] = {name: t[name] is not None for name in ("initial_mask", "must_do", "key_mask")}
    return _plan("residual_attention", q, k, v, scale, quantization, implementation, residual=stored[0], **has)


@functools.lru_cache(maxsize=4096)
def _dense_plan(call: CallSignature, implementation: str | None = None) -> _Plan:
    *tensors, scale = call
    q, k, v = (TensorSignature(*t) for t in tensors[:3])
    key_mask = None if tensors[3] is None else TensorSignature(*tensors[3])
    check_dense_call(q, k, v, key_mask, scale)
    return _plan("attention", q, k, v, scale, implementation=implementation, skip=False, key_mask=key_mask is not None)


def _launch(
    plan: _Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: State,
    key_mask: torch.Tensor | None,
    residual: Residual = Residual(),  # noqa: B008
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    masks = _masks(key_mask, q.shape[0], plan.tile_n)
    out = empty_output(q, v)
    lse = q.new_empty(plan.lse_shape, dtype=torch.float32)
    q, k, v = (readable(x, reads) for x, reads in zip((q, k, v), plan.readable, strict=True))
    scales = Scales()
    if plan.quantization.scores is not None:
        q, k, v, scales = _quantized(plan, q, k, v, key_mask)
    taken = max(1, plan.processors - left_processors())
    arguments = (q, k, v, out, lse, state, masks, scales, residual, plan.scale * LOG2_E, taken)
    if state.control is None:
        run(plan.kernel, out.device, *arguments)
    else:
        with turn_of(state.control):
            run(plan.kernel, out.device, *arguments)
            if plan.choice is not None and counts is not None:
                _choose(plan.choice, state, residual, counts, (q.shape[1], k.shape[1], plan.tile_m, plan.tile_n))
    return out, lse


def _choose(
    kernels: tuple[Kernel, Kernel], state: State, residual: Residual, counts: torch.Tensor, sizes: tuple[int, ...]
) -> None:
    """Launch what chooses the tiles that stay, and does nothing if the call did not decide."""
    decision, device = residual.decision, state.skip_mask.device
    for part in parts(len(counts)):
        mass, of_bins, mask = residual.mass[part], counts[part], state.skip_mask[:, :, part]
        run(kernels[0], device, mass, of_bins, decision, state.control, state.must_do, sizes)
        run(kernels[1], device, mass, of_bins, decision, residual.keep, mask)


def _quantized(
    plan: _Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Scales]:
    target = plan.target
    mean = mean_of(k, key_mask, target)
    q, q_scales, q_norms, lse_shift = quantized_query(q, mean, plan.scale, target)
    k, k_scales, k_norms = quantized_key(k, mean, key_mask, plan.tile_n, target)
    v_scales: torch.Tensor | None = None
    if plan.quantization.values is not None:
        v, v_scales = quantized_value(v, key_mask, target)
        v = v.view(torch.uint8)  # DLPack of old has no FP8
    elif plan.quantization.weighs_excluded:
        v = zero_excluded(v, key_mask)
    return q, k, v, Scales(q_scales, q_norms, k_scales, k_norms, lse_shift, v_scales)


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
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::skip_attention` on torch's current stream.

    With `implementation="portable"` it is the portable kernel, whatever the GPU.

    Raises:
        ValueError: an argument does not fit; nothing has been changed then.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    state = State(skip_mask, control, threshold, initial_mask, must_do)
    call = call_signature((q, k, v, *state, key_mask), scale, tile_m, tile_n)
    plan = _skip_plan(call, quantization, implementation)
    return _launch(plan, q, k, v, state, key_mask)


def residual_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    skip_mask: torch.Tensor,
    control: torch.Tensor,
    plan: torch.Tensor,
    keep: torch.Tensor,
    times: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    row_lse: torch.Tensor,
    initial_mask: torch.Tensor | None,
    must_do: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    *,
    scale: float | None,
    tile_m: int,
    tile_n: int,
    quantization: str = "none",
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernels for `lite_attention::residual_attention` on torch's current stream.

    With `implementation="portable"` it is the portable kernel, whatever the GPU.

    Raises:
        ValueError: an argument does not fit; nothing has been changed then.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    written = (skip_mask, control, plan, keep, times, residual, residual_scale, row_lse)
    tensors = (q, k, v, *written, initial_mask, must_do, key_mask)
    launch = _residual_plan(call_signature(tensors, scale, tile_m, tile_n), quantization, implementation)
    decision, counts, mass = _scratch(q, *(ceil_div(x.shape[1], tile) for x, tile in ((q, tile_m), (k, tile_n))))
    values = residual.view(torch.uint8) if residual_scale is not None else residual  # DLPack of old has no FP8
    state = State(skip_mask, control, None, initial_mask, must_do)
    kept = Residual(plan, keep, times, values, residual_scale, row_lse, mass, decision)
    return _launch(launch, q, k, v, state, key_mask, kept, counts)


def _scratch(q: torch.Tensor, q_tiles: int, k_tiles: int) -> tuple[torch.Tensor, ...]:
    """Return zeros for what a call decides, tiles by bins of their mass, and masses of tiles."""
    batch, heads = q.shape[0], q.shape[2]
    sizes = [4, batch * BINS, batch * heads * q_tiles * k_tiles]
    decision, counts, mass = q.new_zeros(sum(sizes), dtype=torch.int32).split(sizes)
    return decision, counts.view(batch, BINS), mass.view(batch, heads, q_tiles, k_tiles)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    scale: float | None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel for `lite_attention::attention` on torch's current stream, with "portable" the portable one.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: no kernel for this device, dtype or head dim, with what was found and what is needed.
    """
    plan = _dense_plan((*tensor_signatures((q, k, v, key_mask)), scale), implementation)
    return _launch(plan, q, k, v, State(), key_mask)
