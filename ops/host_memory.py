"""Memory of the host that a GPU reads and writes over the bus, as ordinary CUDA tensors.

So ops, compiled code and CUDA graphs take it as they take any other tensor, and nobody copies.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from lite_attention.ops.torch_internals import is_fake

__all__ = ["placed", "zeros"]


class _Pinned:
    """Bytes of the host, page-locked for a GPU; they live as long as a tensor that was made of them."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        # Not torch's pinned memory, which comes in powers of two.
        self.memory, self.device = torch.zeros(nbytes, dtype=torch.uint8, device="cpu"), device
        address = self.memory.data_ptr()
        with torch.cuda.device(device):
            error = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
        if int(error) != 0:
            raise MemoryError(f"{nbytes} bytes of the host cannot be page-locked: {error}")
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3, "strides": None,
        }  # fmt: skip

    def __del__(self) -> None:
        if not hasattr(self, "__cuda_array_interface__") or sys.is_finalizing():
            return
        torch.cuda.synchronize(self.device)  # a kernel may be at it still
        torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())


def zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros on a CUDA device whose memory is the host's.

    Raises:
        MemoryError: the host has not so much memory that can be page-locked.
        RuntimeError: the device cannot read memory of the host in place.
    """
    if is_fake(torch.empty(0)):  # then shapes alone are asked for
        return torch.zeros(shape, dtype=dtype, device=device)
    pinned = _Pinned(math.prod(shape) * dtype.itemsize, device)
    # The interface knows neither FP8 nor bf16.
    tensor = torch.as_tensor(pinned, device=device)
    if tensor.data_ptr() != pinned.memory.data_ptr():
        raise RuntimeError(f"memory='host': expected a GPU that reads memory of the host in place, got {device}")
    return tensor.view(dtype).view(shape)


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy of a tensor on a CUDA device whose memory is the host's."""
    if is_fake(tensor):
        return tensor.to(device)
    return zeros(tuple(tensor.shape), dtype=tensor.dtype, device=device).copy_(tensor)
