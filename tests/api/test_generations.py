"""Which branch, step and generation the calls of real pipelines belong to, and whose memory they use."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanVideoToVideoPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import nn

import lite_attention
from lite_attention import schedules
from lite_attention.enabled import session_of
from lite_attention.model_sites import sites_of
from tests.support import pipelines
from tests.support.diffusers_models import TILE, silent_report
from tests.support.toys import OPTIONS, Toy, context, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Guiders are currently")

STEPS = 4
# Skips in the later steps alone, and at each of them otherwise: a step read in another's place gives another video.
SCHEDULE = schedules.dense_first(torch.tensor([[-4.0], [-4.0], [-2.0], [-0.5]]), 1)

# Passes that each pipeline makes in a step; those of Wan and LTX are named, the others not.
PASSES = {
    pipelines.wan: 2,
    pipelines.wan_of_two: 2,
    pipelines.wan_image_to_video: 2,
    pipelines.wan_video_to_video: 2,
    pipelines.wan_modular: 2,
    pipelines.ltx: 1,
    pipelines.ltx2: 3,
    pipelines.flux: 2,
    pipelines.flux_image_to_image: 2,
    pipelines.flux_kontext: 2,
    pipelines.lumina2: 2,
    pipelines.hunyuan_image_to_video: 2,
}


def enable(target: Any, compile: bool | str = False, **options: Any) -> Any:
    if compile:
        options["inner"] = "eager"
    return lite_attention.enable(target, compile=compile, **{"threshold": SCHEDULE, "tile_shape": TILE} | options)


def transformers(pipe: Any) -> list[Any]:
    return [part for name, part in pipe.components.items() if name.startswith("transformer") and part is not None]


class Told:
    """Says branch and step of every forward, from their number alone; the transformers of a pipeline share it."""

    def __init__(self, passes: int) -> None:
        self.passes, self.count = passes, 0

    def wrap(self, model: nn.Module) -> None:
        run = model._compiled_call_impl

        def told(*args: Any, **kwargs: Any) -> Any:
            step, turn = divmod(self.count, self.passes)
            self.count += 1
            with lite_attention.branch(f"pass {turn}", step, model=model):
                return run(*args, **kwargs)

        model._compiled_call_impl = told


def as_told(build: Callable[[], Any], seed: int = 0, **options: Any) -> torch.Tensor:
    """Generate with each forward told where it is: what the pipeline must make without being told."""
    pipe = enable(build(), slots=6, **options)  # the pipeline's own names take slots too
    told = Told(PASSES[build])
    for model in transformers(pipe):
        told.wrap(model)
    return pipelines.generate(pipe, seed, STEPS)


def sparsity(pipe: Any) -> list[list[float]]:
    return [row.sparsity for row in silent_report(pipe).swapped if row.state is not None]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", PASSES, ids=lambda build: build.__name__)
def test_every_forward_is_placed_as_if_told(build: Callable[[], Any]) -> None:
    want = as_told(build)
    pipe = build()
    dense = pipelines.generate(pipe, steps=STEPS)
    enable(pipe)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lite_attention")
        first = pipelines.generate(pipe, steps=STEPS)
        close(first, want)
        assert (first - dense).abs().max() > 3e-4
        close(pipelines.generate(pipe, steps=STEPS), want)  # and the next generation starts fresh
        pipelines.generate(pipe, steps=STEPS, seed=5)
        close(pipelines.generate(pipe, steps=STEPS), want)
    assert any(max(shares) > 0 for shares in sparsity(pipe))


COMPILED = [pipelines.wan_image_to_video, pipelines.wan_video_to_video, pipelines.wan_modular, pipelines.flux_kontext]
ROUTES = [(build, how) for build in COMPILED for how in (True, "blocks")] + [(pipelines.ltx2, True)]


@pytest.mark.parametrize(("build", "compile"), ROUTES, ids=[f"{build.__name__}-{how}" for build, how in ROUTES])
def test_so_it_is_compiled(build: Callable[[], Any], compile: bool | str) -> None:
    want, pipe = as_told(build), enable(build(), compile)
    for _ in range(2):
        close(pipelines.generate(pipe, steps=STEPS), want)


def test_guidance_that_ends_midway_restarts_nothing() -> None:
    model, steps = enable(pipelines.wan().transformer), []
    for step, timestep in enumerate((900, 700, 500, 300)):
        for name in ("cond", "uncond")[: 2 if step < 2 else 1]:
            with model.cache_context(name):
                model(**wan_inputs(step, timestep))
        steps.append([silent_report(model).swapped[0].state.step(slot) for slot in (0, 1)])
    assert steps == [[1, 1], [2, 2], [3, 2], [4, 2]]


def wan_inputs(step: int, timestep: int) -> dict[str, Any]:
    x = pipelines.dm.WAN.inputs(step, 0)
    return x | {"timestep": torch.tensor([timestep]), "return_dict": False}


# ---- more than one pipeline, thread or model ----------------------------------------------------------------------


@pytest.mark.parametrize("compile", [True, False])
def test_a_second_pipeline_of_the_same_transformer(compile: bool) -> None:
    pipe = enable(pipelines.wan(), compile)
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    want = as_told(pipelines.wan_video_to_video), as_told(pipelines.wan)
    for _ in range(2):
        close(pipelines.generate(other, steps=STEPS), want[0])
        close(pipelines.generate(pipe, steps=STEPS), want[1])


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_pipeline_for_each_thread(compile: bool, method: str) -> None:
    base = enable(pipelines.wan(), compile, **({"method": method, "threshold": None} if method == "residual" else {}))
    want = [pipelines.generate(base, seed, STEPS) for seed in (0, 1)]
    assert not torch.equal(*want)
    barrier = threading.Barrier(2)
    got: list[torch.Tensor | None] = [None, None]

    def request(seed: int) -> None:
        pipe = WanPipeline.from_pipe(base, scheduler=pipelines.wan().scheduler)
        pipe.set_progress_bar_config(disable=True)
        barrier.wait()
        got[seed] = pipelines.generate(pipe, seed, STEPS)

    threads = [threading.Thread(target=request, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, expected in zip(got, want, strict=True):
        assert one is not None
        assert torch.equal(one, expected)


def test_a_first_forward_within_that_of_another_thread() -> None:
    """It tells self-attention by itself, so it learns from the first step on."""
    model, alone = (enable(Toy(2), num_steps=9) for _ in range(2))
    want = [alone(tokens(step), context()) for step in range(3)]
    arrived, overtaken = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is slow:
            arrived.set()
            overtaken.wait(60)

    hook = model.blocks[0].register_forward_pre_hook(wait)
    slow = threading.Thread(target=lambda: model(tokens(0), context()))
    slow.start()
    arrived.wait(60)
    got = [model(tokens(step), context()) for step in range(3)]
    overtaken.set()
    slow.join()
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sizes_that_come_while_a_threshold_is_set() -> None:
    model = enable(Toy(1), num_steps=9)
    model(tokens(0), context())

    def threshold(_: Any) -> float:
        model(tokens(0, seq=128), context())  # as another thread would
        return -2.0

    lite_attention.set_threshold(model, threshold)
    model(tokens(1), context())
    assert silent_report(model).swapped[0].state.threshold.eq(-2.0).all()


def test_a_branch_for_all_in_each_thread() -> None:
    models = [enable(Toy(1, seed=seed), num_steps=9) for seed in (0, 1)]
    barrier = threading.Barrier(2)
    steps: dict[int, list[int]] = {}

    def request(index: int) -> None:
        model = models[index]
        for step in range(2):
            for name in ("cond", "uncond"):
                with lite_attention.branch(name, step):
                    barrier.wait(60)
                    model(tokens(step), context())
                    barrier.wait(60)
        state = silent_report(model).swapped[0].state
        steps[index] = [state.step(slot) for slot in (0, 1)]

    threads = [threading.Thread(target=request, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps == {0: [1, 1], 1: [1, 1]}


def test_states_of_a_thread_go_with_it() -> None:
    model = enable(Toy(2), num_steps=9)
    model(tokens(0), context())
    (site,) = {row.name for row in silent_report(model).swapped if row.name == "blocks.0.attn1"}
    record = next(r for r in lite_attention.enabled.store_of(model).records if r.name(model) == site)
    assert len(record.states) == 1
    during: list[int] = []

    def run() -> None:
        model(tokens(1), context())
        during.append(len(record.states))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    del thread
    assert during == [2]
    assert len(record.states) == 1


# ---- interruptions, caches, lost passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [True, "blocks", False])
@pytest.mark.parametrize("within", [True, False])
def test_an_interrupted_generation_leaves_nothing_behind(within: bool, compile: bool | str) -> None:
    build = pipelines.wan_video_to_video
    pipe, want = enable(build(), compile), as_told(build)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if within:
        calls = iter(range(99))
        block = pipe.transformer.blocks[1]
        hook = block.register_forward_pre_hook(lambda *_: interrupt() if next(calls) == 3 else None)
        with pytest.raises(KeyboardInterrupt):
            pipelines.generate(pipe, steps=STEPS)
        hook.remove()
    else:
        with pytest.raises(KeyboardInterrupt):
            pipelines.generate(pipe, steps=STEPS, callback_on_step_end=interrupt)
    close(pipelines.generate(pipe, steps=STEPS), want)


def test_a_bare_model_that_is_interrupted_begins_anew() -> None:
    model, whole = enable(Toy(2), num_steps=4), enable(Toy(2), num_steps=4)
    want = [whole(tokens(step), context()) for step in range(4)]
    model(tokens(0), context())
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(1), context())
    hook.remove()
    got = [model(tokens(step), context()) for step in range(4)]
    assert all(map(torch.equal, got, want))


ATTENTION: dict[str, Any] = {
    "spatial_attention_block_skip_range": 2,
    "spatial_attention_block_identifiers": ("blocks.*attn1",),
}
CACHES: dict[str, Callable[[Any], Any]] = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "magnitudes": lambda pipe: MagCacheConfig(
        threshold=0.5, num_inference_steps=8, retention_ratio=0.1, mag_ratios=torch.ones(8)
    ),
    "broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_timestep_skip_range=(0, 1000), current_timestep_callback=lambda: pipe.current_timestep,
        **ATTENTION,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 1000), current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda module: 0.3, is_guidance_distilled=True, **ATTENTION,
    ),
    "series": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, max_order=1, cache_identifiers=["^blocks.*attn1$"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("cache_first", [True, False])
def test_sites_stay_in_step_beside_a_cache(cache: str, cache_first: bool) -> None:
    pipe = pipelines.wan_image_to_video(boundary=None)
    if cache_first:
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    enable(pipe, threshold=-4.0)
    if not cache_first:
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    ran: list[int] = []
    hook = pipe.transformer.blocks[2].attn1.to_q.register_forward_pre_hook(lambda *_: ran.append(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lite_attention")
        pipelines.generate(pipe, steps=8)
    hook.remove()
    assert len(ran) < 16  # the cache left it out
    rows = [row for row in silent_report(pipe).swapped if row.state is not None]
    assert {(row.state.step(0), row.state.step(1)) for row in rows} == {(8, 8)}


def test_passes_beyond_the_slots_are_dense_and_said_so() -> None:
    pipe = enable(pipelines.wan_video_to_video(), slots=1, threshold=-0.5)
    dense = pipelines.wan_video_to_video()
    with pytest.warns(UserWarning, match="more than 1 passes: the others are dense"):
        pipelines.generate(pipe, steps=STEPS)
    for step, timestep in enumerate((900, 700)):
        x = wan_inputs(step, timestep)
        cond, uncond = pipe.transformer(**x)[0], pipe.transformer(**x)[0]
        close(uncond, dense.transformer(**x)[0])
    assert (cond - uncond).abs().max() > 1e-3  # the first pass skips
    assert not silent_report(pipe).swapped[0].state.control[3] & 2


def test_a_pass_beyond_the_slots_of_a_new_size_leaves_no_residual() -> None:
    """Its state is born in the slot of another pass, whose next call there starts fresh."""
    options: Any = {"threshold": None, "method": "residual", "slots": 1, "num_steps": 9}
    model, alone = (enable(pipelines.dm.WAN_OF_ONE_LAYER.model(), **options) for _ in range(2))

    def of(step: int, width: int) -> dict[str, Any]:
        return wan_inputs(step, 900 - step) | {"hidden_states": pipelines.dm.latents(3, 16, width, step, seed=0)}

    model(**of(0, 8))
    with pytest.warns(UserWarning, match="more than 1 passes"):
        model(**of(0, 12))
    for step in range(1, 6):
        got = model(**of(step, 12))[0]
        with lite_attention.branch("alone", step, model=alone):
            want = alone(**of(step, 12))[0]
        close(got, want)


def test_a_pass_beyond_the_slots_of_a_new_size_leaves_no_votes() -> None:
    model = enable(pipelines.dm.WAN_OF_ONE_LAYER.model(), threshold=-4.0, slots=1)
    small, large = (
        wan_inputs(0, 900) | {"hidden_states": pipelines.dm.latents(3, 16, width, seed=0)} for width in (8, 12)
    )
    model(**small)
    with pytest.warns(UserWarning, match="more than 1 passes"):
        model(**large)
    (site,) = (site for site in sites_of(model) if site.swapped)
    assert [bool(state.sparsity()) for state in site.states] == [True, False]


def test_a_loop_that_tells_nothing_is_said_to() -> None:
    class Pipe:
        def __init__(self) -> None:
            self.components = {"transformer": Toy(1)}

        def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
            return iterable

    pipe = enable(Pipe(), num_steps=4)
    pipe.progress_bar(range(4))
    with pytest.warns(UserWarning, match="tells neither branch nor timestep"):
        pipe.components["transformer"](tokens(0), context())


@pytest.mark.parametrize("compile", [True, False])
def test_a_model_that_nobody_tells_anything_is_said_to(compile: bool) -> None:
    model = enable(Toy(1), compile, threshold=-4.0)
    with pytest.warns(UserWarning, match="nobody tells where a generation ends"):
        model(tokens(0), context())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens(1), context())  # once
        model = enable(Toy(1), compile, threshold=-4.0)
        lite_attention.reset(model)
        model(tokens(0), context())
        enable(model, compile, num_steps=3, threshold=-4.0)(tokens(0), context())


def test_named_passes_alone_do_not_tell_where_a_generation_ends() -> None:
    model = enable(Toy(1), threshold=-4.0)
    with pytest.warns(UserWarning, match="nobody tells where a generation ends"):
        run_branches(lambda *x: model(*x), 0)


@pytest.mark.parametrize("compile", [True, False])
def test_nothing_swapped_is_said(compile: bool) -> None:
    model = enable(Toy(1), compile, min_tiles=1000, threshold=-4.0)
    with pytest.warns(UserWarning, match=r"no attention was swapped \(.*min_tiles=1000"):
        model(tokens(0), context())


# ---- branches by hand ---------------------------------------------------------------------------------------------


def run_branches(run: Callable[..., Any], step: int, **where: Any) -> None:
    for name in ("cond", "uncond"):
        with lite_attention.branch(name, **where):
            run(tokens(step), context())


@pytest.mark.parametrize("where", ["everywhere", "model", "pipeline"])
def test_a_branch_reaches_an_enabled_model(where: str) -> None:
    pipe = type("Pipe", (), {})()
    pipe.components = {"transformer": Toy(1)}
    model = pipe.components["transformer"]
    enable(pipe if where == "pipeline" else model, num_steps=9, threshold=-4.0)
    target = {"everywhere": {}, "model": {"model": model}, "pipeline": {"model": pipe}}[where]
    for step in range(3):
        run_branches(model, step, **target)
    (row,) = silent_report(model).swapped
    assert (row.state.step(0), row.state.step(1)) == (3, 3)
    assert session_of(model).branches == {"cond": 0, "uncond": 1}


def test_a_branch_for_all_needs_no_slot_in_models_that_do_not_run() -> None:
    full = enable(Toy(1), num_steps=9, slots=1)
    with lite_attention.branch("only", model=full):
        full(tokens(0), context())
    attention = lite_attention.LiteAttention(num_steps=9)
    q = torch.randn(1, 128, 2, 16)
    run_branches(lambda *_: attention(q, q, q), 0)
    assert session_of(full).branches == {"only": 0}
    assert (attention.state.step(0), attention.state.step(1)) == (1, 1)


def test_a_told_step_ends_with_its_branch() -> None:
    first, later = (lite_attention.LiteAttention(num_steps=99) for _ in range(2))
    q = torch.randn(1, 128, 2, 16)
    with lite_attention.branch("cond", step=5):
        for _ in range(2):
            first(q, q, q)
        assert first.state.step() == 5
    for attention in (first, later):
        before = 0 if attention.state is None else attention.state.step()
        attention(q, q, q)
        attention(q, q, q)
        assert attention.state.step() == before + 2


def test_a_step_told_again_after_reset_is_written_again() -> None:
    table = torch.tensor([-1.0, -1.0, -math.inf]).view(1, 3, 1)
    model = nn.ModuleList([lite_attention.LiteAttention(threshold=table, num_steps=3)])
    q = torch.randn(1, 128, 2, 16)
    for _ in range(2):
        with lite_attention.branch("cond", step=2):
            model[0](q, q, q)
            assert model[0].state.step() == 2
        lite_attention.reset(model)


# ---- copies -------------------------------------------------------------------------------------------------------


def test_a_deep_copy_of_a_pipeline_is_not_enabled_and_moves_nothing() -> None:
    pipe = enable(pipelines.wan())
    want = pipelines.generate(pipe, steps=STEPS)
    dense = pipelines.generate(pipelines.wan(), steps=STEPS)
    with pytest.warns(UserWarning, match="the copy of an enabled model is not enabled"):
        other = copy.deepcopy(pipe)
    pipelines.generate(pipe, steps=2, seed=3)
    control = [row.state.control.clone() for row in silent_report(pipe).swapped]
    assert torch.equal(pipelines.generate(other, steps=STEPS), dense)
    rows = silent_report(pipe).swapped
    assert all(torch.equal(row.state.control, before) for row, before in zip(rows, control, strict=True))
    assert torch.equal(pipelines.generate(pipe, steps=STEPS), want)
    enable(other)
    assert torch.equal(pipelines.generate(other, steps=STEPS), want)


def test_a_shallow_copy_of_a_pipeline_shares_its_transformer() -> None:
    pipe = enable(pipelines.wan())
    want = pipelines.generate(pipe, steps=STEPS)
    assert torch.equal(pipelines.generate(copy.copy(pipe), steps=STEPS), want)


# ---- the timestep -------------------------------------------------------------------------------------------------


class Timed(nn.Module):
    """A model that is given a timestep under some name."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy(1)


