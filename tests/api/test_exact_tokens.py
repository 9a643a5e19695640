"""Tokens that are never skipped: which they are in each model, and that they come out as without skipping."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lite_attention
from lite_attention import exact_tokens, token_layout
from lite_attention.ops import SkipState
from lite_attention.ops.shard import Ranks, Shard
from lite_attention.ops.site import Site
from lite_attention.parallel import shard
from tests.support import diffusers_models as dm
from tests.support import toys

TILE, STEPS = toys.TILE, 8
SLICES = [(16, 32), (-16, None)]  # whole tiles of 96 tokens
RANGES = ((16, 32), (80, 96))


def enable(model: nn.Module, compile: bool = False, **options: Any) -> nn.Module:
    return lite_attention.enable(
        model, compile=compile, tile_shape=TILE, inner="aot_eager", num_steps=STEPS, **options
    )  # fmt: skip


# ---- which they are --------------------------------------------------------------------------------------------------


def rows_that_change(case: dm.Case, changed: dm.Inputs, same: dm.Inputs) -> Iterator[tuple[int, list[int]]]:
    """Return, for each sequence of a model, its length, and the rows that change with an input where it is first met.

    It is first met before anything is mixed.
    """
    met: list[dict[int, torch.Tensor]] = []
    model = case.model()

    def note(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape == key.shape:
            met[-1].setdefault(query.shape[2], query)
        return F.scaled_dot_product_attention(query, key, *args, **kwargs)

    for inputs in (same, {**same, **changed}):
        met.append({})
        with dm.replaced_sdpa(note):
            dm.run(model, inputs)
    for length, query in met[0].items():
        yield length, ((query - met[1][length]).abs().amax((0, 1, 3)) > 0).nonzero().flatten().tolist()


LTX2_INPUTS = functools.partial(dm.LTX2.inputs, audio=80)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("case", "inputs", "lengths"),
    [
        (dm.COGVIDEOX, dm.COGVIDEOX.inputs, {120: 96}),
        (dm.HUNYUAN, dm.HUNYUAN.inputs, {24: 0, 120: 96}),
        (dm.HUNYUAN15, dm.HUNYUAN15.inputs, {12: 0, 118: 96}),
        (dm.LTX2, LTX2_INPUTS, {96: 96, 80: 0}),
        (dm.MINIMAX_H3, dm.MINIMAX_H3.inputs, {24: 0, 160: 104}),
        (dm.MOCHI, dm.MOCHI.inputs, {105: 96}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_not_of_the_picture(case: dm.Case, inputs: Any, lengths: dict[int, int]) -> None:
    given, other = inputs(0, 0), inputs(0, 1)["hidden_states"]
    if case is dm.MINIMAX_H3:
        other[:, :16] = given["hidden_states"][:, :16]  # the reference stays
    layout = token_layout.layout_of_call(case.model(), (), given)
    assert layout is not None
    found = {}
    for length, rows in rows_that_change(case, {"hidden_states": other}, given):
        exact = {token for start, end in layout.ranges(length) for token in range(start, end)}
        assert sorted({*range(length)} - exact) == rows
        found[length] = len(rows)
    assert found == lengths


def test_a_model_that_is_not_known_has_none() -> None:
    assert token_layout.layout_of_call(dm.WAN.model(), (), dm.WAN.inputs(0, 0)) is None
    assert token_layout.layout_of_call(dm.COGVIDEOX.model(), (), {}) is None


# ---- that they are exact ---------------------------------------------------------------------------------------------


class ByHand:
    """Self-attention whose exact tokens are told to each call, as keys, and whose own rows are computed once more."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.state: SkipState | None = None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if self.state is None:
            self.state = SkipState.for_inputs(
                q, k, threshold=self.threshold, slots=1, tile_m=TILE[0], tile_n=TILE[1]
            )  # fmt: skip
        out = lite_attention.skip_attention(q, k, v, self.state, must_do=[16, 32, 80, 96]).transpose(1, 2)
        whole = F.scaled_dot_product_attention(query, key, value)
        for start, end in RANGES:
            out[:, :, start:end] = whole[:, :, start:end]
        return out


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    "given", [SLICES, lambda site: SLICES if site.q_shape[1] == 96 else None], ids=["list", "of site"]
)
def test_votes_are_those_of_a_call_that_is_told(compile: bool, given: Any) -> None:
    model, expected = enable(toys.Toy(2), compile, threshold=-1.0, exact_tokens=given), toys.Toy(2)
    by_hand = [ByHand(-1.0), ByHand(-1.0)]
    for block, attend in zip(expected.blocks, by_hand, strict=True):
        block.attn1.attend = attend  # type: ignore[union-attr, assignment]
    for step in range(4):
        inputs = toys.tokens(step), toys.context()
        torch.testing.assert_close(model(*inputs), expected(*inputs))
    assert all(float(attend.state.sparsity()) > 0.2 for attend in by_hand if attend.state is not None)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("method", [{"threshold": 0.0}, {"method": "residual", "keep": 0.2}], ids=["votes", "residual"])
