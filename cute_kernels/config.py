"""What is fixed when a kernel is built; for attention, also its budget of registers and shared memory."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KEY_BITS_PAD", "KEY_CHUNK", "MAX_TILES", "MAX_WORDS", "Config", "KernelConfig", "QuantizeConfig"]

MAX_TILES = 8192  # k-tiles of a row: a bit and a byte of each, for three jobs, lie in shared memory
MAX_WORDS = MAX_TILES // 32
KEY_BITS_PAD = 8  # words of 0 at the end of the bits of the keys: the last tile reads past the last key
KEY_CHUNK = 256  # keys that one thread block adds up for their mean

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
        dtype: "bf16" or "fp16", of values and output, and of queries and keys that are not quantised.
        head_dim: of queries, keys and values.
        tile_m: query rows of a CTA, 64 for each consumer warpgroup.
        tile_n: keys of a tile.
        skip: read and write the skip state; False is dense attention without state.
        initial_mask: a fresh step starts from an initial mask.
        must_do: some tiles are always visited.
        key_mask: some keys are excluded.
        quantization: "none", or "int8" for queries and keys in 8 bits with their scales.
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
        if self.quantization not in ("none", "int8"):
            raise ValueError(f"quantization: expected 'none' or 'int8', got {self.quantization!r}")
        if self.registers_needed > self.consumer_registers or self.shared_bytes > _SHARED_BYTES:
            raise ValueError(
                f"{self}: {self.registers_needed} of {self.consumer_registers} registers a thread, "
                f"{self.shared_bytes} of {_SHARED_BYTES} bytes of shared memory"
            )

    @property
    def int8(self) -> bool:
        """Whether queries and keys are quantised."""
        return self.quantization == "int8"

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
        """Scores and output in float32, weights in 16 bits, and the rest."""
        return self.tile_n // 2 + self.head_dim // 2 + self.tile_n // 4 + _OTHER_REGISTERS

    @property
    def stages(self) -> int:
        """Depth of the rings of K and V tiles: three where shared memory allows it."""
        return 3 if self._shared_bytes(3) <= _SHARED_BYTES else 2

    @property
    def shared_bytes(self) -> int:
        """Q, the rings of K and V, what three jobs visit (bits) and keep (bytes), barriers and alignment."""
        return self._shared_bytes(self.stages)

    def _shared_bytes(self, stages: int) -> int:
        walk = (3 + self.key_mask) * 4 * MAX_WORDS + 3 * MAX_TILES
        qk, v = 1 if self.int8 else 2, 2  # bytes of an element
        return self.head_dim * (qk * self.tile_m + (qk + v) * stages * self.tile_n) + walk + 2 * 1024

    @property
    def name(self) -> str:
        """Name of the exported function."""
        flags = "".join(
            letter for letter, on in (("i", self.initial_mask), ("d", self.must_do), ("k", self.key_mask)) if on
        )
        kind = "skip" if self.skip else "dense"
        parts = [kind, self.dtype, f"d{self.head_dim}", f"{self.tile_m}x{self.tile_n}"]
        parts += ["int8"] if self.int8 else []
        return "_".join(["lite_attention", *parts, *([flags] if flags else [])])


@dataclass(frozen=True)
class QuantizeConfig:
    """One compiled kernel of those that make queries and keys ready for INT8 attention.

    Args:
        op: "key_sums", "quantize_query" or "quantize_key".
        dtype: "bf16" or "fp16".
        head_dim: of queries and keys.
        rows: that share a scale; for "key_sums", that one thread block adds up.
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
