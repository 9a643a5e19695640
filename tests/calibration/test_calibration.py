"""Calibration: what it measures against the oracle, what it chooses against the op, and what it leaves behind."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lite_attention
from lite_attention import ThresholdTable
from lite_attention.calibration import THRESHOLDS, Calibration, Verification, recorder, targets, tile_statistics
from lite_attention.calibration.bounded import HEADROOM
from lite_attention.calibration.error_report import Curve
from lite_attention.calibration.probe import AttentionProbe
from lite_attention.calibration.recorder import Recorder
from lite_attention.calibration.search import calibrate
from lite_attention.calibration.tile_statistics import METRICS, error_of, loss_of, measure_tiles
from lite_attention.ops import SkipState
from lite_attention.ops.bitmask import pack_bits, unpack_bits
from lite_attention.ops.oracle import skip_attention_oracle
from tests.support.diffusers_models import silent_report
from tests.support.op_cases import Qkv, clustered_qkv, dequantized, dequantized_value, too_close
from tests.support.toys import TILE, Attention, Toy, context, tokens

STEPS = 4
BOUND = 0.05


# ---- one call ------------------------------------------------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "plain": {"seq_q": 96},
    "uneven": {"seq_q": 90, "seq_k": 139, "batch": 2, "heads": 4, "kv_heads": 2, "value_dim": 12},
    "key mask": {"seq_q": 70, "seq_k": 101, "batch": 2, "key_mask": True},
    "must do": {"seq_q": 96, "must_do": 0b10100},
}
CALLS["all of it"] = CALLS["uneven"] | CALLS["must do"] | {"seq_q": 90, "key_mask": True}


def case(name: str, step: int = 0) -> tuple[Qkv, dict[str, torch.Tensor | None]]:
    """Return q, k, v and the other tensors of a call."""
    options = dict(CALLS[name])
    masked, must_do = options.pop("key_mask", False), options.pop("must_do", None)
    q, k, v = clustered_qkv(3, step=step, gain=1.2, clusters=6, **options)
    key_mask = None
    if masked:  # a tile without any key, and one with some
        key_mask = torch.ones(k.shape[:2], dtype=torch.bool)
        key_mask[0, 32:48], key_mask[1, 75:] = False, False
    words = None if must_do is None else torch.tensor([must_do], dtype=torch.int32)
    return (q, k, v), {"must_do": words, "key_mask": key_mask}


def plain_error(metric: str, out: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Return the error of each head of [B, S, H, D]."""
    out, dense = (x.transpose(0, 2).flatten(1) for x in (out, dense))
    if metric == "L1":
        return (out - dense).abs().sum(1) / dense.abs().sum(1)
    if metric == "RMSE":
        return (out - dense).norm(dim=1) / dense.norm(dim=1)
    return 1 - torch.nn.functional.cosine_similarity(out, dense)


