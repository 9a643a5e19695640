"""The file that a calibration goes on from: it belongs to one calibration, and to one process at a time."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

import lite_attention
from lite_attention.calibration import CalibrationResult, autosave, recorder
from tests.support.toys import TILE, Toy, context, tokens

STEPS = 3


def _calibrate(model: nn.Module, file: Path | None, seed: int = 0, **options: Any) -> CalibrationResult:
    def generate(prompt: int) -> None:
        for step in range(STEPS):
            model(tokens(step, seed=10 * prompt + seed), context())

    options = {"target_error": 0.05, "num_steps": STEPS, "progress": False} | options
    if lite_attention.enabled.store_of(model) is None:
        options = {"tile_shape": TILE} | options
    return lite_attention.calibrate(model, generate, autosave=file, **options)


def _same(a: CalibrationResult, b: CalibrationResult) -> bool:
    return all(torch.equal(a.table[site], b.table[site]) for site in a.table)


def _scaled() -> nn.Module:
    """A model with the names and shapes of the other, in which one layer is another."""
    model = Toy(layers=2)
    model.blocks[1].attn1.to_k.weight.data.mul_(0.5)
    return model


OTHERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "another model": lambda: (Toy(layers=2, seed=5), {}),
    "another layer": lambda: (_scaled(), {}),
    "more layers": lambda: (Toy(layers=3), {}),
    "other prompts": lambda: (Toy(layers=2), {"prompts": (7,)}),
    "more prompts": lambda: (Toy(layers=2), {"prompts": (0, 1)}),
    "another bound": lambda: (Toy(layers=2), {"target_error": 0.2}),
    "another target": lambda: (Toy(layers=2), {"target_error": None, "target_sparsity": 0.3}),
    "another metric": lambda: (Toy(layers=2), {"metric": "RMSE"}),
    "other tiles": lambda: (Toy(layers=2), {"tile_shape": (8, 16)}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_calibration_has_a_file_of_its_own(
    other: Callable[[], tuple[nn.Module, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither taken for this one's nor overwritten, and both are resumed."""
    file = tmp_path / "calibration.pt"
    first = _calibrate(Toy(layers=2), file)
    before = file.read_bytes()
    model, options = other()
    want = _calibrate(model, None, **options)
    with pytest.warns(UserWarning, match=r"calibration\.pt is of another calibration, with .*; this one goes to"):
        found = _calibrate(model, file, **options)
    assert _same(found, want)
    assert file.read_bytes() == before
    monkeypatch.setattr(recorder, "measure_tiles", None)  # nothing is measured again
    with pytest.warns(UserWarning, match="this one goes to"):
        assert _same(_calibrate(model, file, **options), want)
    assert _same(_calibrate(Toy(layers=2), file), first)


def test_another_generation_of_the_same_numbers_is_told(tmp_path: Path) -> None:
    """What `generate` does is seen when it repeats what was measured."""
    file = tmp_path / "calibration.pt"
    _calibrate(Toy(layers=2), file)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1, slot 0, step 0: expected the attention that was measured"):
        _calibrate(Toy(layers=2), file, seed=3)


def test_other_tiles_or_quantization_of_an_enabled_model_are_told(tmp_path: Path) -> None:
    file = tmp_path / "calibration.pt"

    def enabled(**settings: Any) -> nn.Module:
        settings = {"tile_shape": TILE, "num_steps": STEPS} | settings
        return lite_attention.enable(Toy(layers=2), compile=False, **settings)

    _calibrate(enabled(), file)
    for settings in ({"tile_shape": (16, 8)}, {"use_int8": True}):
        with pytest.raises(ValueError, match=r"expected \(tile_m, tile_n, quantization\) = \[16, 16, 'none'\], as bef"):
            _calibrate(enabled(**settings), file)


