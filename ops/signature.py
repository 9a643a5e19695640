"""What a check may know of a call: shapes, dtypes, devices and strides. Equal signatures pass or fail alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

__all__ = [
    "CallSignature",
    "TensorSignature",
    "call_signature",
    "named_signatures",
    "split_signature",
    "tensor_signatures",
]


class TensorSignature(NamedTuple):
    """All that a check may know of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether it lies in memory as a new tensor would."""
        if 0 in self.shape:
            return True
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        return True


# Signatures of the tensors of a call of an op with a state as plain tuples, which are quick to make, then scale, tile_m
# and tile_n.
CallSignature = tuple[Any, ...]


def tensor_signatures(tensors: tuple[torch.Tensor | None, ...]) -> list[tuple[Any, ...] | None]:
    """Return what `TensorSignature` holds of each, as plain tuples."""
    return [None if t is None else (t.shape, t.dtype, t.device, t.stride()) for t in tensors]


def call_signature(
    tensors: tuple[torch.Tensor | None, ...], scale: float | None, tile_m: int, tile_n: int
) -> CallSignature:
    """Return the signature of a call of the op.

    Args:
        tensors: q, k, v, the state's, must_do and key_mask, in the order of the op's arguments.
        scale: as given to the op, as are the others.
        tile_m: likewise.
        tile_n: likewise.
    """
    return (*tensor_signatures(tensors), scale, tile_m, tile_n)


def split_signature(
    call: CallSignature,
) -> tuple[list[TensorSignature], list[TensorSignature | None], float | None, int, int]:
    """Return the tensors of a call of `skip_attention` that are always there, those that may be None, and the rest.

    The rest are scale, tile_m and tile_n.
    """
    *tensors, scale, tile_m, tile_n = call
    named = [None if t is None else TensorSignature(*t) for t in tensors]
    return [t for t in named[:6] if t is not None], named[6:], scale, tile_m, tile_n


def named_signatures(
    call: CallSignature, names: tuple[str, ...]
) -> tuple[dict[str, TensorSignature | None], float | None, int, int]:
    """Return the signatures of the tensors of a call by the names of the arguments, then scale, tile_m and tile_n."""
    *tensors, scale, tile_m, tile_n = call
    signatures = (None if t is None else TensorSignature(*t) for t in tensors)
    return dict(zip(names, signatures, strict=True)), scale, tile_m, tile_n
