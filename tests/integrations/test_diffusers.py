"""diffusers' backend switch does what `enable(model, compile=False)` does, and nothing is left when it is over."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import AttentionBackendName, FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers import attention_backend as with_backend
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry
from torch import nn

import lite_attention
import lite_attention.integrations.diffusers as lite
from lite_attention.enabled import store_of
from tests.support import diffusers_models as dm
from tests.support import pipelines
from tests.support.diffusers_models import silent_report

OPTIONS: dict[str, Any] = {"threshold": -4.0, "tile_shape": dm.TILE}
STEPS = 5


@pytest.fixture(autouse=True)
def _configured() -> Iterator[None]:
    lite.configure(**OPTIONS)
    yield
    lite.configure()
    assert Registry._active_backend is AttentionBackendName.NATIVE


def backends(model: nn.Module) -> set[Any]:
    processors = [getattr(module, "processor", None) for module in model.modules()]
    return {p._attention_backend for p in processors if hasattr(p, "_attention_backend")}


def skipped(model: nn.Module) -> dict[str, int]:
    """Return the number of skipped tiles of each site, of all branches."""
    rows = silent_report(model).swapped
    return {row.name: int((~row.state.kept_tiles()).sum()) for row in rows if row.state is not None}


def enabled_by_hand(build: Callable[[], Any], **options: Any) -> tuple[list[torch.Tensor], dict[str, int]]:
    """Return two generations of a pipeline whose transformer is enabled, and the tiles then skipped."""
    pipe = build()
    lite_attention.enable(pipe.transformer, compile=False, **(OPTIONS | options))
    latents = [pipelines.generate(pipe, seed, STEPS) for seed in (0, 1)]
    return latents, skipped(pipe.transformer)


# ---- the switch ------------------------------------------------------------------------------------------------------

PIPELINES: dict[str, Callable[[], Any]] = {
    "Wan tells branch and step": pipelines.wan,
    "Wan tells the branch": lambda: pipelines.wan_image_to_video(boundary=None),
    "LTX tells the timestep": pipelines.ltx,
    "LTX-2 has three branches": pipelines.ltx2,
    "Flux": pipelines.flux,
}


@pytest.mark.parametrize("name", PIPELINES)
def test_setting_the_backend_is_enabling_until_it_is_reset(name: str) -> None:
    want, tiles = enabled_by_hand(PIPELINES[name])
    pipe = PIPELINES[name]()
    dense = pipelines.generate(pipe, 0, STEPS)
    pipe.transformer.set_attention_backend("lite_attention")
    assert [*map(torch.equal, (pipelines.generate(pipe, seed, STEPS) for seed in (0, 1)), want)] == [True, True]
    assert skipped(pipe.transformer) == tiles
    assert max(tiles.values()) > 0
    pipe.transformer.reset_attention_backend()
    assert store_of(pipe.transformer) is None
    assert torch.equal(pipelines.generate(pipe, 0, STEPS), dense)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_context_is_enabling_while_it_lasts(name: str) -> None:
    want, _ = enabled_by_hand(PIPELINES[name])
    pipe = PIPELINES[name]()
    dense = pipelines.generate(pipe, 0, STEPS)
    for _ in range(2):
        with with_backend("lite_attention"):
            assert all(map(torch.equal, (pipelines.generate(pipe, seed, STEPS) for seed in (0, 1)), want))
            assert max(skipped(pipe.transformer).values()) > 0
        assert store_of(pipe.transformer) is None
        assert torch.equal(pipelines.generate(pipe, 0, STEPS), dense)


def test_a_model_whose_processors_have_no_backend() -> None:
    model, by_hand = dm.COGVIDEOX.model(), dm.COGVIDEOX.model()
    lite_attention.enable(by_hand, compile=False, **OPTIONS)
    want = [dm.run(by_hand, dm.COGVIDEOX.inputs(step, 0)) for step in range(3)]
    model.set_attention_backend("lite_attention")
    assert all(torch.equal(dm.run(model, dm.COGVIDEOX.inputs(step, 0)), want[step]) for step in range(3))
    model.reset_attention_backend()
    with with_backend("lite_attention"):
        assert all(torch.equal(dm.run(model, dm.COGVIDEOX.inputs(step, 0)), want[step]) for step in range(3))


def test_the_name_is_a_member_like_the_others() -> None:
    member = AttentionBackendName("lite_attention")
    assert member is AttentionBackendName.LITE_ATTENTION
    assert member in [*AttentionBackendName]
    assert member in Registry.list_backends()
    assert (member.name, member.value, str.__str__(member)) == ("LITE_ATTENTION", "lite_attention", "lite_attention")


def test_the_residual_by_options() -> None:
    options: dict[str, Any] = {"threshold": None, "method": "residual", "keep": 0.3, "num_steps": STEPS}
    pipe = pipelines.wan()
    lite_attention.enable(pipe.transformer, compile=False, **(OPTIONS | options))
    want = pipelines.generate(pipe, 0, STEPS)
    lite.configure(**(OPTIONS | options))
    other = pipelines.wan()
    other.transformer.set_attention_backend("lite_attention")
    assert torch.equal(pipelines.generate(other, 0, STEPS), want)
    assert not torch.equal(pipelines.generate(pipelines.wan(), 0, STEPS), want)


# ---- whose it is -----------------------------------------------------------------------------------------------------


def test_another_backend_takes_its_place() -> None:
    model = dm.WAN.model()
    model.set_attention_backend("lite_attention")
    model.set_attention_backend("native")
    assert store_of(model) is None
    model.set_attention_backend("lite_attention")
    assert store_of(model) is not None
    with with_backend("native"):  # a model's own goes before the context's
        dm.run(model, dm.WAN.inputs(0, 0))
    assert len(silent_report(model).swapped) == 3


def test_other_models_stay_as_they_are() -> None:
    model, other = dm.WAN.model(), dm.WAN.model()
    model.set_attention_backend("lite_attention")
    dm.run(other, dm.WAN.inputs(0, 0))
    assert store_of(other) is None
    other.set_attention_backend("native")
    with with_backend("lite_attention"):
        dm.run(other, dm.WAN.inputs(0, 0))
    assert store_of(other) is None


def test_options_of_enable_stay_and_so_does_the_model() -> None:
    model = lite_attention.enable(dm.WAN.model(), compile=False, **(OPTIONS | {"slots": 7}))
    store = store_of(model)
    model.set_attention_backend("lite_attention")
    with with_backend("lite_attention"):
        dm.run(model, dm.WAN.inputs(0, 0))
    assert len(silent_report(model).swapped) == 3
    model.reset_attention_backend()
    assert store_of(model) is store is not None


def test_enabled_by_hand_afterwards() -> None:
    model = dm.WAN.model()
    model.set_attention_backend("lite_attention")
    lite_attention.enable(model, compile=False, **OPTIONS)
    store = store_of(model)
    model.reset_attention_backend()
    assert store_of(model) is store is not None


def test_exact_tokens_are_an_option() -> None:
    lite.configure(**OPTIONS, exact_tokens=[(0, 16)])
    pipe = pipelines.wan()
    pipe.transformer.set_attention_backend("lite_attention")
    pipelines.generate(pipe, 0, STEPS)
    rows = silent_report(pipe.transformer).swapped
    assert {row.exact_tokens for row in rows} == {((0, 16),)}
    assert all(row.state is not None and row.state.kept_tiles()[..., 0].all() for row in rows)


def test_options_are_those_of_the_last_configure() -> None:
    model = dm.WAN.model()
    model.set_attention_backend("lite_attention")
    lite.configure(**(OPTIONS | {"threshold": -math.inf}))
    model.set_attention_backend("lite_attention")
    for step in range(3):
        dm.run(model, dm.WAN.inputs(step, 0))
    assert not any(skipped(model).values())


def test_a_model_within_a_model_is_part_of_it() -> None:
    class Outer(type(dm.WAN.model())):  # type: ignore[misc]
        def forward(self, timestep: torch.Tensor, **inputs: Any) -> Any:
            return self.inner(timestep=timestep, **inputs)

    outer = dm.WAN.model()
    outer.inner = dm.WAN.model()
    outer.__class__ = Outer
    with with_backend("lite_attention"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lite_attention: nobody tells")
        dm.run(outer, dm.WAN.inputs(0, 0))
        assert store_of(outer.inner) is None
        assert [row.name for row in silent_report(outer).swapped] == [f"inner.{name}" for name in dm.WAN.swapped]


def test_compiled_models_are_enabled_so_by_an_option() -> None:
    lite.configure(**OPTIONS, compile=True, inner="eager")
    model, eager = dm.WAN_OF_ONE_LAYER.model(), dm.WAN_OF_ONE_LAYER.model()
    lite_attention.enable(eager, compile=False, **OPTIONS)
    model.set_attention_backend("lite_attention")
    for step in range(3):
        got, want = (dm.run(each, dm.WAN.inputs(step, 0)) for each in (model, eager))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert skipped(model) == skipped(eager)
    assert min(skipped(model).values()) > 0


def test_the_result_of_torch_compile_stays_as_it_is_within_the_context() -> None:
    model, inputs = dm.WAN_OF_ONE_LAYER.model(), dm.WAN.inputs(0, 0)
    dense = dm.run(model, inputs)
    compiled = torch.compile(model, backend="eager")
    with with_backend("lite_attention"):
        torch.testing.assert_close(dm.run(compiled, inputs), dense, rtol=0, atol=1e-5)
    assert store_of(model) is None


def test_nothing_keeps_a_model_alive() -> None:
    model = dm.WAN.model()
    model.set_attention_backend("lite_attention")
    dm.run(model, dm.WAN.inputs(0, 0))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ---- with what else diffusers does -----------------------------------------------------------------------------------


def offloaded(pipe: Any) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, cpu, cpu, "block_level", num_blocks_per_group=1)


def stored_in_float8(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


class LoRA(nn.Module):
    """An adapter beside a linear layer, as peft puts it in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.low, self.high = (
            nn.Parameter(0.2 * dm.noise(*size)) for size in ((4, base.in_features), (base.out_features, 4))
        )
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.low.T @ self.high.T


