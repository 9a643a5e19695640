"""`LiteAttentionRegistry`: each mode on models of each kind, and files that do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lite_attention
from lite_attention import LiteAttention, LiteAttentionRegistry, ThresholdTable
from lite_attention.calibration import Calibration
from lite_attention.inspection import named_states
from lite_attention.ops import SkipState
from tests.support.toys import TILE, Toy, context, tokens

NEVER = float("-inf")
STEPS = 4
SITES = ["blocks.0.attn1", "blocks.1.attn1"]

from_model = LiteAttentionRegistry.from_model


class ByHand(Toy):
    """The toy with `LiteAttention` modules in place of the attention that the others have swapped."""

    def __init__(self, num_steps: int | None = STEPS) -> None:
        super().__init__(layers=2)
        for block in self.blocks:
            block.attn1.add_module("lite", LiteAttention(num_steps=num_steps))
            block.attn1.attend = self._through(block.attn1.lite)

    @staticmethod
    def _through(lite: LiteAttention) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: lite(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _enabled(compile: bool = False, **settings: Any) -> nn.Module:
    settings = {"inner": "eager", "num_steps": STEPS, "tile_shape": TILE, "slots": 2} | settings
    return lite_attention.enable(Toy(layers=2), compile=compile, **settings)


def _run(model: nn.Module, step: int = 0, seq: int = 320) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(step, seq=seq), context())


def _states(model: nn.Module) -> dict[str, SkipState]:
    return {name.removesuffix(".lite"): state for name, state in named_states(model).items()}


def _thresholds(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: state.threshold for name, state in _states(model).items()}


def _file(path: Path, thresholds: dict[str, torch.Tensor] | None = None, **about: Any) -> Path:
    table = (
        {site: torch.full((1, 1, 1), -1.0 - i) for i, site in enumerate(SITES)} if thresholds is None else thresholds
    )
    ThresholdTable(table, **about).save(path)
    return path


KINDS = {"by hand": ByHand, "eager": _enabled, "compiled": lambda: _enabled(compile=True)}
kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
ran = pytest.mark.parametrize("run_first", [True, False])


# ---- const, disable, disabled_steps --------------------------------------------------------------------------------


@kinds
@ran
def test_const_is_one_threshold_for_all(make: Callable[[], nn.Module], run_first: bool) -> None:
    model = make()
    if run_first:
        _run(model)
    from_model(model, "const", threshold=-2.5)
    _run(model)
    assert list(_states(model)) == SITES
    assert all((threshold == -2.5).all() for threshold in _thresholds(model).values())
    from_model(model)
    assert all((threshold == -10).all() for threshold in _thresholds(model).values())


@kinds
@ran
def test_disable_is_dense_and_another_mode_skips_again(make: Callable[[], nn.Module], run_first: bool) -> None:
    model, dense = make(), Toy(layers=2)
    if run_first:
        from_model(model, threshold=-2.0)
        for step in range(2):
            _run(model, step)
        assert min(state.sparsity() for state in _states(model).values()) > 0.03
    from_model(model, "disable")
    for step in range(3):
        torch.testing.assert_close(_run(model, step), _run(dense, step), rtol=0, atol=1e-5)
    from_model(model, threshold=-2.0)
    lite_attention.reset(model)
    for step in range(3):
        out = _run(model, step)
    assert min(state.sparsity() for state in _states(model).values()) > 0.03
    assert (out - _run(dense, 2)).abs().max() > 1e-4


@kinds
@pytest.mark.parametrize(("disabled", "steps"), [(2, [0, 1]), ([0, 2], [0, 2]), (0, []), (None, [])])
def test_disabled_steps_vote_nothing_out(make: Callable[[], nn.Module], disabled: Any, steps: list[int]) -> None:
    model = make()
    _run(model)
    from_model(model, threshold=-2.0, disabled_steps=disabled)
    want = torch.full((STEPS,), -2.0)
    want[steps] = NEVER
    for threshold in _thresholds(model).values():
        assert torch.equal(threshold, want.view(1, -1, 1).expand_as(threshold))


def test_disabled_steps_where_the_number_of_steps_is_not_known() -> None:
    model = _enabled(num_steps=None)
    from_model(model, threshold=-2.0, disabled_steps=[1])
    _run(model)
    for threshold in _thresholds(model).values():
        assert threshold[0, :4, 0].tolist() == [-2.0, NEVER, -2.0, -2.0]
        assert (threshold[:, 2:] == -2.0).all()


# ---- load ----------------------------------------------------------------------------------------------------------


@kinds
@ran
def test_load(make: Callable[[], nn.Module], run_first: bool, tmp_path: Path) -> None:
    model = make()
    if run_first:
        _run(model)
    suffix = ".lite" if isinstance(model, ByHand) else ""
    by_head = -torch.arange(1.0, 1 + 2 * STEPS * 2).view(2, STEPS, 2)
    tables = {SITES[0] + suffix: by_head, SITES[1] + suffix: torch.full((1, 1, 1), NEVER)}
    registry = from_model(model, "load", filename=_file(tmp_path / "a.toml", tables), disabled_steps=1)
    _run(model)
    registry.check()
    want = by_head.clone()
    want[:, 0] = NEVER
    assert torch.equal(_thresholds(model)[SITES[0]], want)
    assert (_thresholds(model)[SITES[1]] == NEVER).all()
    assert registry.table is not None
    assert registry.save_if_calib() is None


def test_a_pipeline_has_its_parts_in_the_names(tmp_path: Path) -> None:
    class Pipe:
        def __init__(self) -> None:
            self.components = {"vae": nn.Identity(), "transformer": Toy(layers=2)}

    pipe = lite_attention.enable(Pipe(), compile=False, num_steps=STEPS, tile_shape=TILE)
    tables = {f"transformer.{site}": torch.full((1, 1, 1), -1.0 - i) for i, site in enumerate(SITES)}
    path = _file(tmp_path / "a.toml", tables, model_class="Toy")
    registry = from_model(pipe, "load", filename=path)
    _run(pipe.components["transformer"])
    registry.check()
    assert [float(t.max()) for t in _thresholds(pipe.components["transformer"]).values()] == [-1, -2]
    from_model(pipe, "load", filename=path)


def test_load_reaches_states_that_are_born_later(tmp_path: Path) -> None:
    model = _enabled()
    _run(model)
    from_model(model, "load", filename=_file(tmp_path / "a.toml"))
    _run(model, seq=160)
    for i, state in enumerate(_states(model).values()):
        assert state.capacity[2] == 160
        assert (state.threshold == -1.0 - i).all()


def test_refuses_a_file_that_does_not_fit_and_lists_all_that_differs(tmp_path: Path) -> None:
    model = _enabled()
    _run(model)
    before = {name: threshold.clone() for name, threshold in _thresholds(model).items()}
    path = _file(
        tmp_path / "a.toml",
        {SITES[0]: -torch.rand(3, 7, 5), "blocks.9.attn1": -torch.ones(1, 1, 1)},
        model_class="WanTransformer3DModel",
        tile_shapes={SITES[0]: (64, 64)},
    )
    with pytest.raises(ValueError, match="does not fit the model") as error:
        from_model(model, "load", filename=path)
    assert str(error.value).splitlines() == [
        f"{path} does not fit the model:",
        "  model class: WanTransformer3DModel in the file, Toy in the model",
        f"  sites not in the file: {SITES[1]}",
        "  sites not in the model: blocks.9.attn1",
        f"  tile shape: (64, 64) in the file, (16, 16) in the model: {SITES[0]}",
        f"  steps: 7 in the file, 4 in the model: {SITES[0]}",
        f"  slots: 3 in the file, 2 in the model: {SITES[0]}",
        f"  heads: 5 in the file, 2 in the model: {SITES[0]}",
    ]
    after = _thresholds(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_thresholds_that_are_the_same_for_all_steps_still_belong_to_a_number_of_steps(tmp_path: Path) -> None:
    model = _enabled()
    _run(model)
    with pytest.raises(ValueError, match=f"steps: 50 in the file, 4 in the model: {SITES[0]}, {SITES[1]}"):
        from_model(model, "load", filename=_file(tmp_path / "a.toml", num_steps=50))


def test_branches_in_another_order(tmp_path: Path) -> None:
    model = _enabled()
    for branch in ("uncond", "cond"):
        with lite_attention.branch(branch, model=model):
            _run(model)
    of_each = {site: torch.tensor([[[-1.0]], [[-2.0]]]) for site in SITES}
    path = _file(tmp_path / "a.toml", of_each, branches=("cond", "uncond"))
    with pytest.raises(ValueError, match="order of branches: cond, uncond in the file, uncond, cond in the model"):
        from_model(model, "load", filename=path)
    from_model(model, "load", filename=_file(path, of_each, branches=("uncond", "cond")))
    from_model(model, "load", filename=_file(path, branches=("cond", "uncond")))  # one for both


def test_more_steps_than_a_state_has_room_for(tmp_path: Path) -> None:
    model = ByHand(num_steps=None)
    tables = {f"{site}.lite": -torch.arange(3.0).view(1, 3, 1) for site in SITES}
    from_model(model, "load", filename=_file(tmp_path / "a.toml", tables))  # before there are states: made to measure
    _run(model)
    assert _thresholds(model)[SITES[0]][0, :, 0].tolist() == [0, -1, -2]
    model = ByHand(num_steps=None)
    _run(model)
    with pytest.raises(ValueError, match=r"steps: 3 in the file, room for 1 \(num_steps\) in the model"):
        from_model(model, "load", filename=tmp_path / "a.toml")


@pytest.mark.parametrize("compile", [False, True])
def test_what_a_model_shows_with_its_first_call_is_told_then(compile: bool, tmp_path: Path) -> None:
    model = _enabled(compile)
    from_model(model, "load", filename=_file(tmp_path / "a.toml", {SITES[0]: -torch.ones(1, 1, 1)}))
    with pytest.raises(ValueError, match=f"a.toml: expected thresholds for {SITES[1]}, a site of the model, got none"):
        _run(model)
    model = _enabled(compile)
    tables = {site: -torch.rand(1, 3, 2) for site in SITES}
    from_model(model, "load", filename=_file(tmp_path / "b.toml", tables))
    with pytest.raises(ValueError, match=rf"b.toml: steps: 3 in the file, 4 in the model: {SITES[0]}"):
        _run(model)
    model = _enabled(compile)
    tables = {site: -torch.ones(1, 1, 1) for site in [*SITES, "blocks.9.attn1"]}
    registry = from_model(model, "load", filename=_file(tmp_path / "c.toml", tables))
    _run(model)
    with pytest.raises(ValueError, match=r"sites not in the model: blocks.9.attn1"):
        registry.check()


@ran
def test_not_strict_takes_what_it_can_and_warns_once(run_first: bool, tmp_path: Path) -> None:
    model = _enabled(num_steps=5)
    steps = -torch.arange(9.0).view(1, 9, 1)
    path = _file(tmp_path / "a.toml", {SITES[0]: steps, "blocks.9.attn1": -torch.ones(1, 1, 1)})
    if run_first:
        _run(model)
        with pytest.warns(UserWarning, match="does not fit the model") as warned:
            from_model(model, "load", filename=path, strict=False)
        assert len(warned) == 1
        assert f"sites not in the file: {SITES[1]}" in str(warned[0].message)
    else:
        from_model(model, "load", filename=path, strict=False)
        _run(model)
    thresholds = _thresholds(model)
    assert thresholds[SITES[0]][0, :, 0].tolist() == [0, -2, -4, -6, -8]
    assert (thresholds[SITES[1]] == NEVER).all()


def test_not_strict_with_other_heads_and_slots(tmp_path: Path) -> None:
    model = _enabled()
    _run(model)
    alike = torch.tensor([[-1.0] * 3, [-2.0] * 3, [-1.0] * 3, [-1.0] * 3]).expand(3, STEPS, 3).clone()
    alike[1] = -5
    unlike = -torch.arange(1.0, 1 + STEPS * 3).view(1, STEPS, 3)
    path = tmp_path / "a.toml"
    _file(path, {SITES[0]: alike, SITES[1]: unlike})
    with pytest.warns(UserWarning, match=f"slots: 3 in the file, 2 in the model: {SITES[0]}"):
        from_model(model, "load", filename=path, strict=False)
    assert (_thresholds(model)[SITES[0]] == -5).all()  # the lowest of the slots
    assert (_thresholds(model)[SITES[1]] == NEVER).all()


def test_strict_or_not_a_file_that_fits_warns_of_nothing(tmp_path: Path) -> None:
    model = _enabled()
    _run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_model(model, "load", filename=_file(tmp_path / "a.toml", model_class="Toy"), strict=False)


# ---- calib ---------------------------------------------------------------------------------------------------------


class FakeCalibration(Calibration):
    """Finds what it is told to find."""

    made: FakeCalibration

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.found: dict[str, torch.Tensor] = {}
        self.detached = False
        FakeCalibration.made = self

    def _thresholds(self) -> dict[str, torch.Tensor]:
        return self.found

    def detach(self) -> None:
        super().detach()
        self.detached = True


@pytest.fixture
def calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite_attention.calibration.Calibration", FakeCalibration)


@pytest.mark.usefixtures("calibration")
def test_calibrates_saves_and_uses_the_thresholds(tmp_path: Path) -> None:
    model, path = _enabled(), tmp_path / "thresholds.toml"
    from_model(model, "disable")
    _run(model)
    config = {"target_error": 0.02, "metric": "RMSE"}
    registry = from_model(model, "calib", filename=path, calib_config=config, disabled_steps=[1])
    made = FakeCalibration.made
    assert (made.bound, made.metric, made.num_steps) == (0.02, "RMSE", STEPS)
    with pytest.raises(ValueError, match="expected at least one generation before save_if_calib"):
        registry.save_if_calib()
    with lite_attention.branch("cond", model=model):
        _run(model)
    by_head = -torch.arange(1.0, 1 + STEPS * 2).view(1, STEPS, 2)
    made.found = {SITES[0]: by_head[:, :2]}
    with pytest.raises(ValueError, match="calibration: expected a generation of 4 steps, as the model has, got 2"):
        registry.save_if_calib()
    made.found = {SITES[0]: by_head, SITES[1]: by_head - 20}
    assert not made.detached
    assert registry.save_if_calib() == path
    assert made.detached
    assert registry.save_if_calib() is None

    want = by_head.clone()
    want[:, 1] = NEVER
    loaded = ThresholdTable.load(path)
    assert torch.equal(loaded.thresholds[SITES[0]], want)
    assert (loaded.model_class, loaded.metric, loaded.target_error, loaded.num_steps) == ("Toy", "RMSE", 0.02, STEPS)
    assert (loaded.dtype, loaded.tokens, loaded.branches) == ("float32", 320, ("cond",))
    assert loaded.tile_shapes == dict.fromkeys(SITES, TILE)
    assert loaded.reached.keys() == {"error", "worst_error", "sparsity", "missed"}
    assert loaded.library_version == lite_attention.__version__
    for site, threshold in _thresholds(model).items():
        assert torch.equal(threshold, loaded.thresholds[site].expand_as(threshold))

    other = _enabled()
    assert from_model(other, "calib", filename=path).mode == "load"  # the file is there: used as it is
    _run(other)
    assert torch.equal(_thresholds(other)[SITES[0]][0], want[0])
    assert FakeCalibration.made is made


@pytest.mark.usefixtures("calibration")
def test_overwrites_a_file_only_by_force(tmp_path: Path) -> None:
    model, path = _enabled(), tmp_path / "a.toml"
    _run(model)
    tables = {site: torch.full((1, STEPS, 1), -3.0) for site in SITES}
    registry = from_model(model, "calib", filename=path)
    assert (FakeCalibration.made.bound, FakeCalibration.made.metric) == (0.01, "L1")
    FakeCalibration.made.found = tables
    _file(path)  # somebody else's, meanwhile
    before = path.read_text()
    with pytest.raises(ValueError, match=r"filename: expected one that does not exist, or force=True, got .*a.toml"):
        registry.save_if_calib()
    assert path.read_text() == before
    assert not FakeCalibration.made.detached
    registry.filename = tmp_path / "b.toml"
    assert registry.save_if_calib() == tmp_path / "b.toml"

    registry = from_model(model, "calib", filename=path, force=True)
    FakeCalibration.made.found = tables
    registry.save_if_calib()
    assert ThresholdTable.load(path).thresholds[SITES[0]].tolist() == [[[-3.0]]]


@kinds
@pytest.mark.parametrize("target", [{"target_error": 0.05}, {"target_sparsity": 0.3, "prompts": (0, 1), "passes": 2}])
def test_calibrates_at_once_where_it_is_told_how_to_generate(
    make: Callable[[], nn.Module], target: dict[str, Any], tmp_path: Path
) -> None:
    """The thresholds are those of `calibrate`, the file is what its result saves, and both are in use."""

    def generate(model: nn.Module) -> Callable[[int], None]:
        def run(prompt: int) -> None:
            for step in range(STEPS):
                _run(model, step + prompt)

        return run

    model, other, path = make(), make(), tmp_path / "a.toml"
    found = lite_attention.calibrate(other, generate(other), num_steps=STEPS, progress=False, **target)
    found.save(tmp_path / "b.toml")
    config = {"generate": generate(model), "progress": False, **target}
    registry = from_model(model, "calib", filename=path, calib_config=config)
    assert registry.save_if_calib() is None
    assert path.read_text() == (tmp_path / "b.toml").read_text()
    assert registry.table is not None
    assert registry.table.target_error == target.get("target_error")
    assert {"calibration error", "verification sparsity"} <= registry.table.reached.keys()
    _run(model)
    for site, threshold in _thresholds(model).items():
        want = registry.table[site + ".lite" * isinstance(model, ByHand)]
        assert torch.equal(threshold[:1], want.expand(1, STEPS, 2))
    assert from_model(make(), "calib", filename=path, calib_config=config).mode == "load"


def test_what_a_calibration_in_error_leaves(tmp_path: Path) -> None:
    """Neither thresholds nor the model change; a second calibration of one model is refused, not mixed up."""
    model = _enabled()
    _run(model)

    def generate(_: int) -> None:
        raise RuntimeError("out of memory")

    config = {"generate": generate, "progress": False}
    with pytest.raises(RuntimeError, match="out of memory"):
        from_model(model, "calib", filename=tmp_path / "a.toml", calib_config=config)
    with pytest.raises(ValueError, match=r"model_or_pipe: expected a model before torch\.compile, got its result"):
        from_model(torch.compile(model), "calib", filename=tmp_path / "a.toml")
    assert not list(tmp_path.iterdir())
    assert all((threshold == -10).all() for threshold in _thresholds(model).values())
    registry = from_model(model, "calib", filename=tmp_path / "a.toml")
    for calibrate in (
        lambda: from_model(model, "calib", filename=tmp_path / "b.toml"),
        lambda: from_model(model, "calib", filename=tmp_path / "b.toml", calib_config=config),
    ):
        with pytest.raises(ValueError, match="expected a model that nobody measures, got one with a calibration under"):
            calibrate()
    for step in range(STEPS):
        _run(model, step)
    assert registry.save_if_calib() == tmp_path / "a.toml"


def test_a_full_disk_loses_no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = _enabled(), tmp_path / "a.toml"
    registry = from_model(model, "calib", filename=path)
    for step in range(STEPS):
        _run(model, step)

    def full(_: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            registry.save_if_calib()
    assert not path.exists()
    assert registry.save_if_calib() == path
    assert ThresholdTable.load(path).thresholds.keys() == set(SITES)


@kinds
def test_the_real_calibration(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, dense, path = make(), Toy(layers=2), tmp_path / "a.toml"
    registry = from_model(model, "calib", filename=path, calib_config={"target_error": 0.05})
    for step in range(STEPS):
        torch.testing.assert_close(_run(model, step), _run(dense, step), rtol=0, atol=1e-5)
    registry.save_if_calib()
    table = ThresholdTable.load(path)
    for site, threshold in _thresholds(model).items():
        saved = table.thresholds[site + ".lite" * isinstance(model, ByHand)]
        assert torch.equal(threshold[:1], saved.expand(1, STEPS, 2))
        assert saved.isfinite().any()
    assert (table.model_class, table.num_steps, table.target_error) == (type(model).__name__, STEPS, 0.05)
    assert table.reached["error"] <= 0.05
    for step in range(STEPS):
        _run(model, step)
    assert min(state.sparsity() for state in _states(model).values()) > 0.03
    other = make()
    from_model(other, "load", filename=path)
    for step in range(STEPS):
        _run(other, step)
    for site, state in _states(other).items():
        assert torch.equal(state.skip_mask, _states(model)[site].skip_mask)


@pytest.mark.parametrize("compile", [False, True])
def test_sites_may_differ_in_heads_and_tiles(compile: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {8: (16, 16), 16: (32, 8)}  # by head dim
    monkeypatch.setattr("lite_attention.compile.settings.tile_shape", lambda dim, *_: tiles[dim])

    def enabled() -> nn.Module:
        model = _enabled(compile, tile_shape=None)
        model.blocks[0].attn1.heads = model.blocks[0].attn1.kv_heads = 4
        return model

    path, model, other = tmp_path / "a.toml", enabled(), enabled()
    registry = from_model(model, "calib", filename=path, calib_config={"target_error": 0.05})
    for step in range(STEPS):
        _run(model, step)
    registry.save_if_calib()
    table = ThresholdTable.load(path)
    assert table.tile_shapes == dict(zip(SITES, tiles.values(), strict=True))
    registry = from_model(other, "load", filename=path)
    for step in range(STEPS):
        assert torch.equal(_run(model, step), _run(other, step))
    registry.check()
    assert [state.capacity[1] for state in _states(other).values()] == [4, 2]
    assert min(state.sparsity() for state in _states(other).values()) > 0.03
    for site, threshold in _thresholds(other).items():
        assert torch.equal(threshold[:1], table.thresholds[site].expand(1, *threshold.shape[1:]))

    tiles[16] = (16, 16)
    changed = enabled()
    _run(changed)
    with pytest.raises(ValueError, match=rf"tile shape: \(32, 8\) in the file, \(16, 16\) in the model: {SITES[1]}$"):
        from_model(changed, "load", filename=path)


# ---- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("calibration")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode: expected one of .* got 'fast'"),
        ({"mode": "load"}, "filename: expected a path in mode 'load', got None"),
        ({"mode": "calib"}, "filename: expected a path in mode 'calib', got None"),
        ({"mode": "calib", "filename": "nowhere/at/all.toml"}, "filename: expected a path in a folder that exists"),
        ({"mode": "disable", "threshold": -3.0}, "threshold: expected None in mode 'disable', got -3.0"),
        ({"filename": "a.toml"}, "filename: expected None in mode 'const'"),
        ({"calib_config": {}}, "calib_config: expected None in mode 'const'"),
        ({"mode": "calib", "filename": "a.toml", "calib_config": {"metric": "L2"}}, "metric: expected one of .* 'L2'"),
        ({"mode": "calib", "filename": "a.toml", "calib_config": {"goal": 1}}, "calib_config: expected the keys"),
        ({"mode": "calib", "filename": "a.toml", "calib_config": {"target_error": -1}}, "target_error: .* at least 0"),
        ({"mode": "calib", "filename": "a.toml", "model": nn.Linear(2, 2)}, "expected one given to enable"),
        ({"mode": "calib", "filename": "a.toml", "model": ByHand(num_steps=None)}, "model: expected num_steps in all"),
        ({"threshold": "x"}, "threshold: expected a number or a tensor, got str"),
        ({"threshold": float("nan")}, "threshold: expected numbers, got NaN"),
        ({"threshold": torch.zeros(1, 1, 1, 1)}, r"threshold: expected at most \(slots, steps, heads\), got \(1, 1"),
        ({"mode": "calib", "filename": "a.toml", "calib_config": "L1"}, "calib_config: expected a dict or None, got"),
        ({"mode": "calib", "filename": "a.toml", "calib_config": {"target_error": "x"}}, "target_error: .* got 'x'"),
        (
            {"mode": "calib", "filename": "a.toml", "calib_config": {"target_sparsity": 0.3}},
            r"""calib_config: expected the keys \['target_error', 'metric'\], and more with "generate", got""",
        ),
        ({"disabled_steps": "ab"}, "disabled_steps: expected a number of steps or a list, none below 0, got 'ab'"),
        ({"disabled_steps": 2.5}, "disabled_steps: expected a number of steps or a list, none below 0, got 2.5"),
        ({"disabled_steps": [0.5]}, "disabled_steps: .* none below 0"),
        ({"disabled_steps": True}, "disabled_steps: .* none below 0"),
        ({"disabled_steps": -1}, "disabled_steps: expected a number of steps or a list, none below 0, got -1"),
        ({"disabled_steps": [1, -2]}, "disabled_steps: .* none below 0"),
        ({"disabled_steps": STEPS + 1}, f"disabled_steps: expected steps below {STEPS}, got {STEPS}"),
        ({"threshold": 1.0}, "threshold: expected at most 0"),
        ({"model": nn.Linear(2, 2)}, "expected one given to enable"),
        ({"model": 3}, "expected an nn.Module or a diffusers pipeline"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    model = _enabled()
    _run(model)
    with pytest.raises(ValueError, match=message):
        from_model(**{"model": model} | arguments)
    assert all((threshold == -10).all() for threshold in _thresholds(model).values())