def test_their_tiles_stay(compile: bool, method: dict[str, Any]) -> None:
    model = enable(toys.Toy(2), compile, exact_tokens=[(20, 40)], **method)  # of no whole tiles
    for step in range(6):
        model(toys.tokens(step), toys.context())
        for row in dm.silent_report(model).swapped:
            assert row.state is not None
            kept = row.state.kept_tiles()[0]
            assert kept[..., 1:3, :].all()
            assert kept[..., 1:3].all()
            assert step < 2 or not kept.all()


@pytest.mark.parametrize("compile", [False, True])
def test_rows_of_the_residual_are_dense(compile: bool) -> None:
    model, dense = toys.Toy(1), toys.Toy(1)
    enable(model, compile, method="residual", keep=0.2, exact_tokens=SLICES)
    others = []
    for step in range(STEPS):
        inputs = toys.tokens(step), toys.context()
        difference = (model(*inputs) - dense(*inputs)).abs().amax((0, 2))
        assert all(float(difference[start:end].max()) < 1e-5 for start, end in RANGES)
        others.append(float(difference.max()))
    assert max(others) > 1e-4


@pytest.mark.parametrize("compile", [False, True])
def test_an_initial_mask_leaves_them(compile: bool) -> None:
    """From the first step on."""

    def diagonal(site: Site) -> torch.Tensor:
        return ~torch.eye(6, dtype=torch.bool)[None, None]

    dense = toys.Toy(1)
    for slices in (None, SLICES):
        model = enable(toys.Toy(1), compile, initial_mask=diagonal, exact_tokens=slices)
        for step in range(2):
            inputs = toys.tokens(step), toys.context()
            difference = (model(*inputs) - dense(*inputs)).abs().amax((0, 2))
            exact = max(float(difference[start:end].max()) for start, end in RANGES)
            assert exact < 1e-5 if slices else exact > 1e-3
            assert float(difference.max()) > 1e-3


def test_sizes_have_ranges_of_their_own() -> None:
    model = enable(toys.Toy(1), exact_tokens=[(-16, None)], threshold=0.0)
    for tokens in (96, 128, 96, 128):
        model(toys.tokens(0, seq=tokens), toys.context())
        (row,) = dm.silent_report(model).swapped
        assert row.exact_tokens == ((tokens - 16, tokens),)
        assert row.state is not None
        assert row.state.kept_tiles()[0, ..., -1].all()


@pytest.mark.parametrize("compile", [False, True])
def test_a_model_tells_them_by_itself(compile: bool) -> None:
    model = enable(dm.MINIMAX_H3.model(), compile, threshold=0.0)
    for step in range(3):
        dm.run(model, dm.MINIMAX_H3.inputs(step, 0))
    report = dm.silent_report(model)
    for row in report.swapped:
        assert row.exact_tokens == (((0, 24),) if "refiner" in row.name else ((0, 56),))
        assert row.state is not None
        kept = row.state.kept_tiles()[0]
        assert kept[..., :4, :].all()
        assert kept[..., :4].all()
        assert kept.all() == ("refiner" in row.name)
    assert "exact tokens, which are never skipped: 0:24 of 24 (1 sites); 0:56 of 160 (2 sites)" in str(report)


@pytest.mark.parametrize("method", [{"threshold": 0.0}, {"method": "residual", "keep": 0.2}], ids=["votes", "residual"])
def test_another_layout_of_the_same_length_starts_fresh(method: dict[str, Any]) -> None:
    """Whatever was skipped of its tokens would be missing, or come twice, in the first step."""
    model, dense = enable(dm.MINIMAX_H3.model(), slots=1, **method), dm.MINIMAX_H3.model()
    for number, text in enumerate((24, 40, 8)):
        for step in range(5 * number, 5 * number + 5):  # nobody tells that a generation begins
            given = dm._minimax_h3_inputs(step, 0, text=text)
            with lite_attention.branch("one", step, model=model):
                out = dm.run(model, given)
            if step == 5 * number:
                torch.testing.assert_close(out, dm.run(dense, given))
        rows = {row.name: row for row in dm.silent_report(model).swapped}
        assert rows["transformer_blocks.0.attn"].exact_tokens == ((0, text + 32),)
        state = rows["transformer_blocks.0.attn"].state
        assert state is not None
        assert not state.kept_tiles()[0].all()


