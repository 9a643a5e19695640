"""Self- and cross-attention are told apart by where q and k come from, in dynamo's graphs and in export's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lite_attention
from lite_attention.compile import Site, make_skip_aware
from tests.support.toys import TILE, Attention, Toy, compile_toy, context, tokens, toy_backend

HOW = pytest.mark.parametrize("how", ["dynamo", "export"])


def sites_of(model: nn.Module, *args: torch.Tensor, how: str) -> list[Site]:
    if how == "export":
        return make_skip_aware(torch.export.export(model, args), tile_shape=TILE).sites
    backend = toy_backend("eager")
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args)
    return backend.sites


def kinds(model: nn.Module, *args: torch.Tensor, how: str) -> list[bool | None]:
    return [site.is_self_attention for site in sites_of(model, *args, how=how)]


@HOW
def test_equal_lengths_by_accident(how: str) -> None:
    sites = sites_of(Toy(2), tokens(0), context(seq=96), how=how)
    assert [site.q_shape == site.k_shape for site in sites] == [True] * 4
    assert [site.reason for site in sites] == [None, "cross-attention"] * 2


class Streams(nn.Module):
    """Two streams that attend to themselves and to each other, as in LTX-2."""

    def __init__(self) -> None:
        super().__init__()
        self.self_a, self.self_b, self.a_to_b, self.b_to_a = (Attention() for _ in range(4))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = a + self.self_a(a)
        b = b + self.self_b(b)
        return a + self.b_to_a(a, b), b + self.a_to_b(b, a)


class Entangled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Streams() for _ in range(3))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            a, b = block(a, b)
        return a + b


@HOW
def test_entangled_streams_stay_two(how: str) -> None:
    assert kinds(Entangled(), tokens(0), tokens(0, seed=1), how=how) == [True, True, False, False] * 3


class WithNumbers(nn.Module):
    """Queries and keys are normalized with an epsilon each, as in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_eps, self.k_eps = 1e-5, 1e-6
        self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 32)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        q, k = F.rms_norm(q, (32,), eps=self.q_eps), F.rms_norm(k, (32,), eps=self.k_eps)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_numbers_are_no_origin() -> None:
    """With dynamic=True dynamo hands floats to the graph as tensors without dimensions."""
    backend = toy_backend("eager")
    with torch.no_grad():
        torch.compile(WithNumbers(), backend=backend, dynamic=True)(torch.randn(1, 96, 64))
    assert {site.reason for site in backend.sites} == {None}


def test_entangled_streams_block_by_block() -> None:
    backend = toy_backend("eager")
    model = compile_toy(Entangled(), backend, "blocks")
    with torch.no_grad():
        model(tokens(0), tokens(0, seed=1))
    assert [site.is_self_attention for site in backend.sites] == [True, True, False, False]


class Joint(nn.Module):
    """Text and picture in one attention, as in Flux; then the picture alone looks at both."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.text = Attention(), Attention()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        qkv = zip(self.text.project(context, None), self.picture.project(x, None), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in qkv)
        joint = F.scaled_dot_product_attention(q, k, v)
        _, picture = joint.split([context.shape[1], x.shape[1]], dim=2)
        return picture + F.scaled_dot_product_attention(self.picture.project(x, None)[0], k, v)


@HOW
def test_joint_attention_is_self_attention(how: str) -> None:
    assert kinds(Joint(), tokens(0), context(), how=how) == [True, False]


class Modulated(Attention):
    """Time and rotary tables, which are inputs, go into q and k alike."""

    def forward(self, x: torch.Tensor, time: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x * (1 + time[:, None]), None)
        return F.scaled_dot_product_attention(q * rotary, k * rotary, v)


@HOW
def test_inputs_that_go_into_both_do_not_count(how: str) -> None:
    assert kinds(Modulated(), tokens(0), torch.randn(1, 32), torch.randn(96, 16), how=how) == [True]


# ---- memory that is written to -------------------------------------------------------------------------------------


def _set_item(x: torch.Tensor) -> torch.Tensor:  # Wan's rotary embedding
    out = torch.zeros(x.shape)
    out[..., 0::2] = x[..., 0::2] * 0.5
    out[..., 1::2] = x[..., 1::2] * 2.0
    return out


def _copy(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape)
    out.copy_(x)
    return out


def _through_a_view(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape)
    out.transpose(1, 2)[..., :8].add_(x.transpose(1, 2)[..., :8])
    return out


def _plus_equals(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape)
    out += x
    return out


def _out(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(x.shape)
    torch.mul(x, 2.0, out=out)
    return out


WRITERS = [_set_item, _copy, _through_a_view, _plus_equals, _out]


class Written(Attention):
    """Attention whose q and k reach it through memory that something else filled."""

    def __init__(self, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.write = write

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
        q, k, v = self.project(x, context)
        return F.scaled_dot_product_attention(self.write(q), self.write(k), v)


@HOW
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__[1:])
def test_writes_in_place_are_traced(how: str, write: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.other = Written(write), Written(write)

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.own(x) + self.other(x, context)

    assert kinds(Both(), tokens(0), context(seq=96), how=how) == [True, False]


@HOW
def test_a_write_after_the_call_does_not_count(how: str) -> None:
    class Reused(Attention):
        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            q, k, v = self.project(x, None)
            memory = torch.zeros(q.shape)
            memory.copy_(q)
            first = F.scaled_dot_product_attention(memory, k, v)
            memory.copy_(self.project(context, None)[0])
            return first + F.scaled_dot_product_attention(memory, k, v)

    assert kinds(Reused(), tokens(0), context(seq=96), how=how) == [True, False]


# ---- leaves and missing evidence -----------------------------------------------------------------------------------


class ByHand(Attention):
    """Attention through a LiteAttention module."""

    def __init__(self) -> None:
        super().__init__()
        self.skipping = lite_attention.LiteAttention().allocate(1, 96, 2, 16)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.project(x, context))
        return self.to_out(self.skipping(q, k, v).flatten(2))


@HOW
@pytest.mark.filterwarnings("ignore:make_skip_aware", "ignore:lite_attention")
def test_our_own_op_is_a_leaf_too(how: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b_to_a, self.a_to_b, self.cross = ByHand(), ByHand(), Attention()

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a, b = a + self.b_to_a(a, b), b + self.a_to_b(b, a)
            return self.cross(a, b)

    assert kinds(Mixed(), tokens(0), tokens(0, seed=1), how=how) == [False]


class Bare(nn.Module):
    """q, k and v come from outside; only what follows has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.to_out = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.to_out(F.scaled_dot_product_attention(q, k, v))


@HOW
@pytest.mark.filterwarnings("ignore:make_skip_aware")
@pytest.mark.parametrize("seq_k", [96, 24])
def test_without_evidence_the_lengths_decide(how: str, seq_k: int) -> None:
    q, k = torch.randn(1, 2, 96, 16), torch.randn(1, 2, seq_k, 16)
    (site,) = sites_of(Bare(), q, k, k.clone(), how=how)
    assert site.is_self_attention is None
    no_evidence = "no evidence of self-attention in the graph, and lengths differ"
    assert site.reason == (None if seq_k == 96 else no_evidence)
