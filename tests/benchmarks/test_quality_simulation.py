"""What is simulated is attention, and is what its names say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import quality_simulation as simulation
from benchmarks.quality_setup import sample
from benchmarks.quality_shares import DenseShares
from lite_attention.ops import step_plan
from lite_attention.ops.tiles import diagonal_tile
from tests.support.quality import setup

TOKENS, TILE = 50, (16, 12)  # 4 x 5 tiles, the last ones partly there


def qkv(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(2, 3, TOKENS, 8, generator=generator) for _ in range(3))


class Attention(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs)


def of_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask of tiles as one of queries and keys."""
    return mask.repeat_interleave(TILE[0], 2).repeat_interleave(TILE[1], 3)[:, :, :TOKENS, :TOKENS]


def some_tiles() -> torch.Tensor:
    mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("at_a_time", [2**27, 16 * TOKENS])
def test_attends_to_the_kept_tiles(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "_MOST_SCORES", at_a_time)
    q, k, v = qkv()
    mask = some_tiles()
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=of_tokens(mask))
    torch.testing.assert_close(simulation.attend(q, k, v, mask, TILE), wanted)


def test_means_of_single_keys_are_the_keys() -> None:
    q, k, v = qkv()
    wanted = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(simulation.attend(q, k, v, some_tiles(), TILE, parts=12), wanted)


def test_means_stand_for_as_many_keys_as_there_are() -> None:
    """All keys of a tile alike: their mean is worth exactly what they are."""
    q, k, _ = qkv()
    k = k[:, :, :: TILE[1]].repeat_interleave(TILE[1], 2)[:, :, :TOKENS]
    v = qkv(1)[2]
    wanted = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(simulation.attend(q, k, v, some_tiles(), TILE, parts=1), wanted)
    assert not torch.allclose(simulation.attend(q, k, v, some_tiles(), TILE), wanted, atol=1e-2)


@pytest.mark.parametrize("at_a_time", [2**27, 16 * TOKENS])
def test_tiles_are_judged_by_mass_or_maximum(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "_MOST_SCORES", at_a_time)
    q, k, _ = qkv()
    scores = q @ k.transpose(2, 3) * 8**-0.5
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 1)):
        rows, keys = slice(16 * i, 16 * i + 16), slice(12 * j, 12 * j + 12)
        mass = scores[b, h, rows].softmax(-1)[:, keys].sum(-1).mean()
        torch.testing.assert_close(simulation.masses(q, k, TILE)[b, h, i, j], mass)
        below = (scores[b, h, rows, keys] - scores[b, h, rows].amax(-1, keepdim=True)).max()
        torch.testing.assert_close(simulation.maxima(q, k, TILE)[b, h, i, j], below)


def test_the_largest_of_a_video_are_chosen_and_the_diagonal() -> None:
    of_tiles = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    chosen = simulation.largest(of_tiles.clone(), 0.5, TILE, TOKENS)
    assert chosen.flatten(1).sum(1).tolist() == [30, 30]
    diagonal = [diagonal_tile(i, TOKENS, TOKENS, *TILE) for i in range(4)]
    assert chosen[:, :, range(4), diagonal].all()
    of_tiles[:, :, range(4), diagonal] = 2
    assert all(of_tiles[b][chosen[b]].min() > of_tiles[b][~chosen[b]].max() for b in range(2))
    assert simulation.largest(of_tiles, 0.01, TILE, TOKENS).flatten(1).sum(1).tolist() == [12, 12]


def test_a_residual_that_moves_evenly_is_forecast_exactly() -> None:
    start, slope = torch.randn(2, 4), torch.randn(2, 4)
    known = [(time, start + time * slope) for time in (0.9, 0.7)]
    torch.testing.assert_close(simulation.forecast(known, 0.4), start + 0.4 * slope)
    torch.testing.assert_close(simulation.forecast(known[1:], 0.4), known[1][1])


@pytest.mark.parametrize("parts", [0, 1])
def test_full_steps_are_dense_and_sparse_ones_are_not(parts: int) -> None:
    """The same q, k and v in all steps: by the residual all steps are dense, by the means the full ones are."""
    q, k, v = qkv()
    attention, wanted = Attention(), F.scaled_dot_product_attention(q, k, v)
    simulated = simulation.Simulation(simulation.Simulated(0.3, 3, parts=parts), [attention], 8, TILE)
    dense = []
    with simulated:
        for step in range(8):
            out = attention(q, k, v)
            dense.append(torch.allclose(out, wanted, atol=1e-5))
            simulated.after_step(step)
    plan = step_plan(8, full_every=3)
    assert dense == [not parts or bool(kind) for kind in plan]
    least = 0.7 - parts / TILE[1]
    kept = torch.tensor([0.0 if kind else least for kind in plan]).expand(2, 1, 8)
    torch.testing.assert_close(simulated.shares, kept)


@pytest.mark.parametrize("change", ["keys", "mask", "outside"])
def test_other_attention_is_let_be(change: str) -> None:
    (q, k, v), attention, mask = qkv(), Attention(), None
    k, v = (k[:, :, :20], v[:, :, :20]) if change == "keys" else (k, v)
    mask = torch.zeros(TOKENS, TOKENS) if change == "mask" else None
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    simulated = simulation.Simulation(simulation.Simulated(0.3, 3), [attention], 8, TILE)
    with simulated:
        simulated.after_step(1)  # the third step is sparse
        attend = F.scaled_dot_product_attention if change == "outside" else attention
        out = attend(query=q, key=k, value=v, attn_mask=mask)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    assert not attention._forward_hooks


def test_all_tiles_kept_is_dense_attention() -> None:
    of = setup()
    dense = sample(of, [(0, 0)], 6, DenseShares(1, 6).after_step).int()
    kept = simulation.Simulation(simulation.Simulated(1.0, 3, parts=1), [of.model], 6, of.tile, of.new_solver(6).times)
    with kept:
        all_kept = sample(of, [(0, 0)], 6, kept.after_step)
    assert (all_kept.int() - dense).abs().max() <= 1
    assert kept.shares.shape == (1, 1, 6)