def plain_loss(out: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Return the loss of each head of [B, S, H, D]."""
    off, of_dense = ((x.square().sum((0, 1, 3))) for x in (out - dense, dense))
    return off / of_dense.mean()


@pytest.mark.parametrize("quantization", ["none", "int8", "int8_fp8"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CALLS)
def test_statistics_are_those_of_the_oracle(name: str, metric: str, quantization: str) -> None:
    """Each candidate votes the oracle's tiles out, and its error is that of the oracle without them."""
    check_statistics(name, metric, quantization)


@pytest.mark.parametrize("start", [0, 40, 64])
def test_statistics_of_a_part_of_the_queries_are_those_of_the_oracle(start: int) -> None:
    check_statistics("uneven", "L1", "none", start)


def check_statistics(name: str, metric: str, quantization: str, query_start: int | None = None) -> None:
    tile = {"tile_m": 16, "tile_n": 16}
    candidates = (-9.0, -4.5, -2.0, -0.5, 0.0)
    (q, k, v), others = case(name)
    state = SkipState.for_inputs(q, k, slots=1, threshold=-4.0, **tile)
    state.query_start = query_start
    first = skip_attention_oracle(q, k, v, state.skip_mask, state.control, state.threshold, **others, **tile)
    (q, k, v), _ = case(name, step=1)  # the tiles dropped at another step are left out of all that follows
    k_tiles = math.ceil(k.shape[1] / 16)
    generator = torch.Generator().manual_seed(7)  # others too, among them tiles that decide the running maximum
    before = unpack_bits(first.skip_mask[0], k_tiles)
    before |= torch.rand(before.shape, generator=generator) < 0.3
    first.skip_mask[0] = pack_bits(before)
    options: dict[str, Any] = {
        "thresholds": candidates,
        "metric": metric,
        "quantization": quantization,
        **others,
        **tile,
    }
    options["query_start"] = query_start
    votes = measure_tiles(q, k, v, before, **options).votes(before)
    found = measure_tiles(q, k, v, before, votes, **options)  # as if the next call had the same queries and keys
    scale = None
    if quantization != "none":  # what the oracle attends with
        (q, k, _), scale = dequantized(q, k, others["key_mask"], scale, 16), math.log(2)
    if quantization == "int8_fp8":
        v = dequantized_value(v, others["key_mask"])
    errors, losses = error_of(metric, found.parts), loss_of(found.parts)
    assert found.tiles == before[:, 0].numel()

    def oracle(mask: torch.Tensor, threshold: float) -> Any:
        control = first.control.clone()
        table = torch.full((1, 1, 1), threshold)
        return skip_attention_oracle(q, k, v, mask, control, table, **others, scale=scale, **tile)

    dense = oracle(torch.zeros_like(first.skip_mask), -math.inf).out
    computed = votes > 0
    for choice, threshold in enumerate((-math.inf, *candidates)):
        voted = oracle(first.skip_mask, threshold)
        clear = voted.margin > too_close(q, k, scale)
        after = unpack_bits(voted.skip_mask[0], k_tiles)
        assert torch.equal(((votes <= choice) | before)[clear], after[clear])
        assert bool((clear | ~computed | before).all()), "choose other inputs: a vote is too close to call"
        out = oracle(voted.skip_mask, -math.inf).out
        torch.testing.assert_close(errors[choice], plain_error(metric, out, dense), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(losses[choice], plain_loss(out, dense), rtol=2e-3, atol=1e-10)
    assert errors[0].max() > 0  # what was dropped before counts
    assert bool((errors[-1] != errors[0]).all())
    assert torch.equal(found.left_out[-1], (votes <= len(candidates)).sum((0, 2, 3)).double())
    nobody = measure_tiles(q, k, v, before, **options)
    torch.testing.assert_close(nobody.parts, nobody.parts[:, :1].expand_as(nobody.parts))


def test_a_margin_on_the_threshold_is_dropped() -> None:
    q, k = torch.rand(1, 16, 1, 1) + 1, torch.ones(1, 64, 1, 1)
    skipped = torch.zeros(1, 1, 1, 4, dtype=torch.bool)
    found = measure_tiles(q, k, k, skipped, thresholds=(-1.0, 0.0), tile_m=16, tile_n=16)
    assert found.votes(skipped).flatten().tolist() == [2, 2, 3, 2]  # all are equal; the one on the diagonal comes first


def test_chunks_and_strides_measure_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), others = case("uneven")
    skipped = torch.zeros(2, 4, 6, 9, dtype=torch.bool)
    options: dict[str, Any] = {**others, "thresholds": THRESHOLDS, "tile_m": 16, "tile_n": 16}
    votes = measure_tiles(q, k, v, skipped, **options).votes(skipped)
    whole = measure_tiles(q, k, v, skipped, votes, **options)
    every_other = measure_tiles(q, k, v, skipped, votes[:, :, ::2], stride=2, **options)
    assert torch.equal(every_other.votes(skipped), votes[:, :, ::2])
    assert every_other.tiles == whole.tiles // 2
    assert bool((whole.parts != every_other.parts).any())
    monkeypatch.setitem(tile_statistics._CHUNK, "cpu", 1)
    one_by_one = measure_tiles(q, k, v, skipped, votes, **options)
    assert torch.equal(one_by_one.votes(skipped), votes)
    torch.testing.assert_close(one_by_one.parts, whole.parts)
    rows = [measure_tiles(q[:, i : i + 16], k, v, skipped[:, :, :1], stride=1, **options) for i in (0,)]
    assert rows[0].tiles == whole.tiles // 6


@pytest.mark.parametrize("stride", [1, 2])
def test_heads_at_once_measure_what_each_does_alone(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), others = case("all of it")
    generator = torch.Generator().manual_seed(1)
    skipped, after = (torch.rand(2, 4, 6, 9, generator=generator) < 0.3 for _ in range(2))
    never = len(THRESHOLDS) + 1
    voted = torch.randint(never + 1, (2, 4, 6, 9), generator=generator, dtype=torch.uint8)[:, :, ::stride]
    options: dict[str, Any] = {"thresholds": THRESHOLDS, "tile_m": 16, "tile_n": 16, "stride": stride}

    def measured(b: slice, h: slice, of_keys: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tensors = q[b, :, h], k[b, :, of_keys], v[b, :, of_keys], skipped[b, h], voted[b, h]
        found = measure_tiles(*tensors, others["must_do"], others["key_mask"][b], **options)
        assert found.tiles == skipped[b, 0, ::stride].numel()
        return found.parts, found.left_out, found.votes(after[b, h])

    alone = [[measured(slice(b, b + 1), slice(h, h + 1), slice(h // 2, h // 2 + 1)) for b in (0, 1)] for h in range(4)]
    row = 16 * 9 * 16
    for scores_at_once in (row, 6 * row, 18 * row, 1 << 20):  # from a row of tiles to all heads, by way of some
        monkeypatch.setitem(tile_statistics._CHUNK, "cpu", scores_at_once)
        parts, left_out, votes = measured(slice(2), slice(4), slice(2))
        for h, of_head in enumerate(alone):
            want_parts, want_left_out, want_votes = zip(*of_head, strict=True)
            torch.testing.assert_close(parts[:, :, h], torch.stack(want_parts).sum(0)[:, :, 0], rtol=1e-4, atol=1e-4)
            assert torch.equal(left_out[:, h], torch.stack(want_left_out).sum(0)[:, 0])
            assert torch.equal(votes[:, h], torch.cat(want_votes)[:, 0])


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_sampled_errors_are_those_of_some_queries(stride: int) -> None:
    (q, k, v), _ = case("uneven")
    skipped = torch.rand(2, 4, 6, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    found = measure_tiles(
        q, k, v, skipped, thresholds=(-1.0,), tile_m=16, tile_n=16, stride=stride, apart=min(stride, 4)
    )
    visited = ~skipped.repeat_interleave(16, 2)[:, :, :90].repeat_interleave(16, 3)[..., :139]
    of_heads = [x.repeat_interleave(4 // x.shape[2], 2).transpose(1, 2) for x in (q, k, v)]
    attend = nn.functional.scaled_dot_product_attention
    out, dense = (attend(*of_heads, attn_mask=mask).transpose(1, 2) for mask in (visited, None))
    query = torch.arange(90)
    sampled = (query // 16 % stride == 0) & (query % 16 % min(stride, 4) == 0)
    want = plain_error("L1", out[:, sampled], dense[:, sampled]).double()
    torch.testing.assert_close(error_of("L1", found.parts)[0], want, rtol=1e-4, atol=1e-6)


def test_sampled_errors_are_close_to_those_of_all_queries() -> None:
    q, k, v = clustered_qkv(3, seq_q=3000, clusters=40, gain=1.2)
    skipped = torch.zeros(1, 2, 94, 94, dtype=torch.bool)
    options: dict[str, Any] = {"thresholds": THRESHOLDS, "tile_m": 32, "tile_n": 32}
    votes = measure_tiles(q, k, v, skipped, **options).votes(skipped)

    def error(stride: int, apart: int) -> torch.Tensor:
        options["stride"], options["apart"] = stride, apart
        return error_of("L1", measure_tiles(q, k, v, skipped, votes[:, :, ::stride], **options).parts)

    exact = error(1, 1)
    assert bool((exact[-1] > 0.2).all())
    for stride in (2, 3, 4):
        sampled, of_the_same_tiles = error(stride, stride), error(stride, 1)
        assert bool((sampled != of_the_same_tiles).any())
        torch.testing.assert_close(sampled, of_the_same_tiles, rtol=0.12, atol=0.001)
        torch.testing.assert_close(sampled, exact, rtol=0.2, atol=0.001)


# ---- models --------------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Two layers of `LiteAttention`."""

    def __init__(self, steps: int | None = STEPS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(32, 2) for _ in range(2))
        self.skip = nn.ModuleList(lite_attention.LiteAttention(num_steps=steps) for _ in range(2))
        for layer, skip in zip(self.layers, self.skip, strict=True):
            layer.attend = lambda q, k, v, skip=skip: skip(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Sampler:
    """Generates with a model in two branches; keeps what the model returned."""

    def __init__(self, model: nn.Module, *more: torch.Tensor, seq: int, branches: tuple[str, ...] = ("cond", "uncond")):
        self.model, self.more, self.seq, self.branches = model, more, seq, branches
        self.outputs: list[torch.Tensor] = []
        self.stop_at = -1

    def __call__(self, prompt: int = 0) -> torch.Tensor:
        x = tokens(STEPS, seq=self.seq, seed=prompt)
        self.outputs = []
        for step, (number, name) in itertools.product(range(STEPS), enumerate(self.branches)):
            if step == self.stop_at and number:
                raise KeyboardInterrupt
            given = self.model if lite_attention.enabled.store_of(self.model) else None
            with lite_attention.branch(name, model=given):
                out = self.model(x + 0.3 * number * tokens(0, seq=self.seq, seed=9), *self.more)
            self.outputs.append(out)
            x = 0.9 * x + 0.05 * out
        return x


def swapped() -> tuple[nn.Module, Sampler, dict[str, Any]]:
    model = Toy(layers=2)
    return model, Sampler(model, context(), seq=96), {"tile_shape": TILE}


def by_hand() -> tuple[nn.Module, Sampler, dict[str, Any]]:
    model = ByHand()
    return model, Sampler(model, seq=400), {}


@pytest.fixture(params=[swapped, by_hand], ids=lambda make: make.__name__)
def parts(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Sampler, dict[str, Any]]]:
    lite_attention.reset()
    yield request.param()
    lite_attention.reset()


Parts = tuple[nn.Module, Sampler, dict[str, Any]]


@pytest.fixture
def unlike(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Two sites of 4 heads and of 2, whose head dims have tiles of their own: 5 x 5 of them, and 3 x 10."""
    monkeypatch.setattr("lite_attention.compile.settings.tile_shape", lambda dim, *_: {8: (16, 16), 16: (32, 8)}[dim])
    model = Toy(layers=2)
    model.blocks[0].attn1.heads = model.blocks[0].attn1.kv_heads = 4
    return model, Sampler(model, context(seq=5), seq=80), {}


def test_sites_weigh_as_much_as_all_their_tiles(unlike: Parts) -> None:
    """However many of them are measured."""
    model, sampler, _ = unlike
    # 3 of 5 rows of tiles, and 1 of 3
    with Calibration(model, target_error=BOUND, num_steps=STEPS, queries=32) as calibration:
        sampler()
    table = calibration.table()
    with Verification(model, table, num_steps=STEPS) as verification:
        sampler()
    assert {site: threshold.shape for site, threshold in table.items()} == {
        "blocks.0.attn1": (3, STEPS, 4),  # slots, steps, heads
        "blocks.1.attn1": (3, STEPS, 2),
    }
    for report in (calibration.report, verification.report):
        assert {row.site: (row.tiles, len(row.error)) for row in report.rows} == {
            "blocks.0.attn1": (25, 4),
            "blocks.1.attn1": (30, 2),
        }
        left_out = {site: sum(r.sparsity.sum() for r in report.rows if r.site == site) for site in table}
        whole = (25 * left_out["blocks.0.attn1"] + 30 * left_out["blocks.1.attn1"]) / (25 * 4 + 30 * 2) / (2 * STEPS)
        assert report["sparsity"] == pytest.approx(float(whole))
        assert 0.01 < report["sparsity"] < 0.9


def dense_outputs(parts: Parts) -> list[torch.Tensor]:
    model, sampler, settings = parts
    with AttentionProbe(model, STEPS, **settings) as probe:
        probe.attend = lambda call: call.run(torch.full((1, 1, 1), -math.inf))  # type: ignore[method-assign]
        sampler()
    return sampler.outputs


def test_chooses_the_most_aggressive_threshold_that_the_op_bears_out(parts: Parts) -> None:
    """The table, found again by trying each candidate with the op on the inputs of the dense trajectory."""
    model, sampler, settings = parts
    want = dense_outputs(parts)
    calls: dict[tuple[str, int], list[tuple[Qkv, int]]] = {}

    class Spied(Calibration):
        def attend(self, call: Any) -> Any:
            q, k, v = (x.clone() for x in call.args[:3])
            calls.setdefault((call.site, call.control.slot), []).append(((q, k, v), call.kwargs["tile_m"]))
            assert call.control.step == len(calls[call.site, call.control.slot]) - 1
            return super().attend(call)

    with Spied(model, target_error=BOUND, num_steps=STEPS, **settings) as calibration:
        sampler()
        names = {row.name for row in silent_report(model).swapped}
    for out, dense in zip(sampler.outputs, want, strict=True):
        torch.testing.assert_close(out, dense, rtol=1e-4, atol=1e-4)  # the trajectory is dense
    limit = HEADROOM * BOUND
    table, rows = calibration.table(), {(r.site, r.slot, r.step): r for r in calibration.report.rows}
    assert table.keys() == names == {site for site, _ in calls}
    assert len(calls) == 2 * len(names)

    aggressive = 0
    for (site, slot), of_state in calls.items():
        inputs = [qkv for qkv, _ in of_state]
        tile = of_state[0][1]
        options: dict[str, Any] = {"slots": 1, "auto_step": False, "tile_m": tile, "tile_n": tile}
        state = SkipState.for_inputs(*inputs[0][:2], **options)

        def after(
            step: int, mask: torch.Tensor, threshold: float | torch.Tensor, state: SkipState = state
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Return what the op gives at a step that skips a mask, and the mask after it."""
            q, k, v = inputs[step]  # noqa: B023 - called in this round of the loop only
            state.set_step(1)  # not fresh
            state.skip_mask.copy_(mask)
            state.set_threshold(threshold)
            return lite_attention.skip_attention(q, k, v, state), state.skip_mask.clone()

        lite_attention.skip_attention(*inputs[0], state)  # which notes the sizes
        mask = torch.zeros_like(state.skip_mask)
        assert bool((rows[site, slot, 0].error == 0).all())
        for step in range(1, STEPS):
            dense = lite_attention.attention(*inputs[step])
            best = torch.full((dense.shape[2],), -math.inf)
            best_error = plain_error("L1", after(step, mask, -math.inf)[0], dense)
            fits_at_all, dropped = best_error <= limit, unpack_bits(mask, 64).sum((0, 1, 3, 4))
            for threshold in THRESHOLDS:
                voted = after(step - 1, mask, threshold)[1]
                error = plain_error("L1", after(step, voted, -math.inf)[0], dense)
                more = unpack_bits(voted, 64).sum((0, 1, 3, 4)) > dropped
                better = (error <= limit) & fits_at_all & more  # no higher than it takes
                best, best_error = torch.where(better, threshold, best), torch.where(better, error, best_error)
                dropped = torch.where(better, unpack_bits(voted, 64).sum((0, 1, 3, 4)), dropped)
            assert torch.equal(table[site][slot, step - 1], best), (site, slot, step)
            torch.testing.assert_close(rows[site, slot, step].error.float(), best_error, rtol=1e-3, atol=1e-5)
            aggressive += int((best > -6).sum())
            mask = after(step - 1, mask, best.view(1, 1, -1))[1]
            state.skip_mask.copy_(mask)
            sparsity = (~state.kept_tiles()[0]).float().mean((0, 2, 3)).double()
            torch.testing.assert_close(rows[site, slot, step].sparsity, sparsity)
        assert bool((table[site][slot, -1] == -math.inf).all())
    assert aggressive > 4  # the bound is no empty one


@pytest.mark.parametrize("how", ["enabled by calibration", "enabled before"])
def test_int8_is_measured_against_int8(how: str) -> None:
    """The error is that of skipping alone: it is 0 where nothing is skipped, and the trajectory is that of INT8."""
    model, sampler, settings = swapped()
    exact = dense_outputs((model, sampler, settings))
    want = dense_outputs((model, sampler, settings | {"use_int8": True}))
    settings |= {"use_int8": True}
    if how == "enabled before":
        lite_attention.enable(model, compile=False, num_steps=STEPS, **settings)
        settings = {}
    with Calibration(model, target_error=BOUND, num_steps=STEPS, **settings) as calibration:
        sampler()
    for out, dense, other in zip(sampler.outputs, want, exact, strict=True):
        assert torch.equal(out, dense)
        assert not torch.allclose(out, other, rtol=1e-4, atol=1e-4)
    rows = calibration.report.rows
    assert all((row.error == 0).all() for row in rows if row.step == 0)
    assert 0 < calibration.report["error"] <= BOUND
    assert any((table > -6).any() for table in calibration.table().values())


def test_the_bound_holds_on_the_dense_trajectory_and_the_sparse_one_is_measured(parts: Parts) -> None:
    model, sampler, settings = parts
    result = calibrate(
        model, sampler, target_error=BOUND, num_steps=STEPS, prompts=(0, 1), held_out=(2,), passes=2, progress=False,
        **settings,
    )  # fmt: skip
    assert result.calibration["missed"] < 0.05
    assert result.calibration["worst_error"] < 1.2 * BOUND
    assert result.calibration["sparsity"] > 0.05
    assert len(result.verification.rows) == len(result.calibration.rows)
    assert 0 < result.verification["error"] < 2 * BOUND
    assert 0 < result.held_out["error"] < 2 * BOUND
    assert result.held_out["sparsity"] > 0.05
    assert result.sample_error is not None
    assert 0 < result.sample_error < BOUND
    assert result.cost.keys() == {"calibration", "verification"}
    assert str(result).splitlines()[2].startswith("dense trajectory")

    # The verified trajectory is the one that a user gets.
    with Verification(model, result.table, num_steps=STEPS, **settings):
        verified = sampler(2)
    if settings:
        lite_attention.enable(model, compile=False, num_steps=STEPS, **settings)
    lite_attention.set_threshold(model, lambda site: result.table[site.name])
    assert torch.equal(sampler(2), verified)


def test_votes_are_judged_by_what_they_do_to_the_next_step() -> None:
    """Inputs that turn round between two steps: what the first votes out is what the second needs."""
    attend = lite_attention.LiteAttention(num_steps=2)
    q, k, v = clustered_qkv(0, seq_q=256, head_dim=16, gain=2.0)
    tables = []
    for second in (q, q.flip(1)):
        with Calibration(attend, target_error=0.02, num_steps=2) as calibration:
            attend(q, k, v)
            attend(second, k, v)
        assert calibration.report["missed"] == 0
        tables.append(calibration.table()[""][0, 0])
    assert bool((tables[0] > tables[1]).all())


def test_steps_that_miss_the_bound_vote_nothing_and_are_reported() -> None:
    attend = lite_attention.LiteAttention(num_steps=3)
    q, k, v = clustered_qkv(0, seq_q=256, head_dim=16, gain=2.0)
    with Calibration(attend, target_error=0.02, num_steps=3) as calibration:
        attend(q, k, v)
        attend(q, k, v)
        attend(q.flip(1), k, v)
    first, second, third = calibration.report.rows
    assert float(first.error.max()) == 0
    assert 0 < float(second.error.max()) <= HEADROOM * 0.02
    assert float(third.error.min()) > 0.02
    assert torch.equal(calibration.table()[""][0, 1], torch.full((2,), -math.inf))
    assert calibration.report["missed"] == pytest.approx(1 / 3)
    assert calibration.report["worst_error"] == float(third.error.max())
    assert "33.3%" in str(calibration.report)

    # A second calibration knows: it aims lower, by as much.
    limits = calibration.limits_after()["", 0]
    torch.testing.assert_close(limits, (HEADROOM * 0.02) ** 2 / third.error)


@pytest.mark.parametrize(
    ("tokens", "queries", "want"), [(96, 64, (1, 4)), (400, 2000, (1, 1)), (8192, 2000, (4, 4)), (8192, 500, (16, 4))]
)
def test_a_part_of_the_queries_is_measured(tokens: int, queries: int, want: tuple[int, int]) -> None:
    q_tiles, tile_m = math.ceil(tokens / (192 if tokens > 400 else 16)), 192 if tokens > 400 else 16
    call: Any = types.SimpleNamespace(skipped=torch.empty(1, 1, q_tiles, 1), kwargs={"tile_m": tile_m})
    with Calibration(ByHand(), target_error=BOUND, queries=queries) as calibration:
        assert calibration._sampling(call) == want
    with Calibration(ByHand(), target_error=BOUND, queries=queries, stride=3) as calibration:
        assert calibration._sampling(call) == (3, 3)


def test_what_was_voted_out_already_may_not_be_made_up_for() -> None:
    """Leaving out more may make the error smaller by chance; a head over the bound still votes nothing."""
    errors = torch.tensor([[0.2, 0.1, 0.0], [0.1, 0.3, 0.1], [0.1, 0.1, 0.4]])
    with Calibration(ByHand(), target_error=0.15, thresholds=(-2.0, -1.0)) as calibration:
        assert calibration._choose(("", 0, 1), Curve(errors, errors, errors, 1.0)).tolist() == [0, 2, 1]


def test_the_worst_prompt_decides() -> None:
    model, sampler, settings = swapped()
    tables = []
    for prompts in ((0,), (1,), (0, 1)):
        with Calibration(model, target_error=BOUND, num_steps=STEPS, **settings) as calibration:
            for prompt in prompts:
                lite_attention.reset(model)
                sampler(prompt)
        tables.append(calibration.table())
    for site, both in tables[2].items():
        higher = torch.maximum(tables[0][site], tables[1][site])
        assert bool((both[:, 0] <= higher[:, 0]).all())  # later steps start from another mask
    assert any(not torch.equal(tables[0][site], tables[2][site]) for site in tables[2])


# ---- interrupts ----------------------------------------------------------------------------------------------------


def test_resumed_is_as_if_never_interrupted(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampler, settings = parts
    options = {"target_error": BOUND, "num_steps": STEPS, **settings}
    measured = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal measured
        measured += 1
        return measure_tiles(*args, **kwargs)

    monkeypatch.setattr(recorder, "measure_tiles", counted)

    def generate(calibration: Calibration) -> None:
        for prompt in (0, 1):
            calibration.start_fresh()
            sampler.stop_at = 2 if stop and prompt else -1
            sampler(prompt)

    stop = False
    with Calibration(model, **options) as calibration:
        generate(calibration)
    whole, calls = calibration.table(), measured
    with Calibration(model, **options) as again:
        generate(again)
    assert all(torch.equal(again.table()[site], whole[site]) for site in whole)  # the same each time

    stop, file, measured = True, tmp_path / "calibration.pt", 0
    with pytest.raises(KeyboardInterrupt), Calibration(model, **options, autosave=file) as interrupted:
        generate(interrupted)
    assert 0 < measured < calls
    stop = False
    with Calibration(model, **options) as resumed:
        resumed.resume(file)
        assert resumed.table().keys() == whole.keys()
        generate(resumed)
    assert measured == calls
    assert all(torch.equal(resumed.table()[site], whole[site]) for site in whole)
    for place, curve in calibration.curves.items():
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(curve, resumed.curves[place], strict=True)
        )

    with Calibration(model, **{**options, "target_error": 0.1}) as other:
        with pytest.raises(
            ValueError, match=r"calibration.pt: expected a calibration with {'rule': .*0\.1'}, got .*0\.05'}$"
        ):
            other.resume(file)
        generate(other)
        with pytest.raises(ValueError, match="resume: expected a calibration that has not run yet, got"):
            other.resume(file)
    earlier = torch.load(file)  # as written before there was a choice of queries
    del earlier["options"]["queries"]
    torch.save(earlier, file)
    with (
        Calibration(model, **options) as later,
        pytest.raises(ValueError, match=r"expected a calibration with {'queries': \(2000, 4\)}, got {'queries': None}"),
    ):
        later.resume(file)


def test_nan_stops_with_the_place_named(parts: Parts) -> None:
    model, sampler, settings = parts
    layer = next(m for m in model.modules() if isinstance(m, Attention))
    site = "blocks.0.attn1" if settings else "skip.0"
    with Calibration(model, target_error=BOUND, num_steps=STEPS, **settings) as calibration:
        sampler.stop_at = 2
        with pytest.raises(KeyboardInterrupt):
            sampler()
        sampler.stop_at = -1
        layer.to_v.weight[0, 0] = math.nan
        name = "uncond"
        with (
            pytest.raises(FloatingPointError, match=rf"^{site}, slot 1, step 2: attention gives NaN"),
            lite_attention.branch(name, model=model if settings else None),
        ):
            model(tokens(2, seq=sampler.seq), *sampler.more)
        assert {place[2] for place in calibration.curves} == {0, 1, 2}


# ---- a budget for the whole ----------------------------------------------------------------------------------------


class Characters(nn.Module):
    """Self-attention whose heads differ: how sharp their scores are, and how much their values vary."""

    SHARP = (0.6, 1.5, 3.0, 1.5)
    VARIED = (1.0, 1.0, 1.0, 0.05)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.out = nn.Linear(64, 64)
        self.proj = nn.Linear(64, 3 * 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.proj(x).unflatten(-1, (3, 4, 16)).unbind(2)
        gain, varied = (torch.tensor(of_heads).view(1, 1, 4, 1) for of_heads in (self.SHARP, self.VARIED))
        q, k, v = ((t).transpose(1, 2) for t in (gain * (q + k), gain * (q + k), 1 + varied * v))
        return x + 0.1 * self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def characters() -> tuple[nn.Module, Callable[[int], torch.Tensor], dict[str, Any]]:
    model = Characters()

    def generate(prompt: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(100 + prompt)
        places = torch.linspace(0, 6, 256).unsqueeze(-1) * torch.arange(1, 33) * 0.3
        x = torch.cat([places.sin(), places.cos()], 1) + 0.4 * torch.randn(1, 256, 64, generator=noise)
        for _ in range(STEPS):
            x = 0.9 * x + 0.1 * model(x)
        return x

    return model, generate, {"tile_shape": TILE, "num_steps": STEPS}


def test_budget_beats_one_threshold_for_all_on_held_out_inputs() -> None:
    model, generate, settings = characters()
    held_out = (2, 3)
    result = calibrate(
        model, generate, target_sparsity=0.4, prompts=(0, 1), held_out=held_out, progress=False, **settings
    )
    assert result.calibration["sparsity"] == pytest.approx(0.4, abs=0.02)
    assert result.held_out["sparsity"] == pytest.approx(0.4, abs=0.05)

    def one_for_all(threshold: float) -> Any:
        with Verification(model, {"": torch.full((1, 1, 1), threshold)}, **settings) as verification:
            for prompt in held_out:
                verification.start_fresh()
                generate(prompt)
        return verification.report

    low, high = -12.0, 0.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if one_for_all(middle)["sparsity"] < result.held_out["sparsity"] else (low, middle)
    uniform = one_for_all(low)  # which skips a little less
    assert result.held_out["sparsity"] - 0.02 < uniform["sparsity"] <= result.held_out["sparsity"]
    assert result.held_out["error"] < 0.7 * uniform["error"]
    again = calibrate(model, generate, target_sparsity=0.4, prompts=(0, 1), progress=False, **settings)
    assert torch.equal(again.table[""], result.table[""])


def test_lasting_curves_are_those_of_one_threshold_at_all_steps(parts: Parts) -> None:
    model, sampler, settings = parts

    def left_out(lasting: bool, index: int | None) -> torch.Tensor:
        """Shares by place and head at candidate 20, where that one, or none, is left out at each step."""
        measured = Recorder(
            model, lambda _, curve: torch.full(curve.errors.shape[1:], index or 0), f"always {index}", lasting=lasting,
            num_steps=STEPS, **settings,
        )  # fmt: skip
        with measured:
            sampler(0)
        return torch.cat([curve.left_out[20] / curve.tiles for _, curve in sorted(measured.curves.items())])

    want, single, lasting = left_out(False, 20), left_out(False, None), left_out(True, None)
    assert want.mean() > 0.1
    assert torch.equal(lasting, want)
    assert (single < want).float().mean() > 0.1


def test_a_price_counts_what_stays_out() -> None:
    """Found again by trying prices; a choice of one step is one of those after it too, where states have them."""
    generator = torch.Generator().manual_seed(0)
    curves = {}
    for site, slot, step in [("a", 0, 0), ("a", 0, 1), ("a", 0, 2), ("b", 0, 0), ("a", 1, 0), ("a", 1, 1)]:
        errors, losses, left_out = (torch.rand(6, 2, generator=generator).double().cumsum(0) for _ in range(3))
        curves[site, slot, step] = Curve(errors.square(), losses.square(), left_out, 10.0)

    def reached(name: str, price: float) -> float:
        figures: dict[str, list[torch.Tensor]] = {"error": [], "sparsity": []}
        choices: dict[tuple[str, int, int], int] = {}
        for (site, slot, _), curve in curves.items():
            for head in range(2):
                first = choices.get((site, slot, head), 0)
                loss = curve.errors if name == "error" else curve.losses
                costs = (loss - price * curve.left_out)[first:, head]
                choice = choices[site, slot, head] = first + int(costs.argmin())
                figures["error"].append(curve.errors[choice, head])
                figures["sparsity"].append(curve.left_out[choice, head] / 10)
        return float(torch.stack(figures[name]).mean())

    for name, target in (("error", 2.0), ("sparsity", 0.2)):
        price = targets.price_for(curves, name, target)
        below, above = reached(name, price * (1 - 1e-6)), reached(name, price * (1 + 1e-6))
        assert below <= target <= above
        assert below < above  # a staircase, of which this is the step


def test_budget_of_error() -> None:
    model, generate, settings = characters()
    result = calibrate(model, generate, target_error=0.03, budget=True, passes=3, progress=False, **settings)
    assert result.calibration["error"] == pytest.approx(0.03, rel=0.25)  # few heads: a staircase
    assert result.verification["error"] == pytest.approx(0.03, rel=0.3)
    bounded = calibrate(model, generate, target_error=0.03, progress=False, **settings)
    assert result.verification["sparsity"] > bounded.verification["sparsity"]


def test_passes_are_resumed_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, generate, settings = characters()
    options = {"target_sparsity": 0.3, "progress": False, "passes": 2, **settings}
    want = calibrate(model, generate, **options)
    file = tmp_path / "passes.pt"
    calibrate(model, generate, **options, autosave=file)
    assert {path.name for path in tmp_path.iterdir()} >= {"passes.pt", "passes.pt.1"}
    monkeypatch.setattr(recorder, "measure_tiles", None)  # nothing is measured again
    assert torch.equal(calibrate(model, generate, **options, autosave=file).table[""], want.table[""])


# ---- how it sits on a model ----------------------------------------------------------------------------------------


def test_detached_model_is_as_before() -> None:
    model, sampler, settings = swapped()
    want = sampler()
    with Calibration(model, target_error=BOUND, num_steps=STEPS, **settings):
        sampler()
    assert torch.equal(sampler(), want)
    assert model._compiled_call_impl is None
    assert not model.blocks[0]._forward_hooks


def test_model_by_hand_is_measured_uncompiled_and_starts_fresh_each_time() -> None:
    model = ByHand(steps=None)  # which tell nobody where a generation begins
    layer = model.skip[0]
    layer.compile(backend="eager")
    compiled, sampler = layer._compiled_call_impl, Sampler(model, seq=128)
    result = calibrate(model, sampler, target_error=BOUND, num_steps=STEPS, prompts=(0, 1), progress=False)
    assert result.table.keys() == {"skip.0", "skip.1"}
    assert {row.step for row in result.verification.rows} == set(range(STEPS))
    assert layer._compiled_call_impl is compiled
    assert layer.state is not None
    assert layer.state.step(0) == layer.state.step(1) == 0
    assert bool(layer.state.kept_tiles().all())


@pytest.mark.parametrize("how", [True, False])
def test_enabled_model_keeps_its_settings_and_is_handed_back(how: bool) -> None:
    """A compiled model is measured eagerly, at the tiles that it was enabled with, and compiled again afterwards."""
    torch.compiler.reset()
    options = {"compile": how, "num_steps": STEPS, "threshold": -4.0, "tile_shape": TILE}
    options |= {"inner": "eager"} if how else {}
    model, sampler, settings = swapped()
    with Calibration(model, target_error=BOUND, num_steps=STEPS, **settings) as plain:
        sampler()
    lite_attention.enable(model, **options)
    want = sampler()
    sites = [row.name for row in silent_report(model).swapped]
    with pytest.raises(ValueError, match=r"settings: expected none .* got \['tile_shape'\]"):
        Calibration(model, target_error=BOUND, **settings)
    lite_attention.reset(model)
    with Calibration(model, target_error=BOUND, num_steps=STEPS) as calibration:
        sampler()
    assert [*calibration.table()] == sites
    for site, table in plain.table().items():
        assert torch.equal(table, calibration.table()[site])
    torch.testing.assert_close(sampler(), want, rtol=0, atol=1e-6)
    assert [row.name for row in silent_report(model).swapped] == sites


def test_one_calibration_at_a_time_and_in_any_order() -> None:
    """The second one on a model is refused, and does not disturb the first."""
    model, sampler, settings = swapped()
    first = Calibration(model, target_error=BOUND, num_steps=STEPS, **settings)
    with pytest.raises(ValueError, match="model_or_pipe: expected a model that nobody measures, got one with a calib"):
        Calibration(model, target_error=BOUND, num_steps=STEPS)
    sampler()
    assert first.table()
    first.detach()
    first.detach()
    assert model._compiled_call_impl is None
    with Calibration(model, target_error=BOUND, num_steps=STEPS, **settings) as second:
        sampler()
    assert second.table()


@pytest.mark.parametrize(
    ("make", "fails"), [(swapped, "attach"), (swapped, "_Watched"), (swapped, "enable"), (by_hand, "_Watched")]
)
def test_a_calibration_that_cannot_begin_leaves_the_model_as_it_was(
    make: Callable[[], Parts], fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sampler, settings = make()

    def raises(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    where = "lite_attention.compile.eager" if fails == "attach" else "lite_attention.calibration.probe"
    for module in model.modules():
        module._compiled_call_impl = module._call_impl  # as if compiled
    before = {module: module._compiled_call_impl for module in model.modules()}
    with monkeypatch.context() as patch:
        patch.setattr(f"{where}.{fails}", raises)
        with pytest.raises(RuntimeError, match="no"):
            Calibration(model, target_error=BOUND, num_steps=STEPS, **settings)
    assert {module: module._compiled_call_impl for module in model.modules()} == before
    assert not lite_attention.enabled.store_of(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with Calibration(model, target_error=BOUND, num_steps=STEPS, **settings) as calibration:
        sampler()
    assert calibration.table()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("then", ["disable", "enable"])
def test_what_is_done_to_a_model_while_it_is_measured_stays_done(compile: bool, then: str) -> None:
    options: dict[str, Any] = {"compile": compile, "inner": "eager", "num_steps": STEPS, "tile_shape": TILE}
    model, sampler, _ = swapped()
    dense = sampler()
    lite_attention.enable(model, **options)
    calibration = Calibration(model, target_error=BOUND, num_steps=STEPS)
    sampler()
    lite_attention.disable(model)
    if then == "enable":
        lite_attention.enable(model, threshold=-2.0, **options)
    calibration.detach()
    assert calibration.table()
    out = sampler()
    if then == "disable":
        assert model._compiled_call_impl is None
        assert torch.equal(out, dense)
    else:
        assert (out - dense).abs().max() > 1e-4
        assert len(silent_report(model).swapped) == 2


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    model, sampler, settings = swapped()
    steps, bound = np.int64(STEPS), np.float32(BOUND)
    options: dict[str, Any] = {"num_steps": steps, "progress": False, "autosave": tmp_path / "a.pt", **settings}
    for _ in range(2):  # from the start, and from the file
        found = calibrate(model, sampler, target_error=bound, passes=np.int32(1), **options)
    assert repr(found) == str(found)
    assert repr(found.table) == str(found.table)
    found.save(tmp_path / "a.toml")
    assert ThresholdTable.load(tmp_path / "a.toml").num_steps == STEPS
    file = tmp_path / "b.pt"
    with Calibration(model, target_error=bound, num_steps=steps, autosave=file, **settings) as calibration:
        sampler()
    with Calibration(model, target_error=bound, num_steps=STEPS, **settings) as resumed:
        resumed.resume(file)
    assert calibration.table().target_error == pytest.approx(BOUND)


def test_the_defaults_of_torch_change_nothing() -> None:
    """Neither the device nor the dtype that new tensors have by default."""
    model, _, settings = swapped()
    steps = [tokens(step, seq=88) for step in range(STEPS)]  # a size that nothing is kept of yet
    text = context()

    def generate(_: int) -> None:
        for step in steps:
            model(step, text)

    options = {"num_steps": STEPS, "progress": False, **settings}
    for target in ({"target_error": BOUND}, {"target_sparsity": 0.3}):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                found = calibrate(model, generate, **target, **options)
        finally:
            torch.set_default_dtype(before)
        want = calibrate(model, generate, **target, **options)
        for site, table in want.table.items():
            assert found.table[site].dtype == torch.float32
            assert torch.equal(found.table[site], table)
        assert dict(found.verification) == dict(want.verification)


def test_pipeline_names_its_transformer_and_one_branch_makes_one_slot() -> None:
    class Pipe:
        def __init__(self, model: nn.Module) -> None:
            self.components = {"transformer": model}

    model, sampler, settings = swapped()
    sampler.branches = ("",)
    with Calibration(Pipe(model), target_error=BOUND, **settings) as calibration:
        for step in range(2):
            model(tokens(step), *sampler.more)
    tables = calibration.table()
    assert [*tables] == ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]
    assert {table.shape for table in tables.values()} == {(1, 2, 2)}


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model, sampler, settings = swapped()
    with Calibration(model, target_error=BOUND, num_steps=STEPS, progress=True, **settings):
        sampler()
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_error": -1.0}, "target_error: expected a number of at least 0, got -1.0"),
        ({"metric": "l1"}, r"metric: expected one of \('L1', 'Cossim', 'RMSE'\), got 'l1'"),
        ({"thresholds": (-1.0, -2.0)}, r"thresholds: expected 1 to 250 ascending numbers of at most 0, got \(-1.0"),
        ({"thresholds": (-1.0, 1.0)}, "thresholds: expected 1 to 250 ascending"),
        ({"stride": 0}, "stride: expected at least 1, got 0"),
        ({"queries": 0}, "queries: expected at least 1, got 0"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], message: str) -> None:
    model = Toy(layers=1)
    with pytest.raises(ValueError, match=message):
        Calibration(model, **{"target_error": 0.1, **options})
    assert model._compiled_call_impl is None


def test_mistakes_of_a_whole_calibration_are_told() -> None:
    model, sampler, settings = swapped()

    def attempt(generate: Any = sampler, **options: Any) -> None:
        calibrate(model, generate, **{"num_steps": STEPS, "progress": False, **settings, **options})

    for options, message in (
        ({}, "target_error, target_sparsity: expected one of them, got None and None"),
        ({"target_sparsity": 1.0}, "target_sparsity: expected a number from 0 to below 1, got 1.0"),
        ({"target_error": -1.0}, "target_error: expected"),
        ({"target_error": True}, "target_error: expected a number of at least 0, got True"),
        ({"target_sparsity": "half"}, "target_sparsity: expected a number from 0 to below 1, got 'half'"),
        ({"target_error": 0.1, "num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"target_error": 0.1, "num_steps": 2.5}, "num_steps: expected .* got 2.5"),
        ({"target_error": 0.1, "passes": None}, "passes: expected .* got None"),
        ({"target_error": 0.1, "metric": "l1"}, "metric: expected one of"),
        ({"target_error": 0.1, "prompts": 3}, "prompts: expected the numbers of prompts, .* got 3"),
        ({"target_error": 0.1, "held_out": 3}, "held_out: expected the numbers of prompts, .* got 3"),
        ({"target_error": 0.1, "generate": "x"}, "generate: expected a function of a prompt's number, got str"),
        ({"target_error": 0.1, "thresholds": "ab"}, "thresholds: expected 1 to 250 ascending numbers .* got 'ab'"),
        ({"target_error": 0.1, "thresholds": (-1.0, float("nan"))}, "thresholds: expected 1 to 250 ascending numbers"),
        ({"target_error": 0.1, "prompts": ()}, "prompts: expected at least one, got none"),
        ({"target_sparsity": 0.1, "passes": 0}, "passes: expected at least 1, got 0"),
        (
            {"target_error": 0.1, "generate": lambda _: None},
            r"generate: expected calls of skip-aware attention, got none",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attempt(**options)
    endless = ByHand(steps=None)
    with pytest.raises(
        ValueError, match=r"num_steps: expected at least the steps .* got 2, .* skip\.0, slot 0, step 2"
    ):
        calibrate(endless, Sampler(endless, seq=128), target_error=0.1, num_steps=2, progress=False)
    with pytest.raises(ValueError, match=r"model_or_pipe: expected a model before torch\.compile, got its result"):
        calibrate(torch.compile(model), sampler, num_steps=STEPS, target_error=0.1)
    with (
        pytest.raises(ValueError, match=r"table: expected thresholds for blocks\.0\.attn1, got them for \['other'\]"),
        Verification(model, {"other": torch.zeros(1, 1, 1)}, num_steps=STEPS, **settings),
    ):
        sampler()
