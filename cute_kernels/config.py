"""Tile configuration and resource budget of the Hopper kernel, derived from the head dim."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KEY_BITS_PAD", "MAX_TILES", "MAX_WORDS", "KernelConfig"]

MAX_TILES = 8192  # k-tiles of a row: a bit and a byte of each, for three jobs, lie in shared memory
MAX_WORDS = MAX_TILES // 32
KEY_BITS_PAD = 8  # words of 0 at the end of the bits of the keys: the last tile reads past the last key

_REGISTERS_PER_SM = 65536
_SHARED_BYTES = 227 * 1024
_WARPGROUP = 128
# Registers of a consumer thread that hold neither scores, output nor weights: addresses, maxima, sums, pipeline state.
_OTHER_REGISTERS = 28
_CONSUMER_REGISTERS = {2: 240, 3: 160}


@dataclass(frozen=True)
class KernelConfig:
    """One compiled kernel: what is fixed when it is built. Everything else is read at run time.

    Args:
        dtype: "bf16" or "fp16".
        head_dim: of queries, keys and values.
        tile_m: query rows of a CTA, 64 for each consumer warpgroup.
        tile_n: keys of a tile.
        skip: read and write the skip state; False is dense attention without state.
        initial_mask: a fresh step starts from an initial mask.
        must_do: some tiles are always visited.
        key_mask: some keys are excluded.
    """

    dtype: str
    head_dim: int
    tile_m: int
    tile_n: int
    skip: bool = True
    initial_mask: bool = False
    must_do: bool = False
    key_mask: bool = False

    def __post_init__(self) -> None:
        if self.registers_needed > self.consumer_registers or self.shared_bytes > _SHARED_BYTES:
            raise ValueError(
                f"{self}: {self.registers_needed} of {self.consumer_registers} registers a thread, "
                f"{self.shared_bytes} of {_SHARED_BYTES} bytes of shared memory"
            )

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
        return 2 * self.head_dim * (self.tile_m + 2 * stages * self.tile_n) + walk + 2 * 1024

    @property
    def name(self) -> str:
        """Name of the exported function."""
        flags = "".join(
            letter for letter, on in (("i", self.initial_mask), ("d", self.must_do), ("k", self.key_mask)) if on
        )
        kind = "skip" if self.skip else "dense"
        return f"lite_attention_{kind}_{self.dtype}_d{self.head_dim}_{self.tile_m}x{self.tile_n}" + (
            f"_{flags}" if flags else ""
        )
