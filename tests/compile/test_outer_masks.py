"""Masks that are a product of allowed queries and allowed keys skip; any other that differs per query is left alone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lite_attention
from lite_attention.ops import skip_attention
from tests.support.toys import TILE, tokens

SEQ, BATCH = 96, 2
Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _rows(m: torch.Tensor) -> torch.Tensor:
    return m.view(m.shape[0], 1, 1, -1).repeat(1, 1, m.shape[1], 1)


def _both(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return _rows(k) & _rows(q).transpose(2, 3)


def _written(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    mask = _both(q, k)
    mask[:, :, :, 0] = True
    return mask


def _written_factor(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    keys = _rows(k)
    keys[:, :, 3] = True
    return keys & _rows(q).transpose(2, 3)


def _written_through_a_view(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    mask = _both(q, k)
    mask.view(-1)[5:400].logical_not_()
    return mask


# (allowed queries [B, S], allowed keys [B, S]) -> mask [B, 1, S, S]
OUTER: dict[str, Mask] = {
    "repeated": _both,
    "repeated, cast": lambda q, k: (_rows(k) & _rows(q).transpose(-1, -2)).bool(),
    "queries first": lambda q, k: torch.logical_and(_rows(q).transpose(3, 2), _rows(k)),
    "broadcast": lambda q, k: k[:, None, None, :] & q[:, None, :, None],
    "expanded": lambda q, k: k[:, None, None].expand(-1, -1, SEQ, -1).to(torch.bool) & q[:, None, :, None],
    "expanded both": lambda q, k: (
        k[:, None, None].expand(-1, 1, SEQ, SEQ) & q[:, None, :, None].expand(-1, 1, SEQ, SEQ)
    ),
    "of floats": lambda q, k: _both(q.float().bool(), k.float().bool()),
}
KEYS: dict[str, Mask] = {
    "keys alone": lambda q, k: k[:, None, None].expand(-1, -1, SEQ, -1),
    "keys alone, repeated": lambda q, k: _rows(k),
}
OTHER: dict[str, Mask] = {
    "written": _written,
    "written factor": _written_factor,
    "written through a view": _written_through_a_view,
    "causal too": lambda q, k: _both(q, k) & torch.ones(SEQ, SEQ, dtype=torch.bool).tril(),
    "either": lambda q, k: _rows(k) | _rows(q).transpose(2, 3),
    "not": lambda q, k: ~_both(q, k),
    "exclusive": lambda q, k: _rows(k) ^ _rows(q).transpose(2, 3),
    "three": lambda q, k: _both(q, k) & _rows(k.flip(1)),
    "rolled": lambda q, k: _both(q, k).roll(1, 2),
    "per head": lambda q, k: (_rows(k) & _rows(q).transpose(2, 3)).repeat(1, 2, 1, 1),
    "batch turned": lambda q, k: _rows(k) & _rows(q).transpose(0, 0).flip(2),
    "queries alone": lambda q, k: _rows(q).transpose(2, 3),
}


class Masked(nn.Module):
    """Self-attention of a projection, under a mask that is made in the forward."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32) for _ in range(3))
        self.make = mask
        self.requires_grad_(False)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = (f(x).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return 4 * q, k, v

    def forward(self, x: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.heads(x), attn_mask=self.make(queries, keys))


class Model(nn.Module):
    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.attn = Masked(mask)

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.attn(*args)


def inputs(step: int) -> tuple[torch.Tensor, ...]:
    x = tokens(step).expand(BATCH, -1, -1).contiguous()
    queries, keys = (torch.arange(SEQ) < torch.tensor(lengths).unsqueeze(1) for lengths in ((70, 90), (81, 40)))
    return x, queries, keys


HOW = pytest.mark.parametrize("compile", [True, False])


def enabled(mask: Mask, compile: bool, threshold: float) -> Model:
    inner = {"inner": "eager"} if compile else {}
    return lite_attention.enable(
        Model(mask), compile=compile, num_steps=4, tile_shape=TILE, threshold=threshold, **inner
    )


@HOW
@pytest.mark.parametrize("name", OUTER | KEYS)
def test_skips_as_under_the_mask_of_keys(name: str, compile: bool) -> None:
    mask = (OUTER | KEYS)[name]
    model, exact, dense = enabled(mask, compile, -3.0), enabled(mask, compile, -math.inf), Model(mask)
    state = lite_attention.SkipState(
        batch=BATCH, heads=2, seq_q=SEQ, seq_k=SEQ, tile_m=TILE[0], tile_n=TILE[1], slots=1, threshold=-3.0
    )
    for step in range(4):
        x, queries, keys = inputs(step)
        got, want = model(x, queries, keys), dense(x, queries, keys)
        torch.testing.assert_close(exact(x, queries, keys), want, rtol=0, atol=1e-5)
        q, k, v = (t.transpose(1, 2) for t in dense.attn.heads(x))
        by_hand = skip_attention(q, k, v, state, key_mask=keys).transpose(1, 2)
        if name in OUTER:
            by_hand = by_hand * queries[:, None, :, None]
        torch.testing.assert_close(got, by_hand, rtol=0, atol=1e-5)
    (row,) = lite_attention.report(model, file=io.StringIO()).swapped
    assert row.state is not None
    assert torch.equal(row.state.kept_tiles()[0], state.kept_tiles()[0])
    assert not state.kept_tiles()[0].all()
    assert (got - want).abs().max() > 1e-4


@HOW
@pytest.mark.parametrize("name", OTHER)
@pytest.mark.filterwarnings("ignore:lite_attention")
@pytest.mark.filterwarnings("ignore:no attention of this model")
def test_other_masks_are_left_alone(name: str, compile: bool) -> None:
    model, dense = enabled(OTHER[name], compile, -3.0), Model(OTHER[name])
    for step in range(3):
        torch.testing.assert_close(model(*inputs(step)), dense(*inputs(step)), rtol=0, atol=1e-5)
    (row,) = lite_attention.report(model, file=io.StringIO()).rows
    assert row.reason is not None
    assert row.reason.startswith("bool mask that differs per query")
