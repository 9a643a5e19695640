"""Which attention the backend swaps, what it says about the rest, and how the settings reach the op."""

from __future__ import annotations

import copy
import functools
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lite_attention
from lite_attention.compile import LiteAttentionBackend, Site
from lite_attention.ops.bitmask import pack_bits
from tests.support.toys import (
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


def run(model: nn.Module, backend: LiteAttentionBackend, *args: Any, steps: int = 2, **kwargs: Any) -> torch.Tensor:
    """Compile a copy of a model, so that what the test holds stays dense, and return its last output."""
    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(steps):
            out = compiled(*args, **kwargs)
    return out


# ---- attention that stays as it is ---------------------------------------------------------------------------------

_CAUSAL = torch.ones(96, 96, dtype=torch.bool).tril()

LEFT_ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "causal": ({"is_causal": True}, "causal"),
    "dropout": ({"dropout_p": 0.5}, "dropout"),
    "float mask": ({"attn_mask": torch.zeros(1, 1, 1, 96)}, "torch.float32 mask, shape (1, 1, 1, 96)"),
    "mask per query": ({"attn_mask": _CAUSAL}, "bool mask that differs per query, shape (96, 96)"),
    "mask per head": ({"attn_mask": torch.ones(1, 2, 1, 96, dtype=torch.bool)}, "bool mask that differs per query"),
    "negative scale": ({"scale": -1.0}, "scale is not a number above 0: -1.0"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_a_reason(name: str, caplog: pytest.LogCaptureFixture) -> None:
    arguments, reason = LEFT_ALONE[name]
    model, backend = Attention(), toy_backend("eager")
    model.attend = functools.partial(F.scaled_dot_product_attention, **arguments)
    caplog.set_level(logging.INFO, "lite_attention")
    with pytest.warns(UserWarning, match="no attention was swapped"):
        out = run(model, backend, tokens(0))
    (site,) = backend.sites
    assert site.reason is not None
    assert site.reason.startswith(reason)
    assert f"left alone: {reason}" in caplog.text
    assert backend.store.session.states == []
    if name != "dropout":
        torch.testing.assert_close(out, model(tokens(0)))


def test_a_broadcast_batch_and_other_ranks_are_left_alone() -> None:
    class Broadcast(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.project(x, None)
            first = F.scaled_dot_product_attention(q, k[:1], v[:1])
            return first + F.scaled_dot_product_attention(q[0], k[0], v[0])

    model, backend = Broadcast(), toy_backend("eager")
    x = tokens(0, batch=2)
    with pytest.warns(UserWarning, match="no attention was swapped"):
        torch.testing.assert_close(run(model, backend, x), model(x))
    assert [site.reason for site in backend.sites] == [
        "batch or heads are broadcast",
        "q, k and v are not all of rank 4",
    ]


def test_sizes_that_only_the_graph_knows_are_left_alone() -> None:
    model, backend = Attention(), toy_backend("eager")

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x[x[:, 0] > 0]
        torch._check(x.shape[0] > 1)
        return model(x.unsqueeze(0))

    x = tokens(0)[0]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        out = torch.compile(forward, backend=backend, fullgraph=True)(x)
    assert [site.reason for site in backend.sites] == ["sizes are not known before the call"]
    torch.testing.assert_close(out, forward(x))


def test_cross_attention_and_short_sequences() -> None:
    model, backend = Toy(1), toy_backend("eager", min_tiles=7)
    with pytest.warns(UserWarning, match="no attention was swapped"):
        run(model, backend, tokens(0), context())
    assert [site.reason for site in backend.sites] == [
        "only 6 k-tile(s), fewer than min_tiles=7",
        "cross-attention",
    ]


@pytest.mark.parametrize("select", [None, lambda site: True])
def test_pooled_keys_are_left_alone_unless_selected(select: Callable[[Site], bool] | None) -> None:
    class Pooled(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x, x.unflatten(1, (-1, 2)).mean(2))

    model, backend = Pooled(), toy_backend("eager", select=select, threshold=-math.inf)
    with nullcontext() if select else pytest.warns(UserWarning, match="no attention was swapped"):
        torch.testing.assert_close(run(model, backend, tokens(0)), model(tokens(0)), rtol=1e-5, atol=1e-5)
    (site,) = backend.sites
    assert site.is_self_attention
    assert site.swapped == (select is not None)
    assert select or "of different number" in str(site.reason)


# ---- attention that is swapped -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_of_mask", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_key_padding_mask_becomes_the_key_mask(batch_of_mask: int, dynamic: bool) -> None:
    inner = Inner()
    model, backend = Attention(), toy_backend(inner)
    reference = Reference(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for step in range(3):
        x = tokens(step, batch=2)
        mask = torch.arange(96).expand(batch_of_mask, 1, 1, 96) < torch.tensor([90 - step, 50])[:batch_of_mask].view(
            -1, 1, 1, 1
        )
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, attn_mask=mask), reference(x, attn_mask=mask))
    assert_same_states(backend, model, reference)
    assert reference.skipped > 0
    (call,) = inner.calls()
    assert isinstance(call.args[8], torch.fx.Node)
    (gm,) = inner.graphs
    names = {str(node.target) for node in gm.graph.nodes}
    assert not {name for name in names if "item" in name and "getitem" not in name}


def test_key_padding_mask_is_exact_at_minus_infinity() -> None:
    model, backend = Attention(), toy_backend("eager", threshold=-math.inf)
    x, mask = tokens(0, batch=2), torch.rand(2, 1, 1, 96, generator=torch.Generator().manual_seed(0)) < 0.7
    torch.testing.assert_close(run(model, backend, x, attn_mask=mask), model(x, attn_mask=mask), rtol=1e-5, atol=1e-5)
    assert backend.sites[0].swapped


def test_grouped_heads() -> None:
    model, backend = Attention(heads=4, kv_heads=2), toy_backend("eager", threshold=-math.inf)
    model.attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=True, scale=0.2)
    torch.testing.assert_close(run(model, backend, tokens(0)), model(tokens(0)), rtol=1e-5, atol=1e-5)
    (site,) = backend.sites
    assert site.swapped
    assert (site.q_shape[2], site.k_shape[2]) == (4, 2)


@pytest.mark.parametrize("norm", [False, True])
def test_autocast_casts_as_it_does_for_sdpa(norm: bool) -> None:
    model, backend = Attention(), toy_backend(threshold=-math.inf)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q.float() if norm else q, k, v)  # as a norm or RoPE in float32 leaves it

    model.attend = attend
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = run(model, backend, tokens(0)), model(tokens(0))
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    assert (backend.sites[0].reason, backend.sites[0].dtype) == (None, torch.bfloat16)


