"""Inputs for a kernel, and its comparison with the CPU kernel in float64, step by step from the same state.

Which kernel, `running` says: None = the GPU's own, "portable" = the portable one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from lite_attention.cute_kernels import launcher
from lite_attention.ops import SkipState
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.oracle import skip_attention_oracle
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.quantize import QUERY_ROWS
from lite_attention.ops.schema import IMPLEMENTATIONS
from lite_attention.ops.targets import Target, target_of

HERE = target_of("cuda")
VARIANTS = [
    (head_dim, dtype, quantization)
    for quantization in QUANTIZATIONS
    for head_dim in HERE.head_dims(quantization)
    for dtype in HERE.dtypes
]
KERNELS_HERE = (None,) if HERE.portable else (None, "portable")
REFERENCE = torch.ops.lite_attention.skip_attention_reference.default
KEY_MEAN = torch.ops.lite_attention.key_mean.default
QUANTIZE_QUERY = torch.ops.lite_attention.quantize_query.default
QUANTIZE_KEY = torch.ops.lite_attention.quantize_key.default
QUANTIZE_VALUE = torch.ops.lite_attention.quantize_value.default

# Of a weight: at most 4 % where it is made from the bits of a score, and half of the last place of e4m3.
WEIGHT_ERROR = {"none": 0.0, "int8": 0.042, "int8_fp8": 0.042 + 2**-4}
OUT_ERROR = {"none": 0.0, "int8": 0.03, "int8_fp8": 0.06}  # of the whole output, relative: many weights, many errors


_running: str | None = None


@contextlib.contextmanager
def running(implementation: str | None) -> Iterator[str | None]:
    """Within it, cases are for a kernel, and run on it."""
    global _running
    before, _running = _running, implementation
    yield implementation
    _running = before


def implementation() -> str | None:
    return _running


def target() -> Target:
    return target_of("cuda", _running)


def kernel() -> Any:
    """The op that runs it."""
    return IMPLEMENTATIONS[_running]


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a state."""
    return launcher.attention_forward(q, k, v, key_mask, scale=None, implementation=_running)


@contextlib.contextmanager
def processors(count: int) -> Iterator[None]:
    """Launch as on a GPU of so few multiprocessors that each CTA computes many q-tiles."""
    with mock.patch.object(launcher, "processors", return_value=count):
        launcher._skip_plan.cache_clear()
        launcher._dense_plan.cache_clear()
        yield
    launcher._skip_plan.cache_clear()
    launcher._dense_plan.cache_clear()


@dataclass
class Case:
    """One call of the op; clustered, so that votes drop tiles."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    state: SkipState
    must_do: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    scale: float | None = None
    quantization: str = "none"

    def call(self, op: Any, state: SkipState, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (self.q, self.k, self.v) if dtype is None else (t.to(dtype) for t in (self.q, self.k, self.v))
        return op(
            q, k, v, state.skip_mask, state.control, state.threshold, state.initial_mask, self.must_do, self.key_mask,
            scale=self.scale, tile_m=state.tile_m, tile_n=state.tile_n, quantization=self.quantization,
        )  # fmt: skip

    def dequantized(self) -> tuple[Case, torch.Tensor]:
        """Return the case that the kernel computes from what is quantized, exact in float64, and what its LSE lacks."""
        mean = KEY_MEAN(self.k, self.key_mask)
        q, q_scales, _, lse_shift = QUANTIZE_QUERY(self.q, mean, scale=self.scale)
        k, k_scales, _ = QUANTIZE_KEY(self.k, mean, self.key_mask, tile_n=self.state.tile_n)
        q, k = each_row(q_scales, q, QUERY_ROWS) * q, each_row(k_scales, k, self.state.tile_n) * k
        v = self.v.double() if self.quantization == "int8" else dequantized_value(self.v, self.key_mask)
        return dataclasses.replace(self, q=q, k=k, v=v, scale=math.log(2), quantization="none"), lse_shift

    def reference(self, state: SkipState, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the CPU kernel; where inputs are quantized, on what the CUDA ops make of them, weights unrounded."""
        if self.quantization == "none":
            return self.call(REFERENCE, state, dtype)
        case, lse_shift = self.dequantized()
        out, lse = case.call(REFERENCE, state, dtype)
        return out, lse + lse_shift.where(~lse.isneginf(), 0)


