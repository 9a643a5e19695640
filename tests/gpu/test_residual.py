"""The kernels with a residual against the CPU kernel in float64, and its choice against masses by a formula."""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lite_attention
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.ops.plan import step_plan
from tests.support.gpu_cases import HERE, VARIANTS, implementation, processors
from tests.support.residual_gpu_cases import ResidualCase, check_residual_step, kernel

pytestmark = pytest.mark.usefixtures("each_kernel")

CASES = int(os.environ.get("LITE_ATTENTION_GPU_CASES", "200"))
# Of a kernel that is not the GPU's own: one that takes few registers, and one that takes many.
FEW = [(64, torch.float16, "none", "bf16"), (128, torch.bfloat16, "none", "fp8"), (128, torch.bfloat16, "int8", "fp8")]
FULL_EVERY_3 = step_plan(12, full_every=3)
# (head dim, quantization, storage, initial mask and must_do, key mask): few, since each is a kernel that takes seconds.
KERNELS = [kernel for kernel in [
    (128, "none", "fp8", False, False), (64, "none", "bf16", True, True), (96, "none", "fp8", False, True),
    (256, "none", "fp8", True, False), (128, "int8", "fp8", True, True), (128, "int8_fp8", "fp8", False, True),
    (64, "int8_fp8", "bf16", True, False),
] if HERE.quantizes(*kernel[:2])]  # fmt: skip


@pytest.mark.parametrize(("dim", "dtype", "quantization"), VARIANTS)
@pytest.mark.parametrize("stored", ["fp8", "bf16"])
def test_steps_of_a_generation(dim: int, dtype: torch.dtype, quantization: str, stored: str) -> None:
    if implementation() is not None and (dim, dtype, quantization, stored) not in FEW:
        pytest.skip("there are enough of this kernel, which is here for comparison")
    case = ResidualCase.make(
        seq_q=1500, seq_k=2100, dim=dim, dtype=dtype, quantization=quantization, plan=FULL_EVERY_3, keep=0.3,
        residual_dtype=stored, peak=0.3,
    )  # fmt: skip
    for _ in range(9):
        check_residual_step(case)
        case.drift()


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_any_call_matches_the_reference(data: st.DataObject) -> None:
    dim, quantization, stored, extras, key_mask = data.draw(st.sampled_from(KERNELS))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    case = ResidualCase.make(
        batch=data.draw(st.integers(1, 3)), seq_q=data.draw(st.integers(1, 800)), seq_k=data.draw(st.integers(1, 1500)),
        heads=kv_heads * group, kv_heads=kv_heads, dim=dim, peak=data.draw(st.sampled_from([0.3, 0.6, 1.0])),
        seed=data.draw(st.integers(0, 1000)), head_major=data.draw(st.booleans()), extras=extras,
        key_mask=key_mask, quantization=quantization,
        plan=data.draw(st.lists(st.sampled_from([0, 0, 1, 2]), min_size=1, max_size=8)),
        keep=data.draw(st.sampled_from([0.01, 0.2, 0.5, 1.0])), forecast=data.draw(st.booleans()),
        residual_dtype=stored, num_steps=data.draw(st.sampled_from([None, 5])),
    )  # fmt: skip
    case.inputs.scale = data.draw(st.sampled_from([None, 0.2]))
    ctas = data.draw(st.sampled_from([1, 3, 132]))
    times = data.draw(st.sampled_from([None, (1.0, 0.9, 0.9, 0.5, 0.2, 0.1)]))
    for n in range(6):
        if times is not None:
            case.state.set_time(times[n])
        with processors(ctas):
            check_residual_step(case)
        case.drift()


@pytest.mark.parametrize("start", [0, 333, 1100, 5000])
def test_a_part_of_the_queries(start: int) -> None:
    case = ResidualCase.make(seq_q=700, seq_k=1800, plan=[2, 1, 0, 2, 0], keep=0.1, residual_dtype="bf16", peak=0.3)
    case.state.query_start = start
    for _ in range(5):
        check_residual_step(case)
        case.drift()


