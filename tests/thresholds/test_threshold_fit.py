"""A threshold table belongs to what it was found on: what differs is told by name, before and after the first call."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lite_attention
from lite_attention import LiteAttentionRegistry, ThresholdTable
from lite_attention.inspection import named_states
from lite_attention.ops.site import Site
from lite_attention.threshold_table.fit import model_name
from tests.support.toys import TILE, Toy, context, tokens

STEPS = 4
SITES = ["blocks.0.attn1", "blocks.1.attn1"]
TOKENS = 96


def _enabled(**settings: Any) -> nn.Module:
    settings = {"num_steps": STEPS, "tile_shape": TILE} | settings
    return lite_attention.enable(Toy(layers=2), compile=False, **settings)


def _run(model: nn.Module, seq: int = TOKENS) -> nn.Module:
    with torch.no_grad():
        model(tokens(0, seq=seq), context())
    return model


def _table(**about: Any) -> ThresholdTable:
    return ThresholdTable({site: torch.full((1, 1, 1), -3.0) for site in SITES}, **about)


FITS: dict[str, dict[str, Any]] = {
    "nothing known": {},
    "all known": {
        "model_class": "Toy",
        "model": model_name(Toy(layers=2)),
        "dtype": "float32",
        "tokens": TOKENS,
        "num_steps": STEPS,
        "tile_shapes": dict.fromkeys(SITES, TILE),
    },
    "of one of several dtypes": {"dtype": "bfloat16, float32"},
    "a path of 0.1, on another machine": {"model": "/models/wan/transformer"},
    "a name on a hub, of a model that has none": {"model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
}
DIFFERS: dict[str, tuple[dict[str, Any], str]] = {
    "model class": ({"model_class": "Wan"}, "model class: Wan in the file, Toy in the model"),
    "model": ({"model": model_name(Toy(layers=3))}, "model: parameters .* in the file, parameters .* in the model"),
    "two models": ({"model": "a/b, c/d"}, "model: a/b, c/d in the file, parameters .* in the model"),
    "dtype": ({"dtype": "bfloat16"}, f"dtype: bfloat16 in the file, float32 in the model: {', '.join(SITES)}"),
    "tokens": ({"tokens": 75600}, "tokens: 75600 in the file, 96 in the model"),
    "steps": ({"num_steps": 50}, f"steps: 50 in the file, 4 in the model: {', '.join(SITES)}"),
    "tiles": ({"tile_shapes": {SITES[0]: (64, 64)}}, r"tile shape: \(64, 64\) in the file, \(16, 16\) in the model"),
}


@pytest.mark.parametrize("about", FITS.values(), ids=FITS)
def test_fits(about: dict[str, Any]) -> None:
    model = _run(_enabled())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _table(**about).apply(model)
        _table(**about).check(model)
        _table(**about).apply(model, strict=False)
    assert all((state.threshold == -3).all() for state in named_states(model).values())


@pytest.mark.parametrize(("about", "message"), DIFFERS.values(), ids=DIFFERS)
def test_differs(about: dict[str, Any], message: str) -> None:
    model, table = _run(_enabled()), _table(**about)
    for refused in (table.apply, table.check):
        with pytest.raises(ValueError, match=rf"^the table does not fit the model:\n  {message}"):
            refused(model)
    assert all((state.threshold == -10).all() for state in named_states(model).values())
    with pytest.warns(UserWarning, match=message) as warned:
        table.apply(model, strict=False)
    assert len(warned) == 1
    assert all((state.threshold == -3).all() for state in named_states(model).values())


def test_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.toml"
    _table(tokens=75600).save(path)
    with pytest.raises(ValueError, match=r"thresholds\.toml does not fit .*\n  tokens: 75600 in the file, 96 in"):
        LiteAttentionRegistry.from_model(_run(_enabled()), "load", filename=path)


@pytest.mark.parametrize(
    ("about", "seq", "message"),
    [
        ({"dtype": "bfloat16"}, TOKENS, "the table: dtype: bfloat16 in the file, float32 in the model: blocks.0.attn1"),
        (
            {"tile_shapes": {SITES[0]: (64, 64)}},
            TOKENS,
            r"the table: tile shape: \(64, 64\) in the file, \(16, 16\)",
        ),
        ({"num_steps": 50}, TOKENS, "the table: steps: 50 in the file, 4 in the model: blocks.0.attn1"),
        ({"tokens": 80}, TOKENS, "the table: expected at most 80 tokens at blocks.0.attn1, got 96"),
    ],
)
def test_what_is_not_known_before_a_state_is_born_is_told_then(about: dict[str, Any], seq: int, message: str) -> None:
    table = _table(**about)
    with pytest.raises(ValueError, match=message):
        table.threshold_of(_site(seq), num_steps=STEPS)
    assert (table.threshold_of(_site(seq), num_steps=STEPS, strict=False) == -3).all()


def _site(seq: int = TOKENS, name: str = SITES[0]) -> Site:
    shape = (1, seq, 2, 16)
    return Site(name, "Attention", 0, shape, shape, shape, torch.float32, torch.device("cpu"), tile_shape=TILE)


def test_a_site_that_a_table_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"the table: expected thresholds for blocks\.9, a site of the mod"):
        _table().threshold_of(_site(name="blocks.9"))
    assert float(_table().threshold_of(_site(name="blocks.9"), strict=False)) == -float("inf")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("/cache/hub/models--Wan-AI--Wan2.1-T2V/snapshots/0fad/transformer", "Wan-AI/Wan2.1-T2V"),
        (r"C:\hub\models--Wan-AI--Wan2.1-T2V\snapshots\0fad\transformer", "Wan-AI/Wan2.1-T2V"),
        ("/models/wan/transformer", None),
        ("./wan", None),
        ("", None),
    ],
)
def test_the_name_of_a_model(path: str, name: str | None) -> None:
    """A path says nothing on another machine: the parameters do."""
    model = _run(_enabled())
    nameless = model_name(model)
    assert nameless.startswith("parameters ")
    model.config = SimpleNamespace(_name_or_path=path)
    assert model_name(model) == (name or nameless)
    _table(model=nameless).check(model)
    _table(model=path).check(model)
    if name:
        with pytest.raises(ValueError, match=f"model: someone/else in the file, {name} in the model"):
            _table(model="someone/else").check(model)
    else:
        _table(model="someone/else").check(model)


def test_a_table_does_not_keep_a_model_alive() -> None:
    table, model = _table(), _enabled()
    table.apply(model)
    LiteAttentionRegistry.from_model(model, "const", threshold=-2.0)
    table.apply(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_pipeline_with_two_transformers() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.components = {"transformer": Toy(layers=1), "transformer_2": Toy(layers=1, seed=1)}

    pipe = Pipe()

    def generate(_: int) -> None:
        for step, model in enumerate([pipe.components["transformer"]] * 2 + [pipe.components["transformer_2"]] * 2):
            with torch.no_grad():
                model(tokens(step), context())

    options: dict[str, Any] = {"num_steps": STEPS, "tile_shape": TILE}
    found = lite_attention.calibrate(pipe, generate, target_error=0.2, progress=False, **options)
    assert [*found.table] == ["transformer.blocks.0.attn1", "transformer_2.blocks.0.attn1"]
    assert found.table.model_class == "Toy, Toy"
    assert all(not lite_attention.enabled.store_of(model) for model in pipe.components.values())
    lite_attention.enable(pipe, compile=False, **options)
    found.table.apply(pipe)
    generate(0)
    found.table.check(pipe)
    for site, state in named_states(pipe).items():
        assert torch.equal(state.threshold[:1], found.table[site])
    with pytest.raises(ValueError, match="model class: Toy, Toy in the file, Toy in the model"):
        found.table.apply(pipe.components["transformer"])


# ---- where users give it -------------------------------------------------------------------------------------------

GIVEN: dict[str, Callable[[ThresholdTable, Path], Any]] = {
    "table": lambda table, _: table,
    "path": lambda table, path: table.save(path) or path,
    "name": lambda table, path: table.save(path) or str(path),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("compile", [False, True])
def test_enable_and_set_threshold_take_a_table_or_its_file(
    given: Callable[[ThresholdTable, Path], Any], compile: bool, tmp_path: Path
) -> None:
    thresholds = {site: -torch.arange(1.0, 1 + 2 * STEPS).view(1, STEPS, 2) - i for i, site in enumerate(SITES)}
    threshold = given(ThresholdTable(thresholds, num_steps=STEPS, model_class="Toy"), tmp_path / "a.toml")
    options: dict[str, Any] = {"num_steps": STEPS, "tile_shape": TILE, "compile": compile, "inner": "eager"}
    enabled = _run(lite_attention.enable(Toy(layers=2), threshold=threshold, **options))
    late, early = (lite_attention.enable(Toy(layers=2), **options) for _ in range(2))
    lite_attention.set_threshold(early, threshold)
    _run(early)
    lite_attention.set_threshold(_run(late), threshold)
    for model in (enabled, early, late):
        for site, state in named_states(model).items():
            assert torch.equal(state.threshold, thresholds[site].expand_as(state.threshold))


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_enable_and_set_threshold_refuse_one_that_does_not_fit(
    given: Callable[[ThresholdTable, Path], Any], tmp_path: Path
) -> None:
    threshold = given(_table(num_steps=50), tmp_path / "a.toml")
    model = _enabled(threshold=threshold)
    with pytest.raises(ValueError, match=r"steps: 50 in the file, 4 in the model: blocks\.0\.attn1"):
        _run(model)
    model = _run(_enabled())
    with pytest.raises(ValueError, match=r"does not fit the model:\n  steps: 50 in the file, 4 in the model"):
        lite_attention.set_threshold(model, threshold)
    assert all((state.threshold == -10).all() for state in named_states(model).values())
    for file in ("nowhere.toml", tmp_path / "nowhere.toml"):
        with pytest.raises(ValueError, match=r"threshold: expected .* or the path of a file, got '.*nowhere\.toml'"):
            _enabled(threshold=file)
        with pytest.raises(ValueError, match=r"threshold: expected .* or the path of a file, got '.*nowhere\.toml'"):
            lite_attention.set_threshold(model, file)


def test_a_calibration_goes_the_round(tmp_path: Path) -> None:
    """Found, saved, given to another model by its file: which computes as the first one that is given the result."""
    options: dict[str, Any] = {"num_steps": STEPS, "tile_shape": TILE}

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(tokens(step), context()) for step in range(STEPS)]

    model = Toy(layers=2)
    found = lite_attention.calibrate(model, lambda _: outputs(model), target_error=0.1, progress=False, **options)
    found.save(tmp_path / "a.toml")
    first = lite_attention.enable(Toy(layers=2), compile=False, threshold=found.table, **options)
    second = lite_attention.enable(Toy(layers=2), compile=False, threshold=tmp_path / "a.toml", **options)
    for a, b in zip(outputs(first), outputs(second), strict=True):
        assert torch.equal(a, b)
    assert min(float(state.sparsity()) for state in named_states(second).values()) > 0.03
