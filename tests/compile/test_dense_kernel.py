"""`dense="kernel"`: what does not skip runs in `lite_attention::attention`, where that computes it exactly."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

import lite_attention
from lite_attention.compile import LiteAttentionBackend, SkipAwareProgram, make_skip_aware, skip_states
from tests.support.toys import (
    THRESHOLD,
    TILE,
    Attention,
    Inner,
    Reference,
    Toy,
    assert_same_states,
    compile_toy,
    context,
    tokens,
    toy_backend,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no attention was swapped"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
]
DENSE = torch.ops.lite_attention.attention.default
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def dense_backend(**options: Any) -> tuple[Inner, LiteAttentionBackend]:
    inner = Inner()
    return inner, toy_backend(inner, dense="kernel", **options)


def run(model: nn.Module, backend: LiteAttentionBackend, *args: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)(*args, **kwargs)


# ---- a whole model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_cross_attention_next_to_skipping(how: str) -> None:
    inner = Inner("aot_eager")
    model, backend = Toy(2), toy_backend(inner, dense="kernel")
    session, reference = backend.store.session, Reference(model)
    compile_toy(model, backend, how, fullgraph=True)
    with torch.no_grad():
        for step, (index, name) in itertools.product(range(3), enumerate(("cond", "uncond"))):
            x = tokens(step, seed=index)
            with session.branch(name, step=step):
                out = model(x, context())
            torch.testing.assert_close(out, reference(x, context(), branch=name), **CLOSE)
    assert reference.skipped > 0
    assert_same_states(backend, model, reference)
    assert len(session.states) == 2  # none for the dense sites
    assert len(inner.graphs) == 1
    assert len(inner.calls(DENSE)) == len(inner.calls()) == (2 if how == "whole" else 1)
    (gm,) = inner.graphs
    assert not gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)

    report = lite_attention.report(model)
    assert {row.name: (row.reason, row.dense_kernel) for row in report.rows} == {
        f"blocks.{i}.{name}": expected
        for i in range(2)
        for name, expected in (("attn1", (None, False)), ("attn2", ("cross-attention", True)))
    }
    assert str(report).count("dense kernel: cross-attention") == 2
    assert str(report).endswith("2 of 4 sites skip-aware, 2 with the dense kernel")


def test_by_default_nothing_is_put_in_place(caplog: pytest.LogCaptureFixture) -> None:
    inner = Inner()
    run(Toy(1), toy_backend(inner), tokens(0), context())
    assert inner.calls(DENSE) == []
    caplog.set_level(logging.INFO, "lite_attention")
    inner, backend = dense_backend()
    run(Toy(1), backend, tokens(0), context())
    assert len(inner.calls(DENSE)) == 1
    assert "(1, 96, 2, 16): swapped" in caplog.text
    assert "(1, 24, 2, 16): dense kernel: cross-attention" in caplog.text


def test_dynamic_sizes_and_no_recompiles() -> None:
    inner, backend = dense_backend()
    model = Toy(1)
    reference = Reference(model)
    compile_toy(model, backend, dynamic=True)
    with torch.no_grad():
        for batch, seq, text in [(2, 96, 24), (3, 64, 40), (2, 130, 7)]:
            x, c = tokens(0, batch, seq), context(batch, text)
            torch.testing.assert_close(model(x, c), reference(x, c), **CLOSE)
    assert len(inner.graphs) == len(inner.calls(DENSE)) == 1


@pytest.mark.slow
def test_through_inductor() -> None:
    model, backend = Toy(1), toy_backend("inductor", dense="kernel")
    reference = Reference(model)
    compile_toy(model, backend)
    for step in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(tokens(step), context()), reference(tokens(step), context()), **CLOSE)
    assert [site.dense_kernel for site in backend.sites] == [False, True]


# ---- which sites ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_tiles": 7}, "only 6 k-tile(s), fewer than min_tiles=7"),
        ({"select": lambda site: False}, "not selected"),
    ],
)
def test_self_attention_that_does_not_skip(options: dict[str, Any], reason: str) -> None:
    inner, backend = dense_backend(**options)
    model = Attention(heads=4, kv_heads=2)
    model.attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=True, scale=0.2)
    torch.testing.assert_close(run(model, backend, tokens(0)), model(tokens(0)), **CLOSE)
    (site,) = backend.sites
    assert (site.reason, site.dense_kernel, site.swapped) == (reason, True, False)
    assert len(inner.calls(DENSE)) == 1
    assert backend.store.session.states == []


def test_ready_made_inputs_have_no_owner_and_need_none() -> None:
    inner, backend = dense_backend()
    q, k, v = (torch.randn(1, 2, seq, 16) for seq in (96, 96, 96))
    attend = torch.compile(lambda *qkv: F.scaled_dot_product_attention(*qkv), backend=backend)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), **CLOSE)
    torch.testing.assert_close(attend(q, k[:, :, :30], v[:, :, :30]).shape, q.shape)
    assert len(inner.calls(DENSE)) == len(inner.graphs) == 2
    owner, lengths = [site.reason for site in backend.sites]
    assert str(owner).startswith("owner unknown")
    assert lengths == "no evidence of self-attention in the graph, and lengths differ"


_CAUSAL = torch.ones(96, 24, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"is_causal": True}, "causal"),
        ({"dropout_p": 0.5}, "dropout"),
        ({"attn_mask": torch.zeros(1, 1, 1, 24)}, "torch.float32 mask"),
        ({"attn_mask": _CAUSAL}, "bool mask that differs per query"),
        ({"scale": -1.0}, "scale is not a number above 0"),
    ],
)
def test_what_it_does_not_compute_is_left_alone(arguments: dict[str, Any], reason: str) -> None:
    inner, backend = dense_backend()
    model = Attention()
    model.attend = functools.partial(F.scaled_dot_product_attention, **arguments)
    out = run(model, backend, tokens(0), context())
    if "dropout_p" not in arguments:
        torch.testing.assert_close(out, model(tokens(0), context()))
    (site,) = backend.sites
    assert str(site.reason).startswith(reason)
    assert not site.dense_kernel
    assert inner.calls(DENSE) == []


def test_gradients_are_left_to_sdpa() -> None:
    inner, backend = dense_backend()
    model = Attention().requires_grad_()
    torch.compile(model, backend=backend)(tokens(0), context()).sum().backward()
    assert model.to_q.weight.grad is not None
    assert inner.calls(DENSE) == []
    assert [site.dense_kernel for site in backend.sites] == [False]


def test_sizes_that_only_the_graph_knows() -> None:
    """A state would need them before the call."""
    inner = Inner("aot_eager")
    model, backend = Attention(), toy_backend(inner, dense="kernel")

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x[x[:, 0] > 0]
        torch._check(x.shape[0] > 1)
        return model(x.unsqueeze(0))

    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        for seed in range(2):
            x = tokens(0, seed=seed)[0]
            torch.testing.assert_close(compiled(x), forward(x), **CLOSE)
    assert [(site.reason, site.dense_kernel) for site in backend.sites] == [
        ("sizes are not known before the call", True)
    ]
    assert len(inner.calls(DENSE)) == 1


def test_no_keys_are_left_to_sdpa() -> None:
    """It gives zeros, the op an error."""
    inner, backend = dense_backend()
    model, nothing = Attention(), context(seq=0)
    torch.testing.assert_close(run(model, backend, tokens(0), nothing), model(tokens(0), nothing))
    assert [(site.reason, site.dense_kernel) for site in backend.sites] == [("no queries or keys", False)]
    assert inner.calls(DENSE) == []


@pytest.mark.parametrize("batch_of_mask", [1, 2])
def test_key_padding_mask_of_the_text(batch_of_mask: int) -> None:
    inner, backend = dense_backend()
    model = Attention()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (20, 24, 3):
        mask = torch.arange(24).expand(batch_of_mask, 1, 1, 24) < torch.tensor([length, 9])[:batch_of_mask].view(
            -1, 1, 1, 1
        )
        args = tokens(0, 2), context(2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args, attn_mask=mask), model(*args, attn_mask=mask), **CLOSE)
    assert len(inner.calls(DENSE)) == len(inner.graphs) == 1


def test_autocast_casts_as_it_does_for_sdpa() -> None:
    inner, backend = dense_backend()
    model = Attention()
    model.attend = lambda q, k, v: F.scaled_dot_product_attention(q.float(), k, v)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = run(model, backend, tokens(0), context()), model(tokens(0), context())
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    assert len(inner.calls(DENSE)) == 1


def test_attention_written_by_hand() -> None:
    inner, backend = dense_backend()
    model = Attention()
    model.attend = lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v
    torch.testing.assert_close(run(model, backend, tokens(0), context()), model(tokens(0), context()), **CLOSE)
    assert len(inner.calls(DENSE)) == 1
    names = {str(node.target) for node in inner.graphs[0].graph.nodes}
    assert not {name for name in names if "softmax" in name or "matmul" in name}


# ---- attention that attends to attention ---------------------------------------------------------------------------


class Agents(Attention):
    """A few agents gather what there is, and all tokens ask them: the first output is the second's v, at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x, None)
        agents = q.unflatten(2, (-1, 4)).mean(3)
        gathered = F.scaled_dot_product_attention(agents, k, v)
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, agents, gathered), k, v)


