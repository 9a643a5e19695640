"""Attention written by hand: product, scale, softmax, product. Swapped only where it is plain attention for sure."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lite_attention
from lite_attention.compile import make_skip_aware
from tests.support.toys import (
    THRESHOLD,
    TILE,
    Attend,
    Attention,
    Reference,
    Toy,
    assert_same_states,
    context,
    tokens,
    toy_backend,
)

SCALE = 0.25  # that of head dim 16
T = torch.Tensor


def _matmul(q: T, k: T, v: T) -> T:
    return (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v


def _scale_first(q: T, k: T, v: T) -> T:
    return torch.matmul(torch.softmax(torch.matmul(SCALE * q, k.transpose(2, 3)), dim=-1), v)


def _half_here_half_there(q: T, k: T, v: T) -> T:
    return F.softmax(torch.mul(0.5, (q * 0.5) @ k.mT), dim=3) @ v


def _division(q: T, k: T, v: T) -> T:
    return nn.Softmax(dim=-1)(torch.div(q @ k.mT, math.sqrt(16))) @ v


def _softmax_in_float(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).float().softmax(-1).to(q.dtype).contiguous() @ v


def _softmax_of_dtype(q: T, k: T, v: T) -> T:
    return F.softmax(q @ k.mT / 4, dim=-1, dtype=torch.float32).type_as(v) @ v


def _idle_dropout(q: T, k: T, v: T) -> T:
    weights = F.dropout((q @ k.mT * SCALE).softmax(-1), 0.0)
    return F.dropout(weights, 0.3, training=False) @ v


def _einsum_bhsd(q: T, k: T, v: T) -> T:
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def _einsum_bshd(q: T, k: T, v: T) -> T:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.softmax(torch.einsum("b i h d, b j h d -> b h i j", q, k) * SCALE, -1)
    return torch.einsum("b h i j, b j h d -> b i h d", weights, v).transpose(1, 2)


def _einsum_heads_first(q: T, k: T, v: T) -> T:
    """Heads where the batch usually is, v on the left, and an output of yet another order."""
    weights = torch.einsum("bhxd,bhyd->hbxy", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhne,hbmn->bmhe", v, weights).transpose(1, 2)


def _einsum_and_matmul(q: T, k: T, v: T) -> T:
    return torch.einsum("bhqd,bhkd->bhqk", q, k).mul(SCALE).softmax(-1) @ v


MATCHED = [
    _matmul, _scale_first, _half_here_half_there, _division, _softmax_in_float, _softmax_of_dtype, _idle_dropout,
    _einsum_bhsd, _einsum_bshd, _einsum_heads_first, _einsum_and_matmul,
]  # fmt: skip


def _name(attend: Attend) -> str:
    return attend.__name__[1:]


@pytest.mark.parametrize("attend", MATCHED, ids=_name)
def test_matched(attend: Attend) -> None:
    model, backend = Attention(), toy_backend("eager")
    model.attend = attend
    reference, dense = Reference(model), copy.deepcopy(model)
    torch.testing.assert_close(dense(tokens(0)), Attention.forward(_plain(model), tokens(0)))  # it is attention
    model.compile(backend=backend)
    for step in range(3):
        with torch.no_grad():
            torch.testing.assert_close(model(tokens(step)), reference(tokens(step)), rtol=1e-4, atol=1e-4)
    if attend is not _einsum_heads_first:  # whose state has batch and heads the other way round
        assert_same_states(backend, model, reference)
    assert reference.skipped > 0
    (site,) = backend.sites
    assert sorted(site.q_shape) == sorted(site.k_shape) == sorted(site.v_shape) == [1, 2, 16, 96]


def _plain(model: Attention) -> Attention:
    plain = copy.deepcopy(model)
    plain.attend = F.scaled_dot_product_attention
    return plain


@pytest.mark.parametrize("attend", MATCHED, ids=_name)
def test_equal_to_the_original_at_minus_infinity(attend: Attend) -> None:
    model, backend = Attention(), toy_backend("eager", threshold=-math.inf)
    model.attend = attend
    dense = copy.deepcopy(model)
    model.compile(backend=backend)
    x = tokens(0, batch=2, seq=70)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    assert backend.sites[0].swapped


@pytest.mark.parametrize("how", ["aot_eager", "export"])
def test_layers_of_a_model(how: str) -> None:
    model = Toy(2)
    model.blocks[0].attn1.attend = _softmax_in_float
    model.blocks[1].attn1.attend = _einsum_bshd
    reference = Reference(model)
    if how == "export":
        program = make_skip_aware(
            torch.export.export(model, (tokens(0), context())), threshold=THRESHOLD, tile_shape=TILE
        )
        sites, run = program.sites, program.module()
        targets = [str(node.target) for node in program.graph.nodes]
        assert not any("softmax" in target or "einsum" in target for target in targets)
    else:
        backend = toy_backend(how)
        sites, run = backend.sites, torch.compile(model, backend=backend, fullgraph=True)
    for step in range(3):
        with torch.no_grad():
            out = run(tokens(step), context())
        torch.testing.assert_close(out, reference(tokens(step), context()), rtol=1e-4, atol=1e-4)
    assert reference.skipped > 0
    assert [site.reason for site in sites] == [None, "cross-attention"] * 2
    assert [site.name for site in sites if site.swapped] == ["blocks.0.attn1", "blocks.1.attn1"]
    if how == "aot_eager":
        assert [row.name for row in lite_attention.report(model).swapped] == ["blocks.0.attn1", "blocks.1.attn1"]


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
def test_dtypes_that_change_on_the_way(out: torch.dtype) -> None:
    """Scores in float32 from bfloat16; v in either. The op computes in the dtype of the output."""

    def attend(q: T, k: T, v: T) -> T:
        weights = (q.float() @ k.float().mT * SCALE).softmax(-1)
        return (weights.to(out) @ v.to(out)).to(q.dtype)

    model, backend = Attention().to(torch.bfloat16), toy_backend("eager", threshold=-math.inf)
    model.attend = attend
    dense = copy.deepcopy(model)
    model.compile(backend=backend)
    x = tokens(0).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=0.02, atol=0.02)
    assert [(site.reason, site.dtype) for site in backend.sites] == [(None, out)]


def test_scores_that_are_needed_elsewhere_are_kept() -> None:
    def attend(q: T, k: T, v: T) -> T:
        scores = q @ k.mT * SCALE
        return scores.softmax(-1) @ v + scores.mean(-1, keepdim=True)

    model, backend = Attention(), toy_backend("eager", threshold=-math.inf)
    model.attend = attend
    dense = copy.deepcopy(model)
    model.compile(backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(0)), dense(tokens(0)), rtol=1e-5, atol=1e-5)
    assert backend.sites[0].swapped


# ---- what only looks like it ---------------------------------------------------------------------------------------


def _additive_mask(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE + torch.zeros(96)).softmax(-1) @ v


def _masked_fill(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).masked_fill(torch.ones(96, 96).triu(1).bool(), -math.inf).softmax(-1) @ v


def _masked_in_place(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * SCALE
    scores.masked_fill_(torch.ones(96, 96).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v


def _masked_through_a_view(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * SCALE
    scores[..., 10:20] = -math.inf
    return scores.softmax(-1) @ v


def _weights_changed_in_place(q: T, k: T, v: T) -> T:
    weights = (q @ k.mT * SCALE).softmax(-1)
    weights[:, 0] *= 0.5
    return weights @ v


def _scores_to_integers(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).to(torch.int32).float().softmax(-1) @ v


def _scores_to_half(q: T, k: T, v: T) -> T:
    return (1e4 * q @ k.mT * SCALE).half().float().softmax(-1).nan_to_num() @ v


def _scores_to_bfloat16(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).bfloat16().softmax(-1).type_as(v) @ v


def _softmax_in_half(q: T, k: T, v: T) -> T:
    return F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.half).to(v.dtype) @ v


def _weights_to_integers(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).softmax(-1).type(torch.int64).type_as(v) @ v


def _weights_to_bool(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).softmax(-1).to(torch.bool).to(v.dtype) @ v


def _weights_to_half(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).softmax(-1).half().to(v) @ v


def _weights_to_fp8(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).softmax(-1).to(torch.float8_e4m3fn).to(v.dtype) @ v


def _scores_clamped(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).clamp(max=2.0).softmax(-1) @ v


def _scores_chosen(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * SCALE
    return scores.where(scores > 0, -9.0).softmax(-1) @ v


def _scores_capped(q: T, k: T, v: T) -> T:
    return (2 * torch.tanh(q @ k.mT * SCALE / 2)).softmax(-1) @ v


def _scores_rounded(q: T, k: T, v: T) -> T:
    return torch.div(q @ k.mT, 4, rounding_mode="floor").softmax(-1) @ v


def _query_used_again(q: T, k: T, v: T) -> T:
    weights = (q @ k.mT * SCALE).softmax(-1)
    q.zero_()
    return weights @ v


def _active_dropout(q: T, k: T, v: T) -> T:
    torch.manual_seed(0)
    return F.dropout((q @ k.mT * SCALE).softmax(-1), 0.5) @ v


def _three_dimensions(q: T, k: T, v: T) -> T:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(torch.zeros(q.shape[0], 96, 96), q, k.mT, beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, 2))


def _over_queries(q: T, k: T, v: T) -> T:
    return (q @ k.mT * SCALE).softmax(-2) @ v


def _weights_needed_elsewhere(q: T, k: T, v: T) -> T:
    weights = (q @ k.mT * SCALE).softmax(-1)
    return weights @ v + weights.amax(-1, keepdim=True)


def _inverse_scores(q: T, k: T, v: T) -> T:
    return (2.0 / (q @ k.mT)).clamp(-9, 9).softmax(-1) @ v


def _learned_temperature(q: T, k: T, v: T) -> T:
    return (q @ k.mT * torch.full((2, 1, 1), SCALE)).softmax(-1) @ v


def _sums_the_batch_away(q: T, k: T, v: T) -> T:
    return torch.einsum("xhid,bhjd->bhij", q, k).softmax(-1) @ v


def _transposed_scores(q: T, k: T, v: T) -> T:
    return torch.einsum("bhqd,bhkd->bhkq", q, k).softmax(-1) @ v


def _weights_on_the_right(q: T, k: T, v: T) -> T:
    return (v.mT @ (k @ q.mT * SCALE).softmax(-1)).mT


@pytest.mark.filterwarnings("ignore:lite_attention")
@pytest.mark.parametrize(
    "attend",
    [
        _additive_mask, _masked_fill, _masked_in_place, _masked_through_a_view, _weights_changed_in_place,
        _scores_to_integers, _scores_to_half, _scores_to_bfloat16, _softmax_in_half, _weights_to_integers,
        _weights_to_bool, _weights_to_half, _weights_to_fp8, _scores_clamped, _scores_chosen, _scores_capped,
        _scores_rounded, _query_used_again, _active_dropout, _three_dimensions, _over_queries,
        _weights_needed_elsewhere, _inverse_scores, _learned_temperature, _sums_the_batch_away, _transposed_scores,
        _weights_on_the_right,
    ],
    ids=_name,
)  # fmt: skip
def test_not_matched(attend: Attend) -> None:
    model, backend = Attention(), toy_backend("eager")
    model.attend = attend
    dense = copy.deepcopy(model)
    model.compile(backend=backend)
    with torch.no_grad():
        for step in range(2):
            torch.testing.assert_close(model(tokens(step, batch=2)), dense(tokens(step, batch=2)))
    assert not any(site.swapped for site in backend.sites)
    assert backend.store.session.states == []


@pytest.mark.filterwarnings("ignore:lite_attention")
def test_a_negative_scale_is_left_alone_with_a_reason() -> None:
    model, backend = Attention(), toy_backend("eager")
    model.attend = lambda q, k, v: (q @ k.mT * -SCALE).softmax(-1) @ v
    dense = copy.deepcopy(model)
    model.compile(backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(0)), dense(tokens(0)))
    assert [site.reason for site in backend.sites] == ["scale is not a number above 0: -0.25"]
