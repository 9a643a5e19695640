"""`enable` on tiny diffusers models and pipelines: what is swapped, whose memory it uses, when it starts fresh."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from torch import nn

import lite_attention
from lite_attention.ops import Session
from lite_attention.ops.state import SkipState
from tests.support import diffusers_models as dm
from tests.support.diffusers_models import (
    NEVER,
    THRESHOLD,
    TILE,
    Case,
    ExplicitStates,
    run,
    silent_report,
    skipped_by_site,
)
from tests.support.toys import Inner, Toy, context, tokens

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # what Mochi asks for there is none

STEPS = 4
BRANCHES = ("cond", "uncond")
SMALL = dm.WAN_OF_ONE_LAYER


def no_recompiles() -> Any:
    return torch.compiler.set_stance("fail_on_recompile")


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def enable(target: Any, compile: bool | str = True, **options: Any) -> Any:
    options = {"inner": "aot_eager", "threshold": THRESHOLD, "tile_shape": TILE, "exact_tokens": None} | options
    return lite_attention.enable(target, compile=compile, **options)


def states_of(target: Any) -> list[SkipState]:
    states = [row.state for row in silent_report(target).swapped]
    assert None not in states
    return states


def set_threshold(target: Any, threshold: float) -> None:
    for state in states_of(target):
        state.set_threshold(threshold)


def told(step: int, steps: int = STEPS) -> dict[str, Any]:
    """What Wan's pipeline gives to `cache_context`."""
    return {"step_index": step, "sigma": 1 - step / steps, "num_inference_steps": steps}


def check_sites(case: Case, report: lite_attention.Report, exactly: bool = True) -> None:
    """Hold names, and reasons where attention was left alone, against what is known of a model."""
    assert dm.names(report) == case.sites if exactly else sorted(dm.names(report)) == sorted(case.sites)
    for row in report.rows:
        reason = case.reason_of(row.name)
        assert (row.reason is None) == (reason is None), row
        assert row.reason is None or row.reason.startswith(reason), row


