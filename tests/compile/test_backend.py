"""Compiled models against explicit states: whose state it is, whatever graph runs the layer."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import lite_attention
from lite_attention.compile import LiteAttentionBackend
from lite_attention.ops import Session, default_session
from lite_attention.ops.methods import METHODS
from tests.support.toys import (
    ENOUGH,
    OPTIONS,
    TILE,
    Attention,
    Block,
    Inner,
    Reference,
    Toy,
    assert_same_states,
    compile_toy,
    context,
    tokens,
    toy_backend,
)


def assert_steps(
    model: nn.Module,
    reference: Reference,
    backend: LiteAttentionBackend,
    *,
    steps: int | None = None,
    branches: tuple[str, ...] = ("",),
    batch: int = 1,
    seq: int = 96,
) -> None:
    """Run denoising steps through a compiled model and the reference: outputs and states are the same."""
    session = backend.store.session
    for step, (index, name) in itertools.product(range(steps or ENOUGH[reference.method]), enumerate(branches)):
        x, c = tokens(step, batch, seq, seed=index), context(batch)
        with torch.no_grad(), session.branch(name) if name else nullcontext():
            out = model(x, c)
        torch.testing.assert_close(out, reference(x, c, branch=name), rtol=1e-4, atol=1e-4)
    assert reference.skipped > 0
    assert_same_states(backend, model, reference)


HOW = pytest.mark.parametrize("how", ["whole", "blocks"])
METHOD = pytest.mark.parametrize("method", OPTIONS)


@HOW
@METHOD
def test_layers_have_their_own_states(how: str, method: str) -> None:
    inner = Inner("aot_eager")
    model, backend = Toy(4), toy_backend(inner, method=method)
    reference = Reference(model, method=method)
    assert_steps(compile_toy(model, backend, how, fullgraph=True), reference, backend)
    assert len(inner.graphs) == 1
    assert len(inner.calls(METHODS[method].implementations[None])) == (4 if how == "whole" else 1)
    assert len(reference.states) == 4


@HOW
@METHOD
def test_branches(how: str, method: str) -> None:
    inner = Inner("aot_eager")
    model, backend = Toy(2), toy_backend(inner, method=method)
    reference = Reference(model, method=method)
    assert_steps(compile_toy(model, backend, how), reference, backend, branches=("cond", "uncond"))
    assert len(inner.graphs) == 1


def test_branches_of_the_default_session() -> None:
    model, backend = Toy(2), toy_backend("eager", session=None)
    reference = Reference(model)
    compile_toy(model, backend)
    assert backend.store.session is default_session
    for step, name in itertools.product(range(3), ("cond", "uncond")):
        x = tokens(step, seed=len(name))
        with torch.no_grad(), lite_attention.branch(name):
            torch.testing.assert_close(model(x, context()), reference(x, context(), branch=name))
    assert_same_states(backend, model, reference)
    assert reference.skipped > 0


def test_a_state_born_in_a_branch_starts_in_its_slot() -> None:
    model, backend = Toy(1), toy_backend("eager", slots=3)
    session = backend.store.session
    for name in ("first", "second"):
        with session.branch(name):
            pass
    reference = Reference(model)
    compile_toy(model, backend)
    with torch.no_grad(), session.branch("third", step=0):
        model(tokens(0), context())
        reference(tokens(0), context(), branch="third")
    assert_same_states(backend, model, reference)
    (state,) = session.states
    assert not (~state.kept_tiles()[:2]).any()
    with pytest.raises(ValueError, match="at most 3 names"), session.branch("fourth"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "dynamic", "inner", "most_graphs"),
    [("blocks", True, "eager", 1), ("blocks", None, "aot_eager", 3), ("whole", None, "eager", 3)],
)
@METHOD
def test_sizes_change_and_come_back(how: str, dynamic: bool | None, inner: str, most_graphs: int, method: str) -> None:
    graphs = Inner(inner)
    model, backend = Toy(2), toy_backend(graphs, method=method)
    reference = Reference(model, method=method)
    compile_toy(model, backend, how, dynamic=dynamic)
    for batch, seq in [(2, 96), (3, 96), (3, 64), (2, 130), (2, 96)]:
        assert_steps(model, reference, backend, steps=ENOUGH[method] - 1, batch=batch, seq=seq)
    assert len(graphs.graphs) <= most_graphs


@METHOD
def test_reset_drops_states_of_other_sizes(method: str) -> None:
    model, backend = Toy(1), toy_backend("eager", method=method)
    reference = Reference(model, method=method)
    compile_toy(model, backend, dynamic=True)
    for seq in (130, 96):
        assert_steps(model, reference, backend, seq=seq)
    (record,) = (record for record in backend.store.records if record.site.swapped)
    assert len(record.states) == len(backend.store.session.states) == 2
    lite_attention.reset(model)
    gc.collect()
    assert len(record.states) == len(backend.store.session.states) == 1
    reference.reset()
    assert_steps(model, reference, backend)


def test_two_models_with_one_backend() -> None:
    inner = Inner("aot_eager")
    backend = toy_backend(inner)
    models = [Toy(2, seed=seed) for seed in (0, 1)]
    references = [Reference(model) for model in models]
    for model in models:
        compile_toy(model, backend, "blocks")
    for step in range(3):
        for model, reference in zip(models, references, strict=True):
            x = tokens(step)
            with torch.no_grad():
                torch.testing.assert_close(model(x, context()), reference(x, context()), rtol=1e-4, atol=1e-4)
    assert len(inner.graphs) == 1
    masks = [state.skip_mask for state in backend.store.session.states]
    assert len(masks) == len({mask.data_ptr() for mask in masks}) == 4
    assert all(reference.skipped for reference in references)


@METHOD
def test_a_shared_norm_does_not_make_layers_one(method: str) -> None:
    inner = Inner("aot_eager")
    model, backend = Toy(3, share_norm=True), toy_backend(inner, method=method)
    assert_steps(compile_toy(model, backend, "blocks"), Reference(model, method=method), backend)
    assert len(inner.graphs) == 1


def test_a_replaced_parameter_begins_a_fresh_state() -> None:
    model, backend = Toy(2), toy_backend()
    reference = Reference(model)
    assert_steps(compile_toy(model, backend, "blocks"), reference, backend)
    model.blocks[0].attn1.to_q.weight = nn.Parameter(-model.blocks[0].attn1.to_q.weight, requires_grad=False)
    after = Reference(model)
    after.states = {key: state for key, state in reference.states.items() if key[0] != "blocks.0.attn1"}
    gc.collect()
    assert_steps(model, after, backend)


def test_states_vanish_with_the_model() -> None:
    model, backend = Toy(2), toy_backend()
    compile_toy(model, backend, "blocks")
    with torch.no_grad():
        model(tokens(0), context())
    session, alive = backend.store.session, weakref.ref(model.blocks[0].attn1.to_q.weight)
    assert len(session.states) == 2
    assert len(backend.store.records) == 4
    del model
    gc.collect()
    assert alive() is None
    assert session.states == []
    assert backend.store.records == []


@METHOD
def test_cond_and_uncond_in_one_function(method: str) -> None:
    model, backend = Toy(2), toy_backend(method=method)
    reference = Reference(model, method=method)

    def both(x: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(x, c), model(x.flip(1), c)

    compiled = torch.compile(both, backend=backend, fullgraph=True)
    for step in range(ENOUGH[method]):
        x = tokens(step)
        with torch.no_grad():
            cond, uncond = compiled(x, context())
        torch.testing.assert_close(cond, reference(x, context(), branch="cond"), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(uncond, reference(x.flip(1), context(), branch="uncond"), rtol=1e-4, atol=1e-4)
    swapped = [record for record in backend.store.records if record.site.swapped]
    assert len(swapped) == 4
    assert sorted(record.name(model) for record in swapped) == 2 * ["blocks.0.attn1"] + 2 * ["blocks.1.attn1"]
    assert reference.skipped > 0


def test_freezing_fixes_the_owners() -> None:
    # Parameters become attributes of the graph, one graph a block.
    inner = Inner()
    model, backend = Toy(2).eval(), toy_backend(inner)
    with torch._inductor.config.patch(freezing=True):
        assert_steps(compile_toy(model, backend, "blocks"), Reference(model), backend)
    assert len(inner.graphs) == 2
    assert any(node.op == "get_attr" for node in inner.graphs[0].graph.nodes)


# ---- graph breaks and regions --------------------------------------------------------------------------------------


class _Breaking(Attention):
    before = after = False

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.project(x, context)
        if self.before:
            torch._dynamo.graph_break()
        out = self.attend(q, k, v)
        if self.after:
            torch._dynamo.graph_break()
        return self.to_out(out.transpose(1, 2).flatten(2))


def _break(model: Toy, *, before: bool = False, after: bool = False) -> Toy:
    for block in model.blocks:
        block.attn1.__class__ = _Breaking
        block.attn1.before, block.attn1.after = before, after
    return model


@HOW
@METHOD
@pytest.mark.parametrize("side", ["before", "after"])
def test_graph_break_on_one_side(how: str, side: str, method: str) -> None:
    model, backend = _break(Toy(2), **{side: True}), toy_backend("eager", method=method)
    assert_steps(compile_toy(model, backend, how), Reference(model, method=method), backend)


@HOW
def test_graph_breaks_on_both_sides_leave_the_running_module_as_owner(how: str) -> None:
    model, backend = _break(Toy(2), before=True, after=True), toy_backend("eager")
    assert_steps(compile_toy(model, backend, how), Reference(model), backend)
    assert {record.name(model) for record in backend.store.records if record.site.swapped} == {
        "blocks.0.attn1",
        "blocks.1.attn1",
    }


@pytest.mark.filterwarnings("ignore:lite_attention")
def test_without_parameters_or_modules_nobody_owns_a_site() -> None:
    backend, (q, k, v) = toy_backend("eager"), torch.randn(3, 1, 2, 96, 16)
    attend = torch.compile(lambda q, k, v: scaled_dot_product_attention(q, k, v), backend=backend)
    for _ in range(2):
        torch.testing.assert_close(attend(q, k, v), scaled_dot_product_attention(q, k, v))
    assert [site.reason for site in backend.sites] == [
        "owner unknown: no parameter in this graph, and no module runs it"
    ]


class _Looped(nn.Module):
    """Runs one module six times a forward."""

    _repeated_blocks = ("Attention",)

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.attention, self.breaks = Attention(), breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for scale in (1.0, 1.7, 2.4):
            x = x + self.attention(scale * x)
            if self.breaks:
                torch._dynamo.graph_break()
            x = x - self.attention(x.flip(1))
        return x

    def compile_repeated_blocks(self, **options: object) -> None:
        self.attention.compile(**options)


@METHOD
@pytest.mark.parametrize(("how", "breaks"), [(True, False), (True, True), ("blocks", False)])
def test_calls_of_one_module_in_a_forward_are_told_apart(how: bool | str, breaks: bool, method: str) -> None:
    def run(how: bool | str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        model = _Looped(breaks)
        inner = {"inner": "eager"} if how else {}
        lite_attention.enable(model, compile=how, tile_shape=TILE, num_steps=9, **inner, **OPTIONS[method])
        with torch.no_grad():
            outs = [model(tokens(step)) for step in range(4)]
        states = [row.state for row in lite_attention.report(model, file=io.StringIO()).swapped if row.state]
        assert [state.step(0) for state in states] == [4] * 6
        return outs, [state.kept_tiles() for state in states]

    (outs, kept), (eager_outs, eager_kept) = run(how), run(False)
    torch.testing.assert_close(outs, eager_outs)
    assert all(map(torch.equal, kept, eager_kept))
    assert any(not tiles[0].all() for tiles in kept)


class _Checkpointed(Toy):
    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, context, use_reentrant=False)
        return x


class _Region(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return super().forward(x, context)


@pytest.mark.filterwarnings("ignore:lite_attention")
@pytest.mark.parametrize(("kind", "op"), [("checkpoint", "tag_activation_checkpoint"), ("region", "invoke_subgraph")])
def test_regions_are_left_alone_with_a_reason(kind: str, op: str, caplog: pytest.LogCaptureFixture) -> None:
    model, backend = _Checkpointed(2) if kind == "checkpoint" else Toy(2), toy_backend("eager")
    if kind == "region":
        for block in model.blocks:
            block.__class__ = _Region
    dense = copy.deepcopy(model)
    compile_toy(model, backend)
    with torch.no_grad(), caplog.at_level("INFO", "lite_attention"):
        for step in range(2):
            torch.testing.assert_close(model(tokens(step), context()), dense(tokens(step), context()))
    reasons = {site.reason for site in backend.sites}
    assert reasons == {f"inside a nested region ({op})"}
    assert f"left alone: inside a nested region ({op})" in caplog.text
    with pytest.warns(UserWarning, match="no attention of this model is skip-aware"):
        rows = lite_attention.report(model).rows
    assert rows
    assert {row.reason for row in rows} == reasons


# ---- gradients -----------------------------------------------------------------------------------------------------


@METHOD
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_inference_mode_and_no_grad_share_states(first: type, method: str) -> None:
    modes = [torch.no_grad, torch.inference_mode]
    second = modes[1 - modes.index(first)]
    model, backend = Toy(1), toy_backend(method=method)
    reference = Reference(model, method=method)
    compile_toy(model, backend)
    for step, mode in enumerate([first, second, first, second]):
        with mode():
            out = model(tokens(step), context())
        torch.testing.assert_close(out.clone(), reference(tokens(step), context()), rtol=1e-4, atol=1e-4)
    assert_same_states(backend, model, reference)
    lite_attention.reset(model)  # outside of inference mode, also what was born inside
    assert not any((~state.kept_tiles()).any() for state in backend.store.session.states)


def test_gradients_are_those_of_the_model() -> None:
    model, backend = Toy(1).requires_grad_(True), toy_backend()
    dense = copy.deepcopy(model)
    compile_toy(model, backend)
    for m in (model, dense):
        m(tokens(0), context()).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
    assert backend.sites[0].reason == "needs gradients: run it under torch.no_grad()"
    assert_steps(model, Reference(model), backend)  # and without gradients it skips


@pytest.mark.parametrize("inside", [torch.no_grad, torch.enable_grad])
def test_the_grad_mode_at_the_call_counts(inside: type) -> None:
    model, backend = Attention().requires_grad_(True), toy_backend()

    def run(x: torch.Tensor) -> torch.Tensor:
        with inside():
            return model(x)

    compiled = torch.compile(run, backend=backend)
    with torch.no_grad() if inside is torch.enable_grad else nullcontext():
        out = compiled(tokens(0))
    assert out.requires_grad == (inside is torch.enable_grad)
    assert [site.swapped for site in backend.sites] == [inside is torch.no_grad]
    if inside is torch.enable_grad:
        out.sum().backward()
        assert model.to_q.weight.grad is not None


# ---- a whole generation --------------------------------------------------------------------------------------------


@HOW
def test_a_generation_never_recompiles(how: str) -> None:
    model, backend = Toy(2), toy_backend(num_steps=None)
    session, reference = backend.store.session, Reference(model)
    compile_toy(model, backend, how)
    lite_attention.reset(model)  # so nobody warns
    session.is_told = True
    with torch.no_grad():
        model(tokens(0), context())
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        for video, thresholds in enumerate([(-4.0, -3.0, -2.0), (-1.0, -2.0, -6.0)]):
            session.reset()
            reference.reset()
            for step, (index, name) in itertools.product(range(6), enumerate(("cond", "uncond"))):
                lite_attention.set_threshold(model, thresholds[step // 2])
                for state in reference.states.values():
                    state.set_threshold(thresholds[step // 2])
                reference.threshold = thresholds[step // 2]
                x = tokens(step, seed=10 * video + index)
                with session.branch(name, step=step):
                    out = model(x, context())
                torch.testing.assert_close(out, reference(x, context(), branch=name), rtol=1e-4, atol=1e-4)
            assert reference.skipped > 0
            assert_same_states(backend, model, reference)


def test_num_steps_begins_the_next_video_fresh() -> None:
    model, backend = Toy(1), toy_backend("eager", num_steps=2)
    reference = Reference(model)
    compile_toy(model, backend)
    for video in range(2):
        reference.reset()
        for step in range(2):
            x = tokens(step, seed=video)
            with torch.no_grad():
                torch.testing.assert_close(model(x, context()), reference(x, context()))
        assert_same_states(backend, model, reference)


def test_sessions_are_apart() -> None:
    one, other = Session(), Session()
    models = [Toy(1), Toy(1)]
    for model, session in zip(models, (one, other), strict=True):
        compile_toy(model, toy_backend("eager", session=session))
        with torch.no_grad():
            model(tokens(0), context())
    with one.branch("a"), one.branch("b"):
        assert [state.slot for state in (*one.states, *other.states)] == [1, 0]
