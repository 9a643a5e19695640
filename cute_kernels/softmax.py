"""Online softmax of the rows of a warp, with the vote on each tile; how weights are made is a policy's."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32

from lite_attention.cute_kernels.config import DTYPES, KernelConfig
from lite_attention.cute_kernels.fragments import column, element
from lite_attention.cute_kernels.ptx import PACKS, held, max_nan, quad_max

RESCALE_ABOVE = 8.0  # log2 units: weights may grow to 2^8 before the output and the sums are rescaled


class Rows(NamedTuple):
    """State of the two rows of a thread, register tensors of two."""

    row_max: Any  # of the scores so far
    row_shift: Any  # what is subtracted from them, log2 units: at most `rescale_above` below the maximum
    row_sum: Any  # of this thread's weights
    rescale: Any  # what the output is to be scaled by
    offset: Any  # of integer scores: the bits of the weight of a score of 0
    lowest: Any  # of integer scores: what lower ones are taken for, where bits of theirs would be negative
    tile_sum: Any = None  # with the residual: of this thread's weights of the last tile that was summed up


class Keys(NamedTuple):
    """Which keys take part, by number, or by bits of the keys, padded, if there is a key mask."""

    seq_k: Any
    key_bits: Any
    batch: Any


class Votes(NamedTuple):
    """How a job votes."""

    kept: Any  # bytes of tiles in shared memory: 1 = some row keeps it
    score_threshold: Any  # in units of row maxima; NaN where nothing may be skipped
    row_0: Any  # whether a thread's rows are rows of the queries
    row_1: Any


class Slope(NamedTuple):
    """What makes weights of integer scores: what their bits grow by with a step, and whether some may be negative."""

    slope: Any
    clamp: Any


class OnlineSoftmax:
    """What all policies share: maxima, votes, and when to rescale.

    A score times `unit` is in log2 units. The unit of integer scores differs from tile to tile, so their maxima and the
    threshold are in log2 units; those of other scores are not scaled.
    """

    first_weight = 0.0  # log2 of the largest weight of a row when its shift is new
    rescale_above = RESCALE_ABOVE

    def __init__(self, config: KernelConfig) -> None:
        self.columns = config.tile_n // 4  # of one row in one thread
        self.output_columns = config.budget.value_columns // 4
        self.words = self.columns * config.value_dtype.itemsize // 2  # registers of weights
        self.pack = PACKS[config.value_dtype]
        self.dtype = DTYPES[config.dtype]
        self.votes, self.keeps_tile_sums = config.votes, bool(config.residual)

    # What policies decide.

    def excluded(self):
        """The score of an excluded key."""
        return -Float32.inf

    @cute.jit
    def prepare(self, x, unit: Float32, partial: Boolean, first_key: Int32, keys: Keys):
        """Make a tile's scores ready, those of excluded keys the lowest there is, and return their unit."""
        raise NotImplementedError

    @cute.jit
    def row_high(self, x, half: cutlass.Constexpr):
        """Maximum over this thread's columns of one row."""
        raise NotImplementedError

    def in_units_of_max(self, score, unit):
        """A score as `row_max` has it."""
        return score

    def in_log2(self, row_max, unit):
        """A row's maximum in log2 units."""
        raise NotImplementedError

    def too_high(self, above_shift):
        """Whether a maximum so far above the shift wants a new one."""
        return above_shift > self.rescale_above

    def begin_tile(self, rows: Rows):
        """Before the maxima of a tile are looked at."""

    def take_shift(self, rows: Rows, half: int, row_shift):
        """Note the shift of a row from now on."""
        rows.row_shift[half] = row_shift

    @cute.jit
    def weigh(self, x, rows: Rows, highest, unit: Float32, bound: Float32, partial: Boolean) -> Slope:
        """Find what makes weights of the scores, or make them, in place."""
        raise NotImplementedError

    @cute.jit
    def convert(self, x, words, rows: Rows, slope: Slope):
        """Weights to the dtype of values: the order of the accumulator is that of the next operand."""
        raise NotImplementedError

    @cute.jit
    def add_up(self, words, rows: Rows):
        """Add the weights of the tile before to their sums, if that has not been done."""

    # What all share.

    @cute.jit
    def exclude(self, x, first_key: Int32, keys: Keys):
        """Set the scores of excluded keys to the lowest there is."""
        lane = cute.arch.lane_idx()
        excluded = self.excluded()
        if cutlass.const_expr(keys.key_bits is not None):
            word, shift = first_key // 32, Uint32(first_key % 32)
            low = Uint32(keys.key_bits[keys.batch, word])
            for w in cutlass.range_constexpr((self.columns + 7) // 8):
                high = Uint32(keys.key_bits[keys.batch, word + w + 1])
                # 32 keys of the tile, this thread's first column lowest. Two shifts, since one by 32 is undefined.
                bits = ((low >> shift) | ((high << 1) << (Uint32(31) - shift))) >> Uint32((lane % 4) * 2)
                low = high
                for i in cutlass.range_constexpr(8 * w, min(8 * w + 8, self.columns)):
                    if (bits >> Uint32(column(i % 8, 0))) & Uint32(1) == 0:
                        x[element(0, i)] = excluded
                        x[element(1, i)] = excluded
        else:
            for i in cutlass.range_constexpr(self.columns):
                if first_key + column(i, lane) >= keys.seq_k:
                    x[element(0, i)] = excluded
                    x[element(1, i)] = excluded

    @cute.jit
    def step(self, x, rows: Rows, unit: Float32, bound: Float32, partial: Boolean, votes: Votes):
        """Take the scores of a tile into account.

        The common path has no shuffle: only when some thread of the warp sees a new maximum is the row's agreed on.

        Args:
            x: scores; weights in floats, if any, replace them.
            rows: is brought up to date.
            unit: what makes log2 units of scores.
            bound: of the magnitude of integer scores, log2 units.
            partial: some scores are excluded.
            votes: how to vote.

        Returns:
            Whether the output must be rescaled, whether a row of this thread votes to keep the tile, and what makes
            weights of integer scores.
        """
        row_max = rows.row_max
        highest = [self.row_high(x, half) for half in range(2)]
        high_0, high_1 = self.in_units_of_max(highest[0], unit), self.in_units_of_max(highest[1], unit)
        # The vote, negated, so that a NaN keeps.
        keep = Boolean(True)
        if cutlass.const_expr(self.votes):
            low_0 = high_0 - row_max[0] <= votes.score_threshold
            low_1 = high_1 - row_max[1] <= votes.score_threshold
            keep = (votes.row_0 & ~low_0) | (votes.row_1 & ~low_1)
        # Maxima that some thread has found to be too low.
        moved = Boolean(False)
        self.begin_tile(rows)
        if cute.arch.vote_any_sync(~(high_0 <= row_max[0]) | ~(high_1 <= row_max[1])):
            grown = Boolean(False)
            for half in cutlass.range_constexpr(2):
                row_max[half] = max_nan(row_max[half], quad_max(high_0 if half == 0 else high_1))
                in_log2 = self.in_log2(row_max[half], unit)
                over = self.too_high(in_log2 - rows.row_shift[half])
                grown = grown | over
                shift = in_log2 - self.first_weight if over else rows.row_shift[half]
                rows.rescale[half] = cute.math.exp2(rows.row_shift[half] - shift, fastmath=True)
                rows.row_sum[half] = rows.row_sum[half] * rows.rescale[half]
                self.take_shift(rows, half, shift)
            moved = cute.arch.vote_any_sync(grown)
        slope = self.weigh(x, rows, (*highest, high_0, high_1), unit, bound, partial)
        return moved, keep, slope

    @cute.jit
    def rescale_output(self, out, rows: Rows, moved: Boolean):
        """Scale the output where a maximum has grown by much."""
        if moved:
            for half in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(self.output_columns):
                    out[element(half, i)] = out[element(half, i)] * rows.rescale[half]


class FloatSoftmax(OnlineSoftmax):
    """Weights are exponentials of scores in floats, summed up as they are made."""

    @cute.jit
    def prepare(self, x, unit: Float32, partial: Boolean, first_key: Int32, keys: Keys):
        """The unit stays."""
        if partial:
            self.exclude(x, first_key, keys)
        return unit

    @cute.jit
    def row_high(self, x, half: cutlass.Constexpr):
        """NaN survives."""
        a, b = x[element(half, 0)], x[element(half, 1)]  # two independent chains
        for i in cutlass.range_constexpr(2, self.columns, 2):
            a, b = max_nan(a, x[element(half, i)]), max_nan(b, x[element(half, i + 1)])
        return max_nan(a, b)

    def in_log2(self, row_max, unit):
        """Maxima are scores."""
        return row_max * unit

    @cute.jit
    def weigh(self, x, rows: Rows, highest, unit: Float32, bound: Float32, partial: Boolean) -> Slope:
        """Make them, and add them up."""
        for half in cutlass.range_constexpr(2):
            a, b = rows.row_sum[half], Float32(0.0)
            if cutlass.const_expr(self.keeps_tile_sums):
                a = Float32(0.0)
            for i in cutlass.range_constexpr(0, self.columns, 2):
                e, f = element(half, i), element(half, i + 1)
                x[e] = cute.math.exp2(x[e] * unit - rows.row_shift[half], fastmath=True)
                x[f] = cute.math.exp2(x[f] * unit - rows.row_shift[half], fastmath=True)
                a, b = a + x[e], b + x[f]
            if cutlass.const_expr(self.keeps_tile_sums):
                rows.tile_sum[half] = held(a + b)  # the sum would be made twice
                rows.row_sum[half] = rows.row_sum[half] + rows.tile_sum[half]
            else:
                rows.row_sum[half] = a + b
        return Slope(Int32(0), Boolean(False))

    @cute.jit
    def convert(self, x, words, rows: Rows, slope: Slope):
        """Round them."""
        for w in cutlass.range_constexpr(self.words):
            words[w] = self.pack(x[2 * w], x[2 * w + 1])