@pytest.mark.parametrize(
    "select", [lambda site: True, lambda site: False, lambda site: site.ordinal == 1, lambda site: site.ordinal != 1]
)
def test_outputs_that_go_straight_into_attention(select: Callable[[Any], bool]) -> None:
    model, x = Agents(), tokens(0)
    expected = model(x)
    inner, backend = dense_backend(select=select, threshold=-math.inf)
    torch.testing.assert_close(run(model, backend, x), expected, **CLOSE)
    program = make_skip_aware(export(model, (x,)), select=select, dense="kernel", threshold=-math.inf, tile_shape=TILE)
    torch.testing.assert_close(program.module()(x), expected, **CLOSE)
    chosen = [select(site) for site in backend.sites]
    for sites in (backend.sites, program.sites):
        assert [(site.swapped, site.dense_kernel) for site in sites] == [(c, not c) for c in chosen]
    assert len(inner.calls(DENSE)) == 3 - sum(chosen)
    assert len(inner.calls()) == sum(chosen)


def test_our_dense_op_counts_as_attention() -> None:
    """Two streams that have seen each other through it remain two streams."""

    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = Attention()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            of_x, of_y = (t.unflatten(-1, (2, -1)) for t in (x, y))
            x = x + lite_attention.attention(of_x, of_y, of_y).flatten(2)
            y = y + lite_attention.attention(of_y, of_x, of_x).flatten(2)
            return self.last(x, y)

    _, backend = dense_backend()
    run(Streams(), backend, tokens(0), tokens(0, seed=1))
    assert [site.reason for site in backend.sites] == ["cross-attention"]
    model = lite_attention.enable(Streams(), compile=False, num_steps=4)
    model(tokens(0), tokens(0, seed=1))
    with pytest.warns(UserWarning, match="no attention of this model is skip-aware"):
        report = lite_attention.report(model)
    assert [row.reason for row in report.rows] == ["cross-attention"]