def test_unchanged_inputs_give_the_same() -> None:
    case = ResidualCase.make(seq_q=1500, seq_k=1500, plan=[2, 1, 0, 1, 0], keep=0.2, residual_dtype="bf16")
    outs = [case.call(kernel(), case.state) for _ in range(5)]
    for out, lse in outs[1:]:
        torch.testing.assert_close(out.float(), outs[0][0].float(), atol=2e-2, rtol=0)
        torch.testing.assert_close(lse, outs[0][1], atol=2e-3, rtol=0)


def test_values_too_small_to_be_scaled() -> None:
    """448 divided by the largest residual of a row would be infinite, and the zeros among the others NaN."""
    case = ResidualCase.make(seq_q=500, seq_k=500, plan=[2, 1, 0, 1, 0], keep=0.2, residual_dtype="fp8")
    case.inputs.v.mul_(2.0**-122)[..., :32] = 0
    for _ in range(5):
        out, _ = case.call(kernel(), case.state)
        assert out.isfinite().all()


def test_repeats_are_equal() -> None:
    case = ResidualCase.make(batch=2, seq_q=3000, seq_k=3000, heads=4, kv_heads=4, plan=[2, 1, 0, 2, 0], keep=0.2)
    first = None
    for _ in range(20):
        state = copy.deepcopy(case.state)
        outs = [case.call(kernel(), state) for _ in range(5)]
        kept = [x for pair in outs for x in pair] + [b for b in state.buffers()]
        if first is None:
            first = kept
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, kept, strict=True))


def test_a_captured_graph_goes_through_the_plan() -> None:
    case = ResidualCase.make(seq_q=1500, seq_k=1500, plan=step_plan(7), keep=0.2)
    eager, captured = copy.deepcopy(case.state), copy.deepcopy(case.state)
    case.call(kernel(), copy.deepcopy(captured))
    graph = torch.cuda.CUDAGraph()
    warm = copy.deepcopy(captured)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, lse = case.call(kernel(), captured)
    for name, buffer in captured.named_buffers():
        buffer.copy_(dict(warm.named_buffers())[name])
    for _ in range(7):
        graph.replay()
        want, want_lse = case.call(kernel(), eager)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
    for mine, theirs in zip(captured.buffers(), eager.buffers(), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def test_dense_leaves_the_state_alone() -> None:
    case = ResidualCase.make(plan=FULL_EVERY_3)
    for _ in range(3):
        check_residual_step(case)
    case.state.set_flag(FLAG_DENSE, True)
    check_residual_step(case)
    case.state.set_flag(FLAG_DENSE, False)
    check_residual_step(case)


def test_memory_of_the_host_is_as_good() -> None:
    here = ResidualCase.make(seq_q=1500, seq_k=1500, plan=FULL_EVERY_3, keep=0.2)
    there = ResidualCase.make(seq_q=1500, seq_k=1500, plan=FULL_EVERY_3, keep=0.2, memory="host")
    assert there.state.residual.is_cuda
    for _ in range(8):
        for a, b in zip(here.call(kernel(), here.state), there.call(kernel(), there.state), strict=True):
            assert torch.equal(a, b)
        here.drift()
        there.drift()


def test_wrong_storage_is_refused_by_name() -> None:
    case = ResidualCase.make(plan=FULL_EVERY_3, residual_dtype="fp32")
    with pytest.raises(ValueError, match="dtype of residual: expected 'fp8' or 'bf16'"):
        case.call(kernel(), case.state)


def test_larger_state_and_slots() -> None:
    case = ResidualCase.make(batch=2, seq_q=900, seq_k=1300, plan=[2, 1, 0], slots=3)
    q, k, v = case.inputs.q, case.inputs.k, case.inputs.v
    case.inputs.q, case.inputs.k, case.inputs.v = (x[:1, :n].contiguous() for x, n in ((q, 700), (k, 1000), (v, 1000)))
    for slot in (0, 2, 0, 2, 2, 0):
        case.state.slot = slot
        check_residual_step(case)
        case.drift()


def test_functional_form() -> None:
    case = ResidualCase.make(seq_q=1000, seq_k=1000, plan=[2, 1, 0])
    x = case.inputs
    for _ in range(3):
        out = lite_attention.ops.residual_attention(x.q, x.k, x.v, case.state, implementation=implementation())
        assert out.shape == x.q.shape
        assert not out.isnan().any()
    assert math.isclose(float(case.state.sparsity()), 0.7, abs_tol=0.1)