class Int8(nn.Module):
    """A quantized weight, which is no parameter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale, self.bias = base.weight.abs().amax() / 127, base.bias
        self.values = (base.weight / self.scale).round().to(torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.values * self.scale, self.bias)


def replace_projections(model: nn.Module, kind: Callable[[Any], nn.Module], of: type[nn.Module] = nn.Linear) -> None:
    for module in model.modules():
        for name in ("to_q", "to_k", "to_v"):
            if isinstance(getattr(module, name, None), of):
                setattr(module, name, kind(getattr(module, name)))


def fused(adapter: LoRA) -> LoRA:
    adapter.base_layer.weight += adapter.high @ adapter.low
    adapter.high.zero_()
    return adapter


ADAPTER_STEPS: dict[str, Callable[[nn.Module], None]] = {
    "load": lambda model: replace_projections(model, LoRA),
    "fuse": lambda model: replace_projections(model, fused, LoRA),
    "unload": lambda model: replace_projections(model, lambda adapter: adapter.base_layer, LoRA),
}


@torch.no_grad()
def test_adapters_may_come_and_go() -> None:
    lite.configure(**(OPTIONS | {"threshold": -math.inf}))
    pipe, dense = pipelines.wan(), pipelines.wan()
    pipe.transformer.set_attention_backend("lite_attention")
    before = pipelines.generate(pipe, 0, STEPS)
    for name, step in ADAPTER_STEPS.items():
        step(pipe.transformer)
        step(dense.transformer)
        got = pipelines.generate(pipe, 0, STEPS)
        torch.testing.assert_close(got, pipelines.generate(dense, 0, STEPS), rtol=0, atol=1e-4, msg=name)
        assert (got - before).abs().max() > 1e-2, name
        assert [row.name for row in silent_report(pipe.transformer).swapped] == dm.WAN.swapped


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
    "magnitudes": lambda: MagCacheConfig(
        threshold=0.5, num_inference_steps=STEPS, retention_ratio=0.1, mag_ratios=torch.ones(STEPS)
    ),
    "series": lambda: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, max_order=1, cache_identifiers=["^blocks.*attn1$"]
    ),
}
BESIDE: dict[str, Callable[[Any], None]] = {
    "group offload": offloaded,
    "weights in float8": stored_in_float8,
    "weights in int8": lambda pipe: replace_projections(pipe.transformer, Int8),
    **{name: lambda pipe, make=make: pipe.transformer.enable_cache(make()) for name, make in CACHES.items()},
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_beside(name: str, is_first: bool) -> None:
    """At threshold -inf as without the backend; else the sites skip, and all are at the last step."""
    alone = pipelines.wan_image_to_video(boundary=None)
    BESIDE[name](alone)
    want = pipelines.generate(alone, 0, STEPS)
    for threshold in (-math.inf, -4.0):
        pipe = pipelines.wan_image_to_video(boundary=None)
        lite.configure(**(OPTIONS | {"threshold": threshold}))
        if is_first:
            BESIDE[name](pipe)
        pipe.transformer.set_attention_backend("lite_attention")
        if not is_first:
            BESIDE[name](pipe)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "lite_attention")
            got = pipelines.generate(pipe, 0, STEPS)
        rows = silent_report(pipe.transformer).swapped
        assert [row.name for row in rows] == dm.WAN.swapped
        assert {(row.state.step(0), row.state.step(1)) for row in rows if row.state} == {(STEPS, STEPS)}
        if threshold == -math.inf:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    assert any(skipped(pipe.transformer).values())


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.0}, ValueError, "threshold: expected at most 0"),
        ({"treshold": -1.0}, TypeError, "treshold"),
        ({"preset": "slow"}, ValueError, "preset: expected one of .* got 'slow'"),
        ({"compile": "whole"}, ValueError, "compile: expected True, False or 'blocks', got 'whole'"),
        ({"keep": 0.3}, ValueError, "keep"),
        ({"exact_tokens": [(5, 3)]}, ValueError, "exact_tokens: expected a start before its end"),
        ({"exact_tokens": [(3, 5)], "token_order": "tile3d"}, ValueError, "exact_tokens: expected 'auto' or None"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lite.configure(**options)
    assert lite._options == OPTIONS


def test_what_cannot_be_enabled_keeps_its_backend() -> None:
    lite.configure(token_order="tile3d")
    model = dm.FLUX.model()
    with pytest.raises(ValueError, match="token_order"):
        model.set_attention_backend("lite_attention")
    assert backends(model) == {None}
    assert store_of(model) is None
