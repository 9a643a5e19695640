"""Whatever is wrapped around a model's layers, a site has the name of its module, and cross-attention is never swapped.

Hooks, adapters, quantized layers and offloading break graphs, hide weights and replace `forward`.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, apply_layerwise_casting
from torch import nn

import lite_attention
from lite_attention.compile import Site
from tests.support.toys import THRESHOLD, TILE, Attention, Toy, tokens

SELF = ["blocks.0.attn1", "blocks.1.attn1"]
CROSS = ["blocks.0.attn2", "blocks.1.attn2"]
CPU = torch.device("cpu")


class Normed(Attention):
    """Attention that norms queries and keys, as diffusers' models do."""

    def __init__(self) -> None:
        super().__init__(norm_q=nn.LayerNorm(32))
        self.norm_k = nn.LayerNorm(32)

    def project(self, x: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        context = x if context is None else context
        assert self.norm_q is not None
        projected = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in projected)
        return q, k, v


class Model(Toy):
    """A toy as diffusers would write it; it names its blocks to `compile="blocks"`."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__(2)
        for block in self.blocks:
            block.attn1, block.attn2 = Normed(), Normed()
        self.requires_grad_(False)

    def compile_repeated_blocks(self, **options: Any) -> None:
        for block in self.blocks:
            block.compile(**options)


# ---- wrappers ------------------------------------------------------------------------------------------------------


def _replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child))


def _hooked(*ends: str) -> Callable[[nn.Module], None]:
    """Return what puts diffusers' hooks, which replace `forward`, on modules whose path ends so."""

    def wrap(model: nn.Module) -> None:
        for path, module in model.named_modules():
            if path.endswith(ends):
                HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "nothing")
                HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "nothing more")

    return wrap


def torch_hooks(model: nn.Module) -> None:
    for module in model.modules():
        module.register_forward_hook(lambda module, args, out: None)
        module.register_forward_pre_hook(lambda module, args: None)


def layerwise_casting(model: nn.Module) -> None:
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm",))


def blocks_offloaded(model: nn.Module) -> None:
    apply_group_offloading(model, CPU, CPU, "block_level", num_blocks_per_group=1)


