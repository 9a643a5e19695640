"""Calls of the residual's kernel, and their comparison with the CPU kernel in float64 and with masses by a formula."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from lite_attention.ops import control as c
from lite_attention.ops.bitmask import unpack_bits
from lite_attention.ops.plan import step_plan
from lite_attention.ops.residual_state import ResidualState
from lite_attention.ops.schema import RESIDUAL_IMPLEMENTATIONS
from lite_attention.ops.tiles import ceil_div, diagonal_tile
from tests.support.gpu_cases import OUT_ERROR, WEIGHT_ERROR, Case, implementation, make_case

REFERENCE = torch.ops.lite_attention.residual_attention_reference.default

SAMPLE_EVERY = 16
SATURATED = 8.0  # shares of a row, which a sample may have made too large, from which on a sum may be cut off


def kernel() -> Any:
    """The op that runs the kernel in question."""
    return RESIDUAL_IMPLEMENTATIONS[implementation()]


@dataclass
class ResidualCase:
    """Inputs of one call, of `make_case`, with a state that keeps residuals."""

    inputs: Case
    state: ResidualState
    generator: torch.Generator = field(repr=False)

    @classmethod
    def make(cls, *, plan: list[int] | None = None, seed: int = 0, **options: Any) -> ResidualCase:
        """Return a case; options that `make_case` has not are those of `ResidualState`."""
        names = ("slots", "keep", "forecast", "residual_dtype", "memory", "num_steps", "refresh", "auto_step")
        of_state = {name: options.pop(name) for name in names if name in options}
        inputs = make_case(seed=seed, **options)
        mask = inputs.state.initial_mask
        if mask is not None:
            mask = unpack_bits(mask, ceil_div(inputs.k.shape[1], inputs.state.tile_n))
        state = ResidualState.for_inputs(
            inputs.q, inputs.k, inputs.v, quantization=inputs.quantization, implementation=implementation(),
            plan=plan or step_plan(20), initial_mask=mask, **of_state,
        )  # fmt: skip
        return cls(inputs, state, torch.Generator("cuda").manual_seed(seed + 1))

    def call(self, op: Any, state: ResidualState, inputs: Case | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.inputs if inputs is None else inputs
        return op(
            x.q, x.k, x.v, *(state._buffers[name] for name in ResidualState.BUFFERS), x.must_do, x.key_mask,
            scale=x.scale, tile_m=state.tile_m, tile_n=state.tile_n, quantization=x.quantization,
        )  # fmt: skip

    def reference(self, state: ResidualState, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the CPU kernel; where inputs are quantized, on what the CUDA ops make of them, weights unrounded."""
        x = self.inputs
        if x.quantization != "none":
            return self.call(REFERENCE, state, _with_shift(*x.dequantized()))
        return self.call(REFERENCE, state, dataclasses.replace(x, q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype)))

    def drift(self, amount: float = 0.05) -> None:
        """Go on to the next step: inputs change a little."""
        for name in ("q", "k", "v"):
            x = getattr(self.inputs, name)
            noise = torch.randn(x.shape, dtype=torch.float32, device="cuda", generator=self.generator)
            setattr(self.inputs, name, (x.float() + amount * noise).to(x.dtype))


def _with_shift(x: Case, lse_shift: torch.Tensor) -> Case:
    """Return a case whose scores have the shift of their rows in them, as one more channel."""
    channel = lse_shift.double().transpose(1, 2).unsqueeze(-1) / (x.scale or 1)
    q, k = torch.cat([x.q, channel], -1), torch.cat([x.k, torch.ones_like(x.k[..., :1])], -1)
    return dataclasses.replace(x, q=q, k=k)


