"""Attention that the swap cannot reach has a row in the report with the reason, and is as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import lite_attention
from lite_attention.compile import make_skip_aware
from tests.support.diffusers_models import WAN_OF_ONE_LAYER, run, silent_report
from tests.support.toys import TILE, Attention, tokens

HOW = pytest.mark.parametrize("how", [True, False])
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")


_KEPT = torch.arange(96)[None] < 70


class Multihead(Attention):
    """Attention that the swap reaches at once, then torch's module."""

    def __init__(
        self, call: Callable[[nn.Module, torch.Tensor], tuple[torch.Tensor, ...]] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 2, **{"batch_first": True, **options})
        self.call = call or (lambda inner, x: inner(x, x, x, need_weights=False))
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
        x = super().forward(x)
        out, *weights = self.call(self.inner, x)
        return x + out + (0 if not weights or weights[0] is None else 0 * weights[0].sum())


class Encoder(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
        return self.inner(super().forward(x))


class Flex(Attention):
    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
        x = super().forward(x)
        return x + flex_attention(*self.project(x, None)).transpose(1, 2).flatten(2)


WHOLE = "nn.MultiheadAttention computes it as a whole"
RETURNED = "nn.MultiheadAttention returns its weights"
# With what becomes of it compiled, and eagerly.
MODELS: dict[str, tuple[Callable[[], nn.Module], str | None, str | None]] = {
    "multihead": (Multihead, None, None),
    "sequence first": (
        lambda: Multihead(lambda m, x: [m(*[x.transpose(0, 1)] * 3, need_weights=False)[0].mT.mT.transpose(0, 1)],
                          batch_first=False), None, None,
    ),
    "without biases": (lambda: Multihead(bias=False), None, None),
    "other keys": (
        lambda: Multihead(lambda m, x: m(x, x[..., :8], x[..., :24], need_weights=False), kdim=8, vdim=24), None, None,
    ),
    "cross": (
        lambda: Multihead(lambda m, x: m(x, *[torch.ones(1, 96, 32)] * 2, need_weights=False)), "cross-attention",
        "cross-attention",
    ),
    "idle dropout": (lambda: Multihead(dropout=0.5), None, None),
    "weights unused": (lambda: Multihead(lambda m, x: m(x, x, x)[:1]), None, RETURNED),
    "weights used": (lambda: Multihead(lambda m, x: m(x, x, x)), WHOLE, RETURNED),
    "mask": (
        lambda: Multihead(lambda m, x: m(x, x, x, need_weights=False, attn_mask=torch.ones(96, 96).triu(1).bool())),
        WHOLE, "nn.MultiheadAttention with a mask",
    ),
    "padding": (
        lambda: Multihead(lambda m, x: m(x, x, x, need_weights=False, key_padding_mask=~_KEPT)), WHOLE,
        "nn.MultiheadAttention with a float key_padding_mask",
    ),
    "more keys": (lambda: Multihead(add_bias_kv=True), WHOLE, "nn.MultiheadAttention with keys of its own"),
    # A mode that is on keeps the layer from its fast path.
    "encoder layer": (Encoder, "nn.TransformerEncoderLayer computes it as a whole", None),
}  # fmt: skip


@HOW
@pytest.mark.parametrize("name", MODELS)
def test_modules_of_torch(name: str, how: bool) -> None:
    build, compiled, eager = MODELS[name]
    model = build()
    with torch.no_grad():
        dense = model(tokens(0))
        inner = {"inner": "eager"} if how else {}
        lite_attention.enable(model, compile=how, threshold=-math.inf, tile_shape=TILE, num_steps=4, **inner)
        for _ in range(2):
            torch.testing.assert_close(model(tokens(0)), dense, rtol=1e-5, atol=1e-5)
    first, other = silent_report(model).rows
    assert (first.name, first.reason) == ("", None)
    assert other.name == ("inner.self_attn" if name == "encoder layer" and not how else "inner")
    reason = compiled if how else eager
    assert other.reason is None if reason is None else str(other.reason).startswith(reason)


@HOW
def test_multihead_attention_skips(how: bool) -> None:
    model = Multihead()
    model.inner.in_proj_weight.data[:64] *= 4
    inner = {"inner": "eager"} if how else {}
    lite_attention.enable(model, compile=how, threshold=-2.0, tile_shape=TILE, num_steps=4, **inner)
    with torch.no_grad():
        for step in range(3):
            model(5 * tokens(step))
    rows = {row.name: row.sparsity for row in silent_report(model).swapped}
    assert max(rows["inner"]) > 0


def test_flex_attention_in_a_graph_has_a_row() -> None:
    model = Flex()
    with torch.no_grad():
        dense = model(tokens(0))
        lite_attention.enable(model, inner="eager", threshold=-math.inf, tile_shape=TILE, num_steps=4)
        torch.testing.assert_close(model(tokens(0)), dense, rtol=1e-5, atol=1e-5)
    assert [row.reason for row in silent_report(model).rows] == [None, "another attention backend: FlexAttention"]


def test_export_takes_multihead_attention_apart() -> None:
    model = Multihead()
    program = make_skip_aware(torch.export.export(model, (tokens(0),)), threshold=-math.inf, tile_shape=TILE)
    assert [(site.name, site.reason) for site in program.sites] == [("", None), ("inner", None)]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(tokens(0)), model(tokens(0)), rtol=1e-5, atol=1e-5)


