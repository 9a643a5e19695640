"""A tiny model of the quality benchmarks, where its results go, and videos of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import quality
from benchmarks import quality_report as reporting
from benchmarks.quality_bench import Bench
from benchmarks.quality_setup import Setup
from examples.moving_shapes.scenes import Size
from lite_attention.calibration.probe import AttentionProbe, CaughtCall, Output

SIZE: Size = (6, 24, 24)  # 216 tokens, 14 x 14 tiles
STEPS = 4
ABOUT = {"size": SIZE, "tokens": 216, "steps": STEPS, "solver": "euler", "guidance": 3.0, "dtype": "float32"}


def video(seed: int, frames: int = 2, height: int = 16, width: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, frames, height, width), generator=generator, dtype=torch.uint8)


def setup(**options: Any) -> Setup:
    model, judge = quality.tiny()
    return Setup(model, judge, SIZE, STEPS, **{"tile": (16, 16), "batch": 2, **options})


def bench_of(folder: Path, **options: Any) -> Bench:
    results = reporting.Results(folder / "results.jsonl", ABOUT)
    return Bench(setup(**options), results, reporting.Videos(folder / "videos"))


class Counting(AttentionProbe):
    """Counts what each call of the op skips, by site, step and video."""

    def __init__(self, model_or_pipe: Any, threshold: float) -> None:
        self.found: dict[tuple[str, int], list[torch.Tensor]] = {}
        self.threshold = threshold
        super().__init__(model_or_pipe)

    def attend(self, call: CaughtCall) -> Output:
        share = call.skipped.float().mean((1, 2, 3))
        self.found.setdefault((call.site, call.control.step), []).append(share)
        return call.run(torch.full_like(call.args[5], self.threshold))
