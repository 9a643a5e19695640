"""A tiny model of the quality benchmarks, where its results go, and videos of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import quality
from benchmarks import quality_report as reporting
from examples.moving_shapes.scenes import Size

SIZE: Size = (6, 24, 24)  # 216 tokens, 14 x 14 tiles
STEPS = 4
ABOUT = {"size": SIZE, "tokens": 216, "steps": STEPS, "guidance": 3.0, "dtype": "float32"}


def video(seed: int, frames: int = 2, height: int = 16, width: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, frames, height, width), generator=generator, dtype=torch.uint8)


def setup(**options: Any) -> quality.Setup:
    model, judge = quality.tiny()
    return quality.Setup(model, judge, SIZE, STEPS, **{"tile": (16, 16), "batch": 2, **options})


def bench_of(folder: Path, **options: Any) -> quality.Bench:
    results = reporting.Results(folder / "results.jsonl", ABOUT)
    return quality.Bench(setup(**options), results, reporting.Videos(folder / "videos"))
