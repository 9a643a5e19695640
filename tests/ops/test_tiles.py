"""Tile geometry, the order of visits, and bits in words."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_attention.ops import SkipState, tile_shape
from lite_attention.ops.bitmask import pack_bits, unpack_bits
from lite_attention.ops.quantization import QUANTIZATIONS
from lite_attention.ops.targets import SM90A
from lite_attention.ops.tiles import ceil_div, diagonal_tile, visit_order


@pytest.mark.parametrize(
    ("q_tile", "order"),
    [(0, [0, 5, 4, 3, 2, 1]), (2, [2, 0, 5, 1, 4, 3]), (5, [5, 0, 4, 3, 2, 1])],
)
def test_visit_order_by_hand(q_tile: int, order: list[int]) -> None:
    assert visit_order(q_tile, 48, 48, 8, 8) == order


@settings(max_examples=200, deadline=None, print_blob=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40), st.data())
def test_visit_order(seq_q: int, seq_k: int, tile_m: int, tile_n: int, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, ceil_div(seq_q, tile_m) - 1))
    order, k_tiles = visit_order(i, seq_q, seq_k, tile_m, tile_n), ceil_div(seq_k, tile_n)
    assert sorted(order) == list(range(k_tiles))
    # The tile of the key at which the middle of the q-tile points.
    middle = (i + Fraction(1, 2)) * tile_m * Fraction(seq_k, seq_q)
    first = min(k_tiles - 1, int(middle / tile_n))
    assert order[0] == first == diagonal_tile(i, seq_q, seq_k, tile_m, tile_n)
    ends = [j for j in dict.fromkeys([0, k_tiles - 1]) if j != first]
    assert order[1 : 1 + len(ends)] == ends
    rest = order[1 + len(ends) :]
    below, above = [j for j in rest if j < first], [j for j in rest if j > first]
    assert rest == sorted(below, reverse=True) + sorted(above, reverse=True)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_tiles_of_other_devices_are_those_of_the_cpu_kernel(quantization: str) -> None:
    for head_dim, device in itertools.product((8, 64, 96, 128), ("cpu", "meta", "mps")):
        assert tile_shape(head_dim, torch.bfloat16, device, quantization) == (64, 64)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("head_dim", SM90A.head_dims("int8_fp8"))
def test_tiles_on_hopper_are_whole_products_of_the_tensor_cores(head_dim: int, quantization: str) -> None:
    tile_m, tile_n = tile_shape(head_dim, torch.bfloat16, "cuda:1", quantization)
    assert tile_m % 64 == 0  # rows of one warpgroup
    assert tile_n % QUANTIZATIONS[quantization].key_multiple == 0  # keys of one product
    assert tile_n <= 256
    for dtype, device in itertools.product((torch.float16, torch.bfloat16), ("cuda", "cuda:0")):
        assert tile_shape(head_dim, dtype, device, quantization) == (tile_m, tile_n)


@pytest.mark.parametrize("quantization", ["int8", "int8_fp8"])
@pytest.mark.parametrize("head_dim", [16, 96, 192, 256])
def test_no_other_head_dims_are_quantized_on_hopper(head_dim: int, quantization: str) -> None:
    head_dims = " and ".join(map(str, SM90A.head_dims(quantization)))
    message = f"quantization: expected head dims {head_dims} for '{quantization}', got {head_dim}"
    with pytest.raises(ValueError, match=message):
        tile_shape(head_dim, torch.bfloat16, "cuda", quantization)


def test_there_is_no_other_quantization() -> None:
    q = torch.zeros(1, 4, 1, 8)
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match="quantization: expected 'none' or 'int8' or 'int8_fp8', got 'fp8'"):
            tile_shape(64, torch.bfloat16, device, "fp8")
    with pytest.raises(ValueError, match="quantization: expected 'none' or 'int8' or 'int8_fp8', got 'fp8'"):
        SkipState.for_inputs(q, q, quantization="fp8")


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 70])
def test_bits_round_trip(n: int) -> None:
    for bits in (torch.rand(3, 2, n) < 0.5, torch.ones(1, n, dtype=torch.bool), torch.eye(n, dtype=torch.bool)):
        words = pack_bits(bits)
        assert words.dtype == torch.int32
        assert words.shape == (*bits.shape[:-1], ceil_div(n, 32))
        assert torch.equal(unpack_bits(words, n), bits)
        assert not unpack_bits(words, 32 * words.shape[-1])[..., n:].any()


def test_lowest_bit_first_and_bit_31_is_the_sign() -> None:
    bits = torch.zeros(64, dtype=torch.bool)
    bits[[0, 5, 31, 32]] = True
    assert pack_bits(bits).tolist() == [1 + 2**5 - 2**31, 1]
