"""What each of two processes on one device learns, beside what one process does; gloo carries it by the host."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

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
