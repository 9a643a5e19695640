"""`enable(model, compile=False)`: the same attention swapped, with the same numbers, and nothing left behind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import lite_attention
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
from tests.support.toys import Attention, Reference, Toy, context, tokens

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

STEPS = 4


@pytest.fixture(autouse=True)
def no_mode_is_left_behind() -> Iterator[None]:
    before = _get_current_function_mode_stack()
    yield
    assert _get_current_function_mode_stack() == before


def enable(model: nn.Module, **options: Any) -> Any:
    options = {"threshold": THRESHOLD, "tile_shape": TILE, "num_steps": STEPS, "exact_tokens": None} | options
    return lite_attention.enable(model, compile=False, **options)


def reasons(model: nn.Module) -> dict[str, str | None]:
    return {row.name: row.reason for row in silent_report(model).rows}


def skipped(model: nn.Module) -> dict[str, int]:
    return skipped_by_site(silent_report(model))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ---- diffusers models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", dm.SUPPORTED, ids=lambda case: case.name)
def test_same_sites_reasons_and_numbers_as_compiled(case: Case) -> None:
    """What test_diffusers.py holds the compiled route against, held against the eager one."""
    model = case.model()
    inputs = [case.inputs(step, 0) for step in range(STEPS)]
    dense = [run(model, x) for x in inputs]
    explicit = ExplicitStates(case, model)
    enable(model, threshold=NEVER)
    for x, want in zip(inputs, dense, strict=True):
        close(run(model, x), want)
    assert not any(skipped(model).values())

    enable(model)
    for x in inputs:
        out = run(model, x)
        close(out, explicit(x))
    report = silent_report(model)
    assert dm.names(report) == case.sites
    for row in report.rows:
        reason = case.reason_of(row.name)
        assert (row.reason is None) == (reason is None), row
        assert row.reason is None or row.reason.startswith(reason), row
    assert skipped(model) == {site: explicit.skipped(site) for site in case.swapped}
    assert min(skipped(model).values()) > 0
    assert (out - dense[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("layers", [2, 4])
def test_audio_and_video_stay_cross_attention_in_deep_layers(layers: int) -> None:
    """Both streams stem from all inputs by then, and are as long as each other."""
    torch.manual_seed(0)
    model = type(dm.LTX2.model()).from_config({**dm.LTX2.model().config, "num_layers": layers}).eval()
    enable(model)
    run(model, dm.LTX2.inputs(0, 0))
    report = silent_report(model)
    assert {row.q_shape[1] for row in report.rows} == {96}
    cross = [row for row in report.rows if row.name.endswith(("_to_video_attn", "_to_audio_attn"))]
    assert [row.reason for row in cross] == ["cross-attention"] * 2 * layers
    assert len(report.swapped) == 2 * layers


def test_text_as_long_as_the_video() -> None:
    model = dm.WAN.model()
    x = dm.WAN.inputs(0, 0) | {"encoder_hidden_states": dm.noise(1, 96, 16)}
    enable(model)
    run(model, x)
    assert list(skipped(model)) == dm.WAN.swapped


def test_mochi_has_a_state_for_each_sample() -> None:
    """Its attention loops over the samples, each with the text tokens it has: no graph holds that, eager does."""
    model = dm.MOCHI.model()
    masks = torch.cat([dm.text_mask(12, 9), dm.text_mask(12, 4)]).bool()
    inputs = []
    for step in range(STEPS):
        one, two = dm.MOCHI.inputs(step, 0), dm.MOCHI.inputs(step, 10)
        both = {name: torch.cat([one[name], two[name]]) for name in one}
        inputs.append(both | {"encoder_attention_mask": masks})
    blocks = [f"transformer_blocks.{layer}.attn1" for layer in range(2) for _ in range(2)]
    sites = ["time_embed.pooler", *(f"{path} {i}" for i, path in enumerate(blocks))]
    explicit = ExplicitStates(Case("Mochi", dm.MOCHI.build, dm.MOCHI.inputs, sites, sites[1:]), model)
    enable(model)
    for x in inputs:
        close(run(model, x), explicit(x))
    rows = silent_report(model).swapped
    assert [row.name for row in rows] == blocks
    assert [row.q_shape[1] for row in rows] == [105, 100] * 2
    for row, site in zip(rows, sites[1:], strict=True):
        assert int((~row.state.kept_tiles()[0]).sum()) == explicit.skipped(site) > 0


def test_hunyuan_key_mask_changes_from_prompt_to_prompt() -> None:
    model = dm.HUNYUAN.model()
    prompts = [dm.HUNYUAN.inputs(0, 0) | {"encoder_attention_mask": dm.text_mask(24, n)} for n in (13, 24, 1)]
    dense = [run(model, x) for x in prompts]
    enable(model, threshold=NEVER)
    for x, want in zip(prompts, dense, strict=True):
        close(run(model, x), want)


# ---- who a site belongs to, and what kind it is --------------------------------------------------------------------


def test_cross_attention_of_equal_length_is_left_alone() -> None:
    model = Toy()
    reference = Reference(model)
    enable(model)
    for step in range(STEPS):
        args = tokens(step), context(seq=96)
        close(model(*args), reference(*args))
    assert reasons(model) == {
        f"blocks.{layer}.{name}": reason
        for layer in range(4)
        for name, reason in (("attn1", None), ("attn2", "cross-attention"))
    }
    assert min(skipped(model).values()) > 0


class WrittenInPlace(nn.Module):
    """Queries and keys arrive by writes into new tensors, as in Wan's rotary embedding."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention()
        self.cross = cross

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        query, key = torch.empty(x.shape), torch.empty(x.shape)
        query[..., ::2], query[..., 1::2] = x[..., ::2], x[..., 1::2]
        source = other if self.cross else x
        key[..., ::2], key[..., 1::2] = source[..., ::2], source[..., 1::2]
        return self.attention(query, key)


