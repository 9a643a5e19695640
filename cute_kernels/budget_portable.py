"""What a portable attention kernel takes of a multiprocessor: warps, stages, registers and shared memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from lite_attention.cute_kernels.config import KernelConfig

__all__ = ["BLOCK_ROWS", "MAX_TILES", "MAX_WORDS", "Budget"]

BLOCK_ROWS = 16  # of one product: what a warp has is so many rows, or twice
MAX_WORDS = 112  # of a row's tiles, a bit each: with more, two CTAs of 48 KB of tiles would not share 100 KB
MAX_TILES = 32 * MAX_WORDS

_RESERVED_BYTES = 1024  # of a multiprocessor, for each CTA
_CALL_BYTES = 108  # what warps tell each other of the call
# Registers besides sums, as compiled kernels have it.
_STAGE_REGISTERS = {1: 8, 2: 4}  # with one stage, addresses of operands stay from tile to tile
_INTEGER_REGISTERS = 5  # of a block of rows, for integer scores
_HELD_REGISTERS = 4  # for what `copies_portable.py` wants to stay


class _Variant(NamedTuple):
    warps: int
    stages: int  # of K and V: one, or two
    ctas: int  # at a time on a multiprocessor


# In order of merit. Warps of 32 rows read half as many operands of a product as those of 16. Two CTAs hide each
# other's waits. With two stages there is one barrier a tile, with one there are two.
_VARIANTS = (_Variant(4, 2, 2), _Variant(4, 1, 2), _Variant(8, 2, 1), _Variant(8, 1, 1))


@dataclass(frozen=True)
class Budget:
    """Of one configuration: the first variant that fits the target."""

    config: KernelConfig

    @property
    def max_tiles(self) -> int:
        """K-tiles that a row may have."""
        return MAX_TILES

    def check(self) -> None:
        """Check that it fits.

        Raises:
            ValueError: it takes more registers or shared memory than there are, or rows do not make whole warps.
        """
        config, least = self.config, BLOCK_ROWS * max(variant.warps for variant in _VARIANTS)
        if config.tile_m != least:
            raise ValueError(f"tile_m: expected {least}, got {config.tile_m}")
        if self._fitting is None:
            smallest = _VARIANTS[-1]
            raise ValueError(
                f"{config.name}: {self._registers(smallest)} of {config.target.sum_registers} registers a thread, "
                f"{self._shared_bytes(smallest)} of {config.target.shared_bytes} bytes of shared memory"
            )

    @functools.cached_property
    def _fitting(self) -> _Variant | None:
        return next((variant for variant in _VARIANTS if self._fits(variant)), None)

    @property
    def _variant(self) -> _Variant:
        return self._fitting or _VARIANTS[-1]

    def _fits(self, variant: _Variant) -> bool:
        # All of a multiprocessor is what one CTA may have, and what is reserved for that.
        there = self.config.target.shared_bytes + _RESERVED_BYTES
        taken = variant.ctas * (self._shared_bytes(variant) + _RESERVED_BYTES)
        return taken <= there and self._registers(variant) <= self.config.target.sum_registers

    def _blocks(self, variant: _Variant) -> int:
        return self.config.tile_m // (BLOCK_ROWS * variant.warps)

    def _registers(self, variant: _Variant) -> int:
        """For scores, output, promoted sums, and the half of the weights that does not take the place of scores."""
        columns = self.config.tile_n + self.value_columns + self.promoted_columns
        of_block = columns // 2 + self.config.tile_n * self.config.value_dtype.itemsize // 16
        of_block += _INTEGER_REGISTERS * (self.config.quantization.scores is not None)
        return self._blocks(variant) * of_block + _STAGE_REGISTERS[variant.stages]

    def _shared_bytes(self, variant: _Variant) -> int:
        config = self.config
        of_score, of_value = config.score_dtype.itemsize, config.value_dtype.itemsize
        tiles = of_score * config.tile_m + variant.stages * config.tile_n * (of_score + of_value)
        words = 2 * MAX_WORDS + self.partial_words + self.references + self.summed
        return config.head_dim * tiles + 4 * words + _CALL_BYTES

    @property
    def partial_words(self) -> int:
        """Of bits of tiles with excluded keys; one that nobody reads where there is no key mask."""
        return MAX_WORDS if self.config.key_mask else 1

    @property
    def references(self) -> int:
        """Words of what rows are held against in masses; one that nobody reads where there is no residual."""
        return 2 * self.config.tile_m if self.config.residual else 1

    @property
    def summed(self) -> int:
        """Words that say of which tiles there are masses; one that nobody reads where there is no residual."""
        return 32 if self.config.residual else 1

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self._variant.warps

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    @property
    def first_consumer(self) -> int:
        """Number of the first thread that computes: all do."""
        return 0

    @property
    def consumers(self) -> int:
        """Threads that compute."""
        return self.threads

    @property
    def stages(self) -> int:
        """Tiles of K and V in shared memory."""
        return self._variant.stages

    @property
    def ctas(self) -> int:
        """CTAs that a multiprocessor has room for, and the compiler leaves registers for."""
        return self._variant.ctas

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows that a warp has."""
        return self._blocks(self._variant)

    @property
    def shared_bytes(self) -> int:
        """Q, the rings of K and V, bits of the tiles to visit, kept, and with excluded keys, and the call."""
        return self._shared_bytes(self._variant)

    @property
    def holds_addresses(self) -> bool:
        """Whether registers are left for addresses; otherwise they are computed for each tile."""
        if self.config.residual and self.config.head_dim > 192:  # compilers for Blackwell spill
            return False
        columns = self.config.tile_n * 3 // 2 + self.value_columns + self.promoted_columns
        spare = -_HELD_REGISTERS if self.config.residual else _HELD_REGISTERS  # masses take some, too
        return self.blocks * columns // 2 <= self.config.target.sum_registers + spare

    @property
    def ones(self) -> int:
        """Columns of ones beside V, whose products are the sums of the weights where sums are short."""
        return 8 if self.config.quantization.short_sums else 0

    @property
    def value_columns(self) -> int:
        """Columns of the product with V."""
        return self.config.head_dim + self.ones

    @property
    def promoted_columns(self) -> int:
        """Columns of the output that have a second sum, in float32."""
        return self.config.head_dim if self.config.quantization.short_sums else 0
