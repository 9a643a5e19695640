"""`residual_attention`: what its sentences promise, each by a plain construction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lite_attention
from lite_attention.ops import ResidualState, attention, residual_attention, step_plan
from lite_attention.ops import control as c
from lite_attention.ops.bitmask import pack_bits, unpack_bits
from lite_attention.ops.choice import chosen_tiles
from lite_attention.ops.residual import residual_attention_reference
from lite_attention.ops.residual_store import in_columns, in_places
from tests.support.op_cases import Qkv, clustered_qkv
from tests.support.residual_cases import assert_residual_step, residual_state

_SIZES = {"batch": 2, "seq_q": 50, "seq_k": 70, "heads": 4, "kv_heads": 2}  # 7 x 9 tiles
_OP = torch.ops.lite_attention.residual_attention


def _inputs(step: int = 0, **options: Any) -> Qkv:
    return clustered_qkv(4, **{**_SIZES, **options}, step=step)


def _counts(state: ResidualState, slot: int = 0) -> tuple[int, ...]:
    """Return residuals, masks decided, and the mask in use."""
    first = c.slot_word(slot, c.RESIDUALS)
    return tuple(state.control[first : first + 3].tolist())


def _bits(state: ResidualState, mask: int) -> torch.Tensor:
    """Return what a mask keeps, bool [B, Hq, q_tiles, k_tiles], of slot 0."""
    return ~unpack_bits(state.skip_mask[0, mask % 2], state.tiles[1])


# ---- what a step is ------------------------------------------------------------------------------------------------


def test_the_kinds_of_steps_and_what_they_count() -> None:
    q, k, v = _inputs()
    state = residual_state(q, k, v, plan=[2, 1, 0, 2, 0, 1, 0, 0, 2])
    seen = []
    for _ in range(9):
        _, want = assert_residual_step(q, k, v, state)
        seen.append((want.kind, *_counts(state)))
    assert seen == [
        ("deciding", 0, 1, 0), ("full", 1, 1, 1), ("sparse", 1, 1, 1), ("deciding", 2, 2, 1), ("sparse", 2, 2, 1),
        ("full", 1, 2, 2), ("sparse", 1, 2, 2), ("sparse", 1, 2, 2), ("deciding", 2, 3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("before", ["fresh", "reset", "jump to 0", "another size"])
def test_after_a_start_in_the_middle_of_a_plan_come_two_full_steps(before: str) -> None:
    state = residual_state(*_inputs(), plan=[2, 1, *[0] * 98])
    kinds = []
    for step in range(9):
        if step == 4 and before == "fresh":
            state.start_fresh()
        if step == 4 and before == "reset":
            state.reset()
        if step == 4 and before == "jump to 0":
            state.set_step(0)
        if step == 4 and before != "reset":
            state.set_plan([0])
        sizes = {"batch": 1} if before == "another size" and step >= 4 else {}
        kinds.append(assert_residual_step(*_inputs(step, **sizes), state)[1].kind)
    assert kinds == ["deciding", "full", "sparse", "sparse"] * 2 + ["sparse"]


def test_past_its_end_the_last_of_a_plan_and_of_keep_hold() -> None:
    q, k, v = _inputs()
    state = residual_state(q, k, v, plan=[2, 1, 2], keep=torch.tensor([0.9, 0.5, 0.2]))
    for _ in range(5):
        residual_attention(q, k, v, state)
    assert _counts(state) == (1, 4, 3)
    assert _bits(state, 4).float().mean() == pytest.approx(0.2, abs=0.02)
    assert _bits(state, 3).float().mean() == pytest.approx(0.2, abs=0.02)


def test_dense_computes_all_and_leaves_all() -> None:
    state = residual_state(*_inputs(), plan=[2, 1, 0])
    for step in range(3):
        residual_attention(*_inputs(step), state)
    before = {name: buffer.clone() for name, buffer in state.named_buffers()}
    state.set_flag(c.FLAG_DENSE, True)
    out = residual_attention(*_inputs(3), state)
    torch.testing.assert_close(out, attention(*_inputs(3)), rtol=1e-4, atol=1e-4)
    state.set_flag(c.FLAG_DENSE, False)
    for name, buffer in state.named_buffers():
        assert torch.equal(buffer.nan_to_num(-1), before[name].nan_to_num(-1)), name


# ---- what it gives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residual_dtype", "quantization", "off"),
    [
        ("fp32", "none", 1e-5), ("bf16", "none", 2**-7), ("fp8", "none", 2**-3), ("fp32", "int8", 1e-5),
        ("fp32", "int8_fp8", 1e-5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("forecast", [True, False])
@pytest.mark.parametrize("value_dim", [8, 5])
def test_unchanged_inputs_give_in_sparse_steps_what_full_ones_do(
    value_dim: int, forecast: bool, residual_dtype: str, quantization: str, off: float
) -> None:
    q, k, v = _inputs(value_dim=value_dim)
    state = residual_state(
        q, k, v, plan=[2, 1, 0, 2, 0, 1, 0], keep=0.2, residual_dtype=residual_dtype, forecast=forecast
    )
    results = [residual_attention(q, k, v, state, return_lse=True, quantization=quantization) for _ in range(7)]
    assert 0.1 < state.kept_tiles().float().mean() < 0.3
    for full, sparse in ((1, 2), (3, 4), (5, 6)):
        for got, want in zip(results[sparse], results[full], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=off)


@pytest.mark.parametrize("times", [[0.9, 0.8, 0.75, 0.5, 0.45, 0.3], [None] * 6], ids=["told", "steps"])
def test_what_is_linear_in_time_is_forecast(times: list[float | None]) -> None:
    """With scores unchanged and values moving along a line, residuals lie on a line too."""
    q, k, v = _inputs()
    drift = torch.randn(v.shape)
    state = residual_state(q, k, v, plan=[2, 1, 0, 1, 0, 0], keep=0.2)
    for step, time in enumerate(times):
        state.set_time(time)
        now = float(step) if time is None else time
        moved = v + now * drift
        out = residual_attention(q, k, moved, state)
        off = (out - attention(q, k, moved)).abs().max()
        assert (off < 1e-4) == (step != 2), step  # where there is one residual, nothing is extended


@pytest.mark.parametrize("case", ["equal times", "no forecast", "an infinite time"])
def test_without_a_direction_the_last_residual_holds(case: str) -> None:
    q, k, v = _inputs()
    state = residual_state(q, k, v, plan=[2, 1, 1, 0], keep=0.2, forecast=case != "no forecast")
    state.set_time(0.5 if case == "equal times" else None)
    for scale in (1.0, 2.0, 3.0):
        out = residual_attention(q, k, scale * v, state)
    if case == "an infinite time":
        state.times[0, 2] = math.inf
    # The one before is not even read.
    if state.residual.shape[1] == 2:
        state.residual[0, 0] = math.nan
    torch.testing.assert_close(residual_attention(q, k, 3 * v, state), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_two_halves_of_the_keys_merge_to_the_whole(quantization: str) -> None:
    q, k, v = _inputs(seq_k=80)
    parts = [(k[:, :40], v[:, :40]), (k[:, 40:], v[:, 40:])]
    states = [residual_state(q, *part, plan=[2, 1, 0], keep=0.2) for part in parts]
    whole = residual_state(q, k, v, plan=[2, 1, 0], keep=0.2)
    for _ in range(3):
        pairs = [
            residual_attention(q, *part, state, return_lse=True, quantization=quantization)
            for part, state in zip(parts, states, strict=True)
        ]
        want, want_lse = residual_attention(q, k, v, whole, return_lse=True, quantization=quantization)
        lse = torch.stack([pair[1] for pair in pairs])
        weights = lse.softmax(0).transpose(2, 3).unsqueeze(-1)
        out = sum(pair[0] * weight for pair, weight in zip(pairs, weights, strict=True))
        tol = 1e-4 if quantization == "none" else 0.1  # each half has scales and a mean of its own
        torch.testing.assert_close(out, want, rtol=tol, atol=tol)
        torch.testing.assert_close(lse.logsumexp(0), want_lse, rtol=tol, atol=tol)


# ---- what is chosen ------------------------------------------------------------------------------------------------


def _decided(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the tiles that a first step keeps."""
    state = residual_state(q, k, v, plan=[2], **options)
    assert_residual_step(q, k, v, state)
    return _bits(state, 1)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_the_share_that_is_kept(keep: float) -> None:
    kept = _decided(*_inputs(), keep=keep)
    diagonal = 7 * 4
    for video in kept:
        assert video.sum() == pytest.approx(max(round(keep * video.numel()), diagonal), abs=2)  # a bin is cut by a hash


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_of_equal_masses_the_hash_keeps_the_share(keep: float) -> None:
    q = torch.zeros(2, 512, 4, 8)
    state = residual_state(q, q, q, plan=[2], keep=keep)
    residual_attention(q, q, q, state)
    kept = _bits(state, 1)
    assert kept.float().mean() == pytest.approx(keep, abs=0.01)
    assert kept.float().mean((2, 3)).sub(keep).abs().max() < 0.05  # in all heads
    assert kept.float().mean(2).sub(keep).abs().max() < 0.3  # and everywhere
    assert torch.equal(kept[0], kept[1])


