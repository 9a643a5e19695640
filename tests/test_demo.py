"""The demo end to end, at a size that runs in seconds."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from lite_attention.__main__ import main
from lite_attention.demo import DemoOptions, run

SMALL = {"steps": 4, "frames": 4, "height": 16, "width": 16, "compile": False}


def test_runs_from_the_command_line_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "demo.png"
    size = ["--steps", "3", "--frames", "4", "--height", "16", "--width", "16", "--no-compile"]
    assert main(["demo", *size, "--threshold", "-1", "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "not trained" in printed.out
    assert "lite_attention.enable(pipe" in printed.out
    assert "denoising" in printed.err  # the progress bar stays out of what may be piped


def test_skips_more_and_more_with_a_small_error() -> None:
    result = run(DemoOptions(threshold=-1.0, **SMALL))
    sparsity = [step.sparsity for step in result.steps]
    assert sparsity[0] == 0
    assert sparsity[1] > 0
    assert sparsity == sorted(sparsity)
    errors = [step.error for step in result.steps]
    assert errors[0] <= 1e-5  # the first step skips nothing
    assert all(math.isfinite(error) and error < 0.5 for error in errors)
    assert errors[-1] > 1e-5
    kept = torch.stack(result.kept_tiles)
    assert kept[0].all()
    assert not (kept[1:] & ~kept[:-1]).any()  # what was dropped stays out


def test_threshold_minus_infinity_is_dense() -> None:
    result = run(DemoOptions(threshold=-math.inf, **SMALL))
    assert all(step.sparsity == 0 for step in result.steps)
    assert all(step.error <= 1e-5 for step in result.steps)


def test_same_seed_same_numbers() -> None:
    first, second = (run(DemoOptions(threshold=-1.0, **SMALL)) for _ in range(2))
    assert [(s.sparsity, s.error) for s in first.steps] == [(s.sparsity, s.error) for s in second.steps]


@pytest.mark.parametrize("size", [{"height": 15}, {"steps": 0}])
def test_refuses_sizes_that_do_not_fit(size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="height and width even"):
        DemoOptions(**size)


def test_command_line_tells_errors_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--width", "7"]) == 1
    assert capsys.readouterr().err.startswith("lite-attention: steps, frames, height, width")


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = (
        "import sys, lite_attention, lite_attention.plot, lite_attention.demo; assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from lite_attention import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "lite-attention\[plot\]"'):
        plot.require_matplotlib()
