"""What a rank computes in the tests of the library's own exchange; each function runs on all ranks."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

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

BATCH, HEADS, DIM, STEPS, TILE = 2, 4, 16, 4, 16
THRESHOLDS = torch.tensor([-3.0, -4.0, -5.0, -6.0])  # by head


class Case(NamedTuple):
    """One generation."""

    method: str = "votes"
    count: int = 128  # tokens of all ranks
    kv_heads: int = HEADS
    value_dim: int = DIM
    key_ranks: int = 1  # that gather keys; the others exchange heads
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


def new_state(case: Case, heads: torch.Tensor, rows: range | None = None) -> SiteState:
    """Return a state of some heads, and of the queries that stand at these keys; None = of all."""
    rows = range(case.count) if rows is None else rows
    sizes: dict[str, Any] = {"batch": BATCH, "seq_q": len(rows), "seq_k": case.count, "tile_m": TILE, "tile_n": TILE}
    sizes["heads"] = len(heads)
    if case.method == "votes":
        return SkipState(**sizes, threshold=THRESHOLDS[heads])
    plan = step_plan(STEPS, full_every=3)
    return ResidualState(**sizes, value_dim=case.value_dim, plan=plan, keep=0.5, residual_dtype="fp32")


@functools.cache
def groups(key_ranks: int) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return those that exchange heads, which are neighbors, and those that gather keys."""
    world = dist.get_world_size()
    if key_ranks == 1:
        return dist.group.WORLD, None
    if key_ranks == world:
        return None, dist.group.WORLD
    mesh = init_device_mesh("cpu", (key_ranks, world // key_ranks), mesh_dim_names=("keys", "heads"))
    return mesh.get_group("heads"), mesh.get_group("keys")


def generation(case: Case) -> Found:
    """Compare ranks with one process that computes the whole by parts: residuals choose within a part."""
    rank, head_ranks = dist.get_rank(), dist.get_world_size() // case.key_ranks
    attend: Any = {"votes": skip_attention, "residual": residual_attention}[case.method]
    order = torch.arange(HEADS) if case.order is None else torch.tensor(case.order)
    parts = order.view(head_ranks * case.parts, -1)
    here = slice(rank % head_ranks * case.parts, (rank % head_ranks + 1) * case.parts)
    runs = torch.arange(case.count).tensor_split(dist.get_world_size())
    rings = [torch.cat(runs[i : i + head_ranks]) for i in range(0, len(runs), head_ranks)]
    rows = [range(int(ring[0]), int(ring[-1]) + 1) for ring in rings]
    if case.method == "votes" and all(len(of_ring) % TILE == 0 for of_ring in rows):
        rows = [range(case.count)]  # then the ranks have rows of its masks
    single = [[new_state(case, heads, of_ring) for heads in parts] for of_ring in rows]
    for of_ring, states in zip(rows, single, strict=True):
        for state in states:
            state.query_start = of_ring[0] if len(rows) > 1 else None
    own_ring = rings[rank // head_ranks]
    own_rows = range(int(own_ring[0]), int(own_ring[-1]) + 1)
    own = [new_state(case, heads, own_rows) for heads in parts[here]]
    shared = HEADS // case.kv_heads
    options = {n: torch.tensor(x) if n == "key_lengths" else x for n, x in case.options}
    group, key_group = groups(case.key_ranks)

    def on_ranks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: torch.Tensor | None) -> Any:
        return ulysses_attention(
            q, k, v, own if case.parts > 1 else own[0], group, key_group=key_group, seq_len=case.count, order=given,
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
        for of_ring, states in zip(rows, single, strict=True):
            at = slice(of_ring.start, of_ring.stop)
            for heads, state in zip(parts, states, strict=True):
                kv = heads[::shared] // shared
                qkv = (q[:, at][:, :, heads], k[:, :, kv], v[:, :, kv])
                out[:, at, heads], lse[:, heads, at] = attend(*qkv, state, return_lse=True, **options)
                dense[:, at, heads] = attend(*qkv, new_state(case, heads, of_ring), **options)
        local = [part(x) for x in (q, k, v)]
        if case.by_head_first:
            local = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in local]
        got, got_lse = run(*local, None if case.order is None else order)
        errors.append(float((got - part(out)).abs().max()))
        lse_errors.append(float((got_lse - part(lse, 2)).abs().max()))
        moved.append(float((out - dense).abs().max()))
    expected = single[0 if len(rows) == 1 else rank // head_ranks][here]
    first = own_rows[0] // TILE if len(rows) == 1 else 0
    same = all(
        torch.equal(a.skip_mask, b.skip_mask[..., first : first + a.skip_mask.shape[-2], :])
        for a, b in zip(own, expected, strict=True)
    )
    skipped = torch.stack([state.sparsity() for state in own]).mean().item()
    return Found(max(errors), max(lse_errors), same, skipped, max(moved))


ORDERS: dict[str, Any] = {
    "no tensor": [0, 1, 2, 3], "of some heads": torch.arange(2), "no integers": torch.arange(4.0),
    "a head twice": torch.tensor([0, 1, 1, 3]), "sharers apart": torch.tensor([0, 2, 1, 3]),
}  # fmt: skip


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
    state: Any = [new_state(case, torch.arange(1))] * parts
    given: dict[str, Any] = {"group": dist.group.WORLD, "order": ORDERS.get(change)}
    if change == "no state":
        state = None
    elif change == "states of two kinds":
        state = [*state, new_state(case._replace(method="residual"), torch.arange(1))]
    elif change == "no group":
        given["key_group"] = 2
    try:
        ulysses_attention(q, k, v, state, seq_len=seq_len, **given)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


class Copies(TorchDispatchMode):
    """Counts the elements that ops other than attention and collectives write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_ours = func.namespace in ("lite_attention", "_c10d_functional")
        is_copy = any(name in str(func) for name in ("copy", "clone", "cat", "index", "pad", "contiguous"))
        if is_copy and not is_ours:
            written = args[3] if "index_copy" in str(func) else result  # a part of what it returns
            self.elements += written.numel()
        return result


def copied(case: Case) -> tuple[int, int]:
    """Return how many elements a call copies, and how many there are in q, k, v and the output."""
    order = None if case.order is None else torch.tensor(case.order)
    heads = part(torch.arange(HEADS) if order is None else order, 0)
    states = [new_state(case, of_part) for of_part in heads.tensor_split(case.parts)]
    local = [part(x).contiguous() for x in tokens(case, 0)]
    attend = functools.partial(ulysses_attention, group=dist.group.WORLD, seq_len=case.count, order=order)
    attend(*local, states)  # the first call is fresh
    with Copies() as copies:
        out = attend(*local, states)
    return copies.elements, sum(x.numel() for x in (*local, out))


def abort_once(marked: str) -> int:
    """Have rank 1 end by a signal, the first time."""
    if dist.get_rank() == 1 and not Path(marked).exists():
        Path(marked).touch()
        os.abort()
    dist.barrier()
    return dist.get_rank()


def without_one(way: str) -> str:
    """Return what a rank is told of one that died, or that does not come, after a call in which it was."""
    case = Case()
    module = LiteAttention(num_steps=STEPS, **{"key_group" if way == "keys" else "process_group": dist.group.WORLD})
    local = [*map(part, tokens(case, 0))]
    module(*local)
    if dist.get_rank() == 1:
        return "stays away" if way == "stays away" else os._exit(1)
    try:
        if way == "by hand":
            ulysses_attention(*local, new_state(case, torch.arange(2)), dist.group.WORLD)
        else:
            module(*local)
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
    reset: bool = False, options: dict[str, Any] | None = None, kv_heads: int = HEADS, key_ranks: int = 1,
    parts: int = 1,
) -> Learned:  # fmt: skip
    """Run some generations of `LiteAttention` on ranks and in one process."""
    group, key_group = groups(key_ranks)
    case = Case(count=tokens_of_all, kv_heads=kv_heads)
    num_steps = None if reset else STEPS
    options = {"threshold": THRESHOLDS.view(1, 1, HEADS), "num_steps": num_steps, **(options or {})}
    single = LiteAttention(**options)
    ours = LiteAttention(**options, process_group=group, key_group=key_group, parts=parts)
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
        assert ours.exchange is not None
        own = ours.exchange.own_heads
        q_tiles = ours.states[0].tiles[0]
        first = dist.get_rank() * key_ranks // dist.get_world_size() * q_tiles
        of_single = single.state.skip_mask[:, :, own, first : first + q_tiles]
        same = same and torch.equal(torch.cat([state.skip_mask for state in ours.states], 2), of_single)
        heads.append(own.tolist())
        kept.append(float((1 - ours.sparsity("head")).sum()))
    return Learned(max(errors), same, heads, kept, float(single.sparsity()))