def test_heads_compete_and_videos_do_not() -> None:
    """A head of one sharp peak a row needs few tiles, one that looks everywhere many."""
    tokens = torch.nn.functional.one_hot(torch.arange(64) // 8, 8).float()
    sharp, flat = 40 * tokens, torch.zeros(64, 8)
    q = torch.stack([torch.stack([sharp, flat], 1), torch.stack([sharp, sharp], 1)])
    k = tokens.view(1, 64, 1, 8).expand(2, -1, 2, -1).contiguous()
    kept = _decided(q, k, k, keep=0.5).sum((2, 3))
    assert kept[0, 0] < 12 < 48 < kept[0, 1]
    assert kept[1].sum() == pytest.approx(64, abs=2)
    assert kept[0].sum() == pytest.approx(64, abs=2)
    assert (kept[1] - kept[1].float().mean()).abs().max() < 8


def test_the_diagonal_and_must_do_come_first_even_if_they_are_more() -> None:
    q, k, v = _inputs()
    must_do = pack_bits(torch.arange(9) == 5)
    state = residual_state(q, k, v, plan=[2], keep=0.0)
    _, want = assert_residual_step(q, k, v, state, must_do=must_do)
    assert want.certain.all()
    kept = _bits(state, 1)
    assert kept[..., 5].all()
    assert (kept.sum(-1) <= 2).all()
    assert kept.sum() >= 2 * 4 * 7


def test_a_nan_stays_and_spreads_no_further_than_its_rows() -> None:
    q, k, v = _inputs()
    q[0, 3, 1] = math.nan  # q-tile 0 of head 1
    kept = _decided(q, k, v, keep=0.1)
    assert kept[0, 1, 0].all()
    assert not kept[0, 1, 1:].all(-1).any()


def test_a_row_without_a_score_has_no_weight() -> None:
    """Rows 0 to 3 saw nothing in the step before, the others a little; what the first would look at does not count."""
    q, k, v = _inputs(batch=1)
    state = residual_state(q, k, v, plan=[2, 2])
    assert_residual_step(q, k, v, state)
    state.row_lse[0, 0, :, :, :4] = -math.inf
    assert_residual_step(q, k, v, state)
    other = residual_state(q, k, v, plan=[2, 2])
    residual_attention(q, k, v, other)
    other.row_lse[0, 0, :, :, :4] = -math.inf
    q[:, :4] = torch.randn(1, 4, 4, 8)
    assert_residual_step(q, k, v, other)
    assert torch.equal(_bits(state, 2), _bits(other, 2))


def test_quantized_masses_are_against_the_whole_lse() -> None:
    """Scores lack what the mean of the keys gave each row; the LSE in the step before does not."""
    q, k, v = _inputs()
    q, k = torch.randn(q.shape), k + torch.randn(k.shape[3])
    states = [residual_state(q, k, v, plan=[2, 2], keep=0.3) for _ in range(2)]
    for _ in range(2):
        _, want = assert_residual_step(q, k, v, states[0], quantization="int8")
        assert want.certain.float().mean() > 0.9
        residual_attention(q, k, v, states[1])
    assert (_bits(states[0], 2) == _bits(states[1], 2)).float().mean() > 0.97  # rounding moves few


def test_the_choice_by_a_plain_sort() -> None:
    """Where no two masses share a bin, it is the largest ones."""
    octaves = -torch.randperm(300).float().view(1, 3, 10, 10) / 16 - 0.01
    nothing = torch.zeros(1, 3, 10, 10, dtype=torch.bool)
    chosen = chosen_tiles(octaves.exp2(), ~nothing, nothing, 0.37)
    assert torch.equal(chosen.flatten(), octaves.flatten() >= octaves.flatten().sort(descending=True).values[110])


# ---- special values ------------------------------------------------------------------------------------------------


def test_a_row_without_a_visitable_tile_gives_nothing_whatever_its_residual() -> None:
    q, k, v = _inputs()
    state = residual_state(q, k, v, plan=[2, 1, 0])
    for _ in range(2):
        residual_attention(q, k, v, state)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1] = False
    out, lse = residual_attention(q, k, v, state, key_mask=mask, return_lse=True)
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()
    assert out[0].any(-1).all()
    assert lse[0].isfinite().all()


