"""Calls that hypothesis draws, and what both methods do with them: states, inputs and options of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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


# ---- what is drawn -------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a state."""

    tile_m: int
    tile_n: int
    many_tiles: bool  # more than one word of bits has, and more than a sample of a deciding step
    batch: int
    seq_q: int
    seq_k: int


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """Draw sizes near the edges of tiles, often of few, sometimes of many."""
    tile_m, tile_n = draw(st.integers(4, 16)), draw(st.integers(4, 16))
    many_tiles = draw(st.sampled_from([False] * 7 + [True]))
    if many_tiles:
        tile_n = 4
    batch = 1 if many_tiles else draw(st.integers(1, 2))
    few = st.integers(1, 5)
    seq_q = draw(near_tile_edges(tile_m, st.integers(1, 2) if many_tiles else few))
    seq_k = draw(near_tile_edges(tile_n, st.integers(33, 66) if many_tiles else few))
    return Sizes(tile_m, tile_n, many_tiles, batch, seq_q, seq_k)


def fields_of_calls(of: Sizes, slots: st.SearchStrategy[int]) -> dict[str, st.SearchStrategy[Any]]:
    """Return what the fields of a `DrawnCall` are drawn from, as a rule as large as the state."""
    return {
        "before": st.sampled_from([""] * 8 + ["fresh", "fresh", "dense", "jump", "reset"]),
        "slot": slots,
        "batch": st.sampled_from([of.batch] * 5 + [1]),
        "seq_q": st.sampled_from([of.seq_q] * 5 + [max(1, of.seq_q - of.tile_m)]),
        "seq_k": st.sampled_from([of.seq_k] * 5 + [max(1, of.seq_k - of.tile_n - 1)]),
        "must_do": st.sampled_from([False, False, True]),
        "key_mask": st.sampled_from([""] * 5 + ["tokens", "tiles", "one for all", "nothing"]),
        "scale": st.sampled_from([None, None, 0.7]),
        "query_start": st.one_of(st.none(), st.none(), st.integers(0, of.seq_k)),
    }


@st.composite
def fields_of_case(draw: st.DrawFn, of: Sizes, slots: int) -> dict[str, Any]:
    """Draw the fields of a `DrawnCase` but those of its steps: `num_steps`, `refresh` and `auto_step`."""
    return {
        "seed": draw(st.integers(0, 2**16)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
        "quantization": draw(st.sampled_from(["none", "none", "int8", "int8_fp8"])),
        "capacity": (of.batch, of.seq_q, of.seq_k),
        "kv_heads": draw(st.integers(1, 2)),
        "group": 1 if of.many_tiles else draw(st.sampled_from([1, 1, 2])),
        "head_dim": draw(st.sampled_from([2, 4, 7, 8])),
        "value_dim": draw(st.sampled_from([1, 4, 8, 16])),
        "tile_m": of.tile_m,
        "tile_n": of.tile_n,
        "slots": slots,
        "initial_mask": draw(st.sampled_from([None, None, (False, False), (True, True), (True, False)])),
    }


def near_tile_edges(tile: int, tiles: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    """Return lengths of so many tiles, and a little more or less."""
    edge = st.sampled_from([0, 0, -1, 1, tile // 2])
    return st.builds(lambda n, off: max(1, n * tile + off), tiles, edge)
