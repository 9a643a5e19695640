"""Real pipelines of diffusers, of tiny random parts: calibrated, saved, and enabled with the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lite_attention
from lite_attention.calibration import Verification
from tests.support import pipelines

STEPS = 4
OPTIONS: dict[str, Any] = {"num_steps": STEPS, "tile_shape": (8, 8)}

# Slots in use: two transformers with cond and uncond, two passes that nobody names, three passes.
PIPELINES = {"wan_of_two": 2, "wan_video_to_video": 2, "ltx2": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slots"), PIPELINES.items())
@torch.no_grad()
def test_a_pipeline_goes_the_round(name: str, slots: int, tmp_path: Path) -> None:
    """With the file it makes what was verified, and it makes it again."""
    pipe, file = getattr(pipelines, name)(), tmp_path / "thresholds.toml"
    found = lite_attention.calibrate(
        pipe, lambda seed: pipelines.generate(pipe, seed, STEPS), target_error=0.3, progress=False, **OPTIONS
    )
    found.save(file)
    assert {row.step for row in found.verification.rows} == set(range(STEPS))
    assert {row.slot for row in found.verification.rows} == set(range(slots))
    assert found.verification["sparsity"] > 0.1
    with Verification(pipe, found.table, **OPTIONS):
        want = pipelines.generate(pipe, 1, STEPS)

    other = getattr(pipelines, name)()
    lite_attention.enable(other, compile=False, threshold=file, **OPTIONS)
    for _ in range(2):
        assert torch.equal(pipelines.generate(other, 1, STEPS), want)
    lite_attention.ThresholdTable.load(file).check(other)