def each_row(scales: torch.Tensor, x: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the scales [B, H, groups] of so many rows each as float64 [B, S, H, 1], for x [B, S, H, D]."""
    return scales.double().repeat_interleave(rows, 2)[..., : x.shape[1]].transpose(1, 2).unsqueeze(-1)


def dequantized_value(v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return v [B, S, H, D] as FP8 values have it, in float64."""
    values, scales = QUANTIZE_VALUE(v, key_mask)
    in_order = values.double().unflatten(3, (-1, 4, 2, 2)).transpose(4, 5).flatten(3)[..., : v.shape[1]]
    return (in_order * scales.double().unsqueeze(3)).permute(0, 3, 1, 2)


def clustered(
    batch: int, seq: int, heads: int, dim: int, *, peak: float, generator: torch.Generator, clusters: torch.Tensor
) -> torch.Tensor:
    """[batch, seq, heads, dim]: consecutive tokens share a cluster, so that far tiles score low."""
    which = torch.arange(seq, device="cuda") * len(clusters) // seq
    noise = torch.randn(batch, seq, heads, dim, device="cuda", generator=generator)
    return peak * clusters[which] + 0.5 * noise


def make_case(
    *,
    batch: int = 1,
    seq_q: int = 700,
    seq_k: int = 900,
    heads: int = 2,
    kv_heads: int = 2,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    peak: float = 0.6,
    threshold: float = -4.0,
    seed: int = 0,
    head_major: bool = False,
    extras: bool = False,
    key_mask: bool = False,
    quantization: str = "none",
    **state_options: Any,
) -> Case:
    """Return a case; `extras` adds an initial mask and must_do tiles, `head_major` lays q, k, v out as [B, H, S, D]."""
    generator = torch.Generator("cuda").manual_seed(seed)
    clusters = torch.randn(7, 1, dim, device="cuda", generator=generator)
    make = {"generator": generator, "peak": peak, "clusters": clusters}
    q, k = clustered(batch, seq_q, heads, dim, **make), clustered(batch, seq_k, kv_heads, dim, **make)
    v = torch.randn(batch, seq_k, kv_heads, dim, device="cuda", generator=generator)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if head_major:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if not target().quantizes(dim, quantization):
        pytest.skip(f"{target()} has no {quantization} for head dim {dim}")
    tile_m, tile_n = target().tile_shape(dim, quantization)
    q_tiles, k_tiles = math.ceil(seq_q / tile_m), math.ceil(seq_k / tile_n)

    def random_bits(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device="cuda", generator=generator) < 0.2

    if extras:
        state_options["initial_mask"] = random_bits(1, heads, q_tiles, k_tiles)
    state_options |= {"quantization": quantization, "implementation": _running}
    state = SkipState.for_inputs(q, k, threshold=threshold, **state_options)
    case = Case(q, k, v, state, quantization=quantization)
    if extras:
        case.must_do = pack_bits(random_bits(k_tiles))
    if key_mask:
        case.key_mask = ~random_bits(batch, seq_k)
        case.key_mask[:, : seq_k // 5] = False  # whole tiles without a key
        if batch > 1:
            case.key_mask[0] = False  # rows that see nothing
    return case


def check_step(case: Case) -> float:
    """Run one step on the kernel and on the CPU kernel, compare all that it computes, and return the sparsity."""
    other = copy.deepcopy(case.state)
    before = copy.deepcopy(case.state)
    out, lse = case.call(kernel(), case.state)
    want, want_lse = case.reference(other)
    # FlashAttention's budget: twice the error of the same attention in the inputs' dtype, and one rounding.
    rounding = (want.to(out.dtype).double() - want).abs().max().item()
    low = case.reference(copy.deepcopy(before), torch.float32)[0].to(out.dtype)
    budget = 2 * (low.double() - want).abs().max().item() + rounding
    # Weights are rounded to the dtype before the second product, which the reference in float32 does not do.
    weight_error = WEIGHT_ERROR[case.quantization]
    budget += (torch.finfo(out.dtype).eps + weight_error) * case.v.double().abs().max().item()
    lse_budget = 1e-4 + weight_error
    if weight_error:
        off, whole = (x.nan_to_num().norm() for x in (out.double() - want, want))
        assert off <= OUT_ERROR[case.quantization] * whole
    torch.testing.assert_close(out.double(), want, atol=budget, rtol=0, equal_nan=True)
    lse_error = (lse.double() - want_lse.double()).abs() / want_lse.double().abs().clamp(min=1)
    assert not (lse_error > lse_budget).any(), f"lse off by {lse_error.nan_to_num().max()}"
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    assert torch.equal(lse.isnan(), want_lse.isnan())
    assert torch.equal(case.state.control, other.control)
    differs = case.state.skip_mask != other.skip_mask
    if differs.any():
        assert _too_close(case, before)[case.state.kept_tiles() != other.kept_tiles()].all()
    return case.state.sparsity().item()


def _too_close(case: Case, before: SkipState) -> torch.Tensor:
    """Return bool [slots, B, Hq, q_tiles, k_tiles]: votes within rounding of the threshold, by the oracle."""
    case = case if case.quantization == "none" else case.dequantized()[0]
    state = before.cpu()
    oracle = skip_attention_oracle(
        case.q.double().cpu(), case.k.double().cpu(), case.v.double().cpu(), state.skip_mask, state.control,
        state.threshold, state.initial_mask, None if case.must_do is None else case.must_do.cpu(),
        None if case.key_mask is None else case.key_mask.cpu(), scale=case.scale, tile_m=state.tile_m,
        tile_n=state.tile_n,
    )  # fmt: skip
    scale = (case.q.shape[-1] ** -0.5 if case.scale is None else case.scale) * math.log2(math.e)
    largest = case.q.double().norm(dim=-1).max() * case.k.double().norm(dim=-1).max() * scale
    close = oracle.margin < 1e-3 * max(1.0, largest.item() / 64)
    *_, q_tiles, k_tiles = state.kept_tiles().shape  # may be more than the call has
    close = torch.nn.functional.pad(close, (0, k_tiles - close.shape[-1], 0, q_tiles - close.shape[-2]))
    return close.cuda().expand(state.slots, *close.shape)
