"""The kernels against the CPU kernel in float64."""

from __future__ import annotations

import copy
import math
import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lite_attention
from lite_attention.cute_kernels.config import KernelConfig
from lite_attention.ops import SkipState
from lite_attention.ops.control import FLAG_DENSE
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.schema import ATTENTION
from tests.support.gpu_cases import (
    HERE,
    VARIANTS,
    Case,
    check_step,
    dense,
    implementation,
    kernel,
    make_case,
    processors,
    target,
)

pytestmark = pytest.mark.usefixtures("each_kernel")

CASES = int(os.environ.get("LITE_ATTENTION_GPU_CASES", "300"))


OUT_TOLERANCE = {"none": 2e-2, "int8": 0.08, "int8_fp8": 0.15}
LSE_TOLERANCE = {"none": 1e-3, "int8": 0.045, "int8_fp8": 0.1}


def near_multiples(tile: int, most: int) -> st.SearchStrategy[int]:
    edges = [n * tile + d for n in range(most // tile + 1) for d in (-1, 0, 1) if 1 <= n * tile + d <= most]
    return st.sampled_from([1, *edges]) | st.integers(1, most)


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_any_call_matches_the_reference(data: st.DataObject) -> None:
    dim, dtype, quantization = data.draw(st.sampled_from(VARIANTS))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    case = make_case(
        batch=data.draw(st.integers(1, 3)),
        seq_q=data.draw(near_multiples(192, 800) | near_multiples(128, 800)),
        seq_k=data.draw(near_multiples(80, 1500) | near_multiples(96, 1500) | near_multiples(32, 1500)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=dim,
        dtype=dtype,
        peak=data.draw(st.sampled_from([0.3, 0.6, 1.0])),
        threshold=data.draw(st.sampled_from([0.0, -1.0, -4.0, -12.0, -math.inf])),
        seed=data.draw(st.integers(0, 1000)),
        head_major=data.draw(st.booleans()),
        extras=dtype == torch.bfloat16 and dim in HERE.head_dims("int8") and data.draw(st.booleans()),
        key_mask=data.draw(st.booleans()),
        quantization=quantization,
        num_steps=data.draw(st.sampled_from([None, 2])),
        refresh=data.draw(st.sampled_from([None, 2])),
    )
    case.scale = data.draw(st.sampled_from([None, 0.2]))
    ctas = data.draw(st.sampled_from([1, 3, 132]))
    for _ in range(3):
        with processors(ctas):
            check_step(case)
        case.q = case.q + 0.05 * torch.randn_like(case.q)
        case.state.slot = data.draw(st.integers(0, 1))


@pytest.mark.parametrize(("seq_q", "seq_k"), [(1000, 3000), (3001, 2879), (1921, 4001)])
@pytest.mark.parametrize(("dim", "dtype", "quantization"), VARIANTS)
@pytest.mark.parametrize("ctas", [3, 132])
def test_half_of_the_tiles_dropped(
    dim: int, dtype: torch.dtype, quantization: str, seq_q: int, seq_k: int, ctas: int
) -> None:
    case = make_case(
        seq_q=seq_q, seq_k=seq_k, dim=dim, dtype=dtype, quantization=quantization, peak=1.2, threshold=-3.0
    )
    shares = []
    for _ in range(4):
        with processors(ctas):
            shares.append(check_step(case))
        case.q = case.q + 0.05 * torch.randn_like(case.q)
    assert 0.3 < shares[-1] < 0.9
    assert shares == sorted(shares)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_minus_infinity_is_dense_bit_for_bit(quantization: str) -> None:
    case = make_case(seq_q=1500, seq_k=1700, threshold=-math.inf, quantization=quantization)
    out, lse = case.call(kernel(), case.state)
    case.state.set_flag(FLAG_DENSE, True)
    before = case.state.control.clone()
    flagged, flagged_lse = case.call(kernel(), case.state)
    assert torch.equal(out, flagged)
    assert torch.equal(lse, flagged_lse)
    assert torch.equal(case.state.control, before)
    assert not case.state.skip_mask.any()
    q, k, v = (t.transpose(1, 2) for t in (case.q, case.k, case.v))
    sdpa = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(1, 2)
    torch.testing.assert_close(out.double(), sdpa, atol=OUT_TOLERANCE[quantization], rtol=0)
    if quantization == "none":
        stateless, stateless_lse = dense(case.q, case.k, case.v)
        assert torch.equal(out, stateless)
        assert torch.equal(lse, stateless_lse)


@pytest.mark.parametrize("key_mask", [False, True])
@pytest.mark.parametrize("dim", HERE.head_dims())
def test_attention_without_state(dim: int, key_mask: bool) -> None:
    case = make_case(batch=2, seq_q=1000, seq_k=1333, heads=4, dim=dim, key_mask=key_mask, head_major=True)
    with processors(3):
        out, lse = dense(case.q, case.k, case.v, case.key_mask)
    allowed = torch.ones_like(case.q[:, :1, 0, 0], dtype=torch.bool) if case.key_mask is None else case.key_mask
    q, k, v = (t.double().transpose(1, 2) for t in (case.q, case.k, case.v))
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ k.mT * dim**-0.5).masked_fill(~allowed[:, None, None], -math.inf)
    want_lse = scores.logsumexp(-1)
    want = (scores - want_lse.unsqueeze(-1)).exp().nan_to_num() @ v
    torch.testing.assert_close(out.double(), want.transpose(1, 2), atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)
    assert out.stride() == case.q.stride()
    torch.library.opcheck(ATTENTION, (case.q, case.k, case.v, case.key_mask), {"scale": None})


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_state_larger_than_the_call(quantization: str) -> None:
    case = make_case(seq_q=1200, seq_k=3000, peak=1.0, extras=True, quantization=quantization)
    case.q, case.k, case.v = case.q[:, :700], case.k[:, :900], case.v[:, :900]
    for _ in range(3):
        check_step(case)
    assert not (case.state.skip_mask[..., 0] >> math.ceil(900 / case.state.tile_n)).any()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("start", [0, 333, 1100, 5000])
def test_a_part_of_the_queries(start: int, quantization: str) -> None:
    case = make_case(seq_q=700, seq_k=1800, peak=1.0, quantization=quantization)
    case.state.query_start = start
    for _ in range(3):
        check_step(case)
    assert case.state.query_start == start


def test_a_row_of_many_tiles() -> None:
    tile_m, tile_n = target().tile_shape(128)
    config = KernelConfig("bf16", 128, tile_m, tile_n, target=target())
    tiles = config.budget.max_tiles - 90  # more words of the mask than a warp has lanes, and not all that there may be
    case = make_case(seq_q=200, seq_k=tile_n * tiles, heads=1, kv_heads=1, peak=1.0)
    kept = torch.rand(1, 1, 2, tiles) < 0.01
    kept[..., 0] = True
    case.state = SkipState.for_inputs(
        case.q, case.k, threshold=-4.0, initial_mask=~kept, implementation=implementation()
    )
    for _ in range(2):
        check_step(case)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_repeats_are_bit_equal_under_load(quantization: str) -> None:
    case = make_case(seq_q=2000, seq_k=3000, heads=8, kv_heads=8, peak=1.0, quantization=quantization)
    case.call(kernel(), case.state)
    start = copy.deepcopy(case.state)
    want, want_lse = case.call(kernel(), case.state)
    after = case.state.skip_mask.clone()
    load = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    for i in range(1000):
        with torch.cuda.stream(side):
            load.fill_(i % 256)
        case.state.load_state_dict(start.state_dict())
        out, lse = case.call(kernel(), case.state)
        same = torch.equal(out, want) and torch.equal(lse, want_lse) and torch.equal(case.state.skip_mask, after)
        assert same, f"repeat {i}"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_graph_replay_equals_eager(quantization: str) -> None:
    case = make_case(seq_q=900, seq_k=1100, peak=0.6, num_steps=20, quantization=quantization)
    eager = copy.deepcopy(case.state)
    case.call(kernel(), case.state)  # compiles outside of the capture
    case.state.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = case.call(kernel(), case.state)
    case.state.reset()
    skipped = []
    for step in range(50):
        graph.replay()
        want, _ = case.call(kernel(), eager)
        assert torch.equal(out, want), f"step {step}"
        assert torch.equal(case.state.skip_mask, eager.skip_mask)
        assert torch.equal(case.state.control, eager.control)
        skipped.append(eager.sparsity().item())
        case.q.add_(0.15 * torch.randn_like(case.q))  # latents drift, so votes differ from step to step
    assert max(skipped) > skipped[0] > 0
    assert eager.step() == 10  # 50 steps wrapped round after 20


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("key_mask", [False, True])
@pytest.mark.parametrize("head_major", [False, True])
def test_opcheck(quantization: str, key_mask: bool, head_major: bool) -> None:
    case = make_case(seq_q=200, seq_k=333, key_mask=key_mask, head_major=head_major, quantization=quantization)
    state = case.state
    torch.library.opcheck(
        kernel(),
        (case.q, case.k, case.v, state.skip_mask, state.control, state.threshold, None, None, case.key_mask),
        {"scale": None, "tile_m": state.tile_m, "tile_n": state.tile_n, "quantization": quantization},
    )


def test_streams_and_threads() -> None:
    cases = [make_case(seq_q=1000 + 64 * i, seq_k=2000, peak=1.0, seed=i) for i in range(4)]
    wants = []
    for case in cases:
        state = copy.deepcopy(case.state)
        wants.append([case.call(kernel(), state)[0] for _ in range(10)])
    torch.cuda.synchronize()
    failures: list[int] = []

    def work(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            outs = [cases[i].call(kernel(), cases[i].state)[0] for _ in range(10)]
            torch.cuda.current_stream().synchronize()
        if not all(torch.equal(out, want) for out, want in zip(outs, wants[i], strict=True)):
            failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_two_streams_with_one_state(quantization: str) -> None:
    """Kernels that leave half of the GPU free would run side by side, and take each other's jobs."""
    case = make_case(seq_q=3000, seq_k=3000, heads=8, kv_heads=8, peak=1.0, num_steps=30, quantization=quantization)
    alone = copy.deepcopy(case.state)
    streams = [torch.cuda.Stream() for _ in range(2)]
    with processors(torch.cuda.get_device_properties(0).multi_processor_count // 2):
        wants = [case.call(kernel(), alone)[0] for _ in range(20)]
        torch.cuda.synchronize()
        outs = []
        for i in range(20):
            with torch.cuda.stream(streams[i % 2]):
                outs.append(case.call(kernel(), case.state)[0])
        torch.cuda.synchronize()
    for step, (out, want) in enumerate(zip(outs, wants, strict=True)):
        assert torch.equal(out, want), f"step {step}"
    assert torch.equal(case.state.skip_mask, alone.skip_mask)
    assert torch.equal(case.state.control, alone.control)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_nan_and_infinity(bad: float, where: str, quantization: str) -> None:
    case = make_case(seq_q=500, seq_k=700, peak=1.0, quantization=quantization)
    getattr(case, where)[0, 333, 1, 5] = bad
    other = copy.deepcopy(case.state)
    for _ in range(2):
        out, lse = case.call(kernel(), case.state)
        want, want_lse = case.reference(other)
        assert torch.equal(out.isnan(), want.isnan())
        torch.testing.assert_close(out.double(), want, atol=OUT_TOLERANCE[quantization], rtol=0, equal_nan=True)
        lse_tolerance = LSE_TOLERANCE[quantization]
        torch.testing.assert_close(lse.double(), want_lse.double(), atol=lse_tolerance, rtol=1e-3, equal_nan=True)
        assert torch.equal(case.state.kept_tiles(), other.kept_tiles())


def test_state_lies_between_canaries() -> None:
    case = make_case(batch=2, seq_q=1000, seq_k=2700, heads=3, kv_heads=3, peak=1.0)
    guarded = {}
    for name, buffer in case.state.named_buffers():
        around = torch.full((buffer.numel() + 128,), 0x5A5A5A5A, dtype=torch.int32, device="cuda").view(buffer.dtype)
        around[64:-64] = buffer.flatten()
        guarded[name] = around
    views = {name: guarded[name][64:-64].view(buffer.shape) for name, buffer in case.state.named_buffers()}
    case.state = SkipState.over(views, case.state.tile_m, case.state.tile_n)
    for _ in range(3):
        case.call(kernel(), case.state)
    assert case.state.skip_mask.any()
    for around in guarded.values():
        edges = torch.cat([around[:64], around[-64:]]).view(torch.int32)
        assert (edges == 0x5A5A5A5A).all()


@pytest.mark.parametrize(("seq_q", "seq_k"), [(140_000, 80), (64, 140_000)])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_offsets_beyond_32_bits(quantization: str, seq_q: int, seq_k: int) -> None:
    heads = 128  # 140,000 x 128 x 128 elements are more than 2^31
    q, k, v = (torch.randn(1, s, heads, 128, device="cuda", dtype=torch.bfloat16) for s in (seq_q, seq_k, seq_k))
    how = {"quantization": quantization, "implementation": implementation()}
    state = SkipState.for_inputs(q, k, threshold=-math.inf, **how)
    out = lite_attention.skip_attention(q, k, v, state, **how)
    for head in (0, heads - 1):
        picked = (slice(None), slice(-64, None), slice(head, head + 1))
        small = Case(q[picked].contiguous(), k[:, :, head : head + 1], v[:, :, head : head + 1], state)
        scores = small.q[0, :, 0].double() @ small.k[0, :, 0].double().T / 128**0.5
        want = scores.softmax(-1) @ small.v[0, :, 0].double()
        torch.testing.assert_close(out[0, -64:, head].double(), want, atol=OUT_TOLERANCE[quantization], rtol=0)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_what_kernels_cannot_read_is_copied(quantization: str) -> None:
    case = make_case(seq_q=300, seq_k=400, quantization=quantization)
    want, _ = case.call(kernel(), copy.deepcopy(case.state))
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        wide = torch.zeros(*x.shape[:-1], 129, device="cuda", dtype=torch.bfloat16)
        wide[..., 1:] = x
        setattr(case, name, wide[..., 1:])  # odd strides, odd address
    out, _ = case.call(kernel(), case.state)
    assert torch.equal(out, want)


def test_unsupported_says_why() -> None:
    how = {"implementation": implementation()}
    q = torch.randn(1, 100, 2, 80, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="head dims"):
        lite_attention.skip_attention(q, q, q, SkipState.for_inputs(q, q, **how), **how)
    q = torch.randn(1, 100, 2, 128, device="cuda")
    with pytest.raises(RuntimeError, match="bfloat16 and float16"):
        lite_attention.skip_attention(q, q, q, SkipState.for_inputs(q, q, **how), **how)
    q = q.bfloat16()
    state = SkipState.for_inputs(q, q, tile_m=64)
    with pytest.raises(ValueError, match="tile_m, tile_n"):
        lite_attention.skip_attention(q, q, q, state, **how)
    assert not state.control[8:].any()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_model(mode: str | None) -> None:
    """Two layers of attention through the backend, two branches: as eager skip_attention with explicit states."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(256, 768)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 128)).transpose(1, 3).unbind(2)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return x + out.transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = torch.nn.Sequential(Layer(), Layer()).cuda().bfloat16().requires_grad_(False)
    for layer in model:
        layer.qkv.weight.data[:512] *= 4
    clusters = 2 * torch.randn(6, 256, device="cuda").repeat_interleave(200, 0)
    states: dict[tuple[str, int], SkipState] = {}

    def reference(x: torch.Tensor, branch: str) -> torch.Tensor:
        for i, layer in enumerate(model):
            q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 128)).unbind(2)
            state = SkipState.for_inputs(q, k, threshold=-4.0, slots=1, implementation=implementation())
            state = states.setdefault((branch, i), state)
            x = x + lite_attention.skip_attention(q, k, v, state, implementation=implementation()).flatten(2)
        return x

    lite_attention.enable(model, threshold=-4.0, num_steps=8, mode=mode, implementation=implementation())
    with torch.inference_mode():
        for _ in range(6):
            for branch in ("cond", "uncond"):
                x = (clusters + 0.3 * torch.randn(1, 1200, 256, device="cuda")).bfloat16()
                with lite_attention.branch(branch, model=model):
                    out = model(x).clone()
                torch.testing.assert_close(out, reference(x, branch), atol=0.15, rtol=0.02)
    report = lite_attention.report(model)
    assert len(report.swapped) == 2
    for i, row in enumerate(report.rows):
        for slot, branch in enumerate(("cond", "uncond")):
            assert 0.1 < row.sparsity[slot] < 0.95
            assert abs(row.sparsity[slot] - states[branch, i].sparsity().item()) < 0.05
    lite_attention.disable(model)
