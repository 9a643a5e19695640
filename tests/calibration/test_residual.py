"""Shares to keep: what is measured, what is chosen, and a file of them that loads again or is refused by name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lite_attention
from lite_attention import LiteAttention, LiteAttentionRegistry, ThresholdTable
from lite_attention.calibration import calibrate, calibrate_residual
from lite_attention.calibration.residual import _deciding_steps
from lite_attention.model_sites import sites_of
from lite_attention.ops import ResidualState, residual_attention, step_plan
from tests.support import pipelines
from tests.support.toys import TILE, Toy, context, tokens

STEPS = 9
KEEPS = (0.1, 0.3, 0.6)
PLAN = step_plan(STEPS)


def enable(model: Any, **options: Any) -> Any:
    options = {"method": "residual", "tile_shape": TILE, "num_steps": STEPS} | options
    return lite_attention.enable(model, compile=False, **options)


def generate_of(model: Any) -> Any:
    def generate(prompt: int) -> None:
        for step in range(STEPS):
            model(tokens(step, seed=prompt), context())

    return generate


def states_of(model: Any) -> list[Any]:
    return [state for site in sites_of(model) if site.swapped for state in site.states]


# ---- what is measured and chosen -----------------------------------------------------------------------------------


def test_errors_are_those_of_the_op() -> None:
    """In a model of one layer the inputs are the same whatever attention gives, so they can be had by hand."""
    model = Toy(1)
    seen: list[tuple[torch.Tensor, ...]] = []
    by_hand = Toy(1)
    plain = by_hand.blocks[0].attn1.attend
    by_hand.blocks[0].attn1.attend = lambda *qkv, **_: seen.append(qkv) or plain(*qkv)
    generate_of(by_hand)(0)
    result = calibrate_residual(
        enable(model), generate_of(model), num_steps=STEPS, target_error=0.01, keeps=KEEPS, prompts=[0]
    )
    for keep in KEEPS:
        q, k, v = (x.transpose(1, 2) for x in seen[0])
        state = ResidualState(
            batch=1, heads=2, seq_q=96, seq_k=96, value_dim=16, tile_m=TILE[0], tile_n=TILE[1], slots=1, plan=PLAN,
            keep=keep, residual_dtype="bf16",
        )  # fmt: skip
        for step, qkv in enumerate(seen):
            q, k, v = (x.transpose(1, 2) for x in qkv)
            out, dense = residual_attention(q, k, v, state), plain(*qkv).transpose(1, 2)
            if PLAN[step] == 0:
                by_head = ((out - dense).abs().sum((0, 1, 3)) / dense.abs().sum((0, 1, 3))).mean()
                got = result.errors[keep]["blocks.0.attn1", 0, step]
                assert got == pytest.approx(float(by_head), rel=1e-4)
            else:
                assert ("blocks.0.attn1", 0, step) not in result.errors[keep]


@pytest.mark.parametrize("target", [0.0, 0.01, 0.05, 0.5])
def test_the_least_share_under_the_target_is_chosen(target: float) -> None:
    model = enable(Toy(2))
    result = calibrate_residual(
        model, generate_of(model), num_steps=STEPS, target_error=target, keeps=KEEPS, prompts=[0, 1]
    )
    assert [*result.table] == ["blocks.0.attn1", "blocks.1.attn1"]
    spans = {0: [2, 4, 5], 3: [7, 8]}  # sparse steps by the step that decided their mask
    for site, share in result.table.items():
        assert share.shape == (1, STEPS, 1)
        for decided, steps in spans.items():
            means = {k: sum(found[site, 0, s] for s in steps) / len(steps) for k, found in result.errors.items()}
            want = min([k for k, mean in means.items() if mean <= target], default=1.0)
            assert float(share[0, decided, 0]) == pytest.approx(want)
    if target == 0:
        assert result.computed == 1.0
    else:
        assert result.computed < 1.0


def test_which_step_decided() -> None:
    assert PLAN == [2, 1, 0, 2, 0, 0, 1, 0, 0]
    assert _deciding_steps(PLAN) == [0, 0, 0, 3, 0, 0, 3, 3, 3]


def test_the_model_is_as_before() -> None:
    model, alone = enable(Toy(1), keep=0.35), enable(Toy(1), keep=0.35)
    model(tokens(0), context())
    calibrate_residual(model, generate_of(model), num_steps=STEPS, target_error=0.1, keeps=KEEPS)
    assert all(float(state.keep[0]) == pytest.approx(0.35) for state in states_of(model))
    for step in range(STEPS):
        assert torch.equal(model(tokens(step), context()), alone(tokens(step), context()))
    plain = Toy(1)
    dense = plain(tokens(0), context())
    calibrate_residual(plain, generate_of(plain), num_steps=STEPS, target_error=0.1, keeps=KEEPS, tile_shape=TILE)
    assert torch.equal(plain(tokens(0), context()), dense)


class _Self(torch.nn.Module):
    def forward(self, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return q, q, q


def test_modules_and_pipelines() -> None:
    module = torch.nn.Sequential(_Self(), LiteAttention(method="residual", num_steps=STEPS))
    module.forward = lambda q: module[1](*module[0](q))
    q = torch.randn(1, 200, 2, 16)
    result = calibrate_residual(
        module, lambda _: [module(q) for _ in range(STEPS)], num_steps=STEPS, target_error=0.1, keeps=KEEPS
    )
    assert [*result.table] == ["1"]
    assert float(result.table["1"].max()) == pytest.approx(0.1)  # with the same inputs nothing is off
    result.table.apply(module)
    assert float(module[1].state.keep[0]) == pytest.approx(0.1)
    pipe = pipelines.wan()
    result = calibrate_residual(
        pipe, lambda i: pipelines.generate(pipe, i, STEPS), num_steps=STEPS, target_error=0.2, keeps=KEEPS,
        tile_shape=TILE,
    )  # fmt: skip
    assert result.table.branches == ("cond", "uncond")
    assert {place[1] for place in result.errors[0.1]} == {0, 1}
    assert lite_attention.enabled.store_of(pipe.transformer) is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"prompts": []}, "prompts: expected at least one, got none"),
    "a target below 0": ({"target_error": -1.0}, "target_error: expected a number of at least 0"),
    "no such metric": ({"metric": "L7"}, "metric: expected one of"),
    "candidates that fall": ({"keeps": (0.5, 0.2)}, r"keeps: expected ascending shares .* got \[0.5, 0.2\]"),
    "to keep all": ({"keeps": (0.5, 1.0)}, "keeps: expected ascending shares above 0 and below 1"),
    "to keep nothing": ({"keeps": (0.0, 0.5)}, "keep: expected a share above 0"),
    "no sparse step": ({"num_steps": 99, "full_every": 1}, "generate: expected sparse steps of .*, got none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_argument_is_refused_by_name(case: str) -> None:
    options, message = WRONG[case]
    model = Toy(1)
    options = {"num_steps": STEPS, "target_error": 0.1, "keeps": KEEPS, "tile_shape": TILE} | options
    with pytest.raises(ValueError, match=message):
        calibrate_residual(model, generate_of(model), **options)
    assert lite_attention.enabled.store_of(model) is None


def test_each_method_has_a_calibration_of_its_own() -> None:
    votes = lite_attention.enable(Toy(1), compile=False, tile_shape=TILE, num_steps=STEPS)
    with pytest.raises(ValueError, match="method: expected a model with method='residual', got one with 'votes'"):
        calibrate_residual(votes, generate_of(votes), num_steps=STEPS, target_error=0.1)
    residual = enable(Toy(1))
    with pytest.raises(ValueError, match="method: expected a model with method='votes', got one with 'residual'"):
        calibrate(residual, generate_of(residual), num_steps=STEPS, target_error=0.1)
    with pytest.raises(ValueError, match=r"method: expected 'votes', got 'residual'; see calibrate_residual\(\)"):
        calibrate(Toy(1), lambda _: None, num_steps=STEPS, target_error=0.1, method="residual")


# ---- a file of them ------------------------------------------------------------------------------------------------

SHARES = torch.tensor([0.4, 0.4, 0.4, 0.2, 0.4, 0.4, 0.2, 0.2, 0.2])
SITES = ["blocks.0.attn1", "blocks.1.attn1"]


def table(**about: Any) -> ThresholdTable:
    values = {SITES[0]: SHARES.view(1, -1, 1), SITES[1]: torch.full((1, 1, 1), 0.5)}
    known = {"num_steps": STEPS, "full_every": 3, "first_full": 2, "decide_every": 2}
    return ThresholdTable(values, method="residual", **known | about)


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "keep.toml"
    table().save(path)
    loaded = ThresholdTable.load(path)
    assert dataclasses.asdict(loaded) | {"thresholds": {}, "path": None} == dataclasses.asdict(table()) | {
        "thresholds": {},
        "path": None,
    }
    torch.testing.assert_close(loaded[SITES[0]].flatten(), SHARES)
    text = path.read_text()
    assert text.startswith("# LiteAttention shares of tiles to keep")
    assert 'method = "residual"' in text
    assert "keep = 0.5" in text
    assert "threshold" not in text


WAYS = [
    "apply",
    "set_keep",
    "set_keep with a path",
    "enable",
    "enable with a path",
    "registry",
    "before a call",
]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_set_in_a_model(way: str, tmp_path: Path) -> None:
    path = tmp_path / "keep.toml"
    table().save(path)
    given: dict[str, Any] = {"enable": {"keep": table()}, "enable with a path": {"keep": path}}.get(way, {})
    model = enable(Toy(2), **given)
    if way != "before a call":
        model(tokens(0), context())
    if way in ("apply", "before a call"):
        table().apply(model)
    elif way.startswith("set_keep"):
        lite_attention.set_keep(model, path if "path" in way else table())
    elif way == "registry":
        LiteAttentionRegistry.from_model(model, mode="load", filename=path)
    if way == "before a call":
        model(tokens(0), context())
    first, second = states_of(model)
    torch.testing.assert_close(first.keep, SHARES)
    torch.testing.assert_close(second.keep, torch.full((STEPS,), 0.5))


def test_a_share_that_is_set_holds_for_sizes_to_come() -> None:
    model = enable(Toy(2))
    model(tokens(0), context())
    lite_attention.set_keep(model, lambda site: 0.25 if site.name == SITES[0] else torch.tensor([0.5, 0.75]))
    model(tokens(0, seq=128), context())
    shares = [state.keep.tolist() for state in states_of(model)]
    assert shares == [[0.25] * STEPS] * 2 + [[0.5] + [0.75] * (STEPS - 1)] * 2
    module = LiteAttention(method="residual", num_steps=STEPS)
    module.set_keep(0.25)
    module(*(torch.randn(1, 128, 2, 16) for _ in range(3)))
    assert float(module.state.keep[0]) == 0.25
    module.set_keep(0.75)
    assert float(module.state.keep[0]) == 0.75


DIFFERS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "votes"}, "method: residual in the file, votes in the model"),
    "full steps": ({"full_every": 2}, "full_every: 3 in the file, 2 in the model"),
    "first steps": ({"first_full": 3}, "first_full: 2 in the file, 3 in the model"),
    "decisions": ({"decide_every": 1}, "decide_every: 2 in the file, 1 in the model"),
    "steps": ({"num_steps": 20}, "steps: 9 in the file, 20 in the model"),
}  # fmt: skip


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("case", DIFFERS, ids=str)
def test_what_does_not_fit_is_refused_by_name(case: str, called: bool) -> None:
    options, message = DIFFERS[case]
    model = enable(Toy(2), **options)
    if called:
        model(tokens(0), context())
    before = [buffer.clone() for state in states_of(model) for buffer in state.buffers()]
    if case == "steps" and not called:
        table().apply(model)
        with pytest.raises(ValueError, match=message):
            model(tokens(0), context())
        return
    with pytest.raises(ValueError, match=message):
        table().apply(model)
    after = [buffer for state in states_of(model) for buffer in state.buffers()]
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True))


def test_a_site_that_is_not_in_it_keeps_all_where_that_is_allowed() -> None:
    model = enable(Toy(3))
    model(tokens(0), context())
    with pytest.raises(ValueError, match=r"sites not in the file: blocks.2.attn1"):
        table().apply(model)
    with pytest.warns(UserWarning, match="sites not in the file"):
        table().apply(model, strict=False)
    assert (states_of(model)[2].keep == 1).all()


def test_a_table_is_for_one_method(tmp_path: Path) -> None:
    thresholds = ThresholdTable({site: torch.full((1, 1, 1), -4.0) for site in SITES})
    votes = lite_attention.enable(Toy(2), compile=False, tile_shape=TILE)
    for call in (
        lambda: lite_attention.set_threshold(votes, table()),
        lambda: lite_attention.enable(Toy(2), threshold=table()),
    ):
        with pytest.raises(ValueError, match=r"threshold: expected a table of method='votes', got .* keep="):
            call()
    for call in (
        lambda: lite_attention.set_keep(enable(Toy(2)), thresholds),
        lambda: enable(Toy(2), keep=thresholds),
    ):
        with pytest.raises(ValueError, match=r"keep: expected a table of method='residual', got .* threshold="):
            call()
    with pytest.raises(ValueError, match="keep: expected a model with method='residual', got one with method='votes'"):
        lite_attention.set_keep(votes, 0.3)
    with pytest.raises(ValueError, match=r"keep: expected .* the path of a file, got 'nowhere.toml'"):
        enable(Toy(2), keep="nowhere.toml")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0.0, "keep: expected a share above 0"),
        (1.5, "keep: expected .* got 1.5"),
        (math.nan, "keep: expected"),
        (torch.full((STEPS + 1,), 0.5), "keep: expected at most 9 steps"),
        (lambda _: torch.full((2, 2), 0.5), "keep: expected .* shape"),
    ],
    ids=["nothing", "more than all", "NaN", "too many steps", "by head"],
)
def test_what_is_no_share_to_set(keep: Any, message: str) -> None:
    model = enable(Toy(2))
    model(tokens(0), context())
    with pytest.raises(ValueError, match=message):
        lite_attention.set_keep(model, keep)
    assert all(float(state.keep[0]) == pytest.approx(0.3) for state in states_of(model))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.full((2, 1, 1), 0.5), "keep of a: expected one number a step"),
        (torch.full((1, 1, 4), 0.5), "keep of a: expected one number a step"),
        (torch.full((1, 1, 1), 1.5), "keep: expected .* got 1.5"),
        (torch.full((1, 1, 1), -4.0), "keep: expected .* got -4"),
    ],
)
def test_what_is_no_table_of_shares(values: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThresholdTable({"a": values}, method="residual")
    with pytest.raises(ValueError, match="method: expected 'votes', 'residual' or None, got 'cache'"):
        ThresholdTable({"a": values}, method="cache")


def test_a_registry_calibrates_once_and_loads_then(tmp_path: Path) -> None:
    path, model, prompts = tmp_path / "keep.toml", enable(Toy(2)), []

    def generate(prompt: int) -> None:
        prompts.append(prompt)
        generate_of(model)(prompt)

    config: Any = {"generate": generate, "target_error": 0.05}
    for _ in range(2):
        registry = LiteAttentionRegistry.from_model(model, mode="calib", filename=path, calib_config=config)
        assert registry.table.method == "residual"
        ran = len(prompts)
    assert ran == len(prompts) == 8
    model(tokens(0), context())
    loaded = ThresholdTable.load(path)
    for site, state in zip(SITES, states_of(model), strict=True):
        torch.testing.assert_close(state.keep, loaded[site].flatten().expand(STEPS))
    with pytest.raises(ValueError, match=r"calib_config: expected the keys .* got \['budget'\]"):
        LiteAttentionRegistry.from_model(
            model, mode="calib", filename=path, force=True, calib_config=config | {"budget": True}
        )
    with pytest.raises(ValueError, match="calib_config: expected \"generate\" with method='residual'"):
        LiteAttentionRegistry.from_model(model, mode="calib", filename=tmp_path / "other.toml")
    with pytest.raises(ValueError, match="disabled_steps: expected none with a file of shares"):
        LiteAttentionRegistry.from_model(model, mode="load", filename=path, disabled_steps=2)


def test_a_preset_leaves_what_is_set(tmp_path: Path) -> None:
    pipe = lite_attention.enable(pipelines.wan(), compile=False, preset="fast", tile_shape=TILE)
    pipelines.generate(pipe, steps=12)
    lite_attention.set_keep(pipe, 0.35)
    pipelines.generate(pipe, steps=4)
    assert all(float(state.keep[0]) == pytest.approx(0.35) for state in states_of(pipe))
