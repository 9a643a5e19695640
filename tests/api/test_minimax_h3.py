"""MiniMax-H3 by the denoising loop of diffusers' own blocks: one sequence of text, a reference, audio and the video."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MiniMaxH3Scheduler
from diffusers.modular_pipelines.minimax_h3 import before_denoise
from diffusers.modular_pipelines.minimax_h3.denoise import MiniMaxH3DenoiseStep
from diffusers.modular_pipelines.modular_pipeline import PipelineState

import lite_attention
from lite_attention.enabled import wirings
from lite_attention.ops import ResidualState
from tests.support import diffusers_models as dm

STEPS = 6
TEXT, REFERENCE = 24, 16  # rows
_LAYOUT = ("token_tags", "position_ids", "video_indices", "audio_indices", "text_indices")


def pipeline() -> Any:
    pipe = MiniMaxH3DenoiseStep().init_pipeline()
    schedulers = {"scheduler": MiniMaxH3Scheduler(shift=12.0), "audio_scheduler": MiniMaxH3Scheduler(shift=3.0)}
    pipe.update_components(transformer=dm.MINIMAX_H3.model(), **schedulers)
    for scheduler in schedulers.values():
        scheduler.set_timesteps(STEPS + 1)
    return pipe


def plan(pipe: Any, given: dict[str, Any]) -> list[Any]:
    """Return the timesteps of each step, and which of them each row has, as the pipeline makes them."""
    (step,) = {found for found in vars(before_denoise).values() if hasattr(found, "build_row_timesteps")}
    times = zip(pipe.scheduler.timesteps.tolist(), pipe.audio_scheduler.timesteps.tolist(), strict=True)
    return [
        step.build_row_timesteps(
            given["video_indices"], given["audio_indices"], REFERENCE, 0, TEXT, video, audio, max(video, 0.98), 1.0
        )
        for video, audio in times
    ]  # fmt: skip


def generate(pipe: Any, seed: int = 0) -> torch.Tensor:
    """Return the rows of video and audio after the loop."""
    given, state = dm.MINIMAX_H3.inputs(0, seed), PipelineState()
    told = {
        "latents": given["hidden_states"][0].clone(), "audio_latents": given["audio_hidden_states"][0].clone(),
        "prompt_embeds": given["encoder_hidden_states"], "row_timestep_plan": plan(pipe, given),
        "timesteps": pipe.scheduler.timesteps, "audio_timesteps": pipe.audio_scheduler.timesteps,
        "num_condition_video_rows": REFERENCE, "num_condition_audio_rows": 0,
    }  # fmt: skip
    for name, value in told.items():
        state.set(name, value)
    for name in _LAYOUT:
        state.set(name, given[name], "denoiser_input_fields")
    pipe.scheduler._step_index = pipe.audio_scheduler._step_index = None
    result = pipe(state=state)
    return torch.cat([result.get("latents"), result.get("audio_latents")])


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return generate(pipeline())


@pytest.mark.parametrize("compile", [False, True])
def test_it_is_dense_where_nothing_is_skipped(dense: torch.Tensor, compile: bool) -> None:
    pipe = pipeline()
    lite_attention.enable(pipe, compile=compile, inner="aot_eager", tile_shape=dm.TILE, threshold=dm.NEVER)
    torch.testing.assert_close(generate(pipe), dense, rtol=0, atol=1e-4)


def test_each_generation_skips_anew(dense: torch.Tensor) -> None:
    pipe = pipeline()
    lite_attention.enable(pipe, compile=False, tile_shape=dm.TILE, threshold=0.0)
    first = generate(pipe)
    assert 0 < float((first - dense).norm() / dense.norm()) < 0.2
    generate(pipe, seed=1)
    assert torch.equal(generate(pipe), first)
    report = dm.silent_report(pipe)
    assert "exact tokens, which are never skipped: 0:24 of 24 (1 sites); 0:56 of 160 (2 sites)" in str(report)
    assert all(row.state is not None and row.state.step(0) == STEPS for row in report.swapped)
    assert wirings[pipe.transformer].clock().generation == 3
    assert {row.state.slots for row in report.swapped if row.state is not None} == {1}  # it runs once a step


def test_the_flows_time_is_that_of_the_video(dense: torch.Tensor) -> None:
    """Audio has a schedule of its own, and the reference one that stays."""
    pipe, times = pipeline(), list[float]()

    def note(*_: Any) -> None:
        (state, *_) = wirings[pipe.transformer].session().states
        assert isinstance(state, ResidualState)
        times.append(float(state.times[0, 0]))

    pipe.transformer.register_forward_hook(note)
    lite_attention.enable(pipe, compile=False, tile_shape=dm.TILE, method="residual", keep=0.5)
    assert float((generate(pipe) - dense).norm() / dense.norm()) < 0.05
    assert times[1:] == pytest.approx(pipe.scheduler.timesteps.tolist()[1:])
