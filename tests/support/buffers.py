"""The buffers of a state or module, before and after."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["assert_buffers", "buffers_of", "bytes_of"]


def buffers_of(state: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies, by name."""
    return {name: buffer.clone() for name, buffer in state.named_buffers()}


def assert_buffers(state: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Hold buffers against copies of before, to the bit."""
    assert {name for name, _ in state.named_buffers()} == set(buffers)
    for name, buffer in state.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert buffer.is_contiguous()
        assert torch.equal(bytes_of(buffer), bytes_of(buffers[name])), name


def bytes_of(buffer: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a buffer, which compare where NaN or FP8 do not."""
    return buffer.view(torch.uint8) if buffer.dim() else buffer
