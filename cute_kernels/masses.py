"""The mass of tiles: how much of the softmax of its rows each has, summed up while a deciding step computes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from lite_attention.cute_kernels.config import KernelConfig, Residual, Scales
from lite_attention.cute_kernels.ptx import add_to_global, quad_sum, to_clamped_uint
from lite_attention.cute_kernels.softmax import Rows
from lite_attention.ops.units import LOG2_E

_ONE = 2.0**18  # a whole row, in the integers that are summed up: their sum does not depend on the order
# What one thread adds at most: 32 lanes of 12 warps stay within 32 bits.
_MOST = 2.0**23
_NO_WEIGHT = 1e30  # as a reference: what is held against it is nothing
_LANES = 32  # of a warp


class QTile(NamedTuple):
    """Where masses go: little of it is in registers, since few steps decide."""

    masses: Any  # of all tiles
    references: Any  # in shared memory: of each thread's rows what shifts are held against, then what sums are worth
    start: Any  # a word in shared memory: where the masses of this q-tile begin
    total: Any  # a register: what the warp has of one of the last tiles, another in each lane
    tiles: Any  # which tile that is: a register, or words of all lanes in shared memory


class Masses:
    """What the two rows of a consumer thread add to the masses of a q-tile."""

    def __init__(self, config: KernelConfig) -> None:
        self.consumers, self.first_thread = config.budget.consumers, config.budget.first_consumer
        self.whole_sums = config.quantization.short_sums  # each thread has its rows' already

    @cute.jit
    def begin(
        self, references, residual: Residual, scales: Scales, slot: Int32, batch: Int32, head: Int32, first_row: Int32,
        seq_q: Int32,
    ):  # fmt: skip
        """Take the LSE of the step before for a reference."""
        for half in cutlass.range_constexpr(2):
            row, reference = first_row + 8 * half, Float32(_NO_WEIGHT)
            if row < seq_q:
                lse = residual.row_lse[slot, 0, batch, head, row]
                if lse > -Float32.inf:
                    if const_expr(scales.lse_shift is not None):
                        lse -= scales.lse_shift[batch, head, row]
                    reference = lse * LOG2_E
            self.put(references, half, reference)
            self.put(references, half + 2, Float32(0.0))

    @cute.jit
    def take_sample(self, references, rows: Rows, first_row: Int32, seq_q: Int32):
        """Take that of the tiles so far."""
        for half in cutlass.range_constexpr(2):
            row_sum = rows.row_sum[half] if const_expr(self.whole_sums) else quad_sum(rows.row_sum[half])
            reference = rows.row_shift[half] + cute.math.log2(row_sum, fastmath=True)
            if (row_sum == 0.0) | (first_row + 8 * half >= seq_q):
                reference = Float32(_NO_WEIGHT)
            self.put(references, half, reference)
            self.put(references, half + 2, Float32(0.0))

    @cute.jit
    def put(self, references, at: cutlass.Constexpr, value: Float32):
        """Nobody else reads it."""
        references[self.place(at)] = value

    def place(self, at: int):
        """Where one of the four that are of this thread is."""
        thread, _, _ = cute.arch.thread_idx()
        return at * self.consumers + thread - self.first_thread

    @cute.jit
    def weigh(self, rows: Rows, references):
        """Find out what sums are worth since shifts have moved, so that no tile takes an exponential for it."""
        for half in cutlass.range_constexpr(2):
            above = rows.row_shift[half] - references[self.place(half)]
            self.put(references, half + 2, cute.math.exp2(above, fastmath=True))

    def of_q_tile(self, masses, references, start, tiles=None) -> QTile:
        """Begin with nothing; tiles: words in shared memory, where no register is left for them."""
        total = cute.make_rmem_tensor(1, Int32)
        total.fill(0)
        if tiles is None:
            tiles = cute.make_rmem_tensor(1, Int32)
            tiles.fill(0)
        return QTile(masses, references, start, total, tiles)

    def word(self):
        """Which of the words that say tiles is this lane's."""
        return 0

    @cute.jit
    def add(self, rows: Rows, q_tile: QTile, tile: Int32, n: Int32):
        """Add the weights of the n-th tile, whose sums `rows.tile_sum` are of the present shift, to its mass."""
        self.add_up(self.mass(rows, q_tile.references, Float32(0.0)), q_tile, tile, n)

    @cute.jit
    def mass(self, rows: Rows, references, mass: Float32):
        """Add to a mass what two rows have."""
        for half in cutlass.range_constexpr(2):
            mass += rows.tile_sum[half] * references[self.place(half + 2)]
        return mass

    @cute.jit
    def add_up(self, mass: Float32, q_tile: QTile, tile: Int32, n: Int32):
        """Add a thread's part of the mass of the n-th tile to those of the warp, of which each lane has one.

        All are written at once: an atomic add by one lane for each tile took 3 % of the step, since the warp diverges.
        """
        total = cute.arch.warp_redux_sync(to_clamped_uint(mass * _ONE, _MOST), kind="add")
        thread, _, _ = cute.arch.thread_idx()
        if thread - self.first_thread < _LANES:
            total += 1  # tells a tile of no mass from one that is not visited
        if cute.arch.lane_idx() == n % _LANES:
            q_tile.total[0], q_tile.tiles[self.word()] = total, tile
        if n % _LANES == _LANES - 1:
            self.write(q_tile)

    @cute.jit
    def write(self, q_tile: QTile):
        """Add what a warp has to the masses of the q-tile."""
        where = q_tile.masses.iterator + (q_tile.start[0] + q_tile.tiles[self.word()])
        add_to_global(where.toint(), q_tile.total[0])
        q_tile.total[0] = Int32(0)
