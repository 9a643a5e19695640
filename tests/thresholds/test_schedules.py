"""Thresholds by step, layer, head and branch: the builders, callables, and `set_threshold` on all that holds states."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import lite_attention
from lite_attention import LiteAttention, schedules
from lite_attention.compile import Site
from lite_attention.model_sites import sites_of
from lite_attention.ops import SkipState
from tests.support import diffusers_models as dm
from tests.support.diffusers_models import TILE, silent_report
from tests.support.toys import Inner, Reference, Toy, compile_toy, context, tokens, toy_backend

INF = math.inf


def _enable(model: nn.Module, compile: bool | str = False, **options: Any) -> nn.Module:
    options = {"inner": "aot_eager", "tile_shape": TILE, "threshold": -4.0} | options
    return lite_attention.enable(model, compile=compile, **options)


@torch.no_grad()
def _run(model: nn.Module, step: int = 0, seq: int = 96) -> torch.Tensor:
    return model(tokens(step, seq=seq), context())


def _states(model: nn.Module) -> dict[str, list[SkipState]]:
    """All states of each swapped site, of all sizes, in the order in which they were born."""
    return {site.name: site.states for site in sites_of(model) if site.swapped}


def _assert_holds(state: SkipState, want: float | torch.Tensor) -> None:
    """Hold the table against a number, or rows after the last of which the last one holds."""
    rows = torch.as_tensor(want, dtype=torch.float32)
    rows = rows.expand(state.slots, *rows.shape[-2:]) if rows.dim() > 1 else rows.expand(state.slots, 1, 1)
    for slot in range(state.slots):
        for step, row in enumerate(state.threshold[slot]):
            expected = rows[slot, min(step, rows.shape[1] - 1)].expand(row.shape)
            assert torch.equal(row, expected), (slot, step)


# ---- builders ------------------------------------------------------------------------------------------------------


def test_three_segments_are_equal() -> None:
    for num_steps in (3, 4, 5, 50, 51):
        table = schedules.three_segments(num_steps, -3.0, -2.0, -1.0)
        assert table.shape == (num_steps, 1)
        assert table.dtype == torch.float32
        sizes = [int((table == value).sum()) for value in (-3, -2, -1)]
        assert sum(sizes) == num_steps
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert table.flatten().tolist() == sorted(table.flatten().tolist())


def test_linear_runs_from_first_to_last_in_equal_parts() -> None:
    table = schedules.linear(5, -4.0, torch.tensor([-2.0, -4.0, 0.0]))
    want = [[-4 + step * (last + 4) / 4 for last in (-2, -4, 0)] for step in range(5)]
    torch.testing.assert_close(table, torch.tensor(want))


def test_constant_is_one_row() -> None:
    assert schedules.constant(-3.0).tolist() == [[-3]]
    assert schedules.constant(torch.tensor([-3, -1])).tolist() == [[-3, -1]]


def test_dense_first_replaces_the_first_steps_or_precedes_a_single_one() -> None:
    assert schedules.dense_first(-3.0, 2).tolist() == [[-INF], [-INF], [-3]]
    assert schedules.dense_first(torch.tensor([-3.0, -1.0]), 1).tolist() == [[-INF, -INF], [-3, -1]]
    assert schedules.dense_first(-3.0, 0).tolist() == [[-3]]
    longer = schedules.three_segments(6, -3.0, -2.0, -1.0)
    table = schedules.dense_first(longer, 3)
    assert table.flatten().tolist() == [-INF] * 3 + [-2, -1, -1]
    assert longer.flatten().tolist() == [-3, -3, -2, -2, -1, -1]  # as it was
    of_slots = schedules.dense_first(torch.full((2, 1, 3), -1.0), 1)
    assert of_slots.shape == (2, 2, 3)
    assert of_slots[:, 0].eq(-INF).all()
    assert of_slots[:, 1].eq(-1).all()


def test_branches_have_rows_of_their_own() -> None:
    table = schedules.branches(schedules.linear(3, -3.0, -1.0), torch.tensor([-5.0, -6.0]))
    assert table.shape == (2, 3, 2)
    assert table[0].tolist() == [[-3, -3], [-2, -2], [-1, -1]]
    assert table[1].tolist() == [[-5, -6]] * 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.three_segments(2, -1, -1, -1), "num_steps: expected at least 3"),
        (lambda: schedules.linear(1, -1, -1), "num_steps: expected at least 2"),
        (lambda: schedules.linear(4, -INF, -1), "first, last: expected finite"),
        (lambda: schedules.linear(4, torch.zeros(2), torch.zeros(3)), r"first, last: .*\[2, 3\]"),
        (lambda: schedules.constant(torch.zeros(2, 2)), "threshold: expected a number"),
        (lambda: schedules.dense_first(-1.0, -1), "steps: expected at least 0"),
        (lambda: schedules.dense_first(schedules.linear(4, -2, -1), 4), "steps: expected 0 to 3"),
        (lambda: schedules.branches(), "schedules: expected one for each branch"),
        (lambda: schedules.branches(torch.zeros(2), torch.zeros(3)), r"schedules: .*\[2, 3\]"),
    ],
)
def test_mistakes_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# ---- in models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [4, None])
@pytest.mark.parametrize("compile", [False, True])
def test_a_model_follows_a_schedule(compile: bool, num_steps: int | None) -> None:
    model = Toy(2)
    table = schedules.dense_first(schedules.linear(4, torch.tensor([-6.0, -2.0]), -3.0), 1)
    reference = Reference(model, table)
    _enable(model, compile, threshold=table, num_steps=num_steps)
    for step in range(4):
        torch.testing.assert_close(_run(model, step), reference(tokens(step), context()), rtol=0, atol=1e-5)
        skipped = sum(int((~state.kept_tiles()).sum()) for (state,) in _states(model).values())
        assert (step == 0) == (skipped == 0)
        assert skipped == reference.skipped


@pytest.mark.parametrize("compile", [False, True, "blocks"])
def test_a_callable_gives_each_layer_its_own(compile: bool | str) -> None:
    seen: list[Site] = []

    def threshold(site: Site) -> float | torch.Tensor:
        seen.append(site)
        layer = int(site.name.split(".")[1])
        return -float(layer + 1) if layer else schedules.linear(3, -3.0, -1.0)

    model = dm.WAN.model()
    _enable(model, compile, threshold=threshold)
    dm.run(model, dm.WAN.inputs(0, 0))
    dm.run(model, dm.WAN.inputs(1, 0))
    assert [site.name for site in seen] == dm.WAN.swapped  # once a state, by full path
    assert {(site.q_shape, site.tile_shape) for site in seen} == {((1, 96, 2, 12), TILE)}
    for layer, (state,) in enumerate(_states(model).values()):
        _assert_holds(state, -float(layer + 1) if layer else torch.tensor([[-3.0], [-2.0], [-1.0]]))


def test_a_callable_in_an_exported_program() -> None:
    program = torch.export.export(Toy(2), (tokens(0), context()))
    layers = {"blocks.0.attn1": -1.0, "blocks.1.attn1": -2.0}
    program = lite_attention.make_skip_aware(program, tile_shape=TILE, threshold=lambda site: layers[site.name])
    states = lite_attention.compile.skip_states(program.module())
    assert len(states) == 2
    for path, state in states.items():
        _assert_holds(state, layers[path.removesuffix(".lite_attention")])


def test_a_callable_that_returns_no_threshold_is_told_by_the_first_call() -> None:
    for wrong, message in (
        (None, "number or a tensor, got NoneType"),
        (1.0, "at most 0"),
        (torch.zeros(201, 1), "num_st"),
    ):
        model = _enable(Toy(1), threshold=lambda site, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=f"threshold: expected .*{message}"):
            _run(model)


# ---- set_threshold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True, "blocks"])
def test_set_threshold_reaches_states_that_exist_and_those_to_come(compile: bool | str) -> None:
    if compile == "blocks":
        model, run, sizes = dm.WAN.model(), _run_wan, (24, 32)
    else:
        model, run, sizes = Toy(2), _run, (96, 128)
    _enable(model, compile, num_steps=6, dynamic=False if compile else None)
    run(model, 0, sizes[0])
    before = {name: state.threshold.data_ptr() for name, (state,) in _states(model).items()}
    assert len(before) >= 2
    table = schedules.dense_first(schedules.linear(6, -3.0, -1.0), 2)
    lite_attention.set_threshold(model, table)
    assert {name: state.threshold.data_ptr() for name, (state,) in _states(model).items()} == before
    with torch.compiler.set_stance("fail_on_recompile"):
        run(model, 1, sizes[0])
    run(model, 0, sizes[1])
    for states in _states(model).values():
        assert len(states) == 2
        for state in states:
            _assert_holds(state, table)


def _run_wan(model: nn.Module, step: int, height: int) -> torch.Tensor:
    inputs = dm.WAN.inputs(step, 0) | {"hidden_states": dm.latents(3, height, 8, step)}
    return dm.run(model, inputs)


@pytest.mark.parametrize("compile", [False, True])
def test_numbers_follow_a_changed_threshold(compile: bool) -> None:
    model, inner = Toy(2), Inner("aot_eager")
    reference = Reference(model, -INF)
    _enable(model, compile, threshold=-INF, inner=inner)
    for step in range(4):
        if step == 2:
            lite_attention.set_threshold(model, -3.0)
            for state in reference.states.values():
                state.set_threshold(-3.0)
        torch.testing.assert_close(_run(model, step), reference(tokens(step), context()), rtol=0, atol=1e-5)
        assert (reference.skipped > 0) == (step >= 2)
    assert len(inner.graphs) == int(compile)


def test_set_threshold_by_name_before_the_first_call() -> None:
    thresholds: dict[str, float | torch.Tensor] = {
        "blocks.0.attn1": -1.5, "blocks.1.attn1": torch.tensor([-1.0, -2.0]), "blocks.2.attn1": schedules.constant(-INF)
    }  # fmt: skip
    model = _enable(Toy(3))
    lite_attention.set_threshold(model, lambda site: thresholds[site.name])
    _run(model)
    _run(model, seq=128)
    for name, states in _states(model).items():
        for state in states:
            want = torch.as_tensor(thresholds[name])
            assert torch.equal(state.threshold, want.expand(state.threshold.shape).float()), name


class Pipe:
    def __init__(self) -> None:
        self.components = {"transformer": Toy(1), "transformer_2": Toy(1, seed=1)}


def test_names_in_a_pipeline_are_those_of_the_report() -> None:
    pipe = Pipe()
    _enable(pipe)  # type: ignore[arg-type]
    asked: list[str] = []

    def threshold(site: Site) -> float:
        asked.append(site.name)
        assert site.q_shape == (1, 96, 2, 16)
        return -1.0 if site.name.startswith("transformer_2.") else -2.0

    lite_attention.set_threshold(pipe, threshold)
    for model in pipe.components.values():
        _run(model)
    assert sorted(asked) == sorted(row.name for row in silent_report(pipe).swapped)
    for (name, model), want in zip(pipe.components.items(), (-2.0, -1.0), strict=True):
        for (state,) in _states(model).values():
            _assert_holds(state, want)
        assert f"{name}.blocks.0.attn1" in asked


def test_what_does_not_fit_one_part_of_a_pipeline_is_written_to_none() -> None:
    pipe = _enable(Pipe())  # type: ignore[arg-type]
    for model in pipe.components.values():
        _run(model)
    with pytest.raises(ValueError, match="threshold: expected at most 0"):
        lite_attention.set_threshold(pipe, lambda site: 1.0 if site.name.startswith("transformer_2.") else -1.0)
    for model in pipe.components.values():
        _run(model, seq=128)
        for state in _states(model)["blocks.0.attn1"]:
            _assert_holds(state, -4.0)


def test_one_backend_of_two_models_keeps_their_thresholds_apart() -> None:
    backend = toy_backend()
    models = [compile_toy(Toy(1, seed=seed), backend) for seed in range(2)]
    with pytest.raises(ValueError, match=r"model_or_pipe: expected .* run once"):
        lite_attention.set_threshold(models[0], -1.0)
    for model in models:
        _run(model)
    lite_attention.set_threshold(models[0], -1.0)
    lite_attention.set_threshold(models[0], -2.0)
    lite_attention.set_threshold(models[1], -3.0)
    for model in models:
        _run(model, seq=128)
    for model, want in zip(models, (-2.0, -3.0), strict=True):
        for states in _states(model).values():
            assert len(states) == 2
            for state in states:
                _assert_holds(state, want)
    lite_attention.set_threshold(torch.compile(models[1]), -4.0)  # the model is what torch.compile wraps
    assert all(state.threshold.eq(-4).all() for states in _states(models[1]).values() for state in states)
    assert all(state.threshold.eq(-2).all() for states in _states(models[0]).values() for state in states)


def test_modules_are_reached_too() -> None:
    q = torch.randn(1, 100, 2, 16)
    model = nn.ModuleDict({name: LiteAttention(threshold=-4.0, num_steps=3) for name in "ab"})
    model["a"](q, q, q)
    lite_attention.set_threshold(model, lambda site: {"a": -1.0, "b": schedules.linear(3, -2.0, -1.0)}[site.name])
    model["b"](q, q, q)
    _assert_holds(model["a"].state, -1.0)
    _assert_holds(model["b"].state, torch.tensor([[-2.0], [-1.5], [-1.0]]))


_NO_THRESHOLDS = [0.5, math.nan, torch.zeros(7, 1), "low", None]
_OF_OTHER_SIZES = [torch.zeros(4, 2, 2), torch.zeros(3)]  # which nobody knows before the first call


@pytest.mark.parametrize(
    ("wrong", "run_first"), [(w, False) for w in _NO_THRESHOLDS] + [(w, True) for w in _NO_THRESHOLDS + _OF_OTHER_SIZES]
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(wrong: Any, run_first: bool) -> None:
    model = _enable(Toy(2), num_steps=6)
    if run_first:
        _run(model)
        with pytest.raises(ValueError, match="threshold: expected"):
            lite_attention.set_threshold(model, lambda site: wrong if site.name == "blocks.1.attn1" else -1.0)
    with pytest.raises(ValueError, match="threshold: expected"):
        lite_attention.set_threshold(model, wrong)
    _run(model, seq=128)
    for states in _states(model).values():
        for state in states:
            _assert_holds(state, -4.0)


def test_a_schedule_of_unknown_length_fits_up_to_max_steps() -> None:
    model = _enable(Toy(1), max_steps=9)
    for run_first in (False, True):
        if run_first:
            _run(model)
        lite_attention.set_threshold(model, schedules.linear(9, -3.0, -1.0))
        with pytest.raises(ValueError, match=r"threshold: expected .*num_steps="):
            lite_attention.set_threshold(model, schedules.linear(10, -3.0, -1.0))
    for (state,) in _states(model).values():
        _assert_holds(state, schedules.linear(9, -3.0, -1.0))


def test_set_threshold_wants_something_of_ours() -> None:
    with pytest.raises(ValueError, match=r"model_or_pipe: expected one given to enable\(\).* got Toy"):
        lite_attention.set_threshold(Toy(1), -1.0)
    with pytest.raises(ValueError, match="model_or_pipe"):
        lite_attention.set_threshold(object(), -1.0)


def test_enabling_again_forgets_and_nothing_is_kept_alive() -> None:
    model = _enable(Toy(1))
    lite_attention.set_threshold(model, lambda site: -1.0)
    _enable(model, threshold=-5.0)
    _run(model)
    for (state,) in _states(model).values():
        _assert_holds(state, -5.0)
    lite_attention.set_threshold(model, lambda site: -1.0)
    gone = weakref.ref(model)
    del model, state
    gc.collect()
    assert gone() is None