@pytest.mark.parametrize("steps_without", [(1,), (2,), (1, 2), (0,), (0, 1, 2), (3,), (2, 3)], ids=str)
def test_videos_without_keys_in_some_steps(steps_without: tuple[int, ...]) -> None:
    """Infinite differences are not forecast, and nothing is NaN."""
    state = residual_state(*_inputs(), plan=[2, 1, 1, 0, 0])
    for step in range(5):
        mask = torch.ones(2, 70, dtype=torch.bool)
        mask[1] = step not in steps_without
        out, want = assert_residual_step(*_inputs(step), state, key_mask=mask)
        assert not out.isnan().any()
        assert not want.lse.isnan().any()


def test_where_kept_tiles_score_nothing_the_difference_itself_is_the_lse() -> None:
    q, k, v = (x.abs() for x in _inputs(batch=1, heads=1, kv_heads=1))
    state = residual_state(q, k, v, plan=[2, 1, 0], keep=0.0)
    residual_attention(q, k, v, state)
    kept_of_first = state.tile_n * _bits(state, 1)[0, 0, 0].float().argmax()
    k[:, int(kept_of_first) : int(kept_of_first) + 8] = -math.inf  # all that the first rows keep
    want, want_lse = assert_residual_step(q, k, v, state)[1][:2]
    out, lse = residual_attention(q, k, v, state, return_lse=True)
    torch.testing.assert_close(out.double()[:, :8], want[:, :8], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double()[..., :8], want_lse[..., :8], rtol=1e-4, atol=1e-4)
    assert lse[..., :8].isfinite().all()


