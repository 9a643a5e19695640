"""What attention runs on: one record for each architecture, with its tile sizes, limits and kernel.

A new one is a record in `TARGETS` and, where none of the kernels fits, one that its `kernel` names. The portable kernel
runs on every GPU of NVIDIA from Ampere on. Its tiles were measured on Hopper alone; for other GPUs they follow from
published rates.
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

__all__ = [
    "CPU",
    "DTYPE_NAMES",
    "SM80",
    "SM86",
    "SM87",
    "SM89",
    "SM90",
    "SM90A",
    "SM100",
    "SM110",
    "SM120",
    "TARGETS",
    "Target",
    "target_of",
]

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
        sum_registers: of a thread of the portable kernel, that sums of products may take; 0 = it has another kernel.
        notice: what users of such a GPU should know; said once.
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
    sum_registers: int = 0
    notice: str = ""

    def __repr__(self) -> str:
        return f"<target {self.name}>"

    @property
    def portable(self) -> bool:
        """Whether its kernel is the portable one."""
        return self.sum_registers > 0

    @property
    def converts_fp8(self) -> bool:
        """Whether there are instructions that convert from and to e4m3: from Ada on."""
        return min(self.capabilities, default=(0, 0)) >= (8, 9)

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

# The same tiles for all, so that states fit all, but for 64 channels where matrix products run at full rate: there,
# fewer instructions a score count for more than smaller tiles.
_TILES = {64: (128, 64), 96: (128, 64), 128: (128, 64), 192: (128, 64), 256: (128, 32)}
_TILES_AT_FULL_RATE = _TILES | {64: (128, 96)}
_TILES_OF_8_BITS = {64: (128, 64), 128: (128, 64)}


def _portable(
    name: str,
    title: str,
    *capabilities: tuple[int, int],
    shared_kilobytes: int,
    sum_registers: int = 224,
    full_rate: bool = False,
    fp8: bool = False,
    notice: str = "",
) -> Target:
    """Return a target of the portable kernel."""
    tiles = {"none": _TILES_AT_FULL_RATE if full_rate else _TILES, "int8": _TILES_OF_8_BITS}
    return Target(
        name,
        title,
        tiles=tiles | ({"int8_fp8": _TILES_OF_8_BITS} if fp8 else {}),
        dtypes=(torch.bfloat16, torch.float16),
        capabilities=capabilities,
        kernel=f"{KERNELS}.forward_portable:PortableAttentionForward",
        budget=f"{KERNELS}.budget_portable:Budget",
        registers=65536,
        shared_bytes=shared_kilobytes * 1024,
        sum_registers=sum_registers,
        notice=notice,
    )


_FALLBACK = (
    "attention is exact, but by instructions that reach about a third of the GPU's rate; where fewer than three "
    "quarters of the tiles are skipped, PyTorch's own attention is faster"
)

# Machine code runs on GPUs of its major capability, from its minor one on; Jetson runs none of cards. Before 8.9 there
# are no products in e4m3, and on 9.0 and from 10.0 to 11.0 mma.sync makes them of fp16 ones. Blackwell leaves fewer
# registers for sums.
SM80 = _portable("sm_80", "Ampere", (8, 0), shared_kilobytes=163, full_rate=True)
SM86 = _portable("sm_86", "Ampere", (8, 6), shared_kilobytes=99)
SM87 = _portable("sm_87", "Ampere", (8, 7), shared_kilobytes=163)
SM89 = _portable("sm_89", "Ada", (8, 9), shared_kilobytes=99, fp8=True)
SM90 = _portable("sm_90", "Hopper", (9, 0), shared_kilobytes=227, full_rate=True, fp8=True)
SM100 = _portable("sm_100", "Blackwell", (10, 0), (10, 3), shared_kilobytes=227, sum_registers=216, notice=_FALLBACK)
SM110 = _portable("sm_110", "Blackwell", (11, 0), shared_kilobytes=227, sum_registers=216, notice=_FALLBACK)
SM120 = _portable("sm_120", "Blackwell", (12, 0), (12, 1), shared_kilobytes=99, sum_registers=216, fp8=True)

# That kernels are compiled for. Of those that serve a GPU, the first is its own.
TARGETS = {target.name: target for target in (SM90A, SM80, SM86, SM87, SM89, SM90, SM100, SM110, SM120)}


def target_of(device: torch.device | str, implementation: str | None = None) -> Target:
    """Return the target that attention on a device is for: of its tiles are the states there.

    A GPU that no kernel runs on, or that is not here, has the tiles of the first target.

    Args:
        device: where attention runs.
        implementation: "portable" = the portable kernel, also where the GPU has one of its own.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return CPU
    capability = _capability(device)
    targets = [target for target in TARGETS.values() if target.portable or implementation != "portable"]
    serving = [target for target in targets if capability in target.capabilities]
    return serving[0] if serving else SM90 if implementation == "portable" else SM90A


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