class TwoStreams(nn.Module):
    """Two streams that see each other through attention put in by hand, and then through plain cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.by_hand = nn.ModuleList(lite_attention.LiteAttention(num_steps=STEPS) for _ in range(2))
        self.attention = Attention()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        heads_x, heads_y = (t.unflatten(-1, (2, -1)) for t in (x, y))
        x = x + self.by_hand[0](heads_x, heads_y, heads_y).flatten(2)
        y = y + self.by_hand[1](heads_y, heads_x, heads_x).flatten(2)
        return self.attention(x, y)


def test_attention_put_in_by_hand_counts_as_attention() -> None:
    model = TwoStreams()
    enable(model)(tokens(0), tokens(0, seed=1))
    assert reasons(model) == {"by_hand.0": None, "by_hand.1": None, "attention": "cross-attention"}


@pytest.mark.parametrize("cross", [True, False])
def test_origins_follow_writes_in_place(cross: bool) -> None:
    model = WrittenInPlace(cross)
    enable(model)(tokens(0), tokens(0, seed=1))
    assert reasons(model) == {"attention": "cross-attention" if cross else None}


def test_new_tensor_in_place_of_a_freed_one_has_no_past() -> None:
    class Frees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            for _ in range(50):
                scratch = other * 2
                del scratch
                x = x * 1.0  # soon sits where the scratch was
            return self.attention(x)

    model = Frees()
    enable(model)(tokens(0), tokens(0, seed=1))
    assert reasons(model) == {"attention": None}


def test_parameters_replaced_at_every_call_keep_the_states() -> None:
    """As sequential offloading does."""
    model = Toy()
    reference = Reference(model)
    enable(model)
    for step in range(STEPS):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        close(model(tokens(step), context()), reference(tokens(step), context()))
    assert sum(skipped(model).values()) == reference.skipped > 0
    assert len(silent_report(model).rows) == 8


def test_one_attention_module_called_several_times_has_a_state_for_each_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attention(x)
            return self.attention(x) + self.attention(2 * x)

    model = Shared()
    enable(model)
    for step in range(2):
        model(tokens(step))
    rows = silent_report(model).swapped
    assert [row.name for row in rows] == ["attention"] * 3
    assert len({row.state.skip_mask.data_ptr() for row in rows}) == 3


def test_layers_called_from_elsewhere_are_left_alone() -> None:
    model = Toy(2)
    reference = Reference(model)
    block = copy.deepcopy(model.blocks[0])
    enable(model)
    x, text = tokens(0), context()
    assert torch.equal(model.blocks[0](x, text), block(x, text))
    assert silent_report(model).rows == []
    for step in range(STEPS):
        model.blocks[1](tokens(step), text)
        close(model(tokens(step), text), reference(tokens(step), text))
    assert sum(skipped(model).values()) == reference.skipped


def test_site_left_alone_at_first_is_looked_at_again() -> None:
    model = Toy(2)
    enable(model)
    small = tokens(0, seq=16), context(seq=4)
    for _ in range(2):
        model(*small)
    assert reasons(model)["blocks.0.attn1"] == "only 1 k-tile(s), fewer than min_tiles=2"
    reference = Reference(model)
    lite_attention.disable(reference.model)
    out = model(tokens(0), context())  # dense: where the tensors come from is looked at in the next
    lite_attention.reset(model)
    for step in range(STEPS):
        out = model(tokens(step), context())
        close(out, reference(tokens(step), context()))
    assert reasons(model)["blocks.0.attn1"] is None
    assert sum(skipped(model).values()) == reference.skipped > 0


def test_gradients_come_first_and_inference_later() -> None:
    model = Toy(1).requires_grad_()
    x = tokens(0)
    dense = model(x, context())
    enable(model)
    out = model(x, context())
    close(out.detach(), dense.detach())
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.blocks[0].attn1.parameters())
    assert reasons(model)["blocks.0.attn1"] == "needs gradients: run it under torch.no_grad()"
    with torch.inference_mode():
        for step in range(3):
            model(tokens(step), context())
    assert skipped(model)["blocks.0.attn1"] > 0
    close(model(x, context()).detach(), dense.detach())  # dense again: gradients win
    lite_attention.reset(model)  # born in inference mode, and written outside of it


def test_swapped_site_falls_back_where_a_call_is_not_supported() -> None:
    torch.manual_seed(0)
    model = Attention()
    dense = copy.deepcopy(model)
    x = tokens(0)
    enable(model, threshold=NEVER)
    close(model(x), dense(x))
    per_query = torch.ones(96, 96, dtype=torch.bool).tril()
    for arguments in ({"attn_mask": per_query}, {"is_causal": True}, {"attn_mask": torch.zeros(96, 96)}):
        assert torch.equal(model(x, **arguments), dense(x, **arguments))
    key_mask = (torch.arange(96) < 50).view(1, 1, 1, 96)
    close(model(x, attn_mask=key_mask), dense(x, attn_mask=key_mask))
    close(model(x, scale=0.1), dense(x, scale=0.1))
    assert reasons(model) == {"": None}


def test_dense_kernel_runs_what_does_not_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        lengths.append(k.shape[1])
        return lite_attention.attention(q, k, v, **options)

    monkeypatch.setattr("lite_attention.compile.eager.attention", spy)
    model = Toy(2)
    reference = Reference(model)
    enable(model, dense="kernel")
    for step in range(STEPS):
        close(model(tokens(step), context()), reference(tokens(step), context()))
    assert lengths == [24] * 2 * STEPS
    report = silent_report(model)
    assert [(row.reason, row.dense_kernel, row.state is None) for row in report.rows] == [
        (None, False, False),
        ("cross-attention", True, True),
    ] * 2
    assert "2 of 4 sites skip-aware, 2 with the dense kernel" in str(report)

    # Calls of the same sites that it does not compute, or refuses, stay with PyTorch.
    lengths.clear()
    cross = model.blocks[0].attn2
    for arguments, runs in (
        ({"scale": 0.1}, True),
        ({"attn_mask": (torch.arange(24) < 9).view(1, 1, 1, 24)}, True),
        ({"is_causal": True}, False),
        ({"attn_mask": torch.ones(96, 24, dtype=torch.bool).tril()}, False),
    ):
        for attention in (cross, reference.model.blocks[0].attn2):
            attention.attend = functools.partial(F.scaled_dot_product_attention, **arguments)
        reference.reset()
        lite_attention.reset(model)
        close(model(tokens(0), context()), reference(tokens(0), context()))
        assert lengths == [24] * (1 + runs)
        lengths.clear()
    for attention in (cross, reference.model.blocks[0].attn2):
        attention.attend = F.scaled_dot_product_attention
    reference.reset()
    lite_attention.reset(model)
    close(model(tokens(0), context(seq=0)), reference(tokens(0), context(seq=0)))
    assert lengths == []


class InFloat32(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_autocast_casts_what_attention_is_given() -> None:
    """A norm leaves q in float32, next to k and v in bfloat16."""
    model = Toy(2)
    for block in model.blocks:
        block.attn1.norm_q = InFloat32()
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(tokens(0), context())
        enable(model, threshold=NEVER)
        out = model(tokens(0), context())
    torch.testing.assert_close(out, dense, rtol=0, atol=0.1)
    assert out.dtype == dense.dtype
    assert [row.state is not None for row in silent_report(model).swapped] == [True, True]
    close(model(tokens(0), context()), Reference(model, NEVER)(tokens(0), context()))


# ---- nothing left behind -------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), SystemExit()])
def test_exception_leaves_no_mode_behind(error: BaseException) -> None:
    model = Toy(2)
    reference = Reference(model)
    enable(model)
    healthy, model.blocks[1].out = model.blocks[1].out, Fails(error)
    with pytest.raises(type(error)):
        model(tokens(0), context())
    assert _get_current_function_mode_stack() == []
    model.blocks[1].out = healthy
    lite_attention.reset(model)
    for step in range(STEPS):
        close(model(tokens(step), context()), reference(tokens(step), context()))
    assert sum(skipped(model).values()) == reference.skipped > 0
    assert set(reasons(model)) == {f"blocks.{layer}.attn{n}" for layer in range(2) for n in (1, 2)}


def test_hook_of_the_user_that_fails_takes_no_mode_away() -> None:
    model = Toy(1)

    def fail(*_: object) -> None:
        raise RuntimeError("hook")

    model.register_forward_pre_hook(fail)
    model.blocks[0].register_forward_pre_hook(fail)
    enable(model)
    with torch.device("cpu"):  # a mode as well
        before = _get_current_function_mode_stack()
        with pytest.raises(RuntimeError, match="hook"):
            model(tokens(0), context())
        assert _get_current_function_mode_stack() == before


def test_exception_that_the_model_survives() -> None:
    class Survives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = nn.Sequential(Fails(ValueError())), Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                x = self.bad(x)
            except ValueError:
                x = x + 1
            return self.good(x)

    model = Survives()
    enable(model)(tokens(0))
    assert reasons(model) == {"good": None}


def test_hooks_of_the_user_run() -> None:
    model = Toy(1)
    seen = []
    model.register_forward_hook(lambda *_: seen.append("after"))
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    enable(model)(tokens(0), context())
    assert seen == ["before", "after"]
    lite_attention.disable(model)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1


def test_attention_outside_of_the_model_is_not_touched() -> None:
    model, q = enable(Toy(1)), torch.randn(1, 2, 96, 16)
    original = F.scaled_dot_product_attention
    model(tokens(0), context())
    assert F.scaled_dot_product_attention is original
    F.scaled_dot_product_attention(q, q, q)
    assert len(silent_report(model).rows) == 2


# ---- more than one -------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Runs another model, as a part of its own or from outside, between attention of its own."""

    def __init__(self, inside: nn.Module | None, outside: list[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.before = Attention()
        self.inside = inside
        self.outside = outside
        self.after = Attention()

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.before(x)
        other = self.outside[0] if self.inside is None else self.inside
        y = other(x, text)
        return self.after(y, x) + self.after(y)  # crossed, then self


@pytest.mark.parametrize("is_part", [True, False])
@pytest.mark.parametrize("holder_first", [True, False])
def test_two_enabled_models_one_inside_the_other(is_part: bool, holder_first: bool) -> None:
    toy = Toy(2)
    holder = Holder(toy if is_part else None, [toy])
    expected_toy, reference = Reference(toy), copy.deepcopy(holder)
    if is_part:
        reference.inside = None
    reference.outside = [expected_toy]
    expected = Reference(reference)
    own = ExplicitOwn(expected.model)

    for model in (holder, toy) if holder_first else (toy, holder):
        enable(model)
    for step in range(STEPS):
        args = tokens(step), context(seq=96)
        close(holder(*args), own(*args))
    toy_rows = {row.name: row for row in silent_report(toy).rows}
    assert [name for name, row in toy_rows.items() if row.reason is None] == ["blocks.0.attn1", "blocks.1.attn1"]
    rows = [(row.name, row.reason) for row in silent_report(holder).rows if row.name in ("before", "after")]
    assert rows == [("before", None), ("after", "cross-attention"), ("after", None)]


class ExplicitOwn:
    """The holder with explicit states for its own self-attention; what it holds has a reference of its own."""

    def __init__(self, holder: nn.Module) -> None:
        self.holder = holder
        self.states: dict[str, lite_attention.SkipState] = {}
        for name in ("before", "after"):
            getattr(holder, name).attend = self._attend(name)

    def _attend(self, name: str) -> Any:
        calls = 0

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if name == "after" and calls % 2:
                return F.scaled_dot_product_attention(q, k, v)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if name not in self.states:
                self.states[name] = lite_attention.SkipState.for_inputs(
                    q, k, threshold=THRESHOLD, tile_m=TILE[0], tile_n=TILE[1]
                )
            return lite_attention.skip_attention(q, k, v, self.states[name]).transpose(1, 2)

        return attend

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        return self.holder(*args)


def test_two_models_side_by_side() -> None:
    models = [Toy(2, seed=seed) for seed in range(2)]
    references = [Reference(model) for model in models]
    for model in models:
        enable(model)
    for step in range(STEPS):
        for model, reference in zip(models, references, strict=True):
            close(model(tokens(step), context()), reference(tokens(step), context()))
    assert [sum(skipped(model).values()) for model in models] == [reference.skipped for reference in references]
    lite_attention.disable(models[0])
    assert silent_report(models[0]).rows == []
    assert len(silent_report(models[1]).rows) == 4


def test_copy_of_an_enabled_model_is_dense_and_on_its_own() -> None:
    model = Toy(2)
    dense = copy.deepcopy(model)
    enable(model)
    for step in range(2):
        model(tokens(step), context())
    before = skipped(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens(2), context()), dense(tokens(2), context()))
    assert skipped(model) == before
    assert silent_report(twin).rows == []


# ---- torch.compile around it ---------------------------------------------------------------------------------------


def test_torch_compile_leaves_an_eager_model_as_it_is() -> None:
    torch._dynamo.reset()
    model = Toy(2)
    reference = Reference(model)
    enable(model)
    compiled = torch.compile(model, backend="eager")
    for step in range(3):
        close(compiled(tokens(step), context()), reference(tokens(step), context()))
    assert sum(skipped(model).values()) == reference.skipped > 0


def test_model_compiled_in_place_earlier_runs_eagerly() -> None:
    torch._dynamo.reset()
    model = Toy(2)
    reference = Reference(model)
    model.compile(backend="eager")
    enable(model)
    for step in range(3):
        close(model(tokens(step), context()), reference(tokens(step), context()))
    assert sum(skipped(model).values()) == reference.skipped > 0
    lite_attention.disable(model)
    assert model._compiled_call_impl is not None