def disabled_linears(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = torch.compiler.disable(module.forward)


def all_leaves_disabled(model: nn.Module) -> None:
    """As accelerate's hooks and offloading leaf by leaf do."""
    for module in model.modules():
        if not [*module.children()]:
            module.forward = torch.compiler.disable(module.forward)


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 0.1 * self.b(self.a(x))


def lora(model: nn.Module) -> None:
    _replace_linears(model, LoRA)


def lora_on_disabled_linears(model: nn.Module) -> None:
    disabled_linears(model)
    lora(model)


class Int8Linear(nn.Module):
    """A weight that is neither parameter nor buffer, multiplied as integers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.abs().amax() / 127
        self.values = (base.weight / self.scale).round().to(torch.int8).t().contiguous()
        self.bias = base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax() / 127
        product = torch._int_mm((x / scale).round().to(torch.int8).flatten(0, -2), self.values)
        return product.unflatten(0, x.shape[:-1]) * (scale * self.scale) + self.bias


def int8_linears(model: nn.Module) -> None:
    _replace_linears(model, Int8Linear)


class ScaledWeight(torch.Tensor):
    """A weight of two tensors, as torchao keeps it."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> ScaledWeight:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> ScaledWeight:
        return ScaledWeight(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return ScaledWeight(args[0].values, args[0].scale)
        plain = [a.values.to(a.scale.dtype) * a.scale if isinstance(a, ScaledWeight) else a for a in args]
        return func(*plain, **(kwargs or {}))


def weight_subclass(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax() / 127
            weight = ScaledWeight((module.weight / scale).round().to(torch.int8), scale)
            module.weight = nn.Parameter(weight, requires_grad=False)


# What is left of the evidence for self- and cross-attention: the projections, or nothing but the lengths.
EVIDENCE: dict[str, Callable[[nn.Module], None]] = {
    "plain": lambda model: None,
    "hooks on blocks": _hooked("blocks.0", "blocks.1"),
    "hooks on attention": _hooked("attn1", "attn2"),
    "hooks on both": _hooked("blocks.0", "blocks.1", "attn1", "attn2"),
    "hooks everywhere": _hooked(""),
    "torch's hooks": torch_hooks,
    "blocks offloaded": blocks_offloaded,
    "LoRA": lora,
    "int8": int8_linears,
    "weights of a subclass": weight_subclass,
}
NO_EVIDENCE: dict[str, Callable[[nn.Module], None]] = {
    "layer-wise casting": layerwise_casting,
    "disabled linears": disabled_linears,
    "all leaves disabled": all_leaves_disabled,
    "LoRA on disabled linears": lora_on_disabled_linears,
}
WRAPPERS = EVIDENCE | NO_EVIDENCE


def run(wrapper: str, how: bool | str, context: torch.Tensor, **settings: Any) -> tuple[Model, torch.Tensor]:
    """Return a wrapped and enabled model after two steps, and how far the last was off from the dense one."""
    model = Model()
    WRAPPERS[wrapper](model)
    options = {"threshold": -math.inf, "tile_shape": TILE, "num_steps": 4, **settings}
    with torch.no_grad():
        dense = model(tokens(1), context)
        lite_attention.enable(model, compile=how, **({"inner": "eager"} if how else {}), **options)
        for step in range(2):
            out = model(tokens(step), context)
    return model, (out - dense).abs().max()


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {row.name: row.reason for row in lite_attention.report(model, file=io.StringIO()).rows}


HOW = pytest.mark.parametrize("how", [True, "blocks", False])


@HOW
@pytest.mark.filterwarnings("ignore:.*tensor subclass:UserWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_kinds(wrapper: str, how: bool | str) -> None:
    told: list[str] = []

    def threshold(site: Site) -> float:
        told.append(site.name)
        return -math.inf

    context = torch.randn(1, 24, 32)
    model, error = run(wrapper, how, context, threshold=threshold)
    found = reasons(model)
    assert sorted(found) == sorted(SELF + CROSS)
    assert [name for name, reason in found.items() if reason is None] == SELF
    assert sorted(told) == SELF
    assert error < 1e-4


@HOW
@pytest.mark.parametrize("wrapper", ["plain", "hooks on both", "blocks offloaded", "LoRA", "int8"])
def test_cross_attention_of_equal_length_is_told(wrapper: str, how: bool | str) -> None:
    model, error = run(wrapper, how, torch.randn(1, 96, 32))
    found = reasons(model)
    assert {name: found[name] for name in CROSS} == dict.fromkeys(CROSS, "cross-attention")
    assert {name: found[name] for name in SELF} == dict.fromkeys(SELF)
    assert error < 1e-4


@pytest.mark.parametrize("how", [True, "blocks"])
@pytest.mark.parametrize("wrapper", NO_EVIDENCE)
def test_a_guess_by_length_is_told(wrapper: str, how: bool | str, caplog: pytest.LogCaptureFixture) -> None:
    """Run eagerly, the same models give evidence: the first forward is followed through whatever is disabled."""
    model, _ = run(wrapper, how, torch.randn(1, 96, 32))
    assert [name for name, reason in reasons(model).items() if reason is None] == sorted(SELF + CROSS)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("only their equal number says" in message for message in warned) >= 1


@HOW
@pytest.mark.filterwarnings("ignore:lite_attention. no attention")
@pytest.mark.parametrize("wrapper", ["plain", "hooks on both", "disabled linears", "all leaves disabled"])
def test_select_decides_for_each_layer_though_they_share_a_graph(wrapper: str, how: bool | str) -> None:
    """True, False and None of one callable; layers that are left alone are exact, also where attention skips."""
    answers = {"blocks.0.attn1": False, "blocks.1.attn1": None, "blocks.0.attn2": True, "blocks.1.attn2": False}
    asked: list[str] = []

    def threshold(site: Site) -> float:
        asked.append(site.name)
        return -math.inf

    model, error = run(
        wrapper, how, torch.randn(1, 96, 32), select=lambda site: answers[site.name], threshold=threshold
    )
    assert reasons(model) == {
        "blocks.0.attn1": "not selected",
        "blocks.1.attn1": None,
        "blocks.0.attn2": None,
        "blocks.1.attn2": "not selected",
    }
    assert sorted(asked) == ["blocks.0.attn2", "blocks.1.attn1"]
    assert error < 1e-4
    model, error = run(wrapper, how, torch.randn(1, 96, 32), select=lambda site: False, threshold=THRESHOLD)
    assert error == 0
    assert set(reasons(model).values()) == {"not selected"}


LATER = ["hooks everywhere", "blocks offloaded", "LoRA", "int8", "layer-wise casting", "all leaves disabled"]


@pytest.mark.parametrize("how", [True, False])
@pytest.mark.parametrize("wrapper", LATER)
def test_what_comes_later_is_followed_and_reported(wrapper: str, how: bool) -> None:
    text = torch.randn(1, 24, 32)
    model, dense = Model(), Model()
    options = {"threshold": -math.inf, "tile_shape": TILE, "num_steps": 4, **({"inner": "eager"} if how else {})}
    lite_attention.enable(model, compile=how, **options)
    with torch.no_grad():
        for step in range(4):
            model(tokens(step), text)
        for each in (model, dense):
            torch.manual_seed(0)
            WRAPPERS[wrapper](each)
        for step in range(4):
            torch.testing.assert_close(model(tokens(step), text), dense(tokens(step), text), rtol=1e-4, atol=1e-4)
    rows = [row for row in lite_attention.report(model, file=io.StringIO()).rows if row.note is None]
    assert sorted(row.name for row in rows if row.reason is None) == SELF
    assert sorted(row.name for row in rows if row.reason is not None) == CROSS
