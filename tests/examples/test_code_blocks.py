"""The Python of the README and of the pages runs, in order, on tiny models; what compiles has a quicker backend."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from imageio_ffmpeg import count_frames_and_secs

import lite_attention
from lite_attention import LiteAttentionBackend
from tests.support import pipelines
from tests.support.toys import Attention

CHECKOUT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
REPORT = re.compile(r"^```\n(module .*?)^```", re.DOTALL | re.MULTILINE)
STEPS = re.compile(r"(num_steps=|num_inference_steps=|three_segments\()50\b")
ALL_PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
PAGES = [page for page in ALL_PAGES if BLOCK.search(page.read_text())]
SMALL = {"tile_shape": (16, 16)}

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class SmallWan(WanPipeline):
    """Wan's pipeline with defaults of a small video."""

    def __call__(self, prompt: str, **options: Any) -> Any:
        small = {"height": 32, "width": 16, "num_inference_steps": 3, "max_sequence_length": 24}
        return super().__call__(prompt, **{**small, **options, "num_frames": 5})

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> SmallWan:
        pipe = cls(**pipelines.wan().components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def to(self, *_: Any, **__: Any) -> SmallWan:
        return self


class Denoiser(torch.nn.Module):
    """Attention of the latent with itself; the pages' model takes a time and a prompt besides."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, latent: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return self.attention(latent + t) + prompt.mean()


def given_names() -> dict[str, Any]:
    """Return what the pages speak of without making it."""
    pipe, prompts = SmallWan.from_pretrained(), ["a fox", "a tram", "a chef"]
    q, k, v = torch.randn(3, 1, 200, 2, 16)

    def generate(number: int) -> Any:
        generator = torch.Generator().manual_seed(number)
        return pipe(prompts[number], num_inference_steps=6, generator=generator, output_type="latent").frames

    return {
        "torch": torch, "lite_attention": lite_attention, "pipe": pipe, "prompts": prompts, "generate": generate,
        "query": q, "key": k, "value": v, "model": Denoiser().eval(), "denoiser": Denoiser().eval(),
        "timesteps": torch.arange(2.0), "sigmas": torch.tensor([1.0, 0.5]), "latent": torch.randn(1, 96, 32),
        "prompt": torch.randn(1, 8, 32), "negative_prompt": torch.randn(1, 8, 32),
    }  # fmt: skip


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, small tiles, and no C++ compiler."""
    monkeypatch.chdir(tmp_path)
    for name, small in (("enable", {"compile": False, **SMALL}), ("calibrate", SMALL)):
        monkeypatch.setattr(lite_attention, name, functools.partial(getattr(lite_attention, name), **small))
    backend = functools.partial(LiteAttentionBackend, inner="eager", **SMALL)
    monkeypatch.setattr(lite_attention, "LiteAttentionBackend", backend)
    monkeypatch.setattr(lite_attention, "liteattn_backend", backend())
    monkeypatch.setattr("diffusers.WanPipeline", SmallWan)


def run_page(page: Path) -> dict[str, Any]:
    """Run the blocks of a page, and return its names."""
    names = given_names()
    for block in BLOCK.findall(page.read_text()):
        code = STEPS.sub(r"\g<1>6", block)
        with torch.no_grad():
            exec(compile(code, str(page), "exec"), names)
    return names


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_the_page_runs(page: Path) -> None:
    run_page(page)


@pytest.mark.usefixtures("quick")
def test_the_first_script_makes_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = CHECKOUT / "docs/getting-started.md"
    names = run_page(page)
    assert names["video"].shape == (5, 32, 16, 3)
    assert count_frames_and_secs(tmp_path / "fox.mp4")[0] == 5
    printed = re.search(r"^module .*skip-aware$", capsys.readouterr().out, re.DOTALL | re.MULTILINE)
    assert printed is not None
    assert [line.rstrip() for line in printed[0].splitlines()] == REPORT.search(page.read_text())[1].splitlines()


@pytest.mark.usefixtures("quick")
def test_the_threshold_file_is_as_the_page_has_it(tmp_path: Path) -> None:
    page = CHECKOUT / "docs/reference/threshold-file.md"
    run_page(page)
    assert f"```toml\n{(tmp_path / 'thresholds.toml').read_text()}```" in page.read_text()
