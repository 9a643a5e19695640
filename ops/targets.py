"""What attention runs on: one record for each architecture, with its tile sizes, limits and kernel.

A new one is a record in `TARGETS` and, where none of the kernels fits, one that its `kernel` names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import cuda

from lite_attention.ops.namespace import KERNELS
from lite_attention.ops.quantization import check_quantization
from lite_attention.ops.torch_internals import constant_when_compiled

__all__ = ["CPU", "DTYPE_NAMES", "SM90A", "TARGETS", "Target", "target_of"]

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # in names of kernels and on the command line

_TILE_SHAPE = (64, 64)  # where a table has none: no kernel is tuned for it


@dataclass(frozen=True, repr=False)
class Target:
    """An architecture.

    Args:
        name: as compilers have it.
        title: in messages to people.
        tiles: (tile_m, tile_n) by quantization and head dim; empty = all run, on one tile.
        dtypes: of queries, keys and values; empty = all.
        capabilities: (major, minor) of the GPUs that run code for it.
        kernel: "module:Class" of the attention kernel, made from a `KernelConfig`.
        budget: "module:Class", what such a config takes of a multiprocessor, and whether it fits.
        registers: of a multiprocessor, 32 bits each.
        shared_bytes: of shared memory that a thread block may have.
    """

    name: str
    title: str
    tiles: Mapping[str, Mapping[int, tuple[int, int]]] = field(default_factory=dict, hash=False)
    dtypes: tuple[torch.dtype, ...] = ()
    capabilities: tuple[tuple[int, int], ...] = ()
    kernel: str = ""
    budget: str = ""
    registers: int = 0
    shared_bytes: int = 0

    def __repr__(self) -> str:
        return f"<target {self.name}>"

    @property
    def symbol(self) -> str:
        """The name in names of functions."""
        return self.name.replace("_", "")

    def head_dims(self, quantization: str = "none") -> tuple[int, ...]:
        """Return the head dims that have a kernel; none where all run."""
        return tuple(self.tiles.get(quantization, ()))

    def quantizes(self, head_dim: int, quantization: str) -> bool:
        """Return whether a head dim runs with a quantization; without one, that is left to the kernel to say.

        Raises:
            ValueError: no such quantization.
        """
        check_quantization(quantization)
        return quantization == "none" or not self.tiles or head_dim in self.tiles.get(quantization, ())

    def tile_shape(self, head_dim: int, quantization: str = "none") -> tuple[int, int]:
        """Return (tile_m, tile_n): query rows and keys of one tile of the skip mask.

        Raises:
            ValueError: no such quantization, or not for this head dim.
        """
        if not self.quantizes(head_dim, quantization):
            head_dims = " and ".join(map(str, self.head_dims(quantization))) or "none"
            raise ValueError(f"quantization: expected head dims {head_dims} for {quantization!r}, got {head_dim}")
        return self.tiles.get(quantization, {}).get(head_dim, _TILE_SHAPE)

    def unsupported_reason(self, head_dim: int, value_dim: int, dtype: torch.dtype) -> str | None:
        """Return why no kernel of this target runs such a call, or None if one does."""
        if dtype not in self.dtypes:
            dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"the {self.title} kernel computes in {dtypes}, got {dtype}"
        if value_dim != head_dim or head_dim not in self.head_dims():
            head_dims = f"head dims {self.head_dims()}, values alike"
            return f"the {self.title} kernel has {head_dims}, got {head_dim} and {value_dim}"
        return None


CPU = Target("cpu", "CPU")

# Tile shapes chosen among those measured: see docs/performance.md.
SM90A = Target(
    "sm_90a",
    "Hopper",
    tiles={
        "none": {64: (192, 128), 96: (192, 112), 128: (192, 80), 192: (128, 96), 256: (128, 64)},
        "int8": {64: (192, 128), 128: (192, 80)},
        "int8_fp8": {64: (192, 128), 128: (128, 192)},
    },
    dtypes=(torch.bfloat16, torch.float16),
    capabilities=((9, 0),),
    kernel=f"{KERNELS}.forward_sm90:SkipAttentionForward",
    budget=f"{KERNELS}.budget_sm90:Budget",
    registers=65536,
    shared_bytes=227 * 1024,
)

TARGETS = {target.name: target for target in (SM90A,)}  # that kernels are compiled for


def target_of(device: torch.device | str) -> Target:
    """Return the target that attention on a device is for: of its tiles are the states there.

    A GPU that no kernel runs on, or that is not here, has the tiles of the first target.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return CPU
    capability = _capability(device)
    return next((target for target in TARGETS.values() if capability in target.capabilities), SM90A)


@constant_when_compiled
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a GPU, None where it is not there."""
    if not cuda.is_available():
        return None
    index = cuda.current_device() if device.index is None else device.index
    return _capability_of(index) if index < cuda.device_count() else None


@functools.cache
def _capability_of(index: int) -> tuple[int, int]:
    return cuda.get_device_capability(index)
