"""The Python of the README runs, in order, on tiny models; what compiles is given a backend that takes less time."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import lite_attention
from lite_attention import LiteAttentionBackend
from tests.support import pipelines
from tests.support.toys import Attention

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


class SmallWan(WanPipeline):
    """Wan's pipeline with defaults of a small video."""

    def __call__(self, prompt: str, **options: Any) -> Any:
        small = {"height": 32, "width": 16, "num_frames": 5, "num_inference_steps": 3, "max_sequence_length": 24}
        return super().__call__(prompt, **{**small, **options})


class Denoiser(torch.nn.Module):
    """Attention of the latent with itself; the README's model takes a time and a prompt besides."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, latent: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return self.attention(latent + t) + prompt.mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"tile_shape": (16, 16)}
    monkeypatch.setattr(lite_attention, "enable", functools.partial(lite_attention.enable, compile=False, **small))
    backend = functools.partial(LiteAttentionBackend, inner="eager", **small)
    monkeypatch.setattr(lite_attention, "LiteAttentionBackend", backend)
    q, k, v = torch.randn(3, 1, 200, 2, 16)
    names = {
        "torch": torch, "lite_attention": lite_attention, "pipe": SmallWan(**pipelines.wan().components),
        "prompts": ["a fox", "a tram", "a chef"], "self": SimpleNamespace(), "query": q, "key": k, "value": v,
        "model": Denoiser().eval(), "timesteps": torch.arange(2.0), "latent": torch.randn(1, 96, 32),
        "prompt": torch.randn(1, 8, 32), "negative_prompt": torch.randn(1, 8, 32),
    }  # fmt: skip
    names["pipe"].set_progress_bar_config(disable=True)
    for block in BLOCKS:
        code = block.replace("num_steps=50", "num_steps=3").replace("num_inference_steps=50", "num_inference_steps=3")
        with torch.no_grad():
            exec(compile(code, str(README), "exec"), names)

    assert names["video"][0].shape == (5, 32, 16, 3)  # the last video that it made
    assert names["out"].shape == q.shape
    assert (tmp_path / "thresholds.toml").exists()
    printed = capsys.readouterr().out
    assert "3 of 6 sites skip-aware" in printed  # of the report
    assert "dense trajectory" in printed  # of the calibration