def check_residual_step(case: ResidualCase) -> None:
    """Run one step on the kernel and on the CPU kernel, and compare all that it computes and leaves."""
    x, state = case.inputs, case.state
    before, other = copy.deepcopy(state), copy.deepcopy(state)
    out, lse = case.call(kernel(), state)
    want, want_lse = case.reference(other, torch.float64)
    low = case.reference(copy.deepcopy(before), torch.float32)[0].to(out.dtype)
    rounding = (want.to(out.dtype).double() - want.double()).abs().nan_to_num().max().item()
    weight_error, largest = WEIGHT_ERROR[x.quantization], x.v.double().abs().max().item()
    budget = 2 * (low.double() - want.double()).abs().nan_to_num().max().item() + rounding
    budget += (torch.finfo(out.dtype).eps + weight_error) * largest
    if weight_error:
        off, whole = (y.double().nan_to_num().norm() for y in (out.double() - want.double(), want))
        # The output of the kept tiles alone is as wrong, and larger: fewer values are averaged.
        assert off <= 2 * OUT_ERROR[x.quantization] * whole
    torch.testing.assert_close(out.double(), want.double(), atol=budget, rtol=0, equal_nan=True)
    _close_lse(lse, want_lse, 2e-4 + weight_error)
    assert torch.equal(state.control, other.control)
    torch.testing.assert_close(state.times, other.times, equal_nan=True)
    words = state.control.tolist()
    slot = words[c.SLOT]
    first = c.slot_word(slot, 0)
    is_dense = bool(words[c.FLAGS] & c.FLAG_DENSE)
    if is_dense:
        for name in ("skip_mask", "residual", "row_lse"):
            assert torch.equal(*(getattr(s, name).view(torch.uint8) for s in (state, before)))
        return
    _check_left(case, other, slot, budget, weight_error)
    decided = words[first + c.DECIDED]
    was_decided = before.control[first + c.DECIDED].item()
    if decided and (decided != was_decided or _is_fresh(before, x, slot)):
        _check_choice(case, before, slot, decided % 2)
        for half in {0, 1} - {decided % 2}:
            assert torch.equal(state.skip_mask[slot, half], before.skip_mask[slot, half])
    else:
        assert torch.equal(state.skip_mask, before.skip_mask)