class WithTimestep(Timed):
    def forward(self, x: torch.Tensor, timestep: Any) -> torch.Tensor:
        return self.toy(x, context())


class WithT(Timed):
    def forward(self, x: torch.Tensor, t: Any = None) -> torch.Tensor:
        return self.toy(x, context())


@pytest.mark.parametrize(
    ("kind", "values", "steps"),
    [
        (WithTimestep, [torch.tensor(900), torch.tensor(500)], 2),
        (WithTimestep, [torch.tensor([900.0, 900.0]), torch.tensor([500.0, 500.0])], 2),
        (WithTimestep, [torch.full((1, 96), 900.0), torch.full((1, 96), 500.0)], 2),
        (WithTimestep, [torch.tensor([0, 900]), torch.tensor([0, 500])], 2),  # a first frame that is given
        (WithTimestep, [torch.tensor([0.1, 0.2, 1.0]), torch.tensor([0.3, 1.0])], 2),  # as MiniMax-H3 beside references
        (WithTimestep, [torch.tensor(list(t)) for t in ((0, 0.3), (0.2, 0.3), (0.4,), (0.9, 1))], 4),
        (WithTimestep, [900, 500.0], 2),
        (WithT, [torch.tensor([900.0]), torch.tensor([500.0])], 2),
        (WithT, [torch.rand(1, 96, 32), torch.rand(1, 96, 32)], None),
        (WithT, [torch.rand(96, 32), torch.rand(96, 32)], None),
        (WithT, [None, None], None),
        (WithTimestep, ["first", "second"], None),
        (WithTimestep, [torch.tensor([True]), torch.tensor([False])], None),
        (WithTimestep, [torch.empty(0), torch.empty(0)], None),
    ],
    ids=str,
)
def test_what_is_a_timestep(kind: type[Timed], values: list[Any], steps: int | None) -> None:
    """Two passes of each: of one step where it is, steps of their own where it is not."""
    model = enable(kind(), num_steps=9)
    for value in values:
        for _ in range(2):
            model(tokens(0), value)
    state = silent_report(model).swapped[0].state
    want = (steps, steps) if steps is not None else (4, 0)
    assert (state.step(0), state.step(1)) == want