def test_a_calibration_that_another_process_runs_has_a_file_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "calibration.pt"
    with FileLock(f"{file}.lock"):
        with pytest.warns(UserWarning, match="is written by another process; this one goes to"):
            found = _calibrate(Toy(layers=2), file)
        assert not file.exists()
        (own,) = tmp_path.glob("calibration-*.pt")
        with (
            FileLock(f"{own}.lock"),
            pytest.raises(ValueError, match="autosave: expected a file that no other process writes"),
        ):
            _calibrate(Toy(layers=2), file)
    assert _same(found, _calibrate(Toy(layers=2), None))


def test_an_interrupt_frees_the_file_and_the_model(tmp_path: Path) -> None:
    file, model, calls = tmp_path / "calibration.pt", Toy(layers=2), 0

    def generate(_: int) -> None:
        nonlocal calls
        for step in range(STEPS):
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            model(tokens(step), context())

    options: dict[str, Any] = {"num_steps": STEPS, "target_error": 0.05, "tile_shape": TILE, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        lite_attention.calibrate(model, generate, autosave=file, **options)
    assert model._compiled_call_impl is None
    assert lite_attention.enabled.store_of(model) is None
    found = lite_attention.calibrate(model, generate, autosave=file, **options)
    assert _same(found, lite_attention.calibrate(model, generate, **options))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world" * 50, "other archive", "list", "older"],
    ids=["empty", "garbage", "other archive", "list", "older"],
)
def test_refuses_by_name_what_is_no_autosave(content: bytes | str, tmp_path: Path) -> None:
    file = tmp_path / "calibration.pt"
    saved: dict[str, Any] = {"other archive": {"weight": torch.zeros(2)}, "list": [1, 2], "older": {"options": {}}}
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(saved[content], file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"calibration\.pt: expected the autosave of a calibration, got"):
        _calibrate(Toy(layers=2), file)
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="autosave: expected a path in a folder that exists, got"):
        _calibrate(Toy(layers=2), tmp_path / "nowhere" / "calibration.pt")


def test_two_processes_on_one_file(tmp_path: Path) -> None:
    """Of two models: each finds what it finds alone."""
    code = """
    import sys, warnings
    import torch
    import lite_attention
    from tests.support.toys import TILE, Toy, context, tokens
    warnings.simplefilter("ignore")
    model = Toy(layers=1, seed=int(sys.argv[1]))
    def generate(prompt):
        for step in range(4):
            model(tokens(step, seed=prompt), context())
    found = lite_attention.calibrate(
        model, generate, num_steps=4, target_error=.05, prompts=range(3), autosave=sys.argv[2], progress=False,
        tile_shape=TILE,
    )
    found.save(sys.argv[3])
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    root = Path(__file__).parents[2]
    file = str(tmp_path / "calibration.pt")

    def start(seed: int, autosave: str, found: Path) -> subprocess.Popen[str]:
        arguments = [*program, str(seed), autosave, str(found)]
        return subprocess.Popen(arguments, cwd=root, stderr=subprocess.PIPE, text=True)

    together = [start(seed, file, tmp_path / f"{seed}.toml") for seed in (0, 1)]
    assert [process.communicate()[1] for process in together] == ["", ""]
    first = start(0, str(tmp_path / "alone.pt"), tmp_path / "alone.toml")
    assert first.communicate()[1] == ""
    assert (tmp_path / "0.toml").read_text() == (tmp_path / "alone.toml").read_text()
    assert (tmp_path / "1.toml").read_text() != (tmp_path / "alone.toml").read_text()


def test_some_values_of_any_tensor() -> None:
    assert autosave.sampled(torch.arange(10)).tolist() == [0, 4, 8]
    assert autosave.sampled(torch.tensor(3.0)).tolist() == [3]
    assert autosave.sampled(torch.zeros(0, 4)).tolist() == []
    assert autosave.sampled(torch.arange(12.0).view(3, 4).T, most=2).tolist() == [0, 8, 2, 10]


def test_a_model_whose_parameters_are_elsewhere_has_a_fingerprint() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    assert len(autosave.fingerprint(model)) == 16
