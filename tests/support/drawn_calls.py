"""Calls that hypothesis draws, and what both methods do with them: states, inputs and options of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from lite_attention.ops import control as c
from lite_attention.ops.bitmask import pack_bits
from lite_attention.ops.site_state import SiteState
from lite_attention.ops.tiles import ceil_div
from tests.support.op_cases import clustered_qkv


@dataclass(kw_only=True)
class DrawnCall:
    """One step: what is asked of the op, and what happens to the state before."""

    before: str
    slot: int
    batch: int
    seq_q: int
    seq_k: int
    must_do: bool
    key_mask: str
    scale: float | None
    query_start: int | None


@dataclass(kw_only=True)
class DrawnCase:
    """A state's sizes and options, as far as both methods have them."""

    seed: int
    dtype: torch.dtype
    quantization: str
    capacity: tuple[int, int, int]  # batch, seq_q, seq_k
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    tile_m: int
    tile_n: int
    slots: int
    num_steps: int | None
    refresh: int | None
    auto_step: bool
    initial_mask: tuple[bool, bool] | None  # one for each batch, one for each head

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def state_options(self, rng: torch.Generator) -> dict[str, Any]:
        """Return the arguments that a state of either method takes."""
        batch, seq_q, seq_k = self.capacity
        initial = None
        if self.initial_mask is not None:
            tiles = ceil_div(seq_q, self.tile_m), ceil_div(seq_k, self.tile_n)
            shape = (batch if self.initial_mask[0] else 1, self.heads if self.initial_mask[1] else 1, *tiles)
            initial = torch.rand(shape, generator=rng) < 0.3
        return {
            "batch": batch, "heads": self.heads, "seq_q": seq_q, "seq_k": seq_k, "tile_m": self.tile_m,
            "tile_n": self.tile_n, "slots": self.slots, "num_steps": self.num_steps, "refresh": self.refresh,
            "auto_step": self.auto_step, "initial_mask": initial,
        }  # fmt: skip

    def inputs(self, call: DrawnCall, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v of the step of that number."""
        return clustered_qkv(
            self.seed, batch=call.batch, seq_q=call.seq_q, seq_k=call.seq_k, heads=self.heads, kv_heads=self.kv_heads,
            head_dim=self.head_dim, value_dim=self.value_dim, dtype=self.dtype, step=number,
        )  # fmt: skip

    def prepared(self, call: DrawnCall, state: SiteState, rng: torch.Generator) -> dict[str, Any]:
        """Do to the state what comes before the call, and return the call's options."""
        must_do = None
        if call.must_do:
            must_do = pack_bits(torch.rand(ceil_div(call.seq_k, self.tile_n), generator=rng) < 0.3)
        state.slot, state.query_start = call.slot, call.query_start
        state.set_flag(c.FLAG_DENSE, call.before == "dense")
        if call.before == "fresh":
            state.start_fresh(call.slot)
        elif call.before == "jump":
            state.set_step(int(torch.randint(6, (), generator=rng)), call.slot)
        elif call.before == "reset":
            state.reset(call.slot)
        key_mask = _key_mask(call, self.tile_n, rng)
        return {"scale": call.scale, "must_do": must_do, "key_mask": key_mask, "quantization": self.quantization}


def _key_mask(call: DrawnCall, tile_n: int, rng: torch.Generator) -> torch.Tensor | None:
    if not call.key_mask:
        return None
    batch = 1 if call.key_mask == "one for all" else call.batch
    if call.key_mask == "tokens":
        return torch.rand(batch, call.seq_k, generator=rng) < 0.7
    tiles = torch.rand(batch, ceil_div(call.seq_k, tile_n), generator=rng) < 0.6
    mask = tiles.repeat_interleave(tile_n, 1)[:, : call.seq_k].clone()
    mask[:, -1] = False  # an excluded token in a tile that otherwise takes part
    if call.key_mask == "nothing":
        mask[0] = False
    return mask


def near_tile_edges(tile: int, tiles: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    """Return lengths of so many tiles, and a little more or less."""
    edge = st.sampled_from([0, 0, -1, 1, tile // 2])
    return st.builds(lambda n, off: max(1, n * tile + off), tiles, edge)
