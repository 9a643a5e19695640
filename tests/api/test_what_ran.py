"""What runs is what is reported: calls that end up dense say so once, with the cause, and so does the report."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lite_attention
from lite_attention.enabled import store_of
from lite_attention.model_sites import sites_of
from tests.support import diffusers_models as dm
from tests.support import pipelines
from tests.support.diffusers_models import TILE, run, silent_report
from tests.support.toys import Attention, Toy, context, tokens

SMALL = dm.WAN_OF_ONE_LAYER


def enable(target: Any, compile: bool | str = True, **options: Any) -> Any:
    if compile:
        options["inner"] = "eager"
    return lite_attention.enable(target, compile=compile, **{"threshold": -4.0, "tile_shape": TILE} | options)


def lines(target: Any) -> dict[str, str]:
    """Return what the report says of each site's attention, and the shares skipped, by name."""
    return {row.name: " ".join(row.cells()[4:]).strip() for row in silent_report(target).rows}


@pytest.fixture(autouse=True)
def _quiet_dynamo() -> Iterator[None]:
    torch._logging.set_logs(dynamo=50, recompiles=False)
    yield
    torch._logging.set_logs()


# ---- compiled code that does not run -------------------------------------------------------------------------------


def test_beyond_the_limit_of_recompiles() -> None:
    model, dense = enable(Toy(1), num_steps=9, dynamic=False), Toy(1)
    with torch._dynamo.config.patch(recompile_limit=1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(2):
                model(tokens(step), context())
        assert lines(model)["blocks.0.attn1"].startswith("skip-aware ")
        with pytest.warns(UserWarning, match=r"ran without skipping.*recompile_limit"):
            model(tokens(0, seq=128), context())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once
            out = model(tokens(1, seq=128), context())
    assert torch.equal(out, dense(tokens(1, seq=128), context()))
    assert lines(model)["blocks.0.attn1"] == "skip-aware, but it did not run in the last forward"
    assert "1 of these did not skip in the last forward" in str(silent_report(model))
    model(tokens(2), context())
    assert lines(model)["blocks.0.attn1"].startswith("skip-aware ")


@pytest.mark.parametrize("compile", [True, False])
def test_a_call_of_another_kind(compile: bool) -> None:
    """A site that skips gets a mask that differs per query."""
    model = enable(Attention(), compile, num_steps=9)
    for step in range(2):
        model(tokens(step))
    mask = torch.ones(96, 96, dtype=torch.bool).tril()
    with pytest.warns(UserWarning, match=r"ran dense: bool mask that differs per query.*see lite_attention.report"):
        model(tokens(0), attn_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        model(tokens(1), attn_mask=mask)
    (line,) = lines(model).values()
    assert line == "skip-aware, but dense in its last call: bool mask that differs per query, shape (96, 96)"
    model(tokens(2))
    (line,) = lines(model).values()
    assert line.startswith("skip-aware ")
    assert "but" not in line


@pytest.mark.parametrize("compile", [True, False])
def test_a_cause_is_said_once_for_all_sites(compile: bool) -> None:
    model = enable(Toy(3), compile, num_steps=9)
    for step in range(2):
        model(tokens(step), context())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(tokens(2).requires_grad_(), context())
    (message,) = (str(warning.message) for warning in caught)
    assert "ran dense: needs gradients" in message
    assert "recompile_limit" not in message
    noted = [line for name, line in lines(model).items() if name.endswith("attn1")]
    assert len(noted) == 3
    assert all("dense in its last call: needs gradients" in line for line in noted)


def test_a_forward_that_another_thread_overtakes_ran_all_sites() -> None:
    model = enable(Toy(2), False, num_steps=9)
    model(tokens(0), context())
    arrived, overtaken = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is slow:
            arrived.set()
            overtaken.wait(60)

    model.blocks[1].register_forward_pre_hook(wait)
    slow = threading.Thread(target=lambda: model(tokens(1), context()))
    slow.start()
    arrived.wait(60)
    model(tokens(1), context())
    overtaken.set()
    slow.join()
    assert all(line.startswith("skip-aware ") for name, line in lines(model).items() if name.endswith("attn1"))


@pytest.mark.parametrize("compile", [True, False])
def test_a_model_that_is_cast_is_known_by_its_dtype_now(compile: bool) -> None:
    model = enable(Toy(1), compile, num_steps=9)
    model(tokens(0), context())
    model.bfloat16()
    model(tokens(1).bfloat16(), context().bfloat16())
    assert [site.dtype for site in sites_of(model) if site.swapped] == [torch.bfloat16]


# ---- shapes alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [True, False])
def test_a_forward_of_fake_tensors_is_no_step(compile: bool) -> None:
    model = enable(Toy(1), compile, num_steps=2)
    model(tokens(0), context())
    state, mode = silent_report(model).swapped[0].state, FakeTensorMode(allow_non_fake_inputs=True)
    control = state.control.clone()
    with mode, warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(mode.from_tensor(tokens(1)), mode.from_tensor(context()))
    assert out.shape == (1, 96, 32)
    assert torch.equal(state.control, control)
    model(tokens(1), context())
    assert state.step(0) == 2


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_an_enabled_model_is_not_exported(compile: bool, strict: bool) -> None:
    model = enable(Toy(1), compile, num_steps=9)
    model(tokens(0), context())
    state = silent_report(model).swapped[0].state
    control = state.control.clone()
    with pytest.raises(Exception, match=r"lite_attention.disable\(model\) first"):
        torch.export.export(model, (tokens(0), context()), strict=strict)
    assert torch.equal(state.control, control)


# ---- compiling what is enabled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [True, "blocks", False])
def test_compile_in_place_is_refused(compile: bool | str) -> None:
    model = enable(SMALL.model(), compile, num_steps=4)
    want = run(model, SMALL.inputs(0, 0))
    for method in ("compile", "compile_repeated_blocks"):
        with pytest.raises(ValueError, match=r"model: expected one that is not enabled.*disable\(\) first"):
            getattr(model, method)()
    lite_attention.reset(model)
    assert torch.equal(run(model, SMALL.inputs(0, 0)), want)
    lite_attention.disable(model)
    model.compile(backend="eager")
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize("compile", [True, "blocks", False])
def test_torch_compile_around_an_enabled_model_keeps_the_swap(compile: bool | str) -> None:
    model, alone = (enable(SMALL.model(), compile, num_steps=9) for _ in range(2))
    around = torch.compile(model, backend="eager")
    for step in range(3):
        got, want = run(around, SMALL.inputs(step, 0)), run(alone, SMALL.inputs(step, 0))
        assert torch.equal(got, want)
    assert silent_report(around).swapped[0].sparsity[0] > 0


class Outer(nn.Module):
    """What calls an enabled model, and is compiled as a whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return 2.0 * self.model(*args)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("build", [Outer, lambda model: Outer(model).forward], ids=["module", "function"])
def test_what_is_compiled_around_an_enabled_model_keeps_the_swap(build: Any, compile: bool) -> None:
    model, alone = (enable(Toy(1), compile, num_steps=9) for _ in range(2))
    around = torch.compile(build(model), backend="eager")
    for step in range(3):
        assert torch.equal(around(tokens(step), context()), 2.0 * alone(tokens(step), context()))
    assert silent_report(model).swapped[0].sparsity[0] > 0
    torch._dynamo.reset()
    with pytest.raises(Exception, match="lite_attention runs this model"):
        torch.compile(build(model), backend="eager", fullgraph=True)(tokens(0), context())


# ---- copies and pickles -------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "a part": lambda model: pickle.dumps(next(iter(model.children()))),
}


@pytest.mark.parametrize("compile", [True, "blocks", False])
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_an_enabled_model_is_not_pickled(way: str, compile: bool | str) -> None:
    model = enable(SMALL.model(), compile, num_steps=4)
    run(model, SMALL.inputs(0, 0))
    with pytest.raises(ValueError, match=r"lite_attention.disable\(model\) first"):
        WAYS[way](model)
    assert run(model, SMALL.inputs(1, 0)) is not None
    lite_attention.disable(model)
    WAYS[way](model)


def test_a_part_of_an_eager_model_is_not_pickled_either() -> None:
    model = enable(Toy(1), False)
    with pytest.raises(ValueError, match=r"lite_attention.disable\(model\) first"):
        WAYS["a part"](model)


@pytest.mark.parametrize("compile", [True, "blocks", False])
def test_a_deep_copy_is_dense_says_so_and_can_be_enabled(compile: bool | str) -> None:
    model, plain = enable(SMALL.model(), compile, num_steps=9), SMALL.model()
    for step in range(2):
        run(model, SMALL.inputs(step, 0))
    state = silent_report(model).swapped[0].state
    control = state.control.clone()
    with pytest.warns(UserWarning, match=r"the copy .* is not enabled"):
        twin = copy.deepcopy(model)
    with twin.cache_context("other", step_index=7):
        assert torch.equal(run(twin, SMALL.inputs(2, 0)), run(plain, SMALL.inputs(2, 0)))
    assert torch.equal(state.control, control)
    enable(twin, compile, num_steps=9)
    run(twin, SMALL.inputs(0, 0))
    assert silent_report(twin).swapped[0].state is not state
    lite_attention.disable(twin)
    assert torch.equal(run(twin, SMALL.inputs(2, 0)), run(plain, SMALL.inputs(2, 0)))


def test_a_shallow_copy_moves_nothing() -> None:
    model, plain = enable(SMALL.model(), False, num_steps=9), SMALL.model()
    run(model, SMALL.inputs(0, 0))
    control = silent_report(model).swapped[0].state.control.clone()
    twin = copy.copy(model)
    with twin.cache_context("other", step_index=7):
        assert torch.equal(run(twin, SMALL.inputs(2, 0)), run(plain, SMALL.inputs(2, 0)))
    assert torch.equal(silent_report(model).swapped[0].state.control, control)


# ---- adapters -----------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """What an adapter puts in the place of a layer: the layer as a child, and something added."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) * 1.25


def adapt(model: nn.Module, name: str) -> None:
    setattr(model, name, Adapted(getattr(model, name)))


def unload(model: nn.Module, name: str) -> None:
    setattr(model, name, getattr(model, name).base_layer)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("layer", ["proj_out", "patch_embedding"])
def test_a_token_order_survives_adapters(layer: str, compile: bool) -> None:
    """Nothing is skipped, so the output is that of the model as it is now, whatever was there before."""
    x, plain, adapted = SMALL.inputs(0, 0), SMALL.model(), SMALL.model()
    adapt(adapted, layer)
    want = run(plain, x), run(adapted, x)
    assert (want[0] - want[1]).abs().max() > 1e-3
    model = enable(SMALL.model(), compile, threshold=-torch.inf, token_order=(2, 2, 2), num_steps=99)
    for change, expected in ((adapt, want[1]), (unload, want[0]), (adapt, want[1]), (unload, want[0])):
        run(model, x)
        change(model, layer)
        torch.testing.assert_close(run(model, x), expected, rtol=1e-4, atol=1e-4)
    lite_attention.disable(model)
    assert not [
        hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks) if hooks
    ]


# ---- what is left behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [True, False])
def test_enabling_again_and_again_leaves_nothing_and_meets_no_limit(compile: bool) -> None:
    model, stores = Toy(1), []
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            enable(model, compile, num_steps=4)
            for step in range(2):
                model(tokens(step), context())
            assert lines(model)["blocks.0.attn1"].startswith("skip-aware ")
            stores.append(weakref.ref(store_of(model)))
            lite_attention.disable(model)
    gc.collect()
    assert [store() for store in stores] == [None] * 4


@pytest.mark.parametrize("compile", [True, "blocks", False])
@pytest.mark.parametrize("token_order", [None, (2, 2, 2)])
@pytest.mark.parametrize("compiled_before", [False, True])
def test_an_enabled_model_is_freed_with_its_states(
    compile: bool | str, token_order: Any, compiled_before: bool
) -> None:
    model = SMALL.model()
    if compiled_before:
        model.compile(backend="eager")
    enable(model, compile, num_steps=9, token_order=token_order)
    run(model, SMALL.inputs(0, 0))
    alive = weakref.ref(model), weakref.ref(silent_report(model).swapped[0].state)
    del model
    gc.collect()
    assert [found() for found in alive] == [None, None]


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("outer_first", [True, False])
@pytest.mark.parametrize("disabled_first", ["outer", "inner"])
def test_an_enabled_model_within_another(compile: bool, outer_first: bool, disabled_first: str) -> None:
    """The inner one runs as it was enabled last; each is undone by itself."""
    outer, plain = Toy(2), Toy(2)
    models = {"outer": outer, "inner": outer.blocks[0]}
    for name in ("outer", "inner") if outer_first else ("inner", "outer"):
        enable(models[name], compile, num_steps=9)
    for step in range(2):
        outer(tokens(step), context())
    assert silent_report(outer).swapped[-1].sparsity[0] > 0
    lite_attention.disable(models.pop(disabled_first))
    for step in range(2):
        out = outer(tokens(step), context())
    one_is_left = outer_first or disabled_first == "inner"  # enabling the outer one replaced what the inner one had
    assert torch.equal(out, plain(tokens(1), context())) != one_is_left
    lite_attention.disable(*models.values())
    assert torch.equal(outer(tokens(1), context()), plain(tokens(1), context()))
    assert not any(module._forward_pre_hooks or module._compiled_call_impl for module in outer.modules())


@pytest.mark.parametrize("compile", [True, "blocks"])
def test_models_freed_while_enabled_leave_no_compiled_code(compile: bool | str) -> None:
    """As where a cell of a notebook that loads and enables a pipeline is run again."""
    with torch._dynamo.config.patch(recompile_limit=2), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model = enable(SMALL.model(), compile, num_steps=4)
            for step in range(2):
                run(model, SMALL.inputs(step, 0))
            assert lines(model)["blocks.0.attn1"].startswith("skip-aware ")
            del model
            gc.collect()


@pytest.mark.parametrize("compile", [True, False])
def test_a_generation_lets_go_of_the_states_of_other_lengths(compile: bool) -> None:
    """Of the second transformer of a pipeline too, for which a generation does not begin with its first step."""
    pipe = type("Pipe", (), {})()
    pipe.components = {"transformer": SMALL.model(), "transformer_2": SMALL.model(1)}
    enable(pipe, compile)
    for width in (8, 12, 16):
        for timestep, model in zip((900, 500), pipe.components.values(), strict=True):
            x = SMALL.inputs(0, 0)
            x["hidden_states"] = dm.latents(3, 16, width, seed=0)
            run(model, x | {"timestep": torch.tensor([timestep])})
    sites = [site for site in sites_of(pipe) if site.swapped]
    assert len(sites) == 2
    for site in sites:  # those of this generation and of the last
        assert [state.capacity[2] for state in site.states] == [3 * 8 * 6, 3 * 8 * 8]


@pytest.mark.parametrize("compile", [True, False])
def test_shapes_and_shares_are_those_of_one_call(compile: bool) -> None:
    model = enable(Toy(1), compile, threshold=-1.0, num_steps=4)
    shares = {}
    for seq in (96, 48, 96):
        for step in range(2):
            model(tokens(step, seq=seq), context())
        (row,) = silent_report(model).swapped
        assert (row.q_shape, row.k_shape) == ((1, seq, 2, 16), (1, seq, 2, 16))
        assert row.sparsity == list(row.state.sparsity(per="slot"))
        shares[seq] = row.sparsity
    assert shares[48] != shares[96]


def test_a_transformer_that_comes_into_a_pipeline_later_is_dense_and_said_so() -> None:
    pipe = enable(pipelines.wan(), False)
    pipelines.generate(pipe, steps=2)
    pipe.transformer = pipelines.wan().transformer
    with pytest.warns(UserWarning, match=r"transformer came into the pipeline after enable\(\)"):
        dense = pipelines.generate(pipe, steps=2)
    assert torch.equal(dense, pipelines.generate(pipelines.wan(), steps=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lite_attention")
        pipelines.generate(pipe, steps=2)  # once
        enable(pipe, False)
        assert not torch.equal(pipelines.generate(pipe, steps=2), dense)
    lite_attention.disable(pipe.transformer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lite_attention")
        assert torch.equal(pipelines.generate(pipe, steps=2), dense)  # asked for