@pytest.mark.parametrize("what", ["q", "k", "v"])
@pytest.mark.parametrize("residual_dtype", ["fp8", "bf16", "fp32"])
def test_a_nan_comes_out_where_it_went_in(what: str, residual_dtype: str) -> None:
    state = residual_state(*_inputs(), plan=[2, 1, 0, 1, 0], residual_dtype=residual_dtype)
    for step in range(5):
        inputs = dict(zip("qkv", _inputs(step), strict=True))
        if step in (1, 3):
            inputs[what][0, 3, 1, 2] = math.nan
        assert_residual_step(*inputs.values(), state)


# ---- what it costs -------------------------------------------------------------------------------------------------


def test_a_sparse_step_computes_no_more_than_what_is_kept() -> None:
    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten.mm:
                self.products += args[0].shape[0] * args[0].shape[1] * args[1].shape[1]
            return func(*args, **(kwargs or {}))

    q, k, v = _inputs(seq_q=48, seq_k=72)  # whole tiles
    state = residual_state(q, k, v, plan=[2, 1, 0, 2], keep=0.25)
    buffers = [state._buffers[name] for name in state.BUFFERS]
    tiles = []
    for _ in range(4):
        with Count() as count:
            residual_attention_reference(q, k, v, *buffers, None, None, scale=None, tile_m=8, tile_n=8)
        tiles.append(count.products / (2 * 8 * 8 * 8))  # scores, and their product with v
    every = 2 * 4 * 6 * 9
    assert tiles == [every, every, int(state.kept_tiles()[0].sum()), every]
    assert tiles[2] < 0.3 * every


