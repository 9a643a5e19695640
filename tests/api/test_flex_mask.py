"""Masks of FlexAttention as initial masks, against the dense mask that torch makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import lite_attention
from lite_attention import flex_mask, masks
from lite_attention.ops.site import Site
from tests.support.diffusers_models import silent_report
from tests.support.toys import Toy, context, tokens

DOCUMENTS = torch.arange(150) // 40


def _causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def _near(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q - k).abs() <= 10


def _documents(b: Any, h: Any, q: Any, k: Any) -> Any:
    return DOCUMENTS[q] == DOCUMENTS[k]


def _by_head(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q - k).abs() <= 20 * h


def _none(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q < 0


MODS = {"causal": _causal, "near": _near, "documents": _documents, "by head": _by_head, "none": _none}
SIZES = [(150, 150, (16, 16)), (150, 150, (48, 20)), (96, 130, (32, 8)), (10, 150, (16, 64))]


def _site(seq_q: int, seq_k: int, tile: tuple[int, int] | None, batch: int = 1) -> Site:
    q, k = (batch, seq_q, 3, 8), (batch, seq_k, 3, 8)
    return Site("a", "A", 0, q, k, k, torch.float32, torch.device("cpu"), tile_shape=tile)


def _tiles_without_pairs(dense: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    rows = [
        torch.stack([~part.any(-1).any(-1) for part in row.split(tile[1], -1)], -1) for row in dense.split(tile[0], -2)
    ]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize(("seq_q", "seq_k", "tile"), SIZES)
def test_a_tile_is_skipped_iff_none_of_its_pairs_attends(
    name: str, seq_q: int, seq_k: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = create_mask(MODS[name], 1, 3, seq_q, seq_k, device="cpu")
    want = _tiles_without_pairs(dense, tile)
    for pairs_at_once in (1, 1 << 24):
        monkeypatch.setattr(flex_mask, "_PAIRS_AT_ONCE", pairs_at_once)
        got = masks.from_flex(MODS[name], by_head=True)(_site(seq_q, seq_k, tile))
        assert torch.equal(got, want)
    if name != "by head":
        assert torch.equal(masks.from_flex(MODS[name])(_site(seq_q, seq_k, tile)), want[:, :1])


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize(("seq_q", "seq_k", "tile"), SIZES)
@pytest.mark.parametrize("block", [16, 32])
def test_of_a_block_mask_the_blocks_count(name: str, seq_q: int, seq_k: int, tile: tuple[int, int], block: int) -> None:
    mask = create_block_mask(MODS[name], 2, 3, seq_q, seq_k, device="cpu", BLOCK_SIZE=block)
    of_blocks = mask.to_dense().bool().repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :seq_q, :seq_k]
    got = masks.from_flex(mask)(_site(seq_q, seq_k, tile, batch=2))
    assert torch.equal(got, _tiles_without_pairs(of_blocks, tile))
    dense = create_mask(MODS[name], 2, 3, seq_q, seq_k, device="cpu")
    assert not bool((got & ~_tiles_without_pairs(dense, tile)).any())  # no pair that attends is cut


def test_a_model_starts_from_it() -> None:
    """With nothing voted out, attention is that over the tiles that are left."""

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q // 32 == k // 32  # made of whole tiles

    model, other = Toy(layers=1), Toy(layers=1)
    mask = masks.from_flex(near)
    lite_attention.enable(model, compile=False, threshold=-math.inf, initial_mask=mask, tile_shape=(16, 16))
    block = torch.arange(96) // 32
    plain = torch.nn.functional.scaled_dot_product_attention
    other.blocks[0].attn1.attend = lambda q, k, v: plain(q, k, v, attn_mask=block[:, None] == block)
    with torch.no_grad():
        got, want = model(tokens(0), context()), other(tokens(0), context())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    (row,) = silent_report(model).swapped
    assert row.state is not None
    assert float(row.state.initial_mask.sum()) != 0


def test_refuses() -> None:
    for mask in (3, "causal", torch.ones(4, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="mask: expected a mask_mod or a BlockMask of FlexAttention, got"):
            masks.from_flex(mask)
    block_mask = create_block_mask(_causal, 1, 1, 96, 96, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(
        ValueError, match=r"initial_mask: expected a BlockMask of .* \(1, 3, 150, 150\).*got \(1, 1, 96"
    ):
        masks.from_flex(block_mask)(_site(150, 150, (16, 16)))
    with pytest.raises(ValueError, match="site: expected one with a tile_shape, got none at a"):
        masks.from_flex(_causal)(_site(150, 150, None))