def test_passes_with_texts_of_two_lengths_keep_their_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    def text_first(given: Any, _: object) -> token_layout.Layout:
        return token_layout.Layout(given["x"].shape[1] - 80, 80, 0)

    monkeypatch.setitem(token_layout._LAYOUTS, "Toy", text_first)
    model = enable(toys.Toy(1), threshold=0.0)
    skipped: dict[str, list[float]] = {"cond": [], "uncond": []}
    for step in range(3):
        for slot, (branch, tokens) in enumerate((("cond", 96), ("uncond", 112))):
            with lite_attention.branch(branch, step, model=model):
                model(toys.tokens(step, seq=tokens), toys.context())
            (site,) = dm.silent_report(model).swapped
            assert site.state is not None
            assert site.exact_tokens == ((0, tokens - 80),)
            assert site.state.kept_tiles()[slot, ..., : tokens // 16 - 5].all()
            skipped[branch].append(float(site.state.sparsity(per="slot")[slot]))
    assert all(0.1 < first <= last for first, *_, last in skipped.values())


@pytest.mark.parametrize(("rank", "rows"), [(0, []), (1, [0, 1])])
def test_queries_of_a_rank_stand_among_all_keys(rank: int, rows: list[int]) -> None:
    state = SkipState(batch=1, heads=1, seq_q=48, seq_k=96, tile_m=16, tile_n=16, slots=1)
    state.skip_mask.fill_(-1)
    exact_tokens.keep_exact(state, ((60, 70),), Shard(query_ranks=Ranks(rank, 2)))
    kept = state.kept_tiles()[0, 0, 0]
    assert kept.all(1).nonzero().flatten().tolist() == rows
    assert kept.all(0).nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize(("case", "is_known"), [(dm.HUNYUAN, False), (dm.MINIMAX_H3, True)], ids=["apart", "as one"])
def test_where_processes_split_text_and_picture_apart_it_is_said(
    case: dm.Case, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = enable(case.model(), threshold=0.0)
    config = SimpleNamespace(ulysses_degree=1, _ulysses_local_rank=0, ring_degree=1, _ring_local_rank=0)
    monkeypatch.setattr(shard, "context_parallel_of", lambda model: config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            dm.run(model, case.inputs(step, 0))
    said = [str(warning.message) for warning in caught if "split the two apart" in str(warning.message)]
    assert len(said) == (not is_known)
    assert all(bool(row.exact_tokens) == is_known for row in dm.silent_report(model).swapped)


def test_shapes_alone_may_be_asked_for() -> None:
    model, given = enable(dm.MINIMAX_H3.model(), threshold=0.0), dm.MINIMAX_H3.inputs(0, 0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in given.items()}
        out = model(**fake, return_dict=False)
    assert out[0].shape == given["hidden_states"].shape
    dm.run(model, given)
    assert all(row.exact_tokens for row in dm.silent_report(model).swapped)


def test_a_forward_of_another_thread_in_between_changes_nothing() -> None:
    """It has begun later, and ends before."""

    def alone(text: int) -> list[torch.Tensor]:
        model = enable(dm.MINIMAX_H3.model(), threshold=0.0)
        return [dm.run(model, dm._minimax_h3_inputs(step, 0, text=text)) for step in range(4)]

    def other(step: int) -> None:
        inner.append(dm.run(model, dm._minimax_h3_inputs(step, 0, text=40)))

    def overtake(*_: Any) -> None:
        if threading.current_thread() is main:
            pool.submit(other, len(inner)).result()

    model, inner, main = dm.MINIMAX_H3.model(), list[torch.Tensor](), threading.current_thread()
    model.norm_out.register_forward_pre_hook(overtake)
    enable(model, threshold=0.0)
    with ThreadPoolExecutor(1) as pool:
        outer = [dm.run(model, dm._minimax_h3_inputs(step, 0)) for step in range(4)]
    assert all(map(torch.equal, outer, alone(24)))
    assert all(map(torch.equal, inner, alone(40)))


def test_none_leaves_all_to_the_method() -> None:
    model = enable(dm.MINIMAX_H3.model(), threshold=0.0, exact_tokens=None)
    for step in range(3):
        dm.run(model, dm.MINIMAX_H3.inputs(step, 0))
    report = dm.silent_report(model)
    assert "exact tokens" not in str(report)
    assert any(not row.state.kept_tiles()[0, ..., :4, :].all() for row in report.swapped if row.state is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact_tokens": "text"}, r"exact_tokens: expected 'auto', or a list of pairs \[start, end\], got 'text'"),
        ({"exact_tokens": [0, 226]}, r"exact_tokens: expected a list of pairs \[start, end\] .*, got \[0, 226\]"),
        ({"exact_tokens": [(5, 3)]}, r"exact_tokens: expected a start before its end, got \[5, 3\]"),
        ({"exact_tokens": 226}, "exact_tokens: expected a list of pairs"),
        ({"exact_tokens": True}, "exact_tokens: expected a list of pairs"),
        (
            {"exact_tokens": [(0, 8)], "token_order": "tile3d"},
            r"exact_tokens: expected 'auto' or None with token_order, got \[\(0, 8\)\]",
        ),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lite_attention.enable(dm.WAN.model(), **options)


def test_what_a_callable_returns_is_checked() -> None:
    model = enable(toys.Toy(1), exact_tokens=lambda site: [(5, 3)])
    with pytest.raises(ValueError, match="exact_tokens: expected a start before its end"):
        model(toys.tokens(0), toys.context())
