"""Conversions from and to e4m3 by integers, for GPUs without an instruction for them, against PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="the CuTe DSL is not installed")

import cutlass.cute as cute
from cutlass.cute.runtime import from_dlpack

from lite_attention.cute_kernels.ptx import pack_e4m3_by_integers, unpack_e4m3_by_integers

CODES = torch.arange(256, dtype=torch.uint8)


@cute.kernel
def _convert(values: cute.Tensor, packed: cute.Tensor, back: cute.Tensor) -> None:
    at, _, _ = cute.arch.block_idx()
    packed[at] = pack_e4m3_by_integers(*(values[at, i] for i in range(4)))
    for i, value in enumerate(unpack_e4m3_by_integers(packed[at])):
        back[at, i] = value


@cute.jit
def convert(values: cute.Tensor, packed: cute.Tensor, back: cute.Tensor) -> None:
    """Pack values [n, 4] float32 to int32 [n], and unpack them."""
    _convert(values, packed, back).launch(grid=[values.shape[0], 1, 1], block=[1, 1, 1])


def converted(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 of values, and values of these."""
    packed, back = values.new_empty(len(values) // 4, dtype=torch.int32), values.new_empty(len(values) // 4, 4)
    tensors: list[Any] = [from_dlpack(x) for x in (values.view(-1, 4), packed, back)]
    convert(*tensors)
    torch.cuda.synchronize()
    return packed.view(torch.uint8), back.flatten()


def test_all_codes_survive() -> None:
    codes = CODES.cuda().view(torch.float8_e4m3fn)
    packed, back = converted(codes.float())
    torch.testing.assert_close(back, codes.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(packed.view(torch.float8_e4m3fn).float().isnan(), codes.float().isnan())


def test_values_are_rounded_as_by_torch() -> None:
    positive = CODES[:127].view(torch.float8_e4m3fn).float()
    ties = (positive[1:] + positive[:-1]) / 2
    near = torch.cat([positive, ties, ties * (1 + 2**-12), ties * (1 - 2**-12), torch.tensor([460.0, 1e30, torch.inf])])
    values = torch.cat([near, -near, torch.randn(2000) * 10, torch.zeros(2)])
    values = values[: len(values) // 4 * 4].cuda()
    packed, _ = converted(values)
    assert torch.equal(packed, values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