# ---- torch.export --------------------------------------------------------------------------------------------------


def _dense_calls(program: torch.export.ExportedProgram) -> int:
    return len(program.graph.find_nodes(op="call_function", target=DENSE))


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True])
def test_export_round_trip(decomposed: bool, tmp_path: Path) -> None:
    model = Toy(2)
    batch, seq, text = Dim("batch", min=1, max=4), Dim("seq", min=2, max=256), Dim("text", min=1, max=64)
    program: SkipAwareProgram = make_skip_aware(
        export(
            model, (tokens(0, 2), context(2)),
            dynamic_shapes={"x": {0: batch, 1: seq}, "context": {0: batch, 1: text}},
        ),
        dense="kernel", threshold=THRESHOLD, tile_shape=TILE,
    )  # fmt: skip
    if decomposed:
        program = program.run_decompositions({})
    assert [(site.reason, site.dense_kernel) for site in program.sites] == [
        (None, False),
        ("cross-attention", True),
    ] * 2
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    for each in (program, loaded):
        assert _dense_calls(each) == 2
        module, reference = each.module(), Reference(model)
        assert len(skip_states(module)) == 2
        for (b, s, t), step in itertools.product([(2, 96, 24), (1, 96, 24), (4, 200, 5)], range(2)):
            x, c = tokens(step, b, s), context(b, t)
            with torch.no_grad():
                torch.testing.assert_close(module(x, c), reference(x, c), **CLOSE)
        assert reference.skipped > 0


def test_attention_as_the_output_of_a_program() -> None:
    class Bare(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, k)

    q, k = torch.randn(1, 2, 96, 16), torch.randn(1, 2, 30, 16)
    program = make_skip_aware(export(Bare(), (q, k)), dense="kernel")
    assert _dense_calls(program) == 1
    assert not skip_states(program.module())
    torch.testing.assert_close(program.module()(q, k), F.scaled_dot_product_attention(q, k, k), **CLOSE)