# ---- settings ------------------------------------------------------------------------------------------------------


def test_select_decides_and_sees_the_site() -> None:
    seen: list[Site] = []

    def select(site: Site) -> bool | None:
        seen.append(site)
        if site.name.startswith("blocks.0"):
            return site.name.endswith("attn2")  # the cross-attention, and not the self-attention
        return None

    model, backend = Toy(2), toy_backend("eager", select=select)
    run(model, backend, tokens(0), context())
    assert [site.reason for site in backend.sites] == ["not selected", None, None, "cross-attention"]
    assert [(site.name, site.class_name) for site in seen] == [
        (f"blocks.{i}.{attention}", "Attention") for i in range(2) for attention in ("attn1", "attn2")
    ]
    assert [site.is_self_attention for site in seen] == [True, False] * 2
    assert (seen[1].q_shape, seen[1].k_shape) == ((1, 96, 2, 16), (1, 24, 2, 16))


def test_select_cannot_ask_for_the_impossible() -> None:
    model, backend = Attention(), toy_backend("eager", select=lambda site: True)
    model.attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    with pytest.warns(UserWarning, match="no attention was swapped"):
        run(model, backend, tokens(0))
    assert backend.sites[0].reason == "causal"


@pytest.mark.parametrize("dynamic", [False, True])
def test_initial_mask_gets_real_sizes_and_reaches_the_op(dynamic: bool) -> None:
    seen: list[Site] = []

    def diagonal(site: Site) -> torch.Tensor | None:
        seen.append(site)
        (_, seq_q, _, _), seq_k = site.q_shape, site.k_shape[1]
        tiles = -(-seq_q // TILE[0]), -(-seq_k // TILE[1])
        return ~torch.eye(*tiles, dtype=torch.bool)[None, None] if site.name == "blocks.0.attn1" else None

    model, backend = Toy(2), toy_backend("eager", initial_mask=diagonal, threshold=-math.inf)
    compile_toy(model, backend, dynamic=dynamic)
    sizes = [(2, 96), (3, 64)]
    with torch.no_grad():
        for batch, seq in sizes:
            out = model(tokens(0, batch, seq), context(batch))
    assert [site.q_shape for site in seen if site.name == "blocks.0.attn1"] == [(b, s, 2, 16) for b, s in sizes]
    assert all(type(size) is int for site in seen for size in (*site.q_shape, *site.k_shape, *site.v_shape))

    first, second = (record.last for record in backend.store.records if record.site.swapped)
    assert torch.equal(first.skip_mask[0, 0, 0], pack_bits(~torch.eye(4, dtype=torch.bool)))
    assert not second.skip_mask.any()

    # What the diagonal tiles alone give, by hand.
    expected = Toy(2)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (-1, TILE[0])) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).flatten(2, 3)

    expected.blocks[0].attn1.attend = attend
    torch.testing.assert_close(out, expected(tokens(0, 3, 64), context(3)), rtol=1e-5, atol=1e-5)


