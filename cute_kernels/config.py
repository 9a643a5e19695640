"""What is fixed when a kernel is built; for attention, also its budget of registers and shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lite_attention.ops.quantize import FP8_KEYS
from lite_attention.ops.tiles import check_quantization

__all__ = [
    "KEY_BITS_PAD",
    "KEY_CHUNK",
    "MAX_TILES",
    "MAX_WORDS",
    "PROMOTED_KEYS",
    "VALUE_BLOCK",
    "Config",
    "KernelConfig",
    "Masks",
    "QuantizeConfig",
    "Scales",
    "State",
]

MAX_TILES = 8192  # k-tiles of a row: a bit and a byte of each, for three jobs, lie in shared memory
MAX_WORDS = MAX_TILES // 32
KEY_BITS_PAD = 8  # words of 0 at the end of the bits of the keys: the last tile reads past the last key
KEY_CHUNK = 256  # keys that one thread block adds up for their mean, or whose largest values it finds
PROMOTED_KEYS = 1536  # that FP8 products sum up before the sum goes on in float32
VALUE_BLOCK = 128  # keys whose values one thread block transposes

_REGISTERS_PER_SM = 65536
_SHARED_BYTES = 227 * 1024
_WARPGROUP = 128
# Registers of a consumer thread that hold neither scores, output nor weights: addresses, maxima, sums, pipeline state.
_OTHER_REGISTERS = 28
_CONSUMER_REGISTERS = {2: 240, 3: 160}


@dataclass(frozen=True)
class KernelConfig:
    """One compiled attention kernel. Everything that is not here is read at run time.

    Args:
        dtype: "bf16" or "fp16", of the output, and of what is not quantised.
        head_dim: of queries, keys and values.
        tile_m: query rows of a CTA, 64 for each consumer warpgroup.
        tile_n: keys of a tile.
        skip: read and write the skip state; False is dense attention without state.
        initial_mask: a fresh step starts from an initial mask.
        must_do: some tiles are always visited.
        key_mask: some keys are excluded.
        quantization: "none", "int8" for queries and keys in 8 bits with their scales, or "int8_fp8" for values too.
    """

    dtype: str
    head_dim: int
    tile_m: int
    tile_n: int
    skip: bool = True
    initial_mask: bool = False
    must_do: bool = False
    key_mask: bool = False
    quantization: str = "none"

    def __post_init__(self) -> None:
        check_quantization(self.quantization)
        if self.fp8 and self.tile_n % FP8_KEYS:
            raise ValueError(f"tile_n: expected a multiple of {FP8_KEYS} for {self.quantization!r}, got {self.tile_n}")
        if self.registers_needed > self.consumer_registers or self.shared_bytes > _SHARED_BYTES:
            raise ValueError(
                f"{self}: {self.registers_needed} of {self.consumer_registers} registers a thread, "
                f"{self.shared_bytes} of {_SHARED_BYTES} bytes of shared memory"
            )

    @property
    def int8(self) -> bool:
        """Whether queries and keys are quantised."""
        return self.quantization != "none"

    @property
    def fp8(self) -> bool:
        """Whether values are quantised, and so weights."""
        return self.quantization == "int8_fp8"

    @property
    def value_columns(self) -> int:
        """Columns of the product with V. In FP8 it has eight more, of ones, whose products are sums of weights."""
        return self.head_dim + 8 * self.fp8

    @property
    def groups(self) -> int:
        """Consumer warpgroups."""
        return self.tile_m // 64

    @property
    def consumers(self) -> int:
        """Consumer threads."""
        return _WARPGROUP * self.groups

    @property
    def threads(self) -> int:
        """Threads of a CTA: one producer warpgroup and the consumers."""
        return _WARPGROUP * (1 + self.groups)

    @property
    def consumer_registers(self) -> int:
        """Registers of a consumer thread, after the producer has given up its share."""
        return _CONSUMER_REGISTERS[self.groups]

    @property
    def producer_registers(self) -> int:
        """Registers of a producer thread: what consumers leave of those of the launch, which are multiples of 8."""
        at_launch = _REGISTERS_PER_SM // self.threads // 8 * 8 * self.threads
        return (at_launch - self.consumers * self.consumer_registers) // _WARPGROUP // 8 * 8

    @property
    def registers_needed(self) -> int:
        """Scores and output in 32 bits, weights in 16 or 8, and the rest."""
        weights = self.tile_n // (8 if self.fp8 else 4)
        return self.tile_n // 2 + self.value_columns // 2 + weights + _OTHER_REGISTERS

    @property
    def promoted_sums(self) -> int:
        """Float32 sums in shared memory. FP8 products cut what they add off 13 bits below the largest, so over a long
        row most would be lost: every PROMOTED_KEYS keys the output goes on in these sums.
        """
        return self.tile_m * self.head_dim if self.fp8 else 0

    @property
    def stages(self) -> int:
        """Depth of the rings of K and V tiles: three where shared memory allows it."""
        return 3 if self._shared_bytes(3) <= _SHARED_BYTES else 2

    @property
    def shared_bytes(self) -> int:
        """Q, the rings of K and V, promoted sums, what three jobs visit (bits) and keep (bytes), and padding."""
        return self._shared_bytes(self.stages)

    def _shared_bytes(self, stages: int) -> int:
        walk = (3 + self.key_mask) * 4 * MAX_WORDS + 3 * MAX_TILES
        qk, v = 1 if self.int8 else 2, 1 if self.fp8 else 2  # bytes of an element
        ring = stages * self.tile_n * (qk * self.head_dim + v * self.value_columns)
        return qk * self.head_dim * self.tile_m + ring + 4 * self.promoted_sums + walk + 2 * 1024

    @property
    def name(self) -> str:
        """Name of the exported function."""
        flags = "".join(
            letter for letter, on in (("i", self.initial_mask), ("d", self.must_do), ("k", self.key_mask)) if on
        )
        kind = "skip" if self.skip else "dense"
        parts = [kind, self.dtype, f"d{self.head_dim}", f"{self.tile_m}x{self.tile_n}"]
        parts += [self.quantization] if self.int8 else []
        return "_".join(["lite_attention", *parts, *([flags] if flags else [])])


@dataclass(frozen=True)
class QuantizeConfig:
    """One compiled kernel of those that make queries, keys and values ready for attention in 8 bits.

    Args:
        op: "key_sums", "quantize_query", "quantize_key", "value_max" or "quantize_value".
        dtype: "bf16" or "fp16".
        head_dim: of queries, keys and values.
        rows: that share a scale; otherwise those of one thread block.
        key_mask: some keys are excluded.
    """

    op: str
    dtype: str
    head_dim: int
    rows: int
    key_mask: bool = False

    @property
    def name(self) -> str:
        """Name of the exported function."""
        name = f"lite_attention_{self.op}_{self.dtype}_d{self.head_dim}_{self.rows}"
        return f"{name}_k" if self.key_mask else name


Config = KernelConfig | QuantizeConfig


# Arguments of an attention kernel, in order, that not all have; None = it has no such.


class State(NamedTuple):
    """The skip state, and masks of tiles."""

    skip_mask: Any = None
    control: Any = None
    threshold: Any = None
    initial_mask: Any = None
    must_do: Any = None


class Masks(NamedTuple):
    """Of keys: bits a tile int32 [B, 2, words] (some key allowed; some key excluded), and bits a key, padded."""

    tile_flags: Any = None
    key_bits: Any = None


class Scales(NamedTuple):
    """What quantising gives besides values: scales and norms of queries and keys, LSE shift, scales of FP8 values."""

    q: Any = None
    q_norms: Any = None
    k: Any = None
    k_norms: Any = None
    lse_shift: Any = None
    v: Any = None
