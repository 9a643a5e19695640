"""The short examples run as they stand, on pipelines of tiny parts that are loaded from a folder."""

from __future__ import annotations

import functools
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from imageio_ffmpeg import count_frames_and_secs

import lite_attention
from lite_attention import LiteAttentionBackend, ThresholdTable
from tests.support import pipelines
from tests.support.example_of_ranks import run_example, run_program
from tests.support.ranks import Ranks, ranks_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"tile_shape": (16, 16)}
WAN = ["--size", "5", "32", "16", "--steps", "4"]
LTX = ["--size", "17", "64", "32", "--steps", "4"]

together = pytest.mark.xdist_group("two processes")  # begun once, not once a worker
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run an example with arguments, in a folder of its own, on small tiles and without a C++ compiler."""
    monkeypatch.chdir(tmp_path)
    for name, small in (("enable", {"compile": False, **SMALL}), ("calibrate", SMALL), ("make_skip_aware", SMALL)):
        monkeypatch.setattr(lite_attention, name, functools.partial(getattr(lite_attention, name), **small))
    monkeypatch.setattr(lite_attention, "liteattn_backend", LiteAttentionBackend(inner="eager"))

    def of(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return of


def saved(build: Callable[[], Any], folder: Path) -> list[str]:
    build().save_pretrained(folder)
    return ["--model", str(folder)]


def test_wan(run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("diffusers_wan.py", *saved(pipelines.wan, tmp_path / "wan"), *WAN)
    assert names["video"].shape == (5, 32, 16, 3)
    assert count_frames_and_secs(tmp_path / "wan.mp4")[0] == 5
    assert "3 of 6 sites skip-aware" in capsys.readouterr().out


def test_ltx(run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("ltx.py", *saved(pipelines.ltx, tmp_path / "ltx"), *LTX)
    assert len(names["video"]) == 17
    assert count_frames_and_secs(tmp_path / "ltx.mp4")[0] == 17
    assert "sites skip-aware" in capsys.readouterr().out


def test_calibrate(run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("calibrate.py", *saved(pipelines.wan, tmp_path / "wan"), *WAN)
    table = ThresholdTable.load(tmp_path / "thresholds.toml")
    assert table.thresholds.keys() == names["found"].table.thresholds.keys()
    assert "held-out" in capsys.readouterr().out


def test_compile_any_model(run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    names = run("compile_any_model.py")
    assert names["noise"].shape == names["latent"].shape
    assert names["noise"].isfinite().all()
    assert capsys.readouterr().out.count(": skips") == 4


def test_export(run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("export_aoti.py")
    assert (tmp_path / "denoiser.pt2").exists()
    assert names["latent"].isfinite().all()
    assert ": skips" in capsys.readouterr().out


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks_of(2) as ranks:
        yield ranks


@together
def test_two_gpus(two: Ranks, tmp_path: Path) -> None:
    """Both processes end with the whole video; one of them writes it."""
    arguments = [*saved(pipelines.wan, tmp_path / "wan"), *WAN]
    videos = two.run(run_example, str(EXAMPLES / "two_gpus.py"), str(tmp_path), arguments)
    assert count_frames_and_secs(tmp_path / "wan.mp4")[0] == 5
    assert videos[0].shape == (5, 32, 16, 3)
    assert (videos[0] == videos[1]).all()


@together
def test_the_program_of_the_page_of_several_gpus(two: Ranks) -> None:
    text = (EXAMPLES.parent / "docs/how-to/parallel.md").read_text()
    (program,) = re.findall(r"^```py\n(import torch\n.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert two.run(run_program, program) == [(1, 512, 8, 64)] * 2


def test_none_is_left_out() -> None:
    tested = {"diffusers_wan", "ltx", "calibrate", "compile_any_model", "export_aoti", "two_gpus"}
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tested