# ---- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 16, 64, 128])
def test_columns_lie_as_a_thread_has_them(dim: int) -> None:
    places = in_places(torch.arange(dim))
    for column in range(dim):
        assert places[column % 8 // 2 * (dim // 4) + column // 8 * 2 + column % 2] == column
    assert torch.equal(in_columns(places), torch.arange(dim))
    assert torch.equal(in_places(torch.arange(dim + 1)), torch.arange(dim + 1))


def test_residuals_in_fp16() -> None:
    """Which the op takes, though a state is not made so."""
    q, k, v = _inputs()
    state = residual_state(q, k, v, plan=[2, 1, 0])
    state.residual = state.residual.to(torch.float16)
    for step in range(3):
        assert_residual_step(*_inputs(step), state)


# ---- the op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "checked"), [({}, (0, 1, 2)), ({"residual_dtype": "fp8"}, (2,)), ({"forecast": False}, (2,))], ids=str
)
def test_opcheck(options: dict[str, Any], checked: tuple[int, ...]) -> None:
    q, k, v = _inputs()
    mask = torch.rand(2, 70) < 0.7
    state = residual_state(q, k, v, plan=[2, 1, 0], initial_mask=torch.rand(1, 4, 7, 9) < 0.2, **options)
    for step in range(3):
        buffers = [state._buffers[name] for name in state.BUFFERS]
        arguments = (q, k, v, *buffers, torch.zeros(1, dtype=torch.int32), mask)
        # It compares what a call writes, also what is NaN.
        state.times.nan_to_num_(0.5)
        checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if state.residual.dtype == torch.float8_e4m3fn:
            checks.remove("test_schema")  # which cannot compare it
        if step in checked:
            torch.library.opcheck(_OP.default, arguments, {"scale": 0.3, "tile_m": 8, "tile_n": 8}, test_utils=checks)
        residual_attention(q, k, v, state, key_mask=mask)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused(name: str) -> None:
    inputs = dict(zip("qkv", _inputs(), strict=True))
    state = residual_state(*inputs.values(), plan=[2])
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"lite_attention::residual_attention has no backward"):
        residual_attention(*inputs.values(), state)
    with torch.no_grad():
        residual_attention(*inputs.values(), state)


def test_vmap_is_refused() -> None:
    q, k, v = _inputs()
    state = residual_state(q, k, v, plan=[2])
    with pytest.raises(RuntimeError, match=r"residual_attention cannot run under torch\.vmap"):
        torch.vmap(lambda x: residual_attention(x, k, v, state))(q.unsqueeze(0))


def test_half_precision_accumulates_in_float32() -> None:
    state = residual_state(*_inputs(dtype=torch.bfloat16), plan=[2, 1, 0])
    for step in range(3):
        out, _ = assert_residual_step(*_inputs(step, dtype=torch.bfloat16), state)
        assert out.dtype == torch.bfloat16


def test_slots_do_not_see_each_other() -> None:
    state = residual_state(*_inputs(), slots=2, plan=[2, 1, 0])
    alone = [residual_state(*_inputs(), plan=[2, 1, 0]) for _ in range(2)]
    for step in range(4):
        for slot in (0, 1):
            state.slot = slot
            inputs = _inputs(10 * slot + step)
            assert torch.equal(residual_attention(*inputs, state), residual_attention(*inputs, alone[slot]))


def test_the_functional_form_joins_what_excludes_keys_and_names_ranges() -> None:
    assert lite_attention.residual_attention is residual_attention
    q, k, v = _inputs()
    lengths, mask = torch.tensor([60, 33]), torch.rand(1, 70) < 0.7
    joined = mask & (torch.arange(70) < lengths[:, None]) & ~((torch.arange(70) >= 5) & (torch.arange(70) < 9))
    states = [residual_state(q, k, v, plan=step_plan(4), keep=0.0) for _ in range(2)]
    for _ in range(3):
        out, lse = residual_attention(
            q, k, v, states[0], scale=0.2, return_lse=True, key_lengths=lengths, key_mask=mask, must_skip=[5, 9],
            must_do=[41, 42],
        )  # fmt: skip
        words = pack_bits(torch.arange(9) == 5)
        want, _ = assert_residual_step(q, k, v, states[1], scale=0.2, key_mask=joined, must_do=words)
        assert torch.equal(out, want)
        assert lse.shape == (2, 4, 50)


def test_the_reference_is_the_cpu_kernel() -> None:
    states = [residual_state(*_inputs(), plan=step_plan(4)) for _ in range(2)]
    for step in range(4):
        inputs = _inputs(step)
        outs = [
            residual_attention(*inputs, state, implementation=implementation)
            for state, implementation in zip(states, (None, "reference"), strict=True)
        ]
        assert torch.equal(*outs)