def _close_lse(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    error = (got.double() - want.double()).abs() / want.double().abs().clamp(min=1)
    assert not (error > tolerance).any(), f"lse off by {error.nan_to_num().max()}"
    assert torch.equal(got.isneginf(), want.isneginf())
    assert torch.equal(got.isnan(), want.isnan())


def _check_left(case: ResidualCase, other: ResidualState, slot: int, budget: float, weight_error: float) -> None:
    """Compare residuals, their LSEs, and the LSE of the step."""
    state, x = case.state, case.inputs
    rows = (slice(None), slice(0, x.q.shape[0]), slice(None), slice(0, x.q.shape[1]))
    got, want = (s.residual[slot][rows].double() for s in (state, other))
    if state.residual_scale is not None and other.residual_scale is not None:
        got, want = (y * s.residual_scale[slot][rows].double().unsqueeze(-1) for y, s in ((got, state), (want, other)))
        step = 2**-3 * want.abs() + 2**-9 * other.residual_scale[slot][rows].double().unsqueeze(-1)
    else:
        step = 2**-7 * want.abs()
    # What is kept is rounded to the output's dtype before it is subtracted.
    atol = 2 * budget + torch.finfo(x.q.dtype).eps * x.v.double().abs().max().item()
    assert not ((got - want).abs() > step + atol).any(), ((got - want).abs() - step - atol).max()
    for plane in range(state.row_lse.shape[1]):
        mine, theirs = (s.row_lse[slot, plane, : x.q.shape[0], :, : x.q.shape[1]] for s in (state, other))
        _close_lse(mine, theirs, 4e-4 + 2 * weight_error)


def _is_fresh(before: ResidualState, x: Case, slot: int) -> bool:
    return c.read_control(before.control, before.slots, (x.q.shape[0], x.q.shape[1], x.k.shape[1])).fresh


def _check_choice(case: ResidualCase, before: ResidualState, slot: int, half: int) -> None:
    """Hold the chosen tiles against masses by the formula."""
    x, state = case.inputs, case.state
    lse_shift = None
    if x.quantization != "none":
        x, lse_shift = x.dequantized()
    mass, visitable, always, is_exact = masses_of(x, state, before, slot, _is_fresh(before, x, slot), lse_shift)
    batch, _, q_tiles, k_tiles = mass.shape
    stays = ~unpack_bits(state.skip_mask[slot, half, :batch, :, :q_tiles], k_tiles)
    assert not (stays & ~visitable).any()
    step = before.control[c.slot_word(slot, c.STEP)].item()
    keep = state.keep[min(step, len(state.keep) - 1)].item()
    relative = 0.04 if case.inputs.quantization == "none" else 0.2
    for b in range(batch):
        wanted = round(keep * visitable[b].sum().item())
        must = always[b] & visitable[b]
        assert stays[b][must].all()
        ranked = mass[b].masked_fill(must, math.inf).masked_fill(~visitable[b], -1).flatten().sort(descending=True)
        if wanted <= must.sum():
            assert torch.equal(stays[b], must)
            continue
        if not is_exact:
            assert abs(int(stays[b].sum()) - wanted) <= 0.05 * wanted + 3
            continue
        cut = ranked.values[wanted - 1].item()
        margin = relative * cut + 1e-5
        assert not (stays[b] & (mass[b] < cut - margin) & ~must).any(), (cut, mass[b][stays[b] & ~must].min())
        assert not (visitable[b] & ~stays[b] & (mass[b] > cut + margin)).any(), (cut, mass[b][~stays[b]].max())
        near = ((mass[b] - cut).abs() <= margin).sum().item()
        assert abs(int(stays[b].sum()) - wanted) <= max(2, near)


def masses_of(
    x: Case, state: ResidualState, before: ResidualState, slot: int, is_fresh: bool, lse_shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Return float64 masses [B, Hq, q_tiles, k_tiles], which tiles are visitable, which stay whatever their mass, and
    whether the sums of the kernel are as exact.
    """
    batch, seq_q, heads, dim = x.q.shape
    seq_k, group = x.k.shape[1], heads // x.k.shape[2]
    tile_m, tile_n = state.tile_m, state.tile_n
    q_tiles, k_tiles = ceil_div(seq_q, tile_m), ceil_div(seq_k, tile_n)
    k = x.k.double().repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", x.q.double(), k) * (dim**-0.5 if x.scale is None else x.scale)
    allowed = torch.ones(batch, seq_k, dtype=torch.bool, device=x.q.device)
    if x.key_mask is not None:
        allowed &= x.key_mask
    scores = scores.masked_fill(~allowed[:, None, None], -math.inf)
    visitable = torch.ones(batch, heads, q_tiles, k_tiles, dtype=torch.bool, device=x.q.device)
    if state.initial_mask is not None:
        visitable &= ~unpack_bits(state.initial_mask[:batch, :, :q_tiles], k_tiles)
    always = torch.zeros_like(visitable)
    if x.must_do is not None:
        always |= unpack_bits(x.must_do, k_tiles)
    visitable |= always
    pad = k_tiles * tile_n - seq_k
    visitable &= torch.nn.functional.pad(allowed, (0, pad)).view(batch, 1, 1, k_tiles, tile_n).any(-1)
    geometry = (seq_q, seq_k, tile_m, tile_n, state.query_start)
    diagonal = torch.tensor([diagonal_tile(i, *geometry) for i in range(q_tiles)], device=x.q.device)
    j = torch.arange(k_tiles, device=x.q.device)
    always |= j == diagonal[:, None]
    row_tile = torch.arange(seq_q, device=x.q.device) // tile_m
    in_tiles = torch.nn.functional.pad(scores, (0, pad), value=-math.inf).unflatten(-1, (k_tiles, tile_n))
    sums = in_tiles.logsumexp(-1).masked_fill(~visitable[:, :, row_tile], -math.inf)  # [B, H, Sq, k_tiles]
    if is_fresh:
        sample = ((j - diagonal[:, None]) % SAMPLE_EVERY == 0) | (j == 0) | (j == k_tiles - 1)
        norm = sums.masked_fill(~sample[row_tile], -math.inf).logsumexp(-1)
    else:
        norm = before.row_lse[slot, 0, :batch, :, :seq_q].double()
        norm = norm if lse_shift is None else norm - lse_shift
    norm = norm.where(norm.isfinite(), math.inf)
    shares = (sums - norm.unsqueeze(-1)).exp()
    rows = torch.zeros(batch, heads, q_tiles, k_tiles, dtype=torch.float64, device=x.q.device)
    rows.index_add_(2, row_tile, shares)
    return rows / rows.sum(-1, keepdim=True).clamp(min=1e-300), visitable, always, bool(shares.max() < SATURATED)
