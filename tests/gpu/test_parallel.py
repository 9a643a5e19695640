"""The library's own exchange on one GPU: a group of one rank packs, sends, attends, sends and unpacks as several do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lite_attention import LiteAttention
from lite_attention.ops import ResidualState, SkipState, residual_attention, skip_attention, step_plan
from lite_attention.parallel import leave_processors, ulysses_attention
from lite_attention.parallel.balance import propose_deal
from lite_attention.parallel.group import ALONE, Group
from tests.support.op_cases import clustered_qkv

DEVICE = "cuda"
HEADS, ORDER = 4, [2, 0, 3, 1]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", init_method=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def tokens(step: int, kv_heads: int = HEADS) -> list[torch.Tensor]:
    qkv = clustered_qkv(3, batch=2, seq_q=1100, heads=HEADS, kv_heads=kv_heads, head_dim=128, step=step)
    return [x.to(DEVICE, torch.bfloat16) for x in qkv]


def states(method: str, qkv: list[torch.Tensor], parts: int, quantization: str) -> list[Any]:
    q, k, v = (x[:, :, : x.shape[2] // parts] for x in qkv)
    if method == "votes":
        return [SkipState.for_inputs(q, k, threshold=-4.0, quantization=quantization) for _ in range(parts)]
    plan = step_plan(5, full_every=2)
    return [ResidualState.for_inputs(q, k, v, plan=plan, quantization=quantization) for _ in range(parts)]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("quantization", ["none", "int8_fp8"])
@pytest.mark.parametrize("method", ["votes", "residual"])
def test_dealt_parts_are_what_one_call_is(
    method: str, quantization: str, kv_heads: int, group: dist.ProcessGroup
) -> None:
    """Outputs, LSEs and masks, bit for bit; residuals choose among the heads of a part."""
    attend: Any = {"votes": skip_attention, "residual": residual_attention}[method]
    order = torch.tensor(ORDER if kv_heads == HEADS else [2, 3, 0, 1], device=DEVICE)
    ours, single = (states(method, tokens(0, kv_heads), 2, quantization) for _ in range(2))
    for step in range(5):
        q, k, v = tokens(step, kv_heads)
        out, lse = torch.empty_like(q), q.new_empty(2, HEADS, q.shape[1], dtype=torch.float32)
        for heads, state in zip(order.view(2, -1), single, strict=True):
            kv = heads[:: HEADS // kv_heads] // (HEADS // kv_heads)
            here = (q[:, :, heads], k[:, :, kv], v[:, :, kv])
            out[:, :, heads], lse[:, heads] = attend(*here, state, return_lse=True, quantization=quantization)
        leave_processors(8 * (step % 2))
        try:
            got, got_lse = ulysses_attention(
                q, k, v, ours, group, order=order, return_lse=True, quantization=quantization
            )
        finally:
            leave_processors(0)
        assert torch.equal(got, out)
        assert torch.equal(got_lse, lse)
        for a, b in zip(ours, single, strict=True):
            assert torch.equal(a.skip_mask, b.skip_mask)
    assert all(float(state.sparsity()) > 0.05 for state in ours)


def test_a_module_in_a_graph_and_compiled(group: dist.ProcessGroup) -> None:
    plain, graphed, compiled = (
        LiteAttention(threshold=-4.0, num_steps=5, process_group=group, parts=parts) for parts in (1, 2, 2)
    )
    for module in (plain, graphed, compiled):
        module.allocate(2, 1100, HEADS, 128, dtype=torch.bfloat16, device=DEVICE)
    run = torch.compile(compiled, fullgraph=True)
    held = tokens(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed(*held)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = graphed(*held)
    graphed.reset_skip_state()
    for step in range(5):
        for held_tensor, x in zip(held, tokens(step), strict=True):
            held_tensor.copy_(x)
        expected = plain(*held)
        graph.replay()
        assert torch.equal(out, expected)
        assert torch.equal(run(*held), expected)
    assert float(plain.sparsity()) > 0.05
    for module in (graphed, compiled):
        masks = torch.cat([state.skip_mask for state in module.states], 2)
        assert torch.equal(masks, plain.states[0].skip_mask)


def test_a_deal_is_proposed_without_waiting(group: dist.ProcessGroup) -> None:
    masks = torch.zeros(2, 1, HEADS, 3, 2, dtype=torch.int32, device=DEVICE)
    order, proposed = torch.tensor(ORDER, device=DEVICE), torch.zeros(HEADS, dtype=torch.int64, device=DEVICE)
    calls, apart = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    apart = apart.pin_memory() if DEVICE == "cuda" else apart
    for _ in range(4):
        assert proposed.tolist() == [0] * HEADS
        torch.cuda.set_sync_debug_mode("error" if DEVICE == "cuda" else "default")
        try:
            propose_deal(proposed, calls, apart, [masks], order, HEADS, Group.of(group), ALONE)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert proposed.tolist() == [0, 1, 2, 3]
    torch.cuda.synchronize()
    assert int(apart) == 0
