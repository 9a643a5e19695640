"""FP8 weights meet their values: what a thread packs, and the order of keys from `quantize_value`, as wgmma reads them.

A model of the instruction's documented layouts, in place of a GPU.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

from lite_attention.cute_kernels.fragments import column, element, four_weights
from lite_attention.ops.quantize import FP8_KEYS, quantize_value

ROWS = 16  # of a warp


def accumulator(weights: torch.Tensor, lane: int) -> dict[int, float]:
    """What registers of a lane hold of a product [16, N], as the PTX manual draws D of wgmma."""
    registers = {}
    for half in range(2):
        for i in range(weights.shape[1] // 4):
            registers[element(half, i)] = weights[lane // 4 + 8 * half, column(i, lane)].item()
    return registers


def operand(words: list[list[list[float]]]) -> torch.Tensor:
    """A [16, 32] from four registers of four bytes in each lane, as the PTX manual draws A of wgmma.m64nNk32."""
    a = torch.full((ROWS, FP8_KEYS), torch.nan)
    for lane, registers in enumerate(words):
        for r, register in enumerate(registers):
            for byte, value in enumerate(register):
                a[lane // 4 + r % 2 * 8, lane % 4 * 4 + byte + r // 2 * 16] = value
    return a


@pytest.mark.parametrize("keys", [64, 96, 128, 192])
def test_weights_meet_their_values(keys: int) -> None:
    weights = torch.randint(-8, 9, (ROWS, keys)).float()
    v = torch.randint(-8, 9, (1, keys, 1, 24)).float()
    v[0, 0] = 448  # so that values are v itself
    values, scales = quantize_value(v, None)
    assert (scales == 1).all()
    lanes = [accumulator(weights, lane) for lane in range(32)]
    out = torch.zeros(ROWS, 24)
    for product in range(keys // FP8_KEYS):
        registers = [[[x[e] for e in four_weights(4 * product + r)] for r in range(4)] for x in lanes]
        out += operand(registers) @ values[0, 0, :, product * FP8_KEYS :][:, :FP8_KEYS].float().T
    assert torch.equal(out, weights @ v[0, :, 0])