def test_implementation_reference_is_another_op() -> None:
    inner = Inner("aot_eager")
    model, backend = Attention(), toy_backend(inner, implementation="reference")
    out = run(model, backend, tokens(0), steps=1)
    torch.testing.assert_close(out, Reference(model)(tokens(0)))
    op = torch.ops.lite_attention.skip_attention_reference.default
    assert len(inner.graphs[0].graph.find_nodes(op="call_function", target=op)) == 1
    assert inner.calls() == []


def test_threshold_table_by_slot_step_and_head() -> None:
    table = torch.tensor([[[-4.0, -1.0]], [[-2.0, -math.inf]]])  # slots, steps, heads
    model, backend = Attention(), toy_backend("eager", threshold=table, slots=2)
    compiled = torch.compile(model, backend=backend)
    for slot, name in enumerate(("cond", "uncond")):
        reference = Reference(model, table[slot : slot + 1])
        for step in range(3):
            with torch.no_grad(), backend.store.session.branch(name):
                torch.testing.assert_close(compiled(tokens(step)), reference(tokens(step)))
        (state,), (expected,) = backend.store.session.states, reference.states.values()
        assert torch.equal(state.kept_tiles()[slot], expected.kept_tiles()[0])
        assert reference.skipped > 0


def test_set_threshold_reaches_all_states_in_place() -> None:
    model, backend = Toy(2), toy_backend("eager")
    run_in_place = compile_toy(model, backend)
    with torch.no_grad():
        run_in_place(tokens(0), context())
    addresses = [state.threshold.data_ptr() for state in backend.store.session.states]
    lite_attention.set_threshold(model, -2.5)
    assert [state.threshold.data_ptr() for state in backend.store.session.states] == addresses
    assert all((state.threshold == -2.5).all() for state in backend.store.session.states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold: expected at most 0"),
        ({"slots": 0}, "slots: expected at least 1, got 0"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"min_tiles": -1}, "min_tiles: expected at least 1, got -1"),
        ({"implementation": "fast"}, "implementation: expected None or 'reference' or 'portable', got 'fast'"),
        ({"dense": "flash"}, "dense: expected 'sdpa' or 'kernel', got 'flash'"),
        ({"use_int8": 1}, "use_int8: expected True or False, got 1"),
        ({"use_int8": True, "use_fp8": None}, "use_fp8: expected True or False, got None"),
        ({"use_fp8": True}, "use_fp8: expected use_int8=True beside it, got use_int8=False"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiteAttentionBackend(**options)


# ---- warnings and the log ------------------------------------------------------------------------------------------


def _warnings_of(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "lite_attention" in str(w.message)]


def test_one_warning_when_nobody_tells_where_a_generation_ends() -> None:
    model, backend = Toy(1), toy_backend("eager", num_steps=None, max_steps=3)
    compile_toy(model, backend)
    seen: list[int] = []

    def call() -> None:
        for step in range(4):
            with torch.no_grad():
                model(tokens(step), context())
            seen.extend(state.step() for state in backend.store.session.states)

    (message,) = _warnings_of(call)
    assert "only every 3 calls" in message
    for remedy in ("lite_attention.enable", "num_steps=", "lite_attention.reset(model)"):
        assert remedy in message
    assert seen == [1, 2, 0, 1]


@pytest.mark.parametrize("told", ["num_steps", "reset", "step"])
def test_no_warning_when_somebody_does(told: str) -> None:
    model, backend = Toy(1), toy_backend("eager", num_steps=5 if told == "num_steps" else None)
    session = backend.store.session

    def call() -> None:
        if told == "reset":
            session.reset()
        if told == "step":
            with session.branch("cond", step=0):
                run(model, backend, tokens(0), context())
        else:
            run(model, backend, tokens(0), context())

    assert _warnings_of(call) == []


def test_a_branch_without_step_tells_nothing() -> None:
    model, backend = Toy(1), toy_backend("eager", num_steps=None)
    with backend.store.session.branch("cond"):
        assert len(_warnings_of(lambda: run(model, backend, tokens(0), context()))) == 1


def test_one_warning_when_nothing_is_swapped() -> None:
    backend = toy_backend("eager")
    causal = Attention()
    causal.attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)
    (message,) = _warnings_of(lambda: run(causal, backend, tokens(0), steps=3))
    assert message == "lite_attention: no attention was swapped (causal); see lite_attention.report(model)"
    (message,) = _warnings_of(lambda: run(nn.Linear(32, 32), toy_backend("eager"), tokens(0), steps=3))
    assert "no scaled_dot_product_attention was seen" in message


