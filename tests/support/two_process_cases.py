"""What each of two processes on one device learns, beside what one process does; gloo carries it by the host."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

import lite_attention
from lite_attention import LiteAttention
from lite_attention.ops import tile_shape
from tests.support.op_cases import clustered_qkv

DIM, HEADS, STEPS, TILES = 128, 4, 4, 5  # tiles of queries that each process has


THRESHOLDS = torch.tensor([-1.0, -3.0, -5.0, -8.0])  # by head


class Case(NamedTuple):
    """Two generations of `LiteAttention`."""

    method: str = "votes"
    quantization: str = "none"
    gathers: bool = False  # keys, in place of exchanging heads
    device: str = "cuda"


class Found(NamedTuple):
    """How a process differs from one that has all."""

    error: float  # of outputs
    same_masks: bool
    skipped: float
    heads: list[int]  # of this process, at the end


@functools.cache
def _by_host() -> torch.library.Library:
    """Let gloo carry tensors of a GPU: of the collectives it has, not all take these."""
    ops, library = torch.ops._c10d_functional, torch.library.Library("_c10d_functional", "IMPL")

    def carried(name: str) -> Any:
        op = getattr(ops, name)
        return lambda x, *args: ops.wait_tensor(op(x.cpu(), *args)).to(x.device)

    for name in ("all_gather_into_tensor", "all_to_all_single"):
        library.impl(name, carried(name), "CUDA")
    return library


def _options(case: Case) -> dict[str, Any]:
    by_method = {"votes": {"threshold": THRESHOLDS}, "residual": {"keep": 0.4, "full_every": 2, "first_full": 1}}
    return {"num_steps": STEPS, "quantization": case.quantization, "method": case.method, **by_method[case.method]}


class Piece:
    """Some queries and heads, in one process that has all keys."""

    def __init__(self, case: Case, rows: range, heads: range, of: int) -> None:
        self.rows, self.heads = slice(rows.start, rows.stop), slice(heads.start, heads.stop)
        self.module = LiteAttention(**_options(case))
        sizes: dict[str, Any] = {"kv_seq_len": of, "dtype": torch.bfloat16, "device": case.device}
        self.module.allocate(1, len(rows), len(heads), DIM, **sizes)
        assert self.module.state is not None
        self.module.state.query_start = rows.start if len(rows) < of else None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module(q[:, self.rows, self.heads], k[:, :, self.heads], v[:, :, self.heads])
        return out

    @property
    def masks(self) -> torch.Tensor:
        """(..., heads, q_tiles, k_words)."""
        assert self.module.state is not None
        return self.module.state.skip_mask


def _pieces(case: Case, halves: list[range]) -> list[Piece]:
    """Return one of all for votes; residuals choose among the heads and queries of a rank."""
    of = halves[-1].stop
    if case.method == "votes":
        return [Piece(case, range(of), range(HEADS), of)]
    if case.gathers:
        return [Piece(case, rows, range(HEADS), of) for rows in halves]
    return [Piece(case, range(of), heads, of) for heads in (range(HEADS // 2), range(HEADS // 2, HEADS))]


def generations(case: Case) -> Found:
    """Run two generations of `LiteAttention` on two ranks and in one process."""
    _by_host()
    rank, group = dist.get_rank(), dist.group.WORLD
    half = TILES * tile_shape(DIM, torch.bfloat16, case.device, case.quantization)[0]
    halves = [range(half), range(half, 2 * half)]
    pieces, here = _pieces(case, halves), slice(halves[rank].start, halves[rank].stop)
    ours = LiteAttention(**_options(case), **{"key_group" if case.gathers else "process_group": group})
    errors = []
    for call in range(2 * STEPS):
        qkv = clustered_qkv(3, seq_q=2 * half, heads=HEADS, head_dim=DIM, gain=0.7, step=call)
        q, k, v = (x.to(case.device, torch.bfloat16) for x in qkv)
        expected = torch.empty_like(q)
        for piece in pieces:
            expected[:, piece.rows, piece.heads] = piece(q, k, v)
        errors.append((ours(q[:, here], k[:, here], v[:, here]) - expected[:, here]).abs().max())
    assert ours.state is not None
    assert ours.exchange is not None
    masks, heads = pieces[-1 if rank else 0].masks, ours.exchange.own_heads
    if case.method == "votes":
        masks = masks.index_select(-3, heads)
        masks = masks.narrow(-2, rank * TILES, TILES) if case.gathers else masks
    same = torch.equal(ours.state.skip_mask, masks)
    return Found(float(max(errors)), same, float(ours.sparsity()), heads.tolist())


class OfModel(NamedTuple):
    """How a tiny Wan of diffusers differs whose tokens two processes share."""

    error: float  # of outputs that skip nothing
    other_tiles: float  # share of the mask's bits: linear layers of other sizes may round otherwise
    skipped: float


@torch.no_grad()
def of_diffusers(degree: str, device: str = "cuda") -> OfModel:
    """Run a generation with each of two processes, and in one, which skip nothing and then something."""
    from diffusers import WanTransformer3DModel

    from lite_attention.inspection import named_states
    from tests.support import context_parallel_cases
    from tests.support import diffusers_models as dm

    _by_host()
    tile_m, dtype = tile_shape(DIM, torch.bfloat16, device)[0], torch.bfloat16

    def build() -> Any:
        sizes: dict[str, Any] = {"attention_head_dim": DIM, "in_channels": 4, "out_channels": 4, "num_layers": 2}
        sizes |= {"num_attention_heads": HEADS, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 64}
        return dm.peaked(lambda: WanTransformer3DModel(**sizes)).to(device, dtype)

    def generation(model: Any) -> torch.Tensor:
        steps = [
            {**dm.WAN.inputs(step, 0), "hidden_states": dm.latents(6, tile_m // 4, 16, step)} for step in range(STEPS)
        ]
        on_device = [{name: x.to(device, dtype) for name, x in inputs.items()} for inputs in steps]
        return torch.stack([dm.run(model, inputs).float() for inputs in on_device])

    def pair(threshold: float) -> tuple[list[Any], float]:
        models = [build(), context_parallel_cases.split(build(), **{degree: 2})]
        models = [lite_attention.enable(m, threshold=threshold, num_steps=STEPS, compile=False) for m in models]
        want, got = map(generation, models)
        return models, float((want - got).abs().max() / want.abs().max())

    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        error = pair(-math.inf)[1]
        one, ours = ([*named_states(model).values()] for model in pair(-4.0)[0])
    here = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    rows = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    differ = [
        (a.kept_tiles()[0, 0, here] if degree == "ulysses_degree" else a.kept_tiles()[0, 0, :, rows])
        ^ b.kept_tiles()[0, 0]
        for a, b in zip(one, ours, strict=True)
    ]
    skipped = sum(float(state.sparsity()) for state in ours) / len(ours)
    return OfModel(error, float(torch.stack(differ).float().mean()), skipped)
