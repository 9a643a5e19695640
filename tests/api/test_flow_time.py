"""The flow's time in real pipelines: who tells it, in first and second order, begun late, broken off, begun anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

import lite_attention
from lite_attention.enabled import session_of
from lite_attention.model_sites import sites_of
from lite_attention.pipeline_scheduler import PipelineScheduler
from tests.support import pipelines
from tests.support.diffusers_models import TILE
from tests.support.toys import Toy, context, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Guiders are", "ignore:lite_attention")

STEPS = 6


def enable(target: Any, **options: Any) -> Any:
    slots = {"slots": 3}  # LTX-2 has three branches
    residual: Any = {"method": "residual", "keep": 0.4, "tile_shape": TILE}
    return lite_attention.enable(target, compile=False, **residual, **slots, **options)


class Times:
    """Notes the time that the first layer of each forward reads."""

    def __init__(self, pipe: Any, model: Any = None) -> None:
        self.seen: list[float] = []
        self._model = model or pipe.transformer
        first = next(module for name, module in self._model.named_modules() if name.endswith("blocks.0"))
        first.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        site = next(site for site in sites_of(self._model) if site.swapped and site.last is not None)
        assert site.last is not None
        self.seen.append(float(site.last.times[site.last.slot, 0]))

    @property
    def source(self) -> set[str]:
        return set(session_of(self._model).time_sources.values())


def each(times: Any, passes: int) -> list[float]:
    return [float(time) for time in times for _ in range(passes)]


# ---- who tells it ---------------------------------------------------------------------------------------------------

SOURCES: dict[Callable[[], Any], tuple[str, int]] = {
    pipelines.wan: ("cache_context", 2),
    pipelines.wan_of_two: ("cache_context", 2),
    pipelines.wan_image_to_video: ("scheduler", 2),
    pipelines.wan_video_to_video: ("scheduler", 2),
    pipelines.wan_modular: ("timestep", 2),
    pipelines.ltx: ("scheduler", 1),
    pipelines.ltx2: ("scheduler", 3),
    pipelines.flux: ("scheduler", 2),
    pipelines.flux_image_to_image: ("scheduler", 2),
}


@pytest.mark.parametrize("build", SOURCES, ids=lambda build: build.__name__)
def test_who_tells_it(build: Callable[[], Any]) -> None:
    source, passes = SOURCES[build]
    pipe = enable(build())
    other = getattr(pipe, "transformer_2", None)
    times = [Times(pipe, model) for model in (pipe.transformer, other) if model is not None]
    for _ in range(2):
        pipelines.generate(pipe, steps=STEPS)
        unit = 1000 if source == "timestep" else 1
        want = each(pipe.scheduler.sigmas[:STEPS] * unit, passes)
        seen = [time for found in times for time in found.seen]
        assert seen[passes:] == pytest.approx(want[passes:])  # the first step leaves nothing that its time is read for
        assert {name for found in times for name in found.source} == {source}
        for found in times:
            found.seen.clear()


def test_a_caller_tells_it_surest() -> None:
    pipe, run = enable(pipelines.wan()), pipelines.generate
    times = Times(pipe)
    with lite_attention.branch("mine", time=0.25):
        run(pipe, steps=STEPS)
    assert set(times.seen) == {0.25}
    assert times.source == {"branch"}


def test_a_model_without_a_timestep_goes_by_the_step() -> None:
    model = enable(Toy(1), num_steps=9)
    times = Times(None, model)
    for step in range(2):
        model(tokens(step), context())
    assert all(map(math.isnan, times.seen))
    assert times.source == {"step"}


def test_a_second_pipeline_with_a_scheduler_of_its_own() -> None:
    pipe = enable(pipelines.wan_image_to_video(boundary=None))
    times = Times(pipe)
    pipelines.generate(pipe, steps=STEPS)
    first, transformer = times.seen[:], pipe.transformer
    times.seen.clear()
    x = pipelines.dm.noise(1, 10, 3, 16, 8, seed=3)
    text = pipelines.dm.noise(1, 24, 16, seed=4)
    for timestep in (900.0, 600.0, 300.0):  # a loop of somebody else, whom the scheduler knows nothing of
        transformer(x, timestep=torch.tensor([timestep]), encoder_hidden_states=text)
    assert times.seen == [900.0, 600.0, 300.0]
    assert times.source == {"timestep"}
    times.seen.clear()
    pipelines.generate(pipe, steps=STEPS)
    assert times.seen == first


def test_votes_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipelineScheduler, "time", property(lambda _: 1 / 0))
    pipe = lite_attention.enable(pipelines.flux(), compile=False, tile_shape=TILE)
    pipelines.generate(pipe, steps=2)


# ---- solvers --------------------------------------------------------------------------------------------------------

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def _named() -> Any:
    return pipelines.wan_image_to_video(boundary=None)


SCHEDULERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "Euler": (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), lambda s: s.sigmas[:-1]),
    "Heun": (lambda: FlowMatchHeunDiscreteScheduler(shift=3.0), lambda s: s.sigmas[:-1]),
    "UniPC": (lambda: UniPCMultistepScheduler(**FLOW), lambda s: s.sigmas[:-1]),
    "DPM++ of a flow": (lambda: DPMSolverMultistepScheduler(**FLOW), lambda s: s.sigmas[:-1]),
    "DPM++ of a diffusion": (lambda: DPMSolverMultistepScheduler(), lambda s: s.timesteps / 1000),
    "a scheduler that tells no step": (lambda: DDIMScheduler(), lambda s: s.timesteps),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("build", [_named, pipelines.wan_video_to_video], ids=["named", "unnamed"])
def test_solvers(build: Callable[[], Any], name: str) -> None:
    """Heun calls the model twice a step, and again at the time where it was last: each call is a step of its own."""
    make, times_of = SCHEDULERS[name]
    pipe = build()
    pipe.scheduler = make()
    times = Times(enable(pipe))
    for _ in range(2):
        latents = pipelines.generate(pipe, steps=STEPS)
        want = each(times_of(pipe.scheduler), 2)
        assert times.seen[2:] == pytest.approx(want[2:])
        assert latents.isfinite().all()
        times.seen.clear()
    steps = 2 * STEPS - 1 if name == "Heun" else STEPS
    assert len(want) == 2 * steps
    state = next(site.last for site in sites_of(pipe) if site.last is not None)
    assert [state.step(slot) for slot in (0, 1)] == [steps, steps]


def test_a_solver_of_second_order_with_wan_itself() -> None:
    pipe = pipelines.wan()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    times = Times(enable(pipe))
    pipelines.generate(pipe, steps=STEPS)
    assert times.seen == pytest.approx(each(pipe.scheduler.sigmas[:-1], 2))


def test_a_generation_that_begins_late() -> None:
    pipe = enable(pipelines.flux_image_to_image())
    times = Times(pipe)
    pipelines.generate(pipe, steps=STEPS, strength=0.5)
    sigmas = pipe.scheduler.sigmas[-4:-1]
    assert times.seen[2:] == pytest.approx(each(sigmas, 2)[2:])
    assert sigmas[0] < 0.9


# ---- broken off -----------------------------------------------------------------------------------------------------


class _StopError(Exception):
    pass


BROKEN = [(pipelines.wan, "within"), (pipelines.wan, "by a flag"), (pipelines.flux, "by a flag")]
BROKEN += [(pipelines.wan_video_to_video, "within"), (pipelines.wan_modular, "within")]


@pytest.mark.parametrize(("build", "how"), BROKEN, ids=[f"{build.__name__}-{how}" for build, how in BROKEN])
def test_an_interrupted_generation_leaves_no_time_behind(build: Callable[[], Any], how: str) -> None:
    want = pipelines.generate(enable(build()), steps=STEPS)
    pipe, calls = enable(build()), iter(range(99))
    times = Times(pipe)

    def stop(*_: Any) -> None:
        if next(calls) == 7:
            raise _StopError

    def interrupt(pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return arguments

    if how == "within":
        hook = pipe.transformer.blocks[1].register_forward_pre_hook(stop)
        with pytest.raises(_StopError):
            pipelines.generate(pipe, steps=STEPS)
        hook.remove()
    else:
        pipelines.generate(pipe, steps=STEPS, callback_on_step_end=interrupt)
    assert 0 < len(times.seen) < 2 * STEPS
    torch.testing.assert_close(pipelines.generate(pipe, steps=STEPS), want)


# ---- what it is for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_steps", [False, True])
def test_told_by_hand_is_told_by_the_pipeline(in_steps: bool) -> None:
    """The same forwards with the same times told by `branch`: the same video. Steps are no line in a shifted flow."""
    pipe = enable(pipelines.wan_video_to_video())
    want = pipelines.generate(pipe, steps=STEPS)
    told = enable(pipelines.wan_video_to_video())
    run, count = told.transformer._compiled_call_impl, iter(range(99))
    times = range(STEPS) if in_steps else pipe.scheduler.sigmas.tolist()

    def telling(*args: Any, **kwargs: Any) -> Any:
        step, turn = divmod(next(count), 2)
        with lite_attention.branch(f"pass {turn}", step, time=times[step], model=told.transformer):
            return run(*args, **kwargs)

    told.transformer._compiled_call_impl = telling
    assert torch.equal(pipelines.generate(told, steps=STEPS), want) is not in_steps
    assert {*session_of(told.transformer).time_sources.values()} == {"branch"}