def _attend_as_sage_does(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out = torch.bmm(torch.bmm(q, k.mT).mul(q.shape[-1] ** -0.5).softmax(-1), v)
    return out.unflatten(0, (query.shape[0], -1)).transpose(1, 2)


@HOW
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("backend", ["flex", "sage"])
def test_other_backends_of_diffusers_are_named(
    backend: str, when: str, how: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.SAGE, _attend_as_sage_does)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    monkeypatch.setattr("diffusers.models.attention_dispatch._check_attention_backend_requirements", lambda _: None)
    model, inputs = WAN_OF_ONE_LAYER.model(), WAN_OF_ONE_LAYER.inputs(0, 0)
    dense = run(model, inputs)
    inner = {"inner": "eager"} if how else {}
    if when == "before":
        model.set_attention_backend(backend)
    lite_attention.enable(model, compile=how, threshold=-math.inf, tile_shape=TILE, num_steps=4, **inner)
    if when == "after":
        torch.testing.assert_close(run(model, inputs), dense, rtol=1e-5, atol=1e-5)
        model.set_attention_backend(backend)
    with pytest.warns(UserWarning, match=f"(?i)another attention backend: {backend}"):
        torch.testing.assert_close(run(model, inputs), dense, rtol=1e-5, atol=1e-5)
    rows = {row.name: f"{row.reason}, {row.note}" for row in silent_report(model).rows}
    assert rows.keys() == set(WAN_OF_ONE_LAYER.sites)
    assert when == "after" or all("another attention backend" in text for text in rows.values())
    assert "another attention backend" in rows["blocks.0.attn1"]
    model.set_attention_backend("native")
    for _ in range(2):
        torch.testing.assert_close(run(model, inputs), dense, rtol=1e-5, atol=1e-5)
    assert [row.name for row in silent_report(model).swapped if row.note is None] == WAN_OF_ONE_LAYER.swapped


@HOW
def test_native_backends_skip(how: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    model, inputs = WAN_OF_ONE_LAYER.model(), WAN_OF_ONE_LAYER.inputs(0, 0)
    inner = {"inner": "eager"} if how else {}
    lite_attention.enable(model, compile=how, threshold=-4.0, tile_shape=TILE, num_steps=4, **inner)
    model.set_attention_backend("_native_math")
    for _ in range(2):
        run(model, inputs)
    (row,) = silent_report(model).swapped
    assert (row.name, row.note) == ("blocks.0.attn1", None)
    assert max(row.sparsity) > 0
