"""The residual for users: options and presets, what is said of memory and steps, and what does not belong to it."""

from __future__ import annotations

import gc
import itertools
import logging
import re
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import lite_attention
from lite_attention import LiteAttention, LiteAttentionBackend, LiteAttentionRegistry, ThresholdTable, plot, presets
from lite_attention.compile.settings import SkipSettings
from lite_attention.enabled import store_of
from lite_attention.model_sites import sites_of
from lite_attention.ops import ResidualState, SkipState, residual_attention, step_plan
from lite_attention.ops import control as c
from tests.support import diffusers_models as dm
from tests.support import pipelines
from tests.support.diffusers_models import silent_report
from tests.support.op_cases import clustered_qkv
from tests.support.toys import KEEP, TILE, Reference, Toy, context, tokens

ROUTES = pytest.mark.parametrize("compile", [False, True])


def enable(target: Any, compile: bool = False, **options: Any) -> Any:
    if compile:
        options["inner"] = "eager"
    if "preset" not in options:
        options = {"method": "residual", "keep": KEEP} | options
    return lite_attention.enable(target, compile=compile, **{"tile_shape": TILE} | options)


def states_of(target: Any) -> list[Any]:
    return [state for site in sites_of(target) if site.swapped for state in site.states]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- options -------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such method": ({"method": "cache"}, "method: expected 'votes' or 'residual', got 'cache'"),
    "a list of methods": ({"method": ["residual"]}, r"method: expected 'votes' or 'residual', got \['residual'\]"),
    "a threshold": ({"method": "residual", "threshold": -4.0}, "threshold: expected none with method='res.*', got -4"),
    "the default threshold": ({"method": "residual", "threshold": -10.0}, "threshold: expected none"),
    "allow_positive": ({"method": "residual", "allow_positive": True}, "allow_positive: expected none with"),
    "keep of votes": ({"keep": 0.3}, "keep: expected none with method='votes', got 0.3, an option of method='resid"),
    "a forecast of votes": ({"forecast": False}, "forecast: expected none with method='votes', got False"),
    "a memory of votes": ({"memory": "device"}, "memory: expected none with method='votes'"),
    "to keep nothing": ({"method": "residual", "keep": 0.0}, "keep: expected a share above 0 .* got 0.0"),
    "to keep more than all": ({"method": "residual", "keep": 1.5}, "keep: expected .* got 1.5"),
    "to keep percents": ({"method": "residual", "keep": torch.tensor([30.0])}, "keep: expected .* got 30"),
    "a table by head": ({"method": "residual", "keep": torch.ones(2, 2)}, r"keep: expected .* got shape \(2, 2\)"),
    "full steps at no step": ({"method": "residual", "full_every": 0}, "full_every: expected at least 1, got 0"),
    "a fraction of a step": ({"method": "residual", "full_every": 2.5}, "full_every: expected an integer, .* got 2"),
    "no first step": ({"method": "residual", "first_full": 0}, "first_full: expected at least 1, got 0"),
    "to decide never": ({"method": "residual", "decide_every": 0}, "decide_every: expected at least 1, got 0"),
    "half a forecast": ({"method": "residual", "forecast": 0.5}, "forecast: expected True or False, got 0.5"),
    "a dtype of torch": ({"method": "residual", "residual_dtype": torch.bfloat16}, "residual_dtype: expected one of"),
    "no such memory": ({"method": "residual", "memory": "disk"}, "memory: expected 'device' or 'host', got 'disk'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_option_is_refused_by_name(case: str) -> None:
    options, message = WRONG[case]
    model = Toy(1)
    want = model(tokens(0), context())
    takers: list[Any] = [SkipSettings, LiteAttention, LiteAttentionBackend]
    takers.append(lambda **options: lite_attention.enable(model, **options))
    for take in takers:
        with pytest.raises(ValueError, match=message):
            take(**options)
    assert torch.equal(model(tokens(0), context()), want)
    assert store_of(model) is None


def test_votes_stay_the_default() -> None:
    assert SkipSettings().method == "votes"
    assert SkipSettings().residual is None
    model = lite_attention.enable(Toy(1), compile=False, tile_shape=TILE, num_steps=3)
    model(tokens(0), context())
    assert all(isinstance(state, SkipState) for state in states_of(model))


@ROUTES
def test_options_reach_the_states(compile: bool) -> None:
    keep = torch.tensor([0.5, 0.4, 0.3])
    options = {"full_every": 4, "first_full": 1, "decide_every": 3, "forecast": False, "residual_dtype": "fp8"}
    model = enable(Toy(2), compile, num_steps=20, keep=keep, refresh=7, **options)
    with torch.no_grad():
        for step in range(4):
            model(tokens(step), context())
    for state in states_of(model):
        assert isinstance(state, ResidualState)
        assert state.plan.tolist() == [*step_plan(20, full_every=4, first_full=1, decide_every=3), 1]
        torch.testing.assert_close(state.keep, torch.cat([keep, keep[-1:].expand(17)]))
        assert state.residual.shape == (2, 1, 1, 2, 96, 16)
        assert state.residual.dtype == torch.float8_e4m3fn
        assert state.control[c.REFRESH] == 7


@ROUTES
def test_steps_that_no_plan_has_are_full(compile: bool) -> None:
    # Past the end of a plan whose last step is sparse a forecast would go on and on.
    model, plain = enable(Toy(1), compile, num_steps=5, full_every=3), Toy(1)
    wrong = []
    with torch.no_grad():
        for step in range(9):
            with lite_attention.branch("cond", step):
                got = model(tokens(step), context())
            wrong.append(float((got - plain(tokens(step), context())).abs().max()) > 1e-4)
    assert wrong == [False, False, True, False, True, False, False, False, False]


# What runs in each step: batch sizes, or branches. The last of them is back after a pause over full steps.
PAUSES: dict[str, list[int | str]] = {
    "a batch": [2, 2, 2, 2, 1, 1, 1, 1, 2],
    "a branch": ["uncond", "uncond", "uncond", "uncond", "cond", "cond", "cond", "cond", "uncond"],
}


@ROUTES
@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("case", PAUSES)
def test_what_was_away_for_long_computes_everything(case: str, by_hand: bool, compile: bool) -> None:
    assert step_plan(9)[8] == 0
    model, plain = enable(Toy(1), compile, num_steps=20), Toy(1)
    with torch.no_grad():
        for step, what in enumerate(PAUSES[case]):
            name, batch = ("cond", what) if case == "a batch" else (what, 1)
            x, text = tokens(step, batch=batch), context(batch)
            if not by_hand and case == "a branch" and what == "uncond" and step < 4:
                with lite_attention.branch("cond", model=model):
                    model(x, text)  # so that steps are counted alike
            with lite_attention.branch(name, step if by_hand else None, model=model):
                got = model(x, text)
    close(got, plain(x, text))


@ROUTES
@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp32"])
@pytest.mark.parametrize("forecast", [True, False])
def test_each_way_to_store_runs_on_each_route(compile: bool, dtype: str, forecast: bool) -> None:
    model = enable(Toy(1), compile, num_steps=8, residual_dtype=dtype, forecast=forecast)
    eager = enable(Toy(1), num_steps=8, residual_dtype=dtype, forecast=forecast)
    dense = Toy(1)
    with torch.no_grad():
        for step in range(8):
            out = model(tokens(step), context())
            close(out, eager(tokens(step), context()))
    assert 1e-4 < (out - dense(tokens(7), context())).abs().max() < 0.5


@ROUTES
def test_an_initial_mask_and_a_selection(compile: bool) -> None:
    band = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(-4)
    model = enable(
        Toy(2), compile, num_steps=8, initial_mask=lambda _: band, select=lambda site: site.name == "blocks.1.attn1"
    )
    with torch.no_grad():
        for step in range(8):
            model(tokens(step), context())
    (site,) = (site for site in sites_of(model) if site.swapped)
    assert site.name == "blocks.1.attn1"
    (state,) = site.states
    kept = state.kept_tiles()[0, 0]
    assert not (kept & band[0]).any()
    assert int(kept.sum()) == round(KEEP * int((~band).sum()) * 2)


# ---- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(20, 50), (8, 4)], ids=["many", "few"])
def test_what_presets_are_said_to_compute(steps: tuple[int, int]) -> None:
    table = re.split(r"\n\n\| preset ", presets.__doc__ or "")[1 if steps == (20, 50) else 2]
    assert [int(number) for number in re.findall(r"of (\d+) steps", table.split("\n")[0])] == [*steps]
    rows = re.findall(r"\| ([\w, ]+) \| (\d+) % \| (\d) \| ([\d.]+) % \| ([\d.]+) % \|", table)
    assert [name for names, *_ in rows for name in names.split(", ")] == [*presets.PRESETS]
    for names, keep, every, *shares in rows:
        for (number, share), name in itertools.product(zip(steps, shares, strict=True), names.split(", ")):
            preset = presets.preset_of(name, number)
            assert (float(keep) / 100, int(every)) == preset
            plan = step_plan(number, full_every=preset.full_every)
            assert float(share) == pytest.approx(100 * presets.computed_share(plan, preset.keep))


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"preset": "quality"}, (0.5, 2)),
        ({"preset": "balanced"}, (0.3, 3)),
        ({"preset": "fast"}, (0.2, 3)),
        ({"preset": "fast", "num_steps": 20}, (0.2, 3)),
        ({"preset": "fast", "num_steps": 9}, (0.2, 3)),
        ({"preset": "fast", "num_steps": 8}, (0.5, 3)),
        ({"preset": "balanced", "num_steps": 8}, (0.5, 3)),
        ({"preset": "balanced", "num_steps": 9}, (0.3, 3)),
        ({"preset": "quality", "num_steps": 4}, (0.5, 2)),
        ({"preset": "fast", "keep": 0.25}, (0.25, 3)),
        ({"preset": "fast", "num_steps": 4, "full_every": 2}, (0.5, 2)),
        ({"preset": "balanced", "method": "residual"}, (0.3, 3)),
    ],
    ids=str,
)
def test_presets(options: dict[str, Any], want: tuple[float, int]) -> None:
    model = enable(Toy(1), **options)
    settings = store_of(model).settings
    assert (settings.method, settings.keep, settings.full_every, settings.slots) == ("residual", *want, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, r"preset: expected one of \['quality', 'balanced', 'fast'\], got 'best'"),
        ({"preset": ["fast"]}, r"preset: expected one of .* got \['fast'\]"),
        ({"preset": "fast", "method": "votes"}, "method: expected none with preset='fast', .* got 'votes'"),
        ({"preset": "fast", "method": "vote"}, "method: expected none with preset='fast', .* got 'vote'"),
        ({"preset": "fast", "num_steps": "20"}, "num_steps: expected an integer, .* got '20'"),
        ({"preset": "fast", "allow_positive": True}, "allow_positive: expected none with preset='fast', .* got True"),
        ({"preset": "fast", "threshold": -3.0}, "threshold: expected none with preset='fast', .* 'residual', got -3.0"),
    ],
)
def test_wrong_presets(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lite_attention.enable(Toy(1), **options)


@ROUTES
def test_a_preset_heeds_the_number_of_steps_that_the_pipeline_announces(compile: bool) -> None:
    pipe = enable(pipelines.wan(), compile, preset="fast")
    for steps, (keep, every) in ((4, (0.5, 3)), (12, (0.2, 3)), (6, (0.5, 3))):
        pipelines.generate(pipe, steps=steps)
        for state in states_of(pipe):
            assert float(state.keep[0]) == pytest.approx(keep)
            assert state.plan[:steps].tolist() == step_plan(steps, full_every=every)
        alone = enable(pipelines.wan(), keep=keep, full_every=every)
        close(pipelines.generate(pipe, steps=steps), pipelines.generate(alone, steps=steps))


def test_what_is_given_beside_a_preset_stays() -> None:
    pipe = enable(pipelines.wan(), preset="fast", keep=0.25)
    pipelines.generate(pipe, steps=4)
    assert all(float(state.keep[0]) == 0.25 for state in states_of(pipe))


def _table_of(pipe: Any, keep: float) -> ThresholdTable:
    shares = {site.name: torch.full((1, 1, 1), keep) for site in sites_of(pipe) if site.swapped}
    return ThresholdTable(shares, method="residual", full_every=3, first_full=2, decide_every=2)


@pytest.mark.parametrize("options", [{"full_every": 2}, {"preset": "quality"}, {"first_full": 3}], ids=str)
def test_a_table_that_was_found_with_other_options_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    called = enable(pipelines.wan())
    pipelines.generate(called, steps=1)
    table, pipe = _table_of(called, 0.55), enable(pipelines.wan())
    table.save(tmp_path / "keep.toml")
    name = "first_full" if "first_full" in options else "full_every"
    for keep in (table, tmp_path / "keep.toml"):
        with pytest.raises(ValueError, match=rf"does not fit the model:\n  {name}: \d in the file, \d in the model"):
            enable(pipe, keep=keep, **options)
        assert store_of(pipe.transformer).settings.keep == KEEP  # enabled as it was
        enable(pipelines.wan(), keep=keep, full_every=3)
    with pytest.raises(ValueError, match=r"keep: expected none with method='votes', got .{,60}, an option of"):
        enable(pipe, method="votes", keep=table)


@pytest.mark.parametrize("how", ["set_keep", "a table that is applied"])
def test_what_is_set_in_a_model_with_a_preset_stays(how: str) -> None:
    pipe = enable(pipelines.wan(), preset="fast")
    pipelines.generate(pipe, steps=9)
    lite_attention.set_keep(pipe, 0.55) if how == "set_keep" else _table_of(pipe, 0.55).apply(pipe)
    for steps in (4, 9):
        pipelines.generate(pipe, steps=steps)
        assert all(float(state.keep[0]) == pytest.approx(0.55) for state in states_of(pipe))


def test_none_beside_a_preset_is_what_is_not_given() -> None:
    pipe = enable(pipelines.wan(), preset="quality", keep=None, full_every=None, num_steps=None)
    assert (store_of(pipe.transformer).settings.keep, store_of(pipe.transformer).settings.full_every) == (0.5, 2)
    fast = enable(pipelines.wan(), preset="fast", full_every=None, num_steps=None)
    pipelines.generate(fast, steps=4)
    assert all(float(state.keep[0]) == 0.5 for state in states_of(fast))  # as few steps have it


def test_a_preset_is_planned_for_each_thread_by_its_own_steps() -> None:
    pipe = enable(pipelines.wan(), preset="fast")
    pipelines.generate(pipe, steps=9)
    mine = states_of(pipe)
    other = threading.Thread(target=pipelines.generate, args=(pipe,), kwargs={"steps": 4})
    other.start()
    other.join()
    assert all(float(state.keep[0]) == pytest.approx(0.2) for state in mine)
    inputs = {"timestep": torch.tensor([900]), "encoder_hidden_states": dm.noise(1, 24, 16)}
    with torch.no_grad():
        pipe.transformer(hidden_states=dm.latents(2, 16, 8), **inputs)
    assert len(states_of(pipe)) > len(mine)  # of another size
    assert all(float(state.keep[0]) == pytest.approx(0.2) for state in states_of(pipe))


# ---- memory --------------------------------------------------------------------------------------------------------


def _bytes(state: torch.nn.Module) -> int:
    return sum(buffer.nbytes for buffer in state.buffers())


@ROUTES
def test_memory_is_told_before_it_is_taken(compile: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = enable(Toy(3), compile, num_steps=8)
    with torch.no_grad(), caplog.at_level(logging.INFO, "lite_attention"):
        model(tokens(0, seq=1024), context())
        model(tokens(1, seq=1024), context())
    states = states_of(model)
    each = _bytes(states[0]) / 2**20
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert told[0].startswith(f"residuals: {3 * each:.2f} MiB for 3 site(s) like blocks.*.attn1, {each:.2f} MiB each")
    by_site = [message for message in caplog.messages if message.startswith("residual of")]
    assert [message.split(":")[0] for message in by_site] == [f"residual of blocks.{i}.attn1" for i in range(3)]
    assert by_site[-1].endswith(f"{3 * each:.2f} MiB in all so far")


def test_votes_tell_nothing_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    model = lite_attention.enable(Toy(1), compile=False, tile_shape=TILE, num_steps=3)
    with caplog.at_level(logging.INFO, "lite_attention"):
        model(tokens(0), context())
    assert not any("residual" in message for message in caplog.messages)


def _residuals(model: Any) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(state.residual) for state in states_of(model)]


@ROUTES
@pytest.mark.parametrize(
    "how", ["disable", "enable", "another size and reset", "another generation", "the model is freed"]
)
def test_memory_is_freed(how: str, compile: bool) -> None:
    model = enable(Toy(2), compile, num_steps=2, **({"dynamic": True} if compile else {}))
    with torch.no_grad():
        model(tokens(0), context())
    before = _residuals(model)
    assert len(before) == 2
    assert all(ref() is not None for ref in before)
    with torch.no_grad():
        if how == "disable":
            lite_attention.disable(model)
        elif how == "enable":
            enable(model, compile)
        elif how == "another size and reset":
            model(tokens(1, seq=128), context())
            lite_attention.reset(model)
        elif how == "another generation":
            for step in range(3):
                model(tokens(step, seq=128), context())
        else:
            del model
    gc.collect()
    if compile:
        torch._dynamo.reset()
        gc.collect()
    assert all(ref() is None for ref in before)


# ---- a step with more passes than slots ----------------------------------------------------------------------------


def test_a_third_pass_is_dense_and_said_so() -> None:
    model, dense = enable(Toy(1), num_steps=4), Toy(1)
    assert store_of(model).settings.slots == 2

    def run(step: int) -> torch.Tensor:
        for name in ("cond", "uncond", "perturbed"):
            with torch.no_grad(), lite_attention.branch(name, step):
                out: torch.Tensor = model(tokens(step), context())
        return out

    with pytest.warns(UserWarning, match=r"more than 2 passes: .* slots=3"):
        run(0)
    for step in range(1, 4):
        close(run(step), dense(tokens(step), context()))
    (state,) = states_of(model)
    assert [int(state.control[c.slot_word(slot, c.RESIDUALS)]) for slot in (0, 1)] == [2, 2]


def test_three_slots_are_enough_for_three() -> None:
    model = enable(Toy(1), num_steps=4, slots=3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            for name in ("cond", "uncond", "perturbed"):
                with lite_attention.branch(name, step):
                    model(tokens(step), context())
    assert states_of(model)[0].residual.shape[0] == 3


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_says_what_the_residual_does() -> None:
    pipe = enable(pipelines.wan(), keep=0.3, full_every=3)
    pipelines.generate(pipe, steps=12)
    report = silent_report(pipe)
    found = report.residual
    assert found is not None
    plan = step_plan(12)
    assert found.plan == plan
    kept = [float(state.kept_tiles()[slot].float().mean()) for state in states_of(pipe) for slot in (0, 1)]
    assert found.kept == pytest.approx(sum(kept) / len(kept))
    assert found.computed == pytest.approx((plan.count(1) + plan.count(2) + plan.count(0) * found.kept) / 12)
    assert found.nbytes == sum(map(_bytes, states_of(pipe)))
    assert found.time_sources == ["cache_context"]
    line = str(report).splitlines()[-1]
    assert line.startswith(
        f"residual: 12 steps, {plan.count(2)} deciding, {plan.count(1)} full, {plan.count(0)} sparse"
    )
    assert f"all steps {found.computed:.1%}" in line
    assert line.endswith("time of the flow by cache_context")


def test_the_report_of_steps_that_are_counted() -> None:
    model = enable(Toy(1), num_steps=9)
    with torch.no_grad():
        model(tokens(0), context())
    found = silent_report(model).residual
    assert (len(found.plan), found.kept) == (9, pytest.approx(KEEP))
    module = LiteAttention(method="residual", num_steps=6)
    module(*clustered_qkv(1, seq_q=200))
    assert silent_report(torch.nn.ModuleList([module])).residual.plan == step_plan(6)


def test_a_report_of_votes_says_nothing_of_residuals() -> None:
    model = lite_attention.enable(Toy(1), compile=False, tile_shape=TILE, num_steps=3)
    model(tokens(0), context())
    report = silent_report(model)
    assert report.residual is None
    assert "residual" not in str(report)


def test_a_log_of_what_the_next_step_skips() -> None:
    model = enable(Toy(1), num_steps=8)
    log = lite_attention.SparsityLog(model)
    with torch.no_grad():
        for step in range(8):
            model(tokens(step), context())
            log.record()
    skipped = [share["blocks.0.attn1"] for share in log.steps]
    sparse = [kind == 0 for kind in step_plan(8)[1:]]
    assert [share > 0 for share in skipped[:-1]] == sparse
    assert skipped[1] == pytest.approx(1 - KEEP, abs=0.02)


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    model = enable(Toy(2), num_steps=8)
    with torch.no_grad():
        for step in range(4):
            model(tokens(step), context())
    assert len(plot.skip_maps(model).axes) == 4


# ---- what it has not -----------------------------------------------------------------------------------------------

TABLE = ThresholdTable(thresholds={"blocks.0.attn1": torch.full((1, 1, 1), -4.0)})
THRESHOLDS: dict[str, Any] = {"a number": -3.0, "a callable": lambda _: -3.0, "a table": TABLE}


@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("called", [True, False])
def test_it_has_no_thresholds(kind: str, called: bool) -> None:
    model = enable(Toy(1), num_steps=4)
    if called:
        model(tokens(0), context())
    message = "threshold: expected a model with method='votes', got one with method='residual'"
    if kind == "a table":
        message = "method: votes in the file, residual in the model"
    with pytest.raises(ValueError, match=message):
        lite_attention.set_threshold(model, THRESHOLDS[kind])


def test_a_module_has_no_thresholds() -> None:
    module = LiteAttention(method="residual")
    with pytest.raises(ValueError, match="threshold: expected a model with method='votes'"):
        module.set_threshold(-3.0)
    with pytest.raises(ValueError, match="threshold: expected a model with method='votes'"):
        LiteAttentionRegistry.from_model(torch.nn.ModuleList([module]), threshold=-3.0)


@pytest.mark.parametrize("called", [True, False])
def test_a_registry_turns_it_off_and_on(called: bool) -> None:
    model, dense, alone = enable(Toy(1), num_steps=8), Toy(1), enable(Toy(1), num_steps=8)
    with torch.no_grad():
        if called:
            model(tokens(0), context())
        LiteAttentionRegistry.from_model(model, mode="disable")
        for step in range(8 - called):
            close(model(tokens(step), context()), dense(tokens(step), context()))
        LiteAttentionRegistry.from_model(model)
        for step in range(8):
            assert torch.equal(model(tokens(step), context()), alone(tokens(step), context()))


# ---- side by side with votes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", dm.SUPPORTED, ids=lambda case: case.name)
def test_models_of_diffusers_compiled_as_eager(case: dm.Case) -> None:
    """Joint attention, key masks, grouped heads, sound beside video: the same sites and numbers on both routes."""
    compiled, eager = (enable(case.model(), how, num_steps=8, slots=3) for how in (True, False))
    dense, full = case.model(), enable(case.model(), num_steps=8, full_every=1)
    for step in range(6):
        inputs = case.inputs(step, 0)
        got = dm.run(compiled, inputs)
        close(got, dm.run(eager, inputs))
        close(dm.run(full, inputs), dm.run(dense, inputs))
    assert (got - dm.run(dense, inputs)).abs().max() > 1e-4
    assert {row.name for row in silent_report(compiled).swapped} == {*case.swapped}


@pytest.mark.parametrize("compile", [True, "blocks", False])
def test_two_transformers(compile: Any) -> None:
    pipe = enable(pipelines.wan_of_two(), compile, num_steps=12)
    eager = enable(pipelines.wan_of_two(), num_steps=12)
    dense = pipelines.generate(pipelines.wan_of_two(), steps=12)
    got = pipelines.generate(pipe, steps=12)
    close(got, pipelines.generate(eager, steps=12))
    close(got, pipelines.generate(pipe, steps=12))
    assert (got - dense).abs().max() > 1e-4
    assert len(states_of(pipe)) == 6


def test_cond_and_uncond_in_one_batch() -> None:
    model = enable(Toy(2), num_steps=8)
    reference = Reference(Toy(2), method="residual")
    with torch.no_grad():
        for step in range(8):
            x = torch.cat([tokens(step), tokens(step, seed=3)])
            close(model(x, context(2)), reference(x, context(2)))


@pytest.mark.parametrize(("compile", "token_order"), [(False, "tile3d"), (False, (2, 2, 2)), (True, (2, 2, 2))])
def test_a_token_order(compile: bool, token_order: Any) -> None:
    pipe, dense = enable(pipelines.wan(), compile, token_order=token_order, keep=1.0), pipelines.wan()
    close(pipelines.generate(pipe, steps=6), pipelines.generate(dense, steps=6))
    enable(pipe, compile, token_order=token_order)
    got = pipelines.generate(pipe, steps=6)
    assert (got - pipelines.generate(dense, steps=6)).abs().max() > 1e-4
    close(got, pipelines.generate(enable(pipelines.wan(), token_order=token_order), steps=6))


@ROUTES
def test_a_recompile_keeps_what_was_learned(compile: bool) -> None:
    model, reference = enable(Toy(1), compile, num_steps=20), Reference(Toy(1), method="residual")
    with torch.no_grad():
        for step in range(8):
            if step == 5:
                torch._dynamo.reset()
            close(model(tokens(step), context()), reference(tokens(step), context()))


@ROUTES
def test_without_its_sparse_steps_it_is_dense(compile: bool) -> None:
    model, dense = enable(Toy(2), compile, full_every=1, num_steps=6), Toy(2)
    with torch.no_grad():
        for step in range(6):
            close(model(tokens(step), context()), dense(tokens(step), context()))


@ROUTES
def test_disable_leaves_the_model_as_it_was(compile: bool) -> None:
    model, dense = enable(Toy(1), compile, num_steps=6), Toy(1)
    with torch.no_grad():
        for step in range(4):
            model(tokens(step), context())
        lite_attention.disable(model)
        assert torch.equal(model(tokens(4), context()), dense(tokens(4), context()))


# ---- the module ----------------------------------------------------------------------------------------------------


def _inputs(step: int = 0, seq: int = 300, batch: int = 1, value_dim: int = 8) -> tuple[torch.Tensor, ...]:
    return clustered_qkv(6, batch=batch, seq_q=seq, heads=2, head_dim=16, value_dim=value_dim, clusters=10, step=step)


OPTIONS: dict[str, Any] = {"method": "residual", "keep": 0.4, "num_steps": 9}


def test_a_module_is_the_functional_form_over_steps() -> None:
    module = LiteAttention(**OPTIONS)
    state = ResidualState.for_inputs(*_inputs(), plan=step_plan(9), keep=0.4, residual_dtype="bf16", num_steps=9)
    state.set_plan([*step_plan(9), 1])
    for step in range(11):  # over the wrap
        out, lse = module(*_inputs(step), scale=0.3, return_softmax_lse=True, must_do_list=[70, 80])
        want, want_lse = residual_attention(*_inputs(step), state, scale=0.3, return_lse=True, must_do=[70, 80])
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
    for (name, x), (other, y) in zip(module.state.named_buffers(), state.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(x.float().nan_to_num(7), y.float().nan_to_num(7)), name
    module.reset_skip_state()
    assert module.state.step() == 0


def test_a_module_is_told_the_time() -> None:
    module, plain = LiteAttention(**OPTIONS), LiteAttention(**OPTIONS)
    line = [1.0, 0.95, 0.9, 0.7, 0.4]
    for step, time in enumerate(line):
        with lite_attention.branch("cond", step, time=time):
            out = module(*_inputs(step))
            assert float(module.state.times[0, 0]) == pytest.approx(time)
    lite_attention.reset()
    for step in range(5):
        with lite_attention.branch("cond", step):
            flat = plain(*_inputs(step))
    assert (out - flat).abs().max() > 1e-3


def test_a_module_tells_its_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lite_attention"):
        LiteAttention().allocate(1, 4096, 2, 16)
        module = LiteAttention(**OPTIONS).allocate(1, 4096, 2, 16)
    assert caplog.messages == [f"residual of a LiteAttention: {_bytes(module.state) / 2**20:.2f} MiB"]


def test_allocated_for_compiled_code() -> None:
    module = LiteAttention(**OPTIONS).allocate(1, 300, 2, 16, value_dim=8)
    eager = LiteAttention(**OPTIONS)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for step in range(9):
        close(compiled(*_inputs(step)), eager(*_inputs(step)))


@pytest.mark.parametrize(
    "change", [{"value_dim": 16}, {"seq": 320}, {"batch": 2}], ids=["value_dim", "longer", "larger batch"]
)
def test_what_does_not_fit_starts_fresh(change: dict[str, int]) -> None:
    module = LiteAttention(**OPTIONS)
    for step in range(3):
        module(*_inputs(step))
    before = weakref.ref(module.state)
    alone = LiteAttention(**OPTIONS)
    for step in range(3):
        assert torch.equal(module(*_inputs(step, **change)), alone(*_inputs(step, **change)))
    gc.collect()
    assert before() is None


def test_a_persistent_state_goes_on_in_a_fresh_model() -> None:
    saved, fresh, whole = (torch.nn.ModuleList([LiteAttention(**OPTIONS, persistent_state=True)]) for _ in range(3))
    for step in range(5):
        saved[0](*_inputs(step))
        whole[0](*_inputs(step))
    fresh.load_state_dict(saved.state_dict())
    for step in range(5, 9):
        assert torch.equal(fresh[0](*_inputs(step)), whole[0](*_inputs(step)))
    with pytest.raises(ValueError, match="state_dict: expected"):
        torch.nn.ModuleList([LiteAttention(persistent_state=True)]).load_state_dict(saved.state_dict())


def test_a_module_in_short() -> None:
    assert "method='residual', keep=0.4, full_every=3, num_steps=9" in repr(LiteAttention(**OPTIONS))
    with torch.device("meta"):
        assert LiteAttention(**OPTIONS).state is None
