"""The command line: what it prints, draws and refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import lite_attention
from lite_attention import ThresholdTable
from lite_attention.cli import main

NEVER = -math.inf


def test_inspect_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "thresholds.toml", tmp_path / "thresholds.png"
    table = ThresholdTable(
        {"blocks.0.attn1": torch.tensor([[[-4.0, -2.0], [-3.0, -9.0]]]), "b": torch.tensor([[[NEVER]]])},
        tile_shapes={"blocks.0.attn1": (192, 80)},
        model_class="WanTransformer3DModel",
        resolution=(81, 480, 832),
        reached={"calibration": 0.0093},
    )
    table.save(file)
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "model_class: WanTransformer3DModel\n" in printed
    assert "resolution: 81, 480, 832\n" in printed
    assert "calibration: 0.0093\n" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["blocks.0.attn1", "192x80", "all", "2", "2", "-9.000", "-4.000", "-2.000"] in rows
    assert ["b", "all", "all", "all", "-inf", "-inf", "-inf"] in rows

    pytest.importorskip("matplotlib")
    assert main(["inspect", str(file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_tells_errors_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.toml"
    for content in (None, "version = 7"):
        if content:
            wrong.write_text(content)
        assert main(["inspect", str(wrong)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("lite-attention: ")
        assert str(wrong) in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lite-attention {lite_attention.__version__}\n"
