"""Residuals in memory of the host, which the GPU reads and writes in place."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

from lite_attention.ops import ResidualState, host_memory, residual_attention
from tests.support.op_cases import Qkv, clustered_qkv

_SIZES = {"batch": 1, "seq_q": 500, "seq_k": 700, "heads": 4, "kv_heads": 2, "head_dim": 64}


def _inputs(step: int) -> Qkv:
    q, k, v = (x.to("cuda") for x in clustered_qkv(4, **_SIZES, dtype=torch.bfloat16, step=step))
    return q, k, v


def _state(**options: Any) -> ResidualState:
    return ResidualState.for_inputs(*_inputs(0), **{"plan": [2, 1, 0, 2, 0], "memory": "host", **options})


def _equal(a: ResidualState, b: ResidualState) -> bool:
    return all(
        torch.equal(x.cpu().view(torch.uint8), y.cpu().view(torch.uint8))
        for x, y in zip(a.buffers(), b.buffers(), strict=True)
    )


@pytest.mark.parametrize(
    ("implementation", "residual_dtype"), [(None, "fp8"), (None, "bf16"), ("reference", "fp8"), ("reference", "fp32")]
)
def test_it_computes_what_memory_of_the_device_does(implementation: str | None, residual_dtype: str) -> None:
    host, device = _state(residual_dtype=residual_dtype), _state(residual_dtype=residual_dtype, memory="device")
    for step in range(5):
        outs = [residual_attention(*_inputs(step), state, implementation=implementation) for state in (host, device)]
        assert torch.equal(*outs)
    assert _equal(host, device)


def test_it_takes_no_memory_of_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    tensors = [host_memory.zeros((1 << 20, 64), dtype=torch.float8_e4m3fn, device=device) for _ in range(3)]
    assert torch.cuda.memory_allocated() == before
    for number, tensor in enumerate(tensors):
        assert tensor.device == device
        tensor.view(torch.uint8).fill_(number)
    assert [int(tensor.view(torch.uint8)[-1, -1]) for tensor in tensors] == [0, 1, 2]


def test_it_is_given_back_when_the_last_tensor_of_it_goes() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for _ in range(20):  # 20 GiB, if it were not
        part = host_memory.zeros((1 << 30,), dtype=torch.uint8, device=device)[:8]
        gc.collect()
        part += 1  # it is there as long as a part is looked at
        assert part.sum() == 8


@pytest.mark.parametrize("twin", [copy.copy, lambda state: state.to("cpu").to("cuda")], ids=["copy", "there and back"])
def test_a_copy_and_a_move_are_on_the_host_again(twin: Any) -> None:
    state = _state()
    for step in range(2):
        residual_attention(*_inputs(step), state, implementation="reference")
    want = copy.deepcopy(state)
    before = torch.cuda.memory_allocated()
    other = twin(state)
    assert torch.cuda.memory_allocated() - before < state.residual.nbytes
    assert _equal(other, want)
    assert other.residual.device.type == "cuda"
    for step in range(2, 5):
        outs = [residual_attention(*_inputs(step), x, implementation="reference") for x in (other, want)]
        assert torch.equal(*outs)


def test_a_graph_replays_it() -> None:
    state, eager = _state(), _state()
    inputs = _inputs(0)
    for step in range(2):
        for x in (state, eager):
            residual_attention(*_inputs(step), x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = residual_attention(*inputs, state)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, residual_attention(*inputs, eager))
