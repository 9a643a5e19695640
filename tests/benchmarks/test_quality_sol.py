"""Sol-Attn in the quality benchmark: what its kernel is given, and which blocks count as computed."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.quality_sol import BLOCK, Sol, SolAttention, routed, sol_of

TOKENS, HEAD_DIM = 3 * BLOCK + 10, 24


def qkv() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(2, 3, TOKENS, HEAD_DIM, generator=generator) for _ in range(3))


class Attention(nn.Module):
    def forward(self, *args: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(*args)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options of calls of a stand-in for its kernel, which is exact and gives twice the output."""
    calls: list[dict[str, Any]] = []

    def sol_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        assert q.shape == k.shape == v.shape == (2, TOKENS, 3, 128)
        assert all(x.is_contiguous() for x in (q, k, v))
        calls.append(options)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return 2 * F.scaled_dot_product_attention(q, k, v, scale=options["scale"]).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "comfy_kitchen", types.SimpleNamespace(sol_attn=sol_attn))
    return calls


def test_it_attends_once_the_dense_steps_are_done(given: list[dict[str, Any]]) -> None:
    inputs, model = qkv(), Attention()
    dense = F.scaled_dot_product_attention(*inputs)
    mode = SolAttention(Sol(0.5, 1, tail=False), [model], 2)
    with mode:
        first = model(*inputs)
        mode.after_step(0)
        second = model(*inputs)
        outside = F.scaled_dot_product_attention(*inputs)
    assert given == [{"tau": 0.5, "scale": HEAD_DIM**-0.5, "tail": False}]
    torch.testing.assert_close(first, dense)
    torch.testing.assert_close(outside, dense)
    torch.testing.assert_close(second, 2 * dense)
    skipped = 1 - routed(*inputs[:2], 0.5).float().mean((1, 2, 3))
    torch.testing.assert_close(mode.shares, torch.stack([torch.zeros(2), skipped], 1).unsqueeze(1))


def test_means_count_as_a_key_of_their_block(given: list[dict[str, Any]]) -> None:
    inputs, model = qkv(), Attention()
    mode = SolAttention(Sol(math.inf), [model], 1)
    with mode:
        model(*inputs)
    near = 1 - 10 / 16  # of 4 x 4 blocks: those on the diagonal and beside it are exact
    torch.testing.assert_close(mode.shares, torch.full((2, 1, 1), near * (1 - 1 / 64)))


def test_which_blocks_are_exact() -> None:
    """By the rule in words, for one block after the other."""
    q, k, _ = qkv()
    tau = 0.4
    got = routed(q, k, tau)
    blocks = [slice(i * BLOCK, (i + 1) * BLOCK) for i in range(4)]
    for b in range(2):
        for h in range(3):
            mean_keys = torch.stack([k[b, h, block].mean(0) for block in blocks])
            centered = mean_keys - mean_keys.mean(0)
            for i, block in enumerate(blocks):
                query = q[b, h, block].mean(0) / math.log(2) / math.sqrt(HEAD_DIM)
                deviation = math.sqrt((query**2 * centered.square().mean(0)).sum() + 1e-6)
                for j in range(4):
                    exact = abs(i - j) <= 1 or bool(query @ centered[j] > tau * deviation)
                    assert got[b, h, i, j] == exact
    assert 0.4 < got.float().mean() < 0.9  # both kinds


def test_names() -> None:
    assert sol_of("residual:0.2,3") is None
    assert sol_of("sol:1.3") == Sol(1.3)
    assert sol_of("sol:1,4,no-tail") == Sol(1.0, 4, tail=False)
    for name in ("sol:", "sol:1,2,3", "sol:1,tail", "sol:x"):
        with pytest.raises(ValueError, match=r"standard deviations|could not convert"):
            sol_of(name)