def test_no_warning_while_graphs_with_attention_are_still_to_come() -> None:
    class Broken(Toy):
        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0].attn2(x, context)
            torch._dynamo.graph_break()
            return self.blocks[0].attn1(x)

    model, backend = compile_toy(Broken(1), backend := toy_backend("eager")), backend

    def call() -> None:
        with torch.no_grad():
            for step in range(3):
                model(tokens(step), context())

    assert _warnings_of(call) == []
    assert [site.reason for site in backend.sites] == ["cross-attention", None]


def test_the_log_has_one_line_a_site_and_graph(caplog: pytest.LogCaptureFixture) -> None:
    model, backend = Toy(2), toy_backend("eager")
    with caplog.at_level(logging.INFO, "lite_attention"):
        run(model, backend, tokens(0), context(), steps=3)
    lines = [record.getMessage() for record in caplog.records if record.name == "lite_attention"]
    assert lines[:2] == [
        "torch.compile: blocks.0.attn1 (Attention) q (1, 96, 2, 16) k (1, 96, 2, 16): swapped",
        "torch.compile: blocks.0.attn2 (Attention) q (1, 96, 2, 16) k (1, 24, 2, 16): left alone: cross-attention",
    ]
    assert len(lines) == 4


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_report_names_the_layers(how: str) -> None:
    model, backend = Toy(2), toy_backend("eager")
    reference = Reference(model)
    compile_toy(model, backend, how)
    with torch.no_grad():
        model(tokens(0), context())
        reference(tokens(0), context())
    report = lite_attention.report(model)
    assert {row.name: row.reason for row in report.rows} == {
        f"blocks.{i}.{name}": reason
        for i in range(2)
        for name, reason in (("attn1", None), ("attn2", "cross-attention"))
    }
    for row in report.swapped:
        (expected,) = (float(s.sparsity()) for (path, *_), s in reference.states.items() if path == row.name)
        assert row.sparsity[0] == pytest.approx(expected)
        assert f"{expected:.1%}" in str(report)
