"""What a rank computes in the tests of the library's own exchange; each function runs on all ranks."""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import lite_attention
from lite_attention import LiteAttention
from lite_attention.ops import (
    ResidualState,
    SkipState,
    default_session,
    residual_attention,
    skip_attention,
    step_plan,
)
from lite_attention.ops.site_state import SiteState
from lite_attention.parallel import ulysses_attention

BATCH, HEADS, DIM, STEPS = 2, 4, 16, 4
THRESHOLDS = torch.tensor([-3.0, -4.0, -5.0, -6.0])  # by head


class Case(NamedTuple):
    """One generation."""

    method: str = "votes"
    count: int = 128  # tokens of all ranks
    kv_heads: int = HEADS
    value_dim: int = DIM
    parts: int = 1  # of the heads of a rank
    order: tuple[int, ...] | None = None
    by_head_first: bool = False  # how q, k and v lie: (batch, heads, tokens, dim)
    backend: str = ""  # to compile it whole with; "" = eager
    options: tuple[tuple[str, Any], ...] = ()


class Found(NamedTuple):
    """How a rank differs from one process."""

    error: float  # of outputs
    lse_error: float
    same_masks: bool
    skipped: float  # of the tiles, at the end
    moved: float  # output against dense


def tokens(case: Case, step: int) -> list[torch.Tensor]:
    """q, k and v (BATCH, tokens, heads, dim) that flock to centers along the sequence, each head more or less so."""
    noise = torch.Generator().manual_seed(0)
    centers = torch.randn(8, 1, HEADS, DIM, generator=noise).repeat_interleave(-(-case.count // 8), 0)
    pull = torch.tensor([2.0, 1.5, 1.0, 0.5]).view(HEADS, 1) * centers[: case.count, 0]
    dims = (DIM, DIM, case.value_dim)
    rest = [torch.randn(BATCH, case.count, HEADS, d, generator=noise) for d in dims]
    noise.manual_seed(1 + step)
    q, k, v = (0.5 * x + 0.05 * torch.randn(x.shape, generator=noise) for x in rest)
    return [q + pull, (k + pull)[:, :, : case.kv_heads], v[:, :, : case.kv_heads]]


def part(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Return what this rank has of all tokens."""
    return x.tensor_split(dist.get_world_size(), dim)[dist.get_rank()]


def new_state(case: Case, heads: torch.Tensor) -> SiteState:
    sizes: dict[str, Any] = {"batch": BATCH, "seq_q": case.count, "seq_k": case.count, "tile_m": 16, "tile_n": 16}
    sizes["heads"] = len(heads)
    if case.method == "votes":
        return SkipState(**sizes, threshold=THRESHOLDS[heads])
    plan = step_plan(STEPS, full_every=3)
    return ResidualState(**sizes, value_dim=case.value_dim, plan=plan, keep=0.5, residual_dtype="fp32")


def generation(case: Case) -> Found:
    """Compare ranks with one process, whose states are of the heads of a rank: residuals choose among these."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    attend: Any = {"votes": skip_attention, "residual": residual_attention}[case.method]
    order = torch.arange(HEADS) if case.order is None else torch.tensor(case.order)
    parts = order.view(ranks * case.parts, -1)
    single = [new_state(case, heads) for heads in parts]
    own = [new_state(case, heads) for heads in parts.view(ranks, case.parts, -1)[rank]]
    shared = HEADS // case.kv_heads
    options = {n: torch.tensor(x) if n == "key_lengths" else x for n, x in case.options}

    def on_ranks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: torch.Tensor | None) -> Any:
        return ulysses_attention(
            q, k, v, own if case.parts > 1 else own[0], dist.group.WORLD, seq_len=case.count, order=given,
            return_lse=True, **options,
        )  # fmt: skip

    if case.backend:
        torch._dynamo.reset()
    run: Any = torch.compile(on_ranks, fullgraph=True, backend=case.backend) if case.backend else on_ranks
    errors, lse_errors, moved = [], [], []
    for step in range(STEPS):
        q, k, v = tokens(case, step)
        out, lse = q.new_empty(*q.shape[:3], case.value_dim), q.new_empty(BATCH, HEADS, case.count)
        dense = out.clone()
        for heads, state in zip(parts, single, strict=True):
            kv = heads[::shared] // shared
            here = (q[:, :, heads], k[:, :, kv], v[:, :, kv])
            out[:, :, heads], lse[:, heads] = attend(*here, state, return_lse=True, **options)
            dense[:, :, heads] = attend(*here, new_state(case, heads), **options)
        local = [part(x) for x in (q, k, v)]
        if case.by_head_first:
            local = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in local]
        got, got_lse = run(*local, None if case.order is None else order)
        errors.append(float((got - part(out)).abs().max()))
        lse_errors.append(float((got_lse - part(lse, 2)).abs().max()))
        moved.append(float((out - dense).abs().max()))
    expected = single[rank * case.parts : (rank + 1) * case.parts]
    same = all(torch.equal(a.skip_mask, b.skip_mask) for a, b in zip(own, expected, strict=True))
    skipped = torch.stack([state.sparsity() for state in own]).mean().item()
    return Found(max(errors), max(lse_errors), same, skipped, max(moved))


def refused(case: Case, change: str) -> str:
    """Return what a call says that a rule forbids; it says so before anything is sent."""
    q, k, v = (part(x) for x in tokens(case, 0))
    seq_len: int | None = case.count
    parts = 1
    if change == "queries alone":
        k, v = k[:, :-1], v[:, :-1]
    elif change == "tokens of another rank":
        seq_len = case.count + 2 * dist.get_world_size()
    elif change == "parts":
        parts = 2 * HEADS
    state = [new_state(case, torch.arange(1))] * parts
    try:
        ulysses_attention(q, k, v, state, dist.group.WORLD, seq_len=seq_len)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def without_one() -> str:
    """Return what a rank is told of one that died."""
    case = Case()
    if dist.get_rank() == 1:
        os._exit(1)
    try:
        ulysses_attention(*map(part, tokens(case, 0)), new_state(case, torch.arange(2)), dist.group.WORLD)
    except RuntimeError as error:
        return str(error)
    return "nothing was told"


# ---- LiteAttention(process_group=) ----------------------------------------------------------------------------------


class Learned(NamedTuple):
    """What a rank's module has learned over some generations, beside that of one process."""

    error: float
    same_masks: bool
    heads: list[list[int]]  # of this rank, by generation
    kept: list[float]  # tiles of this rank in each generation, of all of its heads
    skipped: float


def generations(
    count: int = 3, tokens_of_all: int = 512, backend: str = "", branches: tuple[str, ...] = ("",),
    reset: bool = False, options: dict[str, Any] | None = None, kv_heads: int = HEADS,
) -> Learned:  # fmt: skip
    """Run some generations of `LiteAttention` on ranks and in one process."""
    case = Case(count=tokens_of_all, kv_heads=kv_heads)
    num_steps = None if reset else STEPS
    options = {"threshold": THRESHOLDS.view(1, 1, HEADS), "num_steps": num_steps, **(options or {})}
    single, ours = LiteAttention(**options), LiteAttention(**options, process_group=dist.group.WORLD)
    default_session.clear()
    ours.allocate(BATCH, case.count, HEADS, DIM, kv_heads=kv_heads)
    run: Any = ours
    if backend:
        torch._dynamo.reset()
        run = torch.compile(ours, fullgraph=True, backend=backend)
    errors, heads, kept, same = [0.0], [], [], True
    for _ in range(count):
        if reset:
            lite_attention.reset()
        for step in range(STEPS):
            for b, branch in enumerate(branches):
                x = tokens(case, 10 * b + step)
                with lite_attention.branch(branch) if branch else contextlib.nullcontext():
                    expected = single(*x)
                    got = run(*map(part, x), seq_len=case.count)
                errors.append(float((got - part(expected)).abs().max()))
        assert isinstance(single.state, SkipState)
        assert isinstance(ours.state, SkipState)
        assert ours.exchange is not None
        own = ours.exchange.own_heads
        same = same and torch.equal(ours.state.skip_mask, single.state.skip_mask[:, :, own])
        heads.append(own.tolist())
        kept.append(float((1 - ours.state.sparsity("head")).sum()))
    return Learned(max(errors), same, heads, kept, float(single.sparsity()))