# ---- each model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", dm.SUPPORTED, ids=lambda case: case.name)
def test_compiled_model_is_dense_at_minus_infinity_and_skips_above(case: Case) -> None:
    model = case.model()
    inputs = [case.inputs(step, 0) for step in range(STEPS)]
    dense = [run(model, x) for x in inputs]
    explicit = ExplicitStates(case, model)
    inner = Inner("aot_eager")

    enable(model, inner=inner, threshold=NEVER, num_steps=STEPS)
    for x, want in zip(inputs[:2], dense, strict=False):
        close(run(model, x), want)
    report = silent_report(model)
    check_sites(case, report)
    assert len(inner.graphs) == 1
    assert set(skipped_by_site(report).values()) == {0}
    assert f"{len(case.swapped)} of {len(case.sites)} sites skip-aware" in str(report)

    set_threshold(model, THRESHOLD)
    lite_attention.reset(model)
    with no_recompiles():
        for x in inputs:
            out = run(model, x)
            close(out, explicit(x))
    skipped = skipped_by_site(report)
    assert skipped == {site: explicit.skipped(site) for site in case.swapped}
    assert min(skipped.values()) > 0
    assert (out - dense[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("case", [dm.WAN, dm.LTX2, dm.FLUX, dm.HUNYUAN], ids=lambda case: case.name)
def test_repeated_blocks_share_graphs_and_not_states(case: Case) -> None:
    model = case.model()
    explicit = ExplicitStates(case, model)
    inner = Inner("aot_eager")
    enable(model, "blocks", inner=inner, num_steps=STEPS)
    for step in range(STEPS):
        x = case.inputs(step, 0)
        close(run(model, x), explicit(x))
    report = silent_report(model)
    check_sites(case, report, exactly=False)  # full paths, though each graph knows only its block
    with_attention = [gm for gm in inner.graphs if any("skip_attention" in str(node.target) for node in gm.graph.nodes)]
    assert len(with_attention) == case.block_graphs
    assert len({state.skip_mask.data_ptr() for state in states_of(model)}) == len(case.swapped)
    assert skipped_by_site(report) == {site: explicit.skipped(site) for site in case.swapped}


def test_key_mask_may_change_from_prompt_to_prompt() -> None:
    model = dm.HUNYUAN.model()
    prompts = [
        dm.HUNYUAN.inputs(0, seed) | {"encoder_attention_mask": dm.text_mask(24, n)}
        for seed, n in enumerate((13, 24, 1))
    ]
    dense = [run(model, x) for x in prompts]
    enable(model, threshold=NEVER, num_steps=1)
    for i, (x, want) in enumerate(zip(prompts, dense, strict=True)):
        if i == 0:
            close(run(model, x), want)
        with no_recompiles():
            close(run(model, x), want)
    ignored = prompts[0] | {"encoder_attention_mask": prompts[1]["encoder_attention_mask"]}
    assert (run(model, ignored) - dense[0]).abs().max() > 1e-3  # the mask matters


@pytest.mark.parametrize("case", [dm.MOCHI], ids=lambda case: case.name)
def test_model_that_cannot_be_swapped_is_left_alone_and_said_so(case: Case) -> None:
    model = case.model()
    x = case.inputs(0, 0)
    want = run(model, x)
    enable(model)
    with pytest.warns(UserWarning, match="no attention was swapped"):
        got = [run(model, x), run(model, x)]
    assert all(torch.equal(out, want) for out in got)
    with pytest.warns(UserWarning, match="no attention of this model is skip-aware") as warned:
        report = lite_attention.report(model, file=io.StringIO())
    check_sites(case, report)
    assert all(str(row.reason) in str(warned[0].message) for row in report.rows)
    assert f"0 of {len(case.sites)} sites skip-aware" in str(report)


@pytest.mark.parametrize("compile", [True, "blocks", False])
def test_mask_of_queries_and_keys(compile: bool | str) -> None:
    """HunyuanVideo 1.5 masks padding of the text on both sides; its graphs break where it puts text in order."""
    case = dm.HUNYUAN15
    model = case.model()
    explicit = ExplicitStates(case, model)
    enable(model, compile, num_steps=STEPS, **({"inner": "aot_eager"} if compile else {}))
    for step in range(STEPS):
        x = case.inputs(step, 0)
        close(run(model, x), explicit(x))
    report = silent_report(model)
    check_sites(case, report, exactly=False)
    skipped = skipped_by_site(report)
    assert skipped == {site: explicit.skipped(site) for site in case.swapped}
    assert min(skipped.values()) > 0


def test_pooling_attention_is_left_alone() -> None:
    model = dm.MOCHI.model()
    enable(model, False)
    run(model, dm.MOCHI.inputs(0, 0) | {
        "encoder_hidden_states": dm.noise(1, 40, 16), "encoder_attention_mask": dm.text_mask(40, 30).bool(),
    })  # fmt: skip
    assert "time_embed.pooler" not in [row.name for row in silent_report(model).swapped]


@pytest.mark.slow
def test_inductor() -> None:
    model = dm.WAN.model()
    explicit = ExplicitStates(dm.WAN, model)
    enable(model, "blocks", inner="inductor", num_steps=STEPS)
    for step in range(3):
        x = dm.WAN.inputs(step, 0)
        close(run(model, x), explicit(x))
    assert skipped_by_site(silent_report(model)) == {site: explicit.skipped(site) for site in dm.WAN.swapped}


# ---- branches and steps through cache_context ----------------------------------------------------------------------


def denoise(model: nn.Module, steps: Sequence[int], branches: Sequence[str] = BRANCHES) -> list[torch.Tensor]:
    """Run a generation as Wan's pipeline does; every branch has other text and video."""
    outs = []
    for step in steps:
        for seed, name in enumerate(branches):
            with model.cache_context(name, **told(step)):
                outs.append(run(model, dm.WAN.inputs(step, 10 * seed)))
    return outs


@pytest.mark.parametrize("compile", [True, "blocks", False])
def test_branches_and_steps_of_cache_context(compile: bool | str) -> None:
    model = dm.WAN.model()
    explicit = ExplicitStates(dm.WAN, model)
    enable(model, compile)
    first = denoise(model, range(STEPS))
    states = states_of(model)
    assert len(states) == 3
    assert [[state.step(slot) for slot in (0, 1)] for state in states] == [[STEPS - 1] * 2] * 3

    want = [explicit(dm.WAN.inputs(step, 10 * seed), BRANCHES[seed]) for step in range(STEPS) for seed in (0, 1)]
    torch.testing.assert_close(first, want, rtol=0, atol=1e-5)
    report = silent_report(model)
    for slot, name in enumerate(BRANCHES):
        assert skipped_by_site(report, slot) == {site: explicit.skipped(site, name) for site in dm.WAN.swapped}
        assert min(skipped_by_site(report, slot).values()) > 0
    assert skipped_by_site(report, 0) != skipped_by_site(report, 1)

    with no_recompiles():  # the step goes backwards: a new generation
        assert all(map(torch.equal, denoise(model, range(STEPS)), first))
    assert {id(state) for state in states_of(model)} == {id(state) for state in states}


def test_branches_are_as_good_as_a_model_each() -> None:
    model, *alone = (dm.WAN.model() for _ in range(3))
    for m in (model, *alone):
        enable(m, False)
    together = denoise(model, range(STEPS))
    for i, (m, name) in enumerate(zip(alone, BRANCHES, strict=True)):
        assert skipped_by_site(silent_report(model), i)
        for step in range(STEPS):
            with m.cache_context(name, **told(step)):
                assert torch.equal(run(m, dm.WAN.inputs(step, 10 * i)), together[2 * step + i])


def test_second_transformer_begins_at_a_later_step() -> None:
    model = dm.WAN.model()
    enable(model)
    first = denoise(model, range(5, 10))
    assert skipped_by_site(silent_report(model))["blocks.0.attn1"] > 0
    with no_recompiles():
        assert all(map(torch.equal, denoise(model, range(5, 10)), first))
        # An interrupted generation leaves nothing behind either.
        denoise(model, range(5, 7))
        assert all(map(torch.equal, denoise(model, range(5, 10)), first))


def test_steps_may_be_told_now_and_counted_then() -> None:
    model = dm.WAN.model()
    enable(model, False)
    dense = denoise(enable(dm.WAN.model(), False, threshold=NEVER), range(2))
    denoise(model, range(STEPS))
    lite_attention.reset(model)
    outs = []
    for step in range(2):
        for seed, name in enumerate(BRANCHES):
            with model.cache_context(name):
                outs.append(run(model, dm.WAN.inputs(step, 10 * seed)))
    close(outs[0], dense[0])
    assert (outs[2] - dense[2]).abs().max() > 1e-4  # skips, though nobody tells the step any more


def test_threshold_of_each_step_is_that_of_the_step_told() -> None:
    table = torch.tensor([NEVER, NEVER, -2.0, -2.0]).view(1, 4, 1)
    model = dm.WAN.model()
    enable(model, False, threshold=table, num_steps=4)
    for step, skips in ((1, False), (2, True), (1, False)):
        with model.cache_context("cond", **told(step)):
            run(model, dm.WAN.inputs(step, 0))
        assert any(skipped_by_site(silent_report(model)).values()) == skips


def test_branch_by_hand_and_bare_calls_with_a_number_of_steps() -> None:
    model = dm.WAN.model()
    enable(model, False, num_steps=STEPS)
    outs: list[list[torch.Tensor]] = [[], []]
    for generation in range(2):
        for step in range(STEPS):
            for seed, name in enumerate(BRANCHES):
                with lite_attention.branch(name, model=model):
                    outs[generation].append(run(model, dm.WAN.inputs(step, 10 * seed)))
    assert all(map(torch.equal, *outs))  # the step after the last is the first, without anyone resetting
    assert not torch.equal(outs[0][0], outs[0][2])


# ---- pipelines -----------------------------------------------------------------------------------------------------


class Pipeline(DiffusionPipeline):
    """The denoising loop of Wan's pipeline, which needs a text encoder. progress_bar and components are diffusers'."""

    _optional_components = ["transformer_2"]  # noqa: RUF012

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2)
        self.set_progress_bar_config(disable=True)

    def __call__(
        self,
        case: Case = dm.WAN,
        steps: int = STEPS,
        *,
        tell: bool = True,
        boundary: int | None = None,
        contexts: Sequence[str] = BRANCHES,
        interrupt_at: int | None = None,
    ) -> list[torch.Tensor]:
        outs = []
        with self.progress_bar(total=steps) as progress_bar:
            for step in range(steps):
                if step == interrupt_at:
                    raise KeyboardInterrupt
                second = boundary is not None and step >= boundary
                model = self.transformer_2 if second else self.transformer
                for seed, name in enumerate(contexts):
                    with model.cache_context(name, **(told(step, steps) if tell else {})):
                        outs.append(run(model, case.inputs(step, 10 * seed)))
                progress_bar.update()
        return outs


@pytest.mark.parametrize(("compile", "tell"), [(True, False), ("blocks", True), (False, True), (False, False)])
def test_pipeline_starts_fresh_at_each_generation(compile: bool | str, tell: bool) -> None:
    pipe = Pipeline(dm.WAN.model())
    explicit = ExplicitStates(dm.WAN, pipe.transformer)
    assert enable(pipe, compile) is pipe
    first = pipe(tell=tell)
    want = [explicit(dm.WAN.inputs(step, 10 * seed), BRANCHES[seed]) for step in range(STEPS) for seed in (0, 1)]
    torch.testing.assert_close(first, want, rtol=0, atol=1e-5)
    assert min(skipped_by_site(silent_report(pipe)).values()) > 0
    with no_recompiles():
        assert all(map(torch.equal, pipe(tell=tell), first))
        with pytest.raises(KeyboardInterrupt):
            pipe(tell=tell, interrupt_at=2)
        assert all(map(torch.equal, pipe(tell=tell), first))


@pytest.mark.parametrize("tell", [True, False])
def test_pipeline_with_two_transformers(tell: bool) -> None:
    pipe = Pipeline(dm.WAN.model(0), dm.WAN.model(1))
    explicit = [ExplicitStates(dm.WAN, model) for model in (pipe.transformer, pipe.transformer_2)]
    enable(pipe, False)
    generations = [pipe(steps=6, tell=tell, boundary=3) for _ in range(2)]
    want = [explicit[step >= 3](dm.WAN.inputs(step, 10 * seed), BRANCHES[seed]) for step in range(6) for seed in (0, 1)]
    torch.testing.assert_close(generations[0], want, rtol=0, atol=1e-5)
    assert all(map(torch.equal, *generations))
    report = silent_report(pipe)
    assert [row.name for row in report.swapped] == [
        f"{part}.blocks.{layer}.attn1" for part in ("transformer", "transformer_2") for layer in range(3)
    ]
    assert len({state.skip_mask.data_ptr() for state in states_of(pipe)}) == 6
    assert min(skipped_by_site(report).values()) > 0
    assert [row.name for row in silent_report(pipe.transformer_2).swapped] == dm.WAN.swapped


LTX2_CONTEXTS = ("cond_uncond", "uncond_stg", "uncond_modality")


@pytest.mark.parametrize("tell", [True, False])
def test_three_contexts_have_three_slots(tell: bool) -> None:
    pipe = Pipeline(dm.LTX2.model())
    explicit = ExplicitStates(dm.LTX2, pipe.transformer)
    enable(pipe, False, slots=2)
    with pytest.warns(UserWarning, match=r"more than 2 passes: the others are dense. Give enable\(\) slots=3"):
        pipe(dm.LTX2, tell=tell, contexts=LTX2_CONTEXTS)

    enable(pipe, False)
    got = pipe(dm.LTX2, tell=tell, contexts=LTX2_CONTEXTS)
    want = [
        explicit(dm.LTX2.inputs(step, 10 * seed), name)
        for step in range(STEPS)
        for seed, name in enumerate(LTX2_CONTEXTS)
    ]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for slot, name in enumerate(LTX2_CONTEXTS):
        skipped = skipped_by_site(silent_report(pipe.transformer), slot)
        assert skipped == {site: explicit.skipped(site, name) for site in dm.LTX2.swapped}
        assert min(skipped.values()) > 0


def dit_pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        norm_num_groups=4, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for block in transformer.transformer_blocks:
        block.attn1.to_q.weight.data *= 8  # peaked attention
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
        norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("compile", [True, False])
def test_a_pipeline_of_diffusers(compile: bool) -> None:
    """It has neither contexts nor steps, and one batch for cond and uncond: the progress bar tells all."""

    def images(pipe: DiTPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe([3], num_inference_steps=4, generator=generator, output_type="pt").images

    pipe = dit_pipeline()
    dense = images(pipe)
    enable(pipe, compile, threshold=NEVER)
    close(images(pipe), dense)
    enable(pipe, compile, threshold=-1.0)
    first = images(pipe)
    report = silent_report(pipe)
    assert dm.names(report) == [f"transformer.transformer_blocks.{layer}.attn1" for layer in range(2)]
    assert min(skipped_by_site(report).values()) > 0
    assert not torch.equal(first, dense)
    with no_recompiles():
        assert torch.equal(images(pipe), first)
    lite_attention.disable(pipe)
    close(images(pipe), dense)


class ModularPipeline:
    """As in diffusers, it has components, and its blocks have the progress bars."""

    def __init__(self, transformer: nn.Module) -> None:
        self.components = {"transformer": transformer, "scheduler": None}


def test_pipeline_without_a_progress_bar() -> None:
    pipe = ModularPipeline(dm.WAN.model())
    enable(pipe, False)
    (model,) = (pipe.components["transformer"],)
    assert isinstance(model, nn.Module)
    first = denoise(model, range(STEPS))
    assert all(map(torch.equal, denoise(model, range(STEPS)), first))
    assert lite_attention.disable(pipe) is pipe


# ---- undoing -------------------------------------------------------------------------------------------------------


def traces(model: nn.Module) -> dict[str, Any]:
    """Return whatever enable() may have left on a model."""
    found: dict[str, Any] = {key: value for key, value in vars(model).items() if key == "cache_context"}
    for name, module in model.named_modules():
        found |= {f"{name} call": module._compiled_call_impl} if module._compiled_call_impl is not None else {}
        found |= {f"{name} hooks": [*module._forward_hooks, *module._forward_pre_hooks]} if (
            module._forward_hooks or module._forward_pre_hooks
        ) else {}  # fmt: skip
    return found


@pytest.mark.parametrize("compile", [True, "blocks", False])
def test_disable_undoes_everything(compile: bool | str) -> None:
    pipe = Pipeline(SMALL.model(0), SMALL.model(1))
    dense = pipe(boundary=2)
    enable(pipe, compile)
    assert traces(pipe.transformer)
    assert "progress_bar" in vars(pipe)
    assert not all(map(torch.equal, pipe(boundary=2), dense))
    state = weakref.ref(states_of(pipe)[0])

    assert lite_attention.disable(pipe) is pipe
    assert [traces(model) for model in (pipe.transformer, pipe.transformer_2)] == [{}, {}]
    assert "progress_bar" not in vars(pipe)
    assert all(map(torch.equal, pipe(boundary=2), dense))
    gc.collect()
    assert state() is None
    with pytest.warns(UserWarning, match="no attention of this model is skip-aware"):
        assert lite_attention.report(pipe, file=io.StringIO()).rows == []
    lite_attention.disable(pipe)  # once more does nothing


@pytest.mark.parametrize("compile", [True, False])
def test_enable_again_replaces_the_settings(compile: bool) -> None:
    pipe = Pipeline(SMALL.model())
    dense = pipe()
    enable(pipe, compile, slots=5)
    pipe()
    enable(pipe.transformer, compile, threshold=NEVER)  # the model alone: the pipeline still tells generations
    torch.testing.assert_close(pipe(), dense, rtol=0, atol=1e-5)
    report = silent_report(pipe)
    assert len(report.rows) == 2  # nothing of before
    assert {state.slots for state in states_of(pipe)} == {3}
    assert not any(skipped_by_site(report).values())

    enable(pipe, not compile)
    first = pipe(tell=False)
    assert all(map(torch.equal, pipe(tell=False), first))
    assert any(skipped_by_site(silent_report(pipe)).values())
    lite_attention.disable(pipe)
    assert traces(pipe.transformer) == {}
    assert "progress_bar" not in vars(pipe)


@pytest.mark.parametrize("compile", [True, False])
def test_model_compiled_earlier_is_compiled_anew_and_gets_its_code_back(compile: bool) -> None:
    model = SMALL.model()
    model.compile_repeated_blocks(backend="eager")
    before = traces(model)
    dense = run(model, SMALL.inputs(0, 0))
    enable(model, compile, threshold=NEVER, num_steps=2)
    close(run(model, SMALL.inputs(0, 0)), dense)
    check_sites(SMALL, silent_report(model))
    lite_attention.disable(model)
    assert traces(model) == before
    assert len(before) == 1


@pytest.mark.parametrize("compile", [True, "blocks", False])
def test_enabled_model_is_freed(compile: bool | str) -> None:
    pipe = enable(Pipeline(SMALL.model()), compile)
    pipe(steps=2)
    gone = [weakref.ref(pipe), weakref.ref(pipe.transformer), weakref.ref(states_of(pipe)[0])]
    del pipe
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unsuitable", [3, None, torch.zeros(2), "Wan", type("P", (), {"components": {"unet": Toy(1)}})()]
)
def test_neither_model_nor_pipeline(unsuitable: object) -> None:
    with pytest.raises(ValueError, match=r"model_or_pipe: expected an nn.Module or a diffusers pipeline"):
        lite_attention.enable(unsuitable)


def test_result_of_torch_compile() -> None:
    compiled = torch.compile(dm.WAN.model(), backend="eager")
    with pytest.raises(ValueError, match=r"model_or_pipe: expected a model before torch.compile"):
        lite_attention.enable(compiled)
    pipe = Pipeline(dm.WAN.model())
    pipe.transformer = compiled
    with pytest.raises(ValueError, match=r"transformer: expected a model before torch.compile"):
        enable(pipe)
    assert "progress_bar" not in vars(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "whole"}, r"compile: expected True, False or 'blocks', got 'whole'"),
        ({"compile": "blocks"}, r"compile: .* CogVideoXTransformer3DModel names no repeated blocks"),
        ({"threshold": 1.0}, "threshold: expected at most 0"),
        ({"threshold": float("nan")}, "threshold: expected numbers, got NaN"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"slots": 0}, "slots: expected at least 1, got 0"),
        ({"implementation": "cuda"}, "implementation: expected None or 'reference'"),
        ({"mode": "max-autotune", "options": {"max_autotune": True}}, "mode"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(options: dict[str, Any], message: str) -> None:
    pipe = Pipeline(dm.COGVIDEOX.model())
    with pytest.raises((ValueError, RuntimeError), match=message):
        lite_attention.enable(pipe, **options)
    assert traces(pipe.transformer) == {}
    assert "progress_bar" not in vars(pipe)


# ---- sessions ------------------------------------------------------------------------------------------------------


def test_models_have_branches_of_their_own() -> None:
    one, two = enable(Toy(1), False, num_steps=3), enable(Toy(1, seed=1), False, num_steps=3)
    for name in ("a", "b", "b2"):
        with lite_attention.branch(name, model=one):
            one(tokens(0), context())
    for name in ("c", "d"):
        with lite_attention.branch(name, model=two):
            two(tokens(0), context())
    with pytest.raises(ValueError, match="slots=4"), lite_attention.branch("c", model=one):
        pass
    assert isinstance(lite_attention.enabled.session_of(one), Session)
    lite_attention.reset(one)
    assert [state.step(0) for model in (one, two) for state in states_of(model)] == [0, 1]
