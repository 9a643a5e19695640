"""What an attention kernel takes of a Hopper multiprocessor: roles, registers and shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from lite_attention.cute_kernels.config import KernelConfig

__all__ = ["MAX_TILES", "MAX_WORDS", "Budget"]

MAX_TILES = 8192  # k-tiles of a row: a bit and a byte of each, for three jobs, lie in shared memory
MAX_WORDS = MAX_TILES // 32

_WARPGROUP = 128
# Registers of a consumer thread that hold neither scores, output nor weights: addresses, maxima, sums, pipeline state.
_OTHER_REGISTERS = 28
_CONSUMER_REGISTERS = {2: 240, 3: 160}


@dataclass(frozen=True)
class Budget:
    """Of one configuration: a producer warpgroup, and for each 64 query rows a consumer warpgroup."""

    config: KernelConfig

    @property
    def max_tiles(self) -> int:
        """K-tiles that a row may have."""
        return MAX_TILES

    def check(self) -> None:
        """Check that it fits.

        Raises:
            ValueError: it takes more registers or shared memory than there are.
        """
        config, most = self.config, self.config.target.shared_bytes
        if self.groups not in _CONSUMER_REGISTERS or config.tile_m % 64:
            rows = " or ".join(str(64 * groups) for groups in _CONSUMER_REGISTERS)
            raise ValueError(f"tile_m: expected {rows}, got {config.tile_m}")
        if self.registers_needed > self.consumer_registers or self.shared_bytes > most:
            raise ValueError(
                f"{config.name}: {self.registers_needed} of {self.consumer_registers} registers a thread, "
                f"{self.shared_bytes} of {most} bytes of shared memory"
            )

    @property
    def groups(self) -> int:
        """Consumer warpgroups."""
        return self.config.tile_m // 64

    @property
    def first_consumer(self) -> int:
        """Number of the first consumer thread."""
        return _WARPGROUP

    @property
    def consumers(self) -> int:
        """Consumer threads."""
        return _WARPGROUP * self.groups

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return _WARPGROUP + self.consumers

    @property
    def consumer_registers(self) -> int:
        """Registers of a consumer thread, after the producer has given up its share."""
        return _CONSUMER_REGISTERS[self.groups]

    @property
    def producer_registers(self) -> int:
        """Registers of a producer thread: what consumers leave of those of the launch, which are multiples of 8."""
        at_launch = self.config.target.registers // self.threads // 8 * 8 * self.threads
        return (at_launch - self.consumers * self.consumer_registers) // _WARPGROUP // 8 * 8

    @property
    def registers_needed(self) -> int:
        """Scores and output in 32 bits, weights in as many as they have, and the rest."""
        weights = self.config.tile_n * self.config.value_dtype.itemsize // 8
        return self.config.tile_n // 2 + self.value_columns // 2 + weights + _OTHER_REGISTERS

    @property
    def ones(self) -> int:
        """Columns of ones beside V, whose products are the sums of the weights where sums are short."""
        return 8 if self.config.quantization.short_sums else 0

    @property
    def value_columns(self) -> int:
        """Columns of the product with V."""
        return self.config.head_dim + self.ones

    @property
    def promoted_sums(self) -> int:
        """Float32 sums in shared memory. FP8 products cut what they add off 13 bits below the largest, so over a long
        row most would be lost: every PROMOTED_KEYS keys the output goes on in these sums.
        """
        return self.config.tile_m * self.config.head_dim if self.config.quantization.short_sums else 0

    @property
    def stages(self) -> int:
        """Depth of the rings of K and V tiles: three where shared memory allows it."""
        return 3 if self._shared_bytes(3) <= self.config.target.shared_bytes else 2

    @property
    def shared_bytes(self) -> int:
        """Q, the rings of K and V, promoted sums, what three jobs visit (bits) and keep (bytes; none with a
        residual), and padding."""
        return self._shared_bytes(self.stages)

    @property
    def _job_bytes(self) -> int:
        """Votes of three jobs; with a residual their second tiles, and references of masses, instead."""
        return 3 * 4 * MAX_WORDS + 16 * self.consumers if self.config.residual else 3 * MAX_TILES

    def _shared_bytes(self, stages: int) -> int:
        config = self.config
        tiles = (3 + config.key_mask) * 4 * MAX_WORDS + self._job_bytes
        of_score, of_value = config.score_dtype.itemsize, config.value_dtype.itemsize
        ring = stages * config.tile_n * (of_score * config.head_dim + of_value * self.value_columns)
        return of_score * config.head_dim * config.tile_m + ring + 4 * self.promoted_sums + tiles + 2 * 1024
